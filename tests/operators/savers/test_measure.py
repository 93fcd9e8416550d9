"""What calibration measures of tokens: the kernel, and torch's operations on a CPU."""

import math

import pytest
import torch

from hyclora.operators import dispatch, reference
from hyclora.operators.savers.measure import NAMES, measure, merge
from tests.helpers.kernel_checks import DEVICE, DTYPES, rand, strided


def mask_of(n_rows: int, *out: int):
    mask = torch.ones(n_rows, dtype=torch.bool, device=DEVICE)
    mask[list(out)] = False
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interpreted", [True, False])
def test_only_tokens_that_count(dtype, interpreted, kernels, monkeypatch):
    """Not those that are masked, nor those with an inf or a nan in one channel, or whose squares would give one."""
    monkeypatch.setattr(dispatch, "INTERPRETING", interpreted and DEVICE == "cpu")
    x = rand(9, 70, dtype=dtype)
    x[2, 5], x[4, 0], x[5, 69], x[3, 1] = math.inf, math.nan, -math.inf, 1e20  # which fp16 has as inf
    found, rows = measure(x, mask_of(9, 0, 7)), x[[1, 6, 8]].float()
    sums = {"total": rows.sum(dim=0), "total_square": rows.square().sum(dim=0)}
    expected = {"count": 3, **sums, "low": rows.amin(dim=0), "high": rows.amax(dim=0)}
    assert {t.dtype for t in found.values()} == {torch.float32}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.as_tensor(value, dtype=torch.float32, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows, n_cols", [(1, 1), (31, 64), (33, 65), (130, 200)])
def test_kernel_is_the_reference(kernels, dtype, n_rows, n_cols):
    """To rounding, extremes exactly; of rows that are not dense and of columns that are, too."""
    rows = strided(rand(n_rows, n_cols, dtype=dtype) * 3 + 1)
    none, some = None, mask_of(n_rows, *range(0, n_rows, 3))
    for x, mask in ((rows, none), (rows, some), (rows.T.contiguous().T, some)):
        found = measure(x, mask)
        truth = reference.measure(x.double(), mask_of(n_rows) if mask is None else mask)
        assert found["count"] == truth["count"]
        for name in NAMES:
            assert found[name].shape == (n_cols,)
            exact = name in ("low", "high")
            torch.testing.assert_close(found[name], truth[name], **({"rtol": 0, "atol": 0} if exact else {}))


def test_parts_add_up():
    x = rand(20, 30)
    whole, parts = measure(x, None), merge(measure(x[:7], None), measure(x[7:], None))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of GPU memory")
def test_no_copy_of_x_is_made():
    x = rand(512, 4096, dtype=torch.bfloat16)
    measure(x, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measure(x, None)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes / 8
