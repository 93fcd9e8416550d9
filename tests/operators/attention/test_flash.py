"""Flash attention of runs, windows and grouped queries: against a dense mask, and without any tensor of its size."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyclora.operators.attention import flash
from hyclora.operators.attention.flash import flash_attention
from tests.helpers.kernel_checks import DEVICE

BOUNDS = {
    "rows": [[0, 40, 80], [1, 1, 0]],
    "runs": [[0, 9, 10, 40, 73, 80], [1, 1, 1, 1, 1, 0]],
    "padding in front": [[0, 13, 40, 80], [0, 1, 1, 0]],
}


def bounds_of(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)[None, None]


def heads(batch=2, seq_len=40, n_heads=6, kv_heads=2, head_dim=16, dtype=torch.float32):
    """q, k, v with gradients and do, [B, S, H, D]; q, k, v lie side by side, as projections give them."""
    generator = torch.Generator().manual_seed(0)
    n = n_heads + 2 * kv_heads
    y = torch.randn(batch, seq_len, n * head_dim, generator=generator).to(DEVICE, dtype)
    do = torch.randn(batch, seq_len, n_heads, head_dim, generator=generator).to(DEVICE, dtype)
    y = y.unflatten(-1, (n, head_dim)).split([n_heads, kv_heads, kv_heads], dim=2)
    return [t.detach().requires_grad_() for t in y], do


def seen(bounds, window, batch, seq_len, causal=True) -> torch.Tensor:
    """[B, S, S]: the dense mask that bounds and window stand for."""
    starts, seeing = bounds[0, 0].tolist()
    token = torch.arange(batch * seq_len)
    run = torch.bucketize(token, torch.tensor(starts[1:-1]), right=True)
    age = token[:, None] - token
    mask = (run[:, None] == run) & (age >= 0 if causal else True) & torch.tensor(seeing).bool()[run]
    if window is not None:
        mask &= age < window
    return torch.stack([mask[i : i + seq_len, i : i + seq_len] for i in range(0, batch * seq_len, seq_len)]).to(DEVICE)


def dense(q, k, v, mask, scaling):
    """The truth in fp64, a row that sees nothing is 0."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 2), v.double().repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scaling
    prob = torch.softmax(scores.masked_fill(~mask[:, None], -1e30), -1) * mask[:, None]
    return torch.einsum("bhij,bjhd->bihd", prob, v)


def results(attention, q, k, v, do) -> list[torch.Tensor]:
    """o, dq, dk, dv."""
    o = attention(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do.to(o.dtype))]


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 7, 20, 39, 40, 1000])
@pytest.mark.parametrize("rows", BOUNDS.values(), ids=BOUNDS)
def test_equals_the_dense_mask(rows, window, kv_heads):
    bounds, (qkv, do) = bounds_of(rows), heads(kv_heads=kv_heads)
    ours = results(lambda q, k, v: flash_attention(q, k, v, bounds, window, 0.3), *qkv, do)
    mask = seen(bounds, window, 2, 40)
    for got, want in zip(ours, results(lambda q, k, v: dense(q, k, v, mask, 0.3), *qkv, do), strict=True):
        torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", BOUNDS.values(), ids=BOUNDS)
