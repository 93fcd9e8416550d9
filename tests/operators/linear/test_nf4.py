"""NF4 dequantization: bit for bit what bitsandbytes gives."""

import pytest
import torch

from hyclora.operators.linear.nf4 import dequantize_4bit
from tests.helpers.kernel_checks import DEVICE, DTYPES, HALF, rand

bnb = pytest.importorskip("bitsandbytes")


def packed(*shape, dtype=torch.float32, quant_type="nf4", nested=True):
    return bnb.nn.Params4bit(
        rand(*shape, dtype=dtype, scale=0.02).cpu(),
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=nested,
    ).to(DEVICE)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (33, 192), (130, 264), (3, 5)], ids=str)
def test_equals_bitsandbytes(kernels, shape, dtype, quant_type, nested):
    """Any shape, also one whose blocks and bytes do not come out even."""
    weight = packed(*shape, dtype=dtype, quant_type=quant_type, nested=nested)
    expected = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
    assert torch.equal(dequantize_4bit(weight, torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    "shape, rows, columns",
    [
        ((40, 4096), (0, 40), (2048, 4096)),  # a program a row, blocks of absmax that start inside of a nested one
        ((12, 5184), (5, 12), (2304, 5184)),  # several programs a row, the last of them not full
        ((70, 264), (3, 60), (8, 72)),  # rows that start inside of a block
        ((90, 256), (33, 70), (0, 256)),
        ((90, 257), (8, 70), (0, 257)),
        ((20, 36), (2, 19), (0, 36)),  # bytes of a row that are no whole words
        ((20, 36), (0, 20), (8, 24)),
        ((16, 64), (7, 8), (3, 50)),
    ],
    ids=str,
)
def test_a_part_is_that_of_the_whole(kernels, shape, rows, columns, dtype, nested):
    weight = packed(*shape, dtype=dtype, nested=nested)
    expected = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
    expected = expected[slice(*rows), slice(*columns)]
    out = torch.full(expected.shape, float("nan"), dtype=dtype, device=DEVICE)
    assert torch.equal(dequantize_4bit(weight, out, rows[0], columns[0]), expected)
    below = rand(19, shape[1] + 3, dtype=dtype)[:, : shape[1]]
    out = torch.full((len(expected) + 19, expected.shape[1]), float("nan"), dtype=dtype, device=DEVICE)
    dequantize_4bit(weight, out, rows[0], columns[0], below)
    assert torch.equal(out[:-19], expected)
    assert torch.equal(out[-19:], below[:, slice(*columns)])


def test_a_wider_dtype_gets_the_stored_values():
    """Weights quantized from bfloat16 are bfloat16 numbers, whatever they are computed in."""
    weight = packed(16, 64, dtype=torch.bfloat16)
    out = dequantize_4bit(weight, torch.empty(16, 64, device=DEVICE))
    assert torch.equal(out, out.bfloat16().float())
