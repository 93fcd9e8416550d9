"""The end of a block: frozen path + low-rank path + residual, rounded once, and in whose memory."""

import pytest
import torch

from hyclora.operators import reference
from hyclora.operators.linear.residual import add_residual, overwritable
from tests.helpers.kernel_checks import DTYPES, HALF, rand, relative_error, strided

SHAPES = [(1, 8, 16), (70, 130, 16), (64, 64, 48), (33, 200, 0), (129, 96, 272)]  # T, N, R


def summands(shape, dtype, residual_dtype):
    n_rows, n_cols, rank = shape
    y, residual = rand(n_rows, n_cols, dtype=dtype), rand(n_rows, n_cols, dtype=residual_dtype, seed=1)
    xa = rand(n_rows, rank, dtype=dtype, seed=2) if rank else None
    return y, xa, rand(n_cols, rank, dtype=dtype, seed=3) if rank else None, residual


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum(kernels, shape, dtype, residual_dtype, overwrite):
    y, xa, B, residual = summands(shape, dtype, residual_dtype)
    overwrite = overwrite and overwritable(residual, dtype)
    exact = reference.add_residual(y.double(), *(t if t is None else t.double() for t in (xa, B)), residual.double())
    place, wider = residual.data_ptr() if overwrite else y.data_ptr(), torch.promote_types(dtype, residual_dtype)
    coarser = dtype if shape[2] > 128 else wider  # such a product is added by itself, and y rounded
    kept = residual.clone()
    total = add_residual(y, xa, B, residual, overwrite)
    assert total.dtype == wider
    assert relative_error(total, exact) < {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[coarser]
    if overwrite or dtype == wider:
        assert total.data_ptr() == place
    assert overwrite or torch.equal(residual, kept)


def test_a_view_of_any_stride_is_added_and_left_alone(kernels):
    y, xa, B, residual = summands((21, 72, 16), HALF, HALF)
    expected = add_residual(y.clone(), xa, B, residual, overwrite=False)
    assert torch.equal(add_residual(y, xa, B, strided(residual), overwrite=False), expected)
    assert not overwritable(strided(residual), HALF)


def test_what_does_not_fit_is_not_overwritten():
    assert not overwritable(None, torch.bfloat16)
    assert not overwritable(rand(4, 8, dtype=torch.bfloat16), torch.float32)
    assert overwritable(rand(4, 8), torch.bfloat16)
