"""NF4 dequantization: bit for bit what bitsandbytes gives."""

import pytest
import torch

from operators.nf4 import dequantize_4bit
from tests.kernel_checks import DEVICE, rand

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (33, 192), (130, 264), (3, 5)], ids=str)
def test_equals_bitsandbytes(kernels, shape, dtype, quant_type, nested):
    """Any shape, also one whose blocks and bytes do not come out even; the interpreter truncates to bfloat16."""
    weight = bnb.nn.Params4bit(
        rand(*shape, dtype=dtype, scale=0.02).cpu(),
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=nested,
    ).to(DEVICE)
    expected = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
    out = dequantize_4bit(weight, torch.full(shape, float("nan"), dtype=dtype, device=DEVICE))
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        assert (out.float() - expected.float()).abs().max() <= 2**-7 * expected.float().abs().max()
    else:
        assert torch.equal(out, expected)


def test_a_wider_dtype_gets_the_stored_values():
    """Weights quantized from bfloat16 are bfloat16 numbers, whatever they are computed in."""
    weight = bnb.nn.Params4bit(rand(16, 64).bfloat16().cpu(), requires_grad=False, quant_type="nf4").to(DEVICE)
    out = dequantize_4bit(weight, torch.empty(16, 64, device=DEVICE))
    assert torch.equal(out, out.bfloat16().float())
