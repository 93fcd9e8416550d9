"""The adapters of a group as one: products of the stack are those of its parts."""

import pytest
import torch

from operators import reference
from operators.low_rank import stack_adapters
from tests.kernel_checks import DTYPES, rand, relative_error

GROUPS = {
    "one": ([(4, 30)], 21),
    "gate and up": ([(8, 40), (8, 40)], 33),
    "q, k, v of unequal ranks and widths": ([(3, 50), (5, 10), (2, 10)], 64),
    "k without an adapter": ([(4, 16), None, (6, 8)], 17),
    "only v": ([None, None, (16, 24)], 9),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_stack_is_the_sum_of_its_parts(kernels, name, dtype):
    shapes, n_cols = GROUPS[name]
    widths = [12 if shape is None else shape[1] for shape in shapes]
    scalings = [0.5 * (i + 1) for i in range(len(shapes))]
    adapters = [
        None if s is None else (rand(s[0], n_cols, seed=i), rand(s[1], s[0], seed=9 + i)) for i, s in enumerate(shapes)
    ]
    stack = stack_adapters(adapters, scalings, widths, dtype)
    expected = reference.stack_adapters(adapters, scalings, widths, dtype)
    tolerance = 0.0 if dtype == torch.float32 else 1e-2
    assert relative_error(stack.A, expected[0]) <= tolerance and relative_error(stack.B, expected[1]) <= tolerance
    x = rand(5, n_cols, seed=3)
    parts = [
        torch.zeros(5, w, device=x.device) if a is None else s * (x @ a[0].t()) @ a[1].t()
        for a, s, w in zip(adapters, scalings, widths, strict=True)
    ]
    assert relative_error((x.to(dtype) @ stack.A.t()) @ stack.B.t(), torch.cat(parts, dim=1)) < 3e-2
