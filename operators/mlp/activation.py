"""What is between the two linear layers of an MLP, forward and backward: SiLU-Hadamard product, GELU."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import as_rows, cdiv, device_guard, use_triton

BLOCK = 2048
MINUS_LOG2_E = tl.constexpr(-math.log2(math.e))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
NORMAL = tl.constexpr(1 / math.sqrt(2 * math.pi))  # the density of a standard normal number at 0


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32 in half the instructions of tl.sigmoid: nothing for denormals, no division."""
    s = 1 + tl.exp2(x * MINUS_LOG2_E)
    return tl.rsqrt(s * s)


@triton.jit
def silu_mul_tile(gate, up):
    """hidden of fp32 tiles gate and up."""
    return gate * sigmoid(gate) * up


@triton.jit
def silu_mul_grad_tile(dhidden, gate, up):
    """dgate, dup, hidden of fp32 tiles."""
    share = sigmoid(gate)
    act = gate * share
    dgate = dhidden * up * (share + act * (1 - share))
    return dgate, dhidden * act, act * up


@triton.jit
def _silu_mul_fwd_kernel(gate_ptr, up_ptr, hidden_ptr, n_cols, stride_gate, stride_up, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n_cols
    gate = tl.load(gate_ptr + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + row * n_cols + col, silu_mul_tile(gate, up).to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_bwd_kernel(
    dhidden_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden_ptr, n_cols, stride_dhidden, stride_gate, stride_up,
    stride_dy, stride_hidden, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n_cols
    dhidden = tl.load(dhidden_ptr + row * stride_dhidden + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    dgate, dup, hidden = silu_mul_grad_tile(dhidden, gate, up)
    dtype = hidden_ptr.dtype.element_ty
    if IN_PLACE:
        tl.debug_barrier()  # other threads may still have to read what is written over
    tl.store(dgate_ptr + row * stride_dy + col, dgate.to(dtype), mask=mask)
    tl.store(dup_ptr + row * stride_dy + col, dup.to(dtype), mask=mask)
    tl.store(hidden_ptr + row * stride_hidden + col, hidden.to(dtype), mask=mask)


def silu_mul_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """reference.silu_mul_fwd on any device: gate, up [T, F] to hidden [T, F], all that it allocates on a GPU."""
    if not use_triton(gate):
        return reference.silu_mul_fwd(gate, up)
    gate, up = as_rows(gate), as_rows(up)
    n_rows, n_cols = gate.shape
    hidden = torch.empty(n_rows, n_cols, dtype=gate.dtype, device=gate.device)
    with device_guard(gate):
        _silu_mul_fwd_kernel[(n_rows, cdiv(n_cols, BLOCK))](
            gate, up, hidden, n_cols, gate.stride(0), up.stride(0), BLOCK=BLOCK
        )
    return hidden


def silu_mul_bwd(dhidden: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """reference.silu_mul_bwd on any device: [dgate, dup] [T, 2F] side by side, and hidden [T, F].

    These 3 F elements a token are all that it allocates on a GPU.
    """
    if not use_triton(dhidden):
        dgate, dup, hidden = reference.silu_mul_bwd(dhidden, gate, up)
        return torch.cat((dgate, dup), dim=1), hidden
    dhidden, gate, up = as_rows(dhidden), as_rows(gate), as_rows(up)
    n_rows, n_cols = gate.shape
    dy = torch.empty(n_rows, 2 * n_cols, dtype=gate.dtype, device=gate.device)
    hidden = torch.empty(n_rows, n_cols, dtype=gate.dtype, device=gate.device)
    _launch_silu_mul_bwd(dhidden, gate, up, dy[:, :n_cols], dy[:, n_cols:], hidden, in_place=False)
    return dy, hidden


def silu_mul_bwd_(dhidden: Tensor, gate: Tensor, up: Tensor) -> None:
    """silu_mul_bwd in place: dgate, dup and hidden take the memory of gate, up, parts of one tensor, and dhidden.

    Rows have unit stride. Allocates nothing on a GPU.
    """
    if use_triton(dhidden):
        return _launch_silu_mul_bwd(dhidden, gate, up, gate, up, dhidden, in_place=True)
    for into, found in zip((gate, up, dhidden), reference.silu_mul_bwd(dhidden, gate, up), strict=True):
        into.copy_(found)


def _launch_silu_mul_bwd(
    dhidden: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, hidden: Tensor, in_place: bool
) -> None:
    n_rows, n_cols = gate.shape
    with device_guard(gate):
        _silu_mul_bwd_kernel[(n_rows, cdiv(n_cols, BLOCK))](
            dhidden, gate, up, dgate, dup, hidden, n_cols, dhidden.stride(0), gate.stride(0), up.stride(0),
            dgate.stride(0), hidden.stride(0), IN_PLACE=in_place, BLOCK=BLOCK,
        )  # fmt: skip


@triton.jit
def gelu_share(x):
    """The part of fp32 x that the exact GELU lets through: (1 + erf(x / sqrt(2))) / 2."""
    return 0.5 + 0.5 * tl.erf(x * SQRT_HALF)


@triton.jit
def gelu_grad_tile(dhidden, up):
    """dup, hidden of fp32 tiles."""
    share = gelu_share(up)
    return dhidden * (share + up * NORMAL * tl.exp2(up * up * MINUS_LOG2_E * 0.5)), up * share


@triton.jit
def _gelu_fwd_kernel(up_ptr, hidden_ptr, n_cols, stride_up, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n_cols
    up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + row * n_cols + col, (up * gelu_share(up)).to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    dhidden_ptr, up_ptr, dup_ptr, hidden_ptr, n_cols, stride_dhidden, stride_up, stride_dup, stride_hidden,
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < n_cols
    dhidden = tl.load(dhidden_ptr + row * stride_dhidden + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    dup, hidden = gelu_grad_tile(dhidden, up)
    dtype = hidden_ptr.dtype.element_ty
    if IN_PLACE:
        tl.debug_barrier()  # as in _silu_mul_bwd_kernel
    tl.store(dup_ptr + row * stride_dup + col, dup.to(dtype), mask=mask)
    tl.store(hidden_ptr + row * stride_hidden + col, hidden.to(dtype), mask=mask)


def gelu_fwd(up: Tensor) -> Tensor:
    """reference.gelu_fwd on any device: up [T, F] to hidden [T, F], all that it allocates on a GPU."""
    if not use_triton(up):
        return reference.gelu_fwd(up)
    up = as_rows(up)
    n_rows, n_cols = up.shape
    hidden = torch.empty(n_rows, n_cols, dtype=up.dtype, device=up.device)
    with device_guard(up):
        _gelu_fwd_kernel[(n_rows, cdiv(n_cols, BLOCK))](up, hidden, n_cols, up.stride(0), BLOCK=BLOCK)
    return hidden


def gelu_bwd(dhidden: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """reference.gelu_bwd on any device: dup and hidden [T, F], all that it allocates on a GPU."""
    if not use_triton(dhidden):
        return reference.gelu_bwd(dhidden, up)
    dhidden, up = as_rows(dhidden), as_rows(up)
    n_rows, n_cols = up.shape
    dup, hidden = (torch.empty(n_rows, n_cols, dtype=up.dtype, device=up.device) for _ in range(2))
    _launch_gelu_bwd(dhidden, up, dup, hidden, in_place=False)
    return dup, hidden


def gelu_bwd_(dhidden: Tensor, up: Tensor) -> None:
    """gelu_bwd in place: dup and hidden take the memory of up and dhidden.

    Rows have unit stride. Allocates nothing on a GPU.
    """
    if use_triton(dhidden):
        return _launch_gelu_bwd(dhidden, up, up, dhidden, in_place=True)
    for into, found in zip((up, dhidden), reference.gelu_bwd(dhidden, up), strict=True):
        into.copy_(found)


def _launch_gelu_bwd(dhidden: Tensor, up: Tensor, dup: Tensor, hidden: Tensor, in_place: bool) -> None:
    n_rows, n_cols = up.shape
    with device_guard(up):
        _gelu_bwd_kernel[(n_rows, cdiv(n_cols, BLOCK))](
            dhidden, up, dup, hidden, n_cols, dhidden.stride(0), up.stride(0), dup.stride(0), hidden.stride(0),
            IN_PLACE=in_place, BLOCK=BLOCK,
        )  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """hidden = fwd(*inputs), and (gradients of the inputs side by side, hidden) = bwd(dhidden, *inputs).

    bwd_: the same in place, each gradient where its input is and hidden where dhidden is. slots: what the inputs are
    called as slots, each a linear layer's output. gated: the second is multiplied by the SiLU of the first, which is a
    slot (act) of its own.
    """

    slots: tuple[str, ...]
    fwd: Callable[..., Tensor]
    bwd: Callable[..., tuple[Tensor, Tensor]]
    bwd_: Callable[..., None]
    gated: bool


SILU_MUL = Activation(("gate", "up"), silu_mul_fwd, silu_mul_bwd, silu_mul_bwd_, gated=True)
GELU = Activation(("up",), gelu_fwd, gelu_bwd, gelu_bwd_, gated=False)
