"""g = dy B and dB = dy^T (x A^T) in one pass over dy, against plain torch."""

import pytest
import torch

from hyclora.operators import reference
from hyclora.operators.linear import low_rank_grad
from hyclora.operators.linear.low_rank_grad import in_one_pass, low_rank_grads
from tests.helpers.kernel_checks import DTYPES, ROUNDING, rand, relative_error

GROUPS = {
    "one": ([40], [4]),
    "gate and up": ([600, 600], [16, 16]),
    "q, k, v of unequal ranks and widths": ([100, 20, 20], [3, 16, 32]),
    "k without an adapter": ([64, 16, 16], [8, 0, 8]),
    "only v": ([24, 8, 8], [0, 0, 16]),
}


@pytest.mark.parametrize("n_rows", [1, 70, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_both_products(kernels, monkeypatch, name, dtype, n_rows):
    """Any number of rows, a dy that has g beside it, several stripes and ranges; what is not written shows as NaN."""
    monkeypatch.setattr(low_rank_grad, "PROGRAMS", 8)
    widths, ranks = GROUPS[name]
    adapters = [
        (rand(r, 8, seed=i), rand(w, r, seed=5 + i)) if r else None
        for i, (w, r) in enumerate(zip(widths, ranks, strict=True))
    ]
    _, B = reference.stack_adapters(adapters, [1.0] * len(widths), widths, dtype)
    wide = rand(n_rows, sum(widths) + B.shape[1], dtype=dtype, seed=1)
    dy, g = wide[:, : sum(widths)], wide[:, sum(widths) :]
    g.fill_(float("nan"))
    xa = rand(n_rows, B.shape[1], dtype=dtype, seed=2)
    xa[:, sum(ranks) :] = 0
    expected_g, expected_dB = reference.low_rank_grads(dy.double(), xa.double(), B.double(), widths, ranks)
    dB = low_rank_grads(dy, xa, B, widths, ranks, g)
    tolerance = ROUNDING[dtype]
    assert relative_error(g, expected_g) < tolerance
    for ours, theirs in zip(dB, expected_dB, strict=True):
        assert ours.dtype == torch.float32 and ours.is_contiguous() and ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-5  # exact products of half precision, summed in fp32
    again = torch.empty_like(g)
    assert all(torch.equal(a, b) for a, b in zip(low_rank_grads(dy, xa, B, widths, ranks, again), dB, strict=True))
    assert torch.equal(again, g)


def test_where_it_is_worth_it(kernels):
    dy = rand(4, 8)
    assert in_one_pass(dy, [16, 0, 32]) and not in_one_pass(dy, [64]) and not in_one_pass(dy, [0, 0])
    assert not in_one_pass(dy, [8] * 4) and not in_one_pass(dy.double(), [8])
