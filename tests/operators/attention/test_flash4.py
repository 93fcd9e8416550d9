"""flash-attn-4 where it is installed: what it is asked for, when it is taken, and its results on a GPU."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from hyclora.models.config import HycloraConfig
from hyclora.models.patch import apply_hyclora
from hyclora.operators.attention import flash, flash4
from hyclora.operators.attention.flash import flash_attention
from hyclora.operators.attention.hollow_graph import record
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import llama
from tests.operators.attention.test_flash import BOUNDS, STARTS, bounds_of, dense, heads, results, seen

ON_HOPPER = torch.cuda.is_available() and flash4.suits(torch.device("cuda", 0), torch.bfloat16, 128)


def stand_in() -> SimpleNamespace:
    """The package's two functions, in fp64: a pair of o and lse; None in a window is no bound."""

    def mask_of(starts, window_size, causal, n_tokens):
        left, right = window_size
        assert right in ((None,) if left is None or not causal else (0,))
        runs = torch.stack([starts.cpu(), torch.ones_like(starts).cpu()])[None, None]
        return seen(runs, None if left is None else left + 1, 1, n_tokens, causal)

    def of_rows(q, k, v, *, softmax_scale, causal, window_size):
        starts = torch.tensor([0, q.shape[1]], dtype=torch.int32)
        o = dense(q, k, v, mask_of(starts, window_size, causal, q.shape[1]), softmax_scale)
        return o.to(q.dtype), None

    def of_runs(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    ):  # fmt: skip
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.device == q.device
        assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
        mask = mask_of(cu_seqlens_q, window_size, causal, len(q))
        return dense(*(t[None] for t in (q, k, v)), mask, softmax_scale)[0].to(q.dtype), None

    return SimpleNamespace(flash_attn_func=of_rows, flash_attn_varlen_func=of_runs)


