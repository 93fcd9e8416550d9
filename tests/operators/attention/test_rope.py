"""RoPE, with and without norms of heads before it: kernels against autograd in float64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hyclora.operators.attention.rope import HeadNorm, rope, rope_bwd
from tests.helpers.kernel_checks import DTYPES, assert_as_good_as_torch, rand


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, n_heads, batch", [(2, 1, 1), (10, 3, 2), (64, 5, 2)])
def test_rope_and_its_gradient(kernels, head_dim, n_heads, batch, dtype):
    """rope equals HF's formula, and the inverse rotation is its gradient; cos and sin shared by the batch or not."""
    x = rand(batch, n_heads, 11, head_dim, dtype=dtype).transpose(1, 2)
    dy = rand(batch, 11, n_heads, head_dim, dtype=dtype, seed=1)
    angle = rand(batch, 11, head_dim // 2, seed=2) * 3
    cos, sin = (torch.cat((f(angle), f(angle)), dim=-1).to(dtype) for f in (torch.cos, torch.sin))

    def stock(kind):
        xs = x.detach().to(kind, copy=True).requires_grad_()
        y, _ = apply_rotary_pos_emb(xs, xs, cos.to(kind), sin.to(kind), unsqueeze_dim=2)
        y.backward(dy.to(kind))
        return y.detach(), xs.grad

    ours = rope(x, cos, sin), rope(dy, cos, sin, inverse=True)
    for mine, theirs, exact in zip(ours, stock(dtype), stock(torch.float64), strict=True):
        assert_as_good_as_torch(mine, theirs, exact)
    assert torch.equal(rope(x[:1], cos[:1], sin[:1]), rope(x, cos[:1], sin[:1])[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim, batch", [(1, 1, 2, 1), (6, 2, 10, 2), (5, 5, 64, 2)])
def test_rope_bwd_is_the_inverse_rotation_side_by_side(kernels, heads, kv_heads, head_dim, batch, dtype):
    """q and k turned back, v as it is, whatever layout attention's backward leaves them in."""
    dq, dk, dv = (
        rand(batch, n, 7, head_dim, dtype=dtype, seed=i).transpose(1, 2)
        for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    cos, sin = (rand(1, 7, head_dim, dtype=dtype, seed=i) for i in (3, 4))
    rows = [t.reshape(batch * 7, -1) for t in (rope(dq, cos, sin, inverse=True), rope(dk, cos, sin, inverse=True), dv)]
    assert torch.equal(rope_bwd(dq, dk, dv, cos, sin), torch.cat(rows, dim=1))


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "no rotation"])
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
def test_rope_bwd_where_the_gradients_are(kernels, rotated, norms):
    """dq, dk, dv side by side in rows with room for more, which is left as it is."""
    rows, widths = rand(14, 40 * 9 + 5), [40 * 5, 40 * 2, 40 * 2]
    parts = rows[:, : 40 * 9].split(widths, dim=1)
    heads = [part.view(2, 7, -1, 40) for part in parts]
    angles = [rand(1, 7, 40, seed=i) for i in (3, 4)] if rotated else [None, None]
    normed = [HeadNorm(rand(40, seed=i), 1e-6, rand(14, w, seed=i)) for i, w in zip((5, 6), widths, strict=False)]
    apart = rope_bwd(*(t.clone() for t in heads), *angles, norms=normed if norms else ())
    room = rows[:, 40 * 9 :].clone()
    assert rope_bwd(*heads, *angles, rows, normed if norms else ()) is rows
    assert torch.equal(rows, torch.cat([apart, room], dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["fp32 weights", "weights like x"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, batch", [(1, 1, 2, 1), (6, 2, 10, 2), (5, 5, 64, 2)])
def test_norms_of_heads(kernels, heads, kv_heads, head_dim, batch, weights, dtype):
    """q and k beside each other in wider rows, each with a weight and an eps of its own."""
    n, eps = (heads, kv_heads), (1e-6, 1e-1)
    rows = rand(batch * 7, (heads + 2 * kv_heads) * head_dim + 3, dtype=dtype)
    q, k, _, _ = rows.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, 3], dim=1)
    weight = [1 + rand(head_dim, dtype=weights or dtype, seed=i, scale=0.3) for i in (1, 2)]
    dq, dk, dv = (rand(batch, i, 7, head_dim, dtype=dtype, seed=i).transpose(1, 2) for i in (heads, kv_heads, kv_heads))
    cos, sin = (rand(1, 7, head_dim // 2, dtype=dtype, seed=i).repeat(1, 1, 2) for i in (3, 4))

    def stock(kind):
        """As HF computes it: the mean of squares in fp32 at least, x_hat rounded, then the weight."""
        found = []
        for x, w, e, d in zip((q, k), weight, eps, (dq, dk), strict=True):
            x = x.detach().to(kind, copy=True).requires_grad_()
            exact = x.view(batch, 7, -1, head_dim).to(torch.promote_types(kind, torch.float32))
            x_hat = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + e)
            normalized = w.to(torch.promote_types(kind, w.dtype)) * x_hat.to(kind)
            y, _ = apply_rotary_pos_emb(normalized, normalized, cos.to(kind), sin.to(kind), unsqueeze_dim=2)
            y.backward(d.to(y.dtype))
            found += [y.detach().to(kind), x.grad]
        return found

    norms = [HeadNorm(w, e, x) for w, e, x in zip(weight, eps, (q, k), strict=True)]
    rotated = [rope(norm.x.view(batch, 7, i, head_dim), cos, sin, norm=norm) for norm, i in zip(norms, n, strict=True)]
    dy = rope_bwd(dq, dk, dv, cos, sin, norms=norms)
    grads = dy.split([x.shape[1] for x in (q, k, k)], dim=1)
    ours = [rotated[0], grads[0], rotated[1], grads[1]]
    for mine, theirs, exact in zip(ours, stock(dtype), stock(torch.float64), strict=True):
        assert_as_good_as_torch(mine, theirs, exact)
    assert torch.equal(grads[2], dv.reshape(batch * 7, -1))
