"""SiLU-Hadamard product, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators import reference
from operators.dispatch import device_guard, use_triton

BLOCK = 1024


@triton.jit
def silu_mul_tile(gate, up):
    """hidden of fp32 tiles gate and up."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_mul_grad_tile(dhidden, gate, up):
    """dgate, dup, hidden of fp32 tiles."""
    sigmoid = tl.sigmoid(gate)
    act = gate * sigmoid
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    return dgate, dhidden * act, act * up


@triton.jit(do_not_specialize=["n_elements"])
def _silu_mul_fwd_kernel(gate_ptr, up_ptr, hidden_ptr, n_elements, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n_elements
    gate = tl.load(gate_ptr + index, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + index, silu_mul_tile(gate, up).to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_elements"])
def _silu_mul_bwd_kernel(
    dhidden_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden_ptr, n_elements, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n_elements
    dhidden = tl.load(dhidden_ptr + index, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + index, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + index, mask=mask, other=0.0).to(tl.float32)
    dgate, dup, hidden = silu_mul_grad_tile(dhidden, gate, up)
    tl.store(dgate_ptr + index, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + index, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    tl.store(hidden_ptr + index, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


def silu_mul_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """reference.silu_mul_fwd on any device: gate, up [T, F] to hidden [T, F]."""
    if not use_triton(gate):
        return reference.silu_mul_fwd(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    hidden = torch.empty_like(gate)
    with device_guard(gate):
        _silu_mul_fwd_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, hidden, gate.numel(), BLOCK=BLOCK)
    return hidden


def silu_mul_bwd(dhidden: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """reference.silu_mul_bwd on any device: dgate, dup and hidden [T, F]."""
    if not use_triton(dhidden):
        return reference.silu_mul_bwd(dhidden, gate, up)
    dhidden, gate, up = (t.contiguous() for t in (dhidden, gate, up))
    dgate, dup, hidden = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    with device_guard(gate):
        _silu_mul_bwd_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            dhidden, gate, up, dgate, dup, hidden, gate.numel(), BLOCK=BLOCK
        )
    return dgate, dup, hidden