def test_what_the_kernel_for_runs_is_told(rows, window, monkeypatch):
    """starts, longest run, window and scale mean to torch's kernel what they mean here."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=True):
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and enable_gqa
        assert max_q == max_k == max(b - a for a, b in pairwise(cu_q.tolist())) and window_size[1] == 0
        left = None if window_size[0] == -1 else window_size[0] + 1
        runs = torch.stack([cu_q.cpu(), torch.ones_like(cu_q).cpu()])[None, None]
        return dense(*(t[None] for t in (q, k, v)), seen(runs, left, 1, len(q)), scale)[0].to(q.dtype)

    monkeypatch.setattr(flash, "varlen_attn", stand_in, raising=False)
    monkeypatch.setattr(flash, "takes_varlen", lambda q, dropout: True)
    test_equals_the_dense_mask(rows, window, 2)


STARTS = {
    "one run": [0, 80],
    "runs": [0, 9, 10, 40, 73, 80],
    "places left": [0, 9, 40, 80, 80, 80],
}


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("window, causal", [(None, True), (7, True), (40, True), (1000, True), (None, False)])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_starts_say_the_same(starts, varlen, window, causal, kv_heads, monkeypatch):
    """On the device of the tokens; torch's kernel reads them there, and is told of no run that is longer than all."""
    mask = seen(bounds_of([starts, [1] * len(starts)]), window, 1, 80, causal)

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=True):
        assert cu_q is cu_k and cu_q.tolist() == starts and cu_q.device == q.device
        assert max_q == max_k == 80
        assert window_size == (-1 if window is None else min(window, 80) - 1, 0 if causal else -1)
        return dense(*(t[None] for t in (q, k, v)), mask, scale)[0].to(q.dtype)

    monkeypatch.setattr(flash, "varlen_attn", stand_in, raising=False)
    monkeypatch.setattr(flash, "takes_varlen", lambda q, dropout: varlen)
    runs = torch.tensor(starts, dtype=torch.int32, device=DEVICE)[None, :, None, None]
    qkv, do = heads(batch=1, seq_len=80, kv_heads=kv_heads)
    ours = results(lambda q, k, v: flash_attention(q, k, v, runs, window, 0.3, causal=causal), *qkv, do)
    for got, want in zip(ours, results(lambda q, k, v: dense(q, k, v, mask, 0.3), *qkv, do), strict=True):
        torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 65), (2, 1, 1, 80), (1, 1, 80, 80), (1, 6, 80, 80), (2, 6, 1, 80)])
def test_masks_of_whole_numbers_are_masks(shape):
    """Somebody's own, broadcast over queries or heads, are not read as starts of runs."""
    assert not flash.tells_runs(torch.ones(shape, dtype=torch.int32))