@pytest.fixture
def taken(monkeypatch):
    """The stand-in wherever the package may be asked."""
    found = stand_in()
    monkeypatch.setattr(flash4, "package", lambda: found)
    monkeypatch.setattr(flash4, "suits", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(flash4, "LEAST", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(flash, "takes_varlen", lambda q, dropout: True)
    monkeypatch.setattr(flash, "_sdpa", lambda *args: pytest.fail("torch's attention"))
    return found


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("window, causal", [(None, True), (1, True), (7, True), (40, True), (None, False)])
@pytest.mark.parametrize("rows", BOUNDS.values(), ids=BOUNDS)
def test_bounds(rows, window, causal, kv_heads, taken):
    bounds, (qkv, do) = bounds_of(rows), heads(kv_heads=kv_heads)
    ours = results(lambda q, k, v: flash_attention(q, k, v, bounds, window, 0.3, causal=causal), *qkv, do)
    mask = seen(bounds, window, 2, 40, causal)
    for got, want in zip(ours, results(lambda q, k, v: dense(q, k, v, mask, 0.3), *qkv, do), strict=True):
        torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_starts(starts, window, taken):
    runs = torch.tensor(starts, dtype=torch.int32, device=DEVICE)[None, :, None, None]
    qkv, do = heads(batch=1, seq_len=80)
    mask = seen(bounds_of([starts, [1] * len(starts)]), window, 1, 80)
    ours = results(lambda q, k, v: flash_attention(q, k, v, runs, window, 0.3), *qkv, do)
    for got, want in zip(ours, results(lambda q, k, v: dense(q, k, v, mask, 0.3), *qkv, do), strict=True):
        torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=1e-5)


def test_when_it_is_taken(taken, monkeypatch):
    """Not for few tokens, with dropout, with deterministic algorithms, or where flash attention is switched off."""
    monkeypatch.setattr(flash4, "LEAST", 100)
    q = torch.empty(1, 100, 4, 128)
    assert flash4.takes(q, 0.0, 100) and not flash4.takes(q, 0.0, 99) and not flash4.takes(q, 0.1, 100)
    torch.use_deterministic_algorithms(True)
    try:
        assert not flash4.takes(q, 0.0, 100)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert not flash4.takes(q, 0.0, 100)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_nothing_is_compiled_in_a_recording(taken, monkeypatch):
    """A kernel that has not run before is not taken there, whatever others have."""
    q = torch.empty(1, 100, 4, 128)
    monkeypatch.setattr(flash4, "_compiled", set())
    assert flash4.takes(q, 0.0, 100, "rows")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert flash4.takes(q, 0.0, 100, "rows") and not flash4.takes(q, 0.0, 100, "runs")
    assert not flash4.takes(q[..., :64], 0.0, 100, "rows") and not flash4.takes(q.bfloat16(), 0.0, 100, "rows")


def test_a_package_that_is_missing_or_broken(monkeypatch, caplog):
    """Is not taken; one that is there, and cannot be imported, is told of once."""

    def broken(name):
        raise RuntimeError("its compiler is another")

    monkeypatch.setattr(flash4, "import_module", broken)
    flash4.package.cache_clear()
    try:
        monkeypatch.setattr(flash4, "PACKAGE", "no-such-package")
        assert flash4.package() is None and not caplog.records
        flash4.package.cache_clear()
        monkeypatch.setattr(flash4, "PACKAGE", "torch")
        assert flash4.package() is None and flash4.package() is None
        (told,) = caplog.records
        assert "cannot be imported (RuntimeError: its compiler is another)" in told.getMessage()
    finally:
        flash4.package.cache_clear()


def test_what_its_compiler_says_of_each_kernel_is_not_passed_on(monkeypatch):
    monkeypatch.setattr(flash4, "PACKAGE", "torch")
    monkeypatch.setattr(flash4, "import_module", lambda name: name)
    flash4.package.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert flash4.package() == "flash_attn.cute"
            warnings.warn("Argument aux_data (position 17) cannot be converted to a JitArgument", stacklevel=1)
            warnings.warn("another", stacklevel=1)
        assert [str(one.message) for one in told] == ["another"]
    finally:
        flash4.package.cache_clear()


@pytest.mark.parametrize("installed", [True, False])
def test_the_report_says_so(installed, monkeypatch):
    monkeypatch.setattr(flash4, "suits", lambda device, dtype, head_dim: installed)
    monkeypatch.setattr(flash4, "version", lambda package: "4.0")
    line = "  attention: flash-attn-4 4.0 for rows, or packed ones, of 4096"
    assert (line in str(apply_hyclora(llama(), HycloraConfig()))) == installed


needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs flash-attn-4 and a GPU that it is taken on")


@needs_hopper
@pytest.mark.parametrize("dtype", flash4.HALF, ids=str)
@pytest.mark.parametrize("head_dim", flash4.HEAD_DIMS)
@pytest.mark.parametrize("window, causal", [(None, True), (100, True), (None, False)])
@pytest.mark.parametrize("rows", BOUNDS.values(), ids=BOUNDS)
def test_results_on_the_gpu(rows, window, causal, head_dim, dtype, monkeypatch):
    """Errors against fp64 are those of torch's kernels, up to half as much again; no length is that of a tile."""
    rows = [[31 * start for start in rows[0]], rows[1]]
    bounds, (qkv, do) = bounds_of(rows), heads(seq_len=1240, head_dim=head_dim, dtype=dtype)
    mask = seen(bounds, window, 2, 1240, causal)

    def attend(q, k, v):
        return flash_attention(q, k, v, bounds, window, 0.125, causal=causal)

    exact = results(lambda q, k, v: dense(q, k, v, mask, 0.125), *qkv, do)
    theirs = results(attend, *qkv, do)
    monkeypatch.setattr(flash4, "LEAST", 1)
    monkeypatch.setattr(flash, "_sdpa", lambda *args: pytest.fail("torch's attention"))
    monkeypatch.setattr(flash, "varlen_attn", lambda *args, **kwargs: pytest.fail("torch's attention"))
    for got, stock, want in zip(results(attend, *qkv, do), theirs, exact, strict=True):
        assert (got.double() - want.double()).norm() <= 1.5 * (stock.double() - want.double()).norm()


@needs_hopper
@pytest.mark.parametrize("starts", [None, [0, 700, 1240, 1240, 1240]], ids=["row", "runs with places left"])
def test_recorded_in_a_cuda_graph_without_its_inputs(starts, monkeypatch):
    """As attention with a kept lse does it: nothing but lse and the starts is saved, and a replay gives the same."""
    monkeypatch.setattr(flash4, "LEAST", 1)
    (q, k, v), do = heads(batch=1, seq_len=1240, head_dim=128, dtype=torch.bfloat16)
    runs = bounds_of([[0, 1240], [1, 0]])
    if starts is not None:
        runs = torch.tensor(starts, dtype=torch.int32, device=DEVICE)[None, :, None, None]

    def attend(q, k, v):
        return flash_attention(q, k, v, runs, None, 0.125)

    def step():
        o, graph, rest = record(attend, q.detach(), k.detach(), v.detach())
        assert sum(t.is_floating_point() for t in rest) == 1 and all(t.numel() <= 6 * 1240 for t in rest)
        return o, *graph.backward([q.detach(), k.detach(), v.detach(), o], rest, do)

    want = results(attend, q, k, v, do)
    step()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = step()
    for t in found:
        t.fill_(float("nan"))
    recorded.replay()
    for got, same in zip(found, want, strict=True):
        torch.testing.assert_close(got, same, atol=2e-2, rtol=2e-2)  # dq is added up in any order
