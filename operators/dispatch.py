"""Which implementation an operator runs: Triton kernels for GPU tensors, plain torch for CPU tensors and fp64."""

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

_NO_GUARD = nullcontext()
INTERPRETING = triton.knobs.runtime.interpret


def use_triton(x: Tensor) -> bool:
    """True for a GPU tensor, and for every tensor under TRITON_INTERPRET=1 (how the kernels are tested on a CPU).

    Not for fp64, which is computed to compare with: kernels compute in fp32.
    """
    return (x.is_cuda or INTERPRETING) and x.dtype != torch.float64


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [T, C] with unit stride along C; a view where possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def as_output(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows [T, C] of a Function in the caller's shape; no view for autograd, so that it may be written to in place."""
    return torch.ops.aten._unsafe_view(rows, (*shape[:-1], rows.shape[-1]))


def device_guard(x: Tensor):
    """Make x's GPU current while a kernel is launched (Triton launches on the current device)."""
    if not x.is_cuda or torch.cuda.device_count() == 1 or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). Triton's own serves kernels too, and is slow on the host."""
    return -(-a // b)


def rank_block(rank: int) -> int:
    """Ranks that a tile of tl.dot has room for."""
    return max(16, next_power_of_2(max(rank, 1)))


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n > 0."""
    return 1 << (n - 1).bit_length()
