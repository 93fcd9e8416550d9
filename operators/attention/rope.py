"""Rotary position embedding, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import cdiv, device_guard, next_power_of_2, use_triton


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
    """reference.rope on any device: x [B, S, H, D] rotated by cos, sin [B or 1, S, D], contiguous, in x's dtype.

    Allocates its result alone on a GPU, if x has unit stride along D and cos, sin are contiguous.
    """
    if not use_triton(x):
        return reference.rope(x, cos, sin, inverse).to(x.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, seq_len, n_heads, head_dim = x.shape
    y = torch.empty(batch, seq_len, n_heads, head_dim, dtype=x.dtype, device=x.device)
    block_half = next_power_of_2(head_dim // 2)
    block_heads = min(next_power_of_2(n_heads), max(1, 2048 // block_half))
    with device_guard(x):
        _rope_kernel[(batch * seq_len, cdiv(n_heads, block_heads))](
            x, cos, sin, y, seq_len, n_heads, head_dim // 2, *x.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0,
            SIGN=-1 if inverse else 1, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["seq_len"])
def _rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dy_ptr, seq_len, q_heads, k_heads, half, q_blocks, k_blocks,
    q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head,
    v_stride_batch, v_stride_seq, v_stride_head, stride_cos_batch, stride_dy,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, pos = token // seq_len, token % seq_len
    dim = tl.arange(0, BLOCK_HALF)
    angle = batch * stride_cos_batch + pos * 2 * half + dim
    cos = tl.load(cos_ptr + angle, mask=dim < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=dim < half, other=0.0).to(tl.float32)[None, :]
    block = tl.program_id(1)
    head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    to = token * stride_dy + dim[None, :]
    if block < q_blocks:
        mask = (head < q_heads)[:, None] & (dim < half)[None, :]
        offset = batch * q_stride_batch + pos * q_stride_seq + head[:, None] * q_stride_head + dim[None, :]
        _rotate_back(dq_ptr + offset, dy_ptr + to + head[:, None] * 2 * half, cos, sin, half, mask)
    elif block < q_blocks + k_blocks:
        head -= q_blocks * BLOCK_HEADS
        mask = (head < k_heads)[:, None] & (dim < half)[None, :]
        offset = batch * k_stride_batch + pos * k_stride_seq + head[:, None] * k_stride_head + dim[None, :]
        _rotate_back(dk_ptr + offset, dy_ptr + to + (q_heads + head[:, None]) * 2 * half, cos, sin, half, mask)
    else:
        head -= (q_blocks + k_blocks) * BLOCK_HEADS
        mask = (head < k_heads)[:, None] & (dim < half)[None, :]
        offset = batch * v_stride_batch + pos * v_stride_seq + head[:, None] * v_stride_head + dim[None, :]
        into = dy_ptr + to + (q_heads + k_heads + head[:, None]) * 2 * half
        tl.store(into, tl.load(dv_ptr + offset, mask=mask, other=0.0), mask=mask)
        tl.store(into + half, tl.load(dv_ptr + offset + half, mask=mask, other=0.0), mask=mask)


@triton.jit
def _rotate_back(d_ptr, dy_ptr, cos, sin, half, mask):
    """The opposite rotation of the two halves at d_ptr and d_ptr + half."""
    d1 = tl.load(d_ptr, mask=mask, other=0.0).to(tl.float32)
    d2 = tl.load(d_ptr + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(dy_ptr, (d1 * cos + d2 * sin).to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(dy_ptr + half, (d2 * cos - d1 * sin).to(dy_ptr.dtype.element_ty), mask=mask)


def rope_bwd(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, dy: Tensor | None = None) -> Tensor:
    """Gradients of q, k before RoPE and of v, side by side [T, N]; dq, dk, dv [B, S, H, D] of any strides.

    dy [T, N or more]: where to write them, else they are all that is allocated on a GPU.
    """
    batch, seq_len, q_heads, head_dim = dq.shape
    width = (q_heads + 2 * dk.shape[2]) * head_dim
    dy = dq.new_empty(batch * seq_len, width) if dy is None else dy
    if not use_triton(dq):
        dq, dk = (rope(d, cos, sin, inverse=True) for d in (dq, dk))
        torch.cat([d.reshape(batch * seq_len, -1) for d in (dq, dk, dv)], dim=1, out=dy[:, :width])
        return dy
    dq, dk, dv = (d if d.stride(-1) == 1 else d.contiguous() for d in (dq, dk, dv))
    cos, sin = cos.contiguous(), sin.contiguous()
    k_heads = dk.shape[2]
    block_half = next_power_of_2(head_dim // 2)
    block_heads = min(next_power_of_2(k_heads), max(1, 2048 // block_half))
    q_blocks, k_blocks = cdiv(q_heads, block_heads), cdiv(k_heads, block_heads)
    with device_guard(dq):
        _rope_bwd_kernel[(batch * seq_len, q_blocks + 2 * k_blocks)](
            dq, dk, dv, cos, sin, dy, seq_len, q_heads, k_heads, head_dim // 2, q_blocks, k_blocks,
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0,
            dy.stride(0), BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        )  # fmt: skip
    return dy