class Recorder(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, and the heads of k wherever attention is computed."""

    def __init__(self):
        super().__init__()
        self.largest, self.k_heads = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.k_heads.add(args[1].shape[1])
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("rows", [[[0, 1024], [1, 0]], [[0, 300, 1000, 1024], [0, 1, 1, 0]]], ids=["row", "runs"])
def test_no_tensor_of_the_size_of_the_map_and_no_repeated_heads(rows, window):
    qkv, do = heads(batch=1, seq_len=1024)
    with Recorder() as recorder:
        results(lambda q, k, v: flash_attention(q, k, v, bounds_of(rows), window, 0.25), *qkv, do)
    assert recorder.largest <= 1024 * 6 * 16 and recorder.k_heads == {2}


def test_dropout_drops_and_scales():
    (q, k, v), _ = heads(batch=1, seq_len=80)
    v = torch.ones_like(v)
    for rows in ([[0, 80], [1, 0]], [[0, 30, 80], [1, 1, 0]]):
        o = flash_attention(q, k, v, bounds_of(rows), 16, 0.25, dropout=0.5)
        assert 0.9 < o.mean() < 1.1 and o.std() > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernel for runs needs a GPU")
@pytest.mark.parametrize("window, causal", [(None, True), (100, True), (None, False)])
@pytest.mark.parametrize("rows", BOUNDS.values(), ids=BOUNDS)
def test_bf16_on_the_gpu(rows, window, causal):
    """Errors against fp64 are those of SDPA with a dense mask in bf16, up to twice."""
    rows = [[32 * start for start in rows[0]], rows[1]]
    bounds, (qkv, do) = bounds_of(rows), heads(seq_len=1280, head_dim=64, dtype=torch.bfloat16)
    assert flash.takes_varlen(qkv[0], 0.0)
    mask = seen(bounds, window, 2, 1280, causal)
    blind = ~mask.any(-1)[:, :, None, None]

    def sdpa(q, k, v):
        k, v = (t.repeat_interleave(3, 2) for t in (k, v))
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        filled = (mask | torch.eye(1280, dtype=torch.bool, device=DEVICE))[:, None]
        o = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=filled, scale=0.125)
        return o.transpose(1, 2).masked_fill(blind, 0)

    exact = results(lambda q, k, v: dense(q, k, v, mask, 0.125), *qkv, do)
    ours = results(lambda q, k, v: flash_attention(q, k, v, bounds, window, 0.125, causal=causal), *qkv, do)
    theirs = results(sdpa, *qkv, do)
    for got, stock, want in zip(ours, theirs, exact, strict=True):
        assert (got.double() - want.double()).norm() <= 2 * (stock.double() - want.double()).norm()


@pytest.mark.parametrize(
    "n_tokens, n_runs, kv_heads, window, n",
    [(1706, 3, 4, None, 1), (1706, 18, 4, None, 1), (1706, 19, 12, None, 3), (1706, 70, 24, None, 8),
     (3412, 26, 4, None, 1), (3412, 70, 4, None, 4), (1706, 240, 12, 9, 12), (1706, 999, 5, None, 5)],
)  # fmt: skip
def test_pieces_of_a_backward(n_tokens, n_runs, kv_heads, window, n, monkeypatch):
    """Where the kernel's memory would be more than that of two q, 128 tokens a run counted, it is that of one at most.

    Where heads can be parted so; a few thousand tokens' memory is let be.
    """
    monkeypatch.setattr(flash, "takes_varlen", lambda q, dropout: True)
    q, k = torch.empty(1, n_tokens, 24, 8), torch.empty(1, n_tokens, kv_heads, 8)
    starts = torch.zeros(1, n_runs + 1, 1, 1, dtype=torch.int32)
    bounds = torch.zeros(1, 1, 2, n_runs + 1, dtype=torch.int32)
    assert flash.backward_pieces(q, k, starts, window, 0.0) == flash.backward_pieces(q, k, bounds, window, 0.0) == n
    assert flash.backward_pieces(q, k, bounds_of([[0, n_tokens], [1, 0]]), None, 0.0) == 1
    monkeypatch.undo()
    assert flash.backward_pieces(q, k, starts, window, 0.0) == 1


@pytest.mark.parametrize(
    "rows, n_tokens, heads, kv_heads, n",
    [(1, 8192, 32, 8, 1), (4, 2048, 32, 32, 1), (1, 8193, 32, 8, 2), (1, 20000, 32, 32, 4), (1, 20000, 28, 7, 7),
     (1, 10**6, 32, 8, 8), (16, 8192, 32, 32, 16), (1, 10**6, 9, 3, 3), (1, 10**6, 8, 1, 1)],
)  # fmt: skip
def test_pieces_of_long_rows(rows, n_tokens, heads, kv_heads, n):
    """A piece has the work of 8192 tokens of 32 heads at most; with dropout heads stay together."""
    q, k = (torch.empty(rows, n_tokens, h, 8, device="meta") for h in (heads, kv_heads))
    bounds = torch.zeros(1, 1, 2, rows + 1, dtype=torch.int32)
    assert flash.backward_pieces(q, k, bounds, None, 0.0) == n
    assert flash.backward_pieces(q, k, bounds, n_tokens // 2, 0.0) == n  # no kernel for runs on a CPU
    assert flash.backward_pieces(q, k, bounds, None, 0.1) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures GPU memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("starts", [[0, 16384], [0, 5000, 16384]], ids=["row", "runs"])
def test_peak_memory_on_the_gpu(starts, window, dtype):
    """Forward and backward of 16384 tokens stay far below one byte for each pair of them."""
    qkv, do = heads(batch=1, seq_len=16384, head_dim=64, dtype=dtype)
    bounds = bounds_of([starts, [1] * (len(starts) - 1) + [0]])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(lambda q, k, v: flash_attention(q, k, v, bounds, window, 0.125), *qkv, do)
    assert torch.cuda.max_memory_allocated() - before < 16384**2
