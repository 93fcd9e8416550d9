"""Rotary position embedding, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators import reference
from operators.dispatch import device_guard, use_triton


@triton.jit(do_not_specialize=["seq_len"])
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, seq_len, n_heads, half, stride_batch, stride_seq, stride_head, stride_cos_batch,
    SIGN: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, pos = token // seq_len, token % seq_len
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)
    mask = (head < n_heads)[:, None] & (dim < half)[None, :]
    angle = batch * stride_cos_batch + pos * 2 * half + dim
    cos = tl.load(cos_ptr + angle, mask=dim < half, other=0.0).to(tl.float32)[None, :]
    sin = SIGN * tl.load(sin_ptr + angle, mask=dim < half, other=0.0).to(tl.float32)[None, :]
    x_offset = batch * stride_batch + pos * stride_seq + head[:, None] * stride_head + dim[None, :]
    x1 = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + x_offset + half, mask=mask, other=0.0).to(tl.float32)
    y_offset = (token * n_heads + head[:, None]) * 2 * half + dim[None, :]
    tl.store(y_ptr + y_offset, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + y_offset + half, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """reference.rope on any device: x [B, S, H, D] rotated by cos, sin [B or 1, S, D], contiguous, in x's dtype."""
    if not use_triton(x):
        return reference.rope(x, cos, sin, inverse).to(x.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, seq_len, n_heads, head_dim = x.shape
    y = torch.empty(batch, seq_len, n_heads, head_dim, dtype=x.dtype, device=x.device)
    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = min(triton.next_power_of_2(n_heads), max(1, 2048 // block_half))
    with device_guard(x):
        _rope_kernel[(batch * seq_len, triton.cdiv(n_heads, block_heads))](
            x, cos, sin, y, seq_len, n_heads, head_dim // 2, *x.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0,
            SIGN=-1 if inverse else 1, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        )  # fmt: skip
    return y
