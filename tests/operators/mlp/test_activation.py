"""SiLU-Hadamard product, softmax backward, RoPE: kernels against autograd in float64."""

import pytest
import torch

from hyclora.operators.attention.rope import rope, rope_bwd
from hyclora.operators.attention.softmax import softmax_bwd
from hyclora.operators.mlp.activation import silu_mul_bwd, silu_mul_fwd
from tests.helpers.kernel_checks import DTYPES, assert_as_good_as_torch, rand, strided

SHAPES = [(1, 1), (3, 37), (9, 515)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(kernels, shape, dtype):
    gate, up, dhidden = (rand(*shape, dtype=dtype, seed=i, scale=2.0) for i in range(3))

    def truth(kind):
        g, u = (t.detach().to(kind, copy=True).requires_grad_() for t in (gate, up))
        hidden = torch.nn.functional.silu(g) * u
        hidden.backward(dhidden.to(kind))
        return g.grad, u.grad, hidden.detach()

    dy, hidden = silu_mul_bwd(strided(dhidden), strided(gate), strided(up))
    ours = *dy.chunk(2, dim=1), hidden
    assert torch.equal(silu_mul_fwd(strided(gate), strided(up)), ours[2])
    for mine, theirs, exact in zip(ours, truth(dtype), truth(torch.float64), strict=True):
        assert_as_good_as_torch(mine, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 2, 3, 1030)], ids=str)
def test_softmax_bwd(kernels, shape, dtype):
    prob = torch.softmax(rand(*shape) * 3, dim=-1).to(dtype)
    dprob = rand(*shape, dtype=dtype, seed=1)
    p64, d64 = prob.double(), dprob.double()
    exact = p64 * (d64 - (p64 * d64).sum(-1, keepdim=True))
    half = prob * (dprob - (prob * dprob).sum(-1, keepdim=True))
    assert_as_good_as_torch(softmax_bwd(dprob.transpose(0, 1).contiguous().transpose(0, 1), prob), half, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim, n_heads, batch", [(2, 1, 1), (10, 3, 2), (64, 5, 2)])
def test_rope_and_its_gradient(kernels, head_dim, n_heads, batch, dtype):
    """rope equals HF's formula, and the inverse rotation is its gradient; cos and sin shared by the batch or not."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

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
