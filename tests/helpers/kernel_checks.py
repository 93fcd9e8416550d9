"""How kernels are tested: on the GPU if there is one, else in Triton's interpreter; error against float64 truth.

bfloat16 is tested on a GPU only. The interpreter (triton 3.7.1) truncates where hardware rounds, and 1024 ones sum to
0 in it: what passes there says nothing. `refuse_bfloat16` holds the tests to that.
"""

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def refuse_bfloat16(monkeypatch):
    """Fail the test whose kernels meet bfloat16 in the interpreter."""
    run = interpreter.GridExecutor.__call__

    def checked(self, *args, **kwargs):
        for arg in (*args, *kwargs.values()):
            if arg is tl.bfloat16 or getattr(arg, "dtype", None) == torch.bfloat16:
                pytest.fail(f"{self.fn.__name__} got bfloat16 in Triton's interpreter: take HALF or DTYPES")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)


def refuse_wide_masks(monkeypatch):
    """Fail the test whose kernels mask a block by `block & (i < n)` of numbers i and n, instead of a block of one.

    The interpreter spreads the comparison over the block as integers, and refuses masks of these from triton 3.9 on.
    """
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        make = getattr(interpreter.InterpreterBuilder, name)

        def checked(self, *args, make=make, place=place, **kwargs):
            if args[place].data.dtype != bool:
                pytest.fail("a kernel masks a block by a comparison of numbers: compare tl.arange(0, 1) + i")
            return make(self, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, checked)


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
    mine, theirs = relative_error(ours, truth), relative_error(torchs, truth)
    assert mine <= slack * theirs + 2e-6, f"error {mine:.2e}, torch's own {theirs:.2e}"
