"""How kernels are tested: on the GPU if there is one, else in Triton's interpreter; error against float64 truth."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rand(*shape, dtype=torch.float32, seed=0, scale=1.0) -> Tensor:
    """Normal numbers on the test device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def strided(x: Tensor) -> Tensor:
    """The same values with a row stride that is larger than the row."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    ours, truth = ours.double().cpu(), truth.double().cpu()
    return ((ours - truth).norm() / truth.norm().clamp_min(1e-12)).item()


def assert_as_good_as_torch(ours, torchs, truth, slack=1.1):
    """Our error against fp64 truth is at most torch's own in the same dtype (times slack, plus fp32 rounding)."""
    # Triton's interpreter truncates to bfloat16 where hardware rounds
    floor = 2**-7 if ours.dtype == torch.bfloat16 and DEVICE == "cpu" else 2e-6
    mine, theirs = relative_error(ours, truth), relative_error(torchs, truth)
    assert mine <= slack * theirs + floor, f"error {mine:.2e}, torch's own {theirs:.2e}"
