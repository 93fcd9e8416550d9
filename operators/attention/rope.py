"""Rotary position embedding, forward and backward, with the norm of each head before it where a family has one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import cdiv, device_guard, next_power_of_2, use_triton


@triton.jit
def _normalize(x1, x2, weight_ptr, dim, half, eps):
    """Of heads in halves [N, D / 2]: x_hat and weight, in halves too, and 1 / RMS [N, 1]."""
    rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * half) + eps)[:, None]
    w1 = tl.load(weight_ptr + dim, mask=dim < half, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight_ptr + half + dim, mask=dim < half, other=0.0).to(tl.float32)[None, :]
    return x1 * rstd, x2 * rstd, w1, w2, rstd


@triton.jit(do_not_specialize=["seq_len"])
def _rope_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, seq_len, n_heads, half, stride_batch, stride_seq, stride_head,
    stride_cos_batch, eps, NORM: tl.constexpr, SIGN: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
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
    if NORM:
        x1, x2, w1, w2, _ = _normalize(x1, x2, weight_ptr, dim, half, eps)
        # HF rounds x_hat to the input's dtype before the weight multiplies it
        dtype = x_ptr.dtype.element_ty
        x1, x2 = x1.to(dtype).to(tl.float32) * w1, x2.to(dtype).to(tl.float32) * w2
    y_offset = (token * n_heads + head[:, None]) * 2 * half + dim[None, :]
    tl.store(y_ptr + y_offset, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + y_offset + half, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over the D channels of each head: frozen weight [D], and eps; x: what was normalized, for backward."""

    weight: Tensor
    eps: float
    x: Tensor | None = None


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, norm: HeadNorm | None = None) -> Tensor:
    """reference.rope on any device: x [B, S, H, D] rotated by cos, sin [B or 1, S, D], contiguous, in x's dtype.

    norm: what x goes through before (reference.rms_norm_fwd of each head). Allocates its result alone on a GPU, if x
    has unit stride along D and cos, sin are contiguous.
    """
    if not use_triton(x):
        normalized = x if norm is None else reference.rms_norm_fwd(x, norm.weight, norm.eps)[0]
        return reference.rope(normalized, cos, sin, inverse).to(x.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, seq_len, n_heads, head_dim = x.shape
    y = torch.empty(batch, seq_len, n_heads, head_dim, dtype=x.dtype, device=x.device)
    block_half = next_power_of_2(head_dim // 2)
    block_heads = min(next_power_of_2(n_heads), max(1, 2048 // block_half))
    weight, eps = (x, 0.0) if norm is None else (norm.weight, norm.eps)
    with device_guard(x):
        _rope_kernel[(batch * seq_len, cdiv(n_heads, block_heads))](
            x, weight, cos, sin, y, seq_len, n_heads, head_dim // 2, *x.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0, eps, NORM=norm is not None,
            SIGN=-1 if inverse else 1, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["seq_len"])
def _rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dy_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr,
    seq_len, q_heads, k_heads, half, q_blocks, k_blocks,
    q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head,
    v_stride_batch, v_stride_seq, v_stride_head, stride_cos_batch, stride_dy, stride_q, stride_k, q_eps, k_eps,
    NORM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
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
        at = head[:, None] * 2 * half
        x_ptr = q_ptr + token * stride_q + at + dim[None, :]
        _rotate_back(dq_ptr + offset, x_ptr, q_weight_ptr, dy_ptr + to + at, cos, sin, dim, half, q_eps, mask, NORM)
    elif block < q_blocks + k_blocks:
        head -= q_blocks * BLOCK_HEADS
        mask = (head < k_heads)[:, None] & (dim < half)[None, :]
        offset = batch * k_stride_batch + pos * k_stride_seq + head[:, None] * k_stride_head + dim[None, :]
        x_ptr = k_ptr + token * stride_k + head[:, None] * 2 * half + dim[None, :]
        at = (q_heads + head[:, None]) * 2 * half
        _rotate_back(dk_ptr + offset, x_ptr, k_weight_ptr, dy_ptr + to + at, cos, sin, dim, half, k_eps, mask, NORM)
    else:
        head -= (q_blocks + k_blocks) * BLOCK_HEADS
        mask = (head < k_heads)[:, None] & (dim < half)[None, :]
        offset = batch * v_stride_batch + pos * v_stride_seq + head[:, None] * v_stride_head + dim[None, :]
        into = dy_ptr + to + (q_heads + k_heads + head[:, None]) * 2 * half
        tl.store(into, tl.load(dv_ptr + offset, mask=mask, other=0.0), mask=mask)
        tl.store(into + half, tl.load(dv_ptr + offset + half, mask=mask, other=0.0), mask=mask)


@triton.jit
def _rotate_back(d_ptr, x_ptr, weight_ptr, dy_ptr, cos, sin, dim, half, eps, mask, NORM: tl.constexpr):
    """The opposite rotation of the two halves at d_ptr and d_ptr + half, and the gradient through the norm of x."""
    d1 = tl.load(d_ptr, mask=mask, other=0.0).to(tl.float32)
    d2 = tl.load(d_ptr + half, mask=mask, other=0.0).to(tl.float32)
    g1, g2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
    if NORM:
        x1 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + half, mask=mask, other=0.0).to(tl.float32)
        x1, x2, w1, w2, rstd = _normalize(x1, x2, weight_ptr, dim, half, eps)
        g1, g2 = g1 * w1, g2 * w2
        mean = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / (2 * half))[:, None]
        g1, g2 = (g1 - x1 * mean) * rstd, (g2 - x2 * mean) * rstd
    tl.store(dy_ptr, g1.to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(dy_ptr + half, g2.to(dy_ptr.dtype.element_ty), mask=mask)


def rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor | None, sin: Tensor | None, dy: Tensor | None = None,
    norms: Sequence[HeadNorm] = (),
) -> Tensor:  # fmt: skip
    """Gradients of q, k before RoPE and of v, side by side [T, N]; dq, dk, dv [B, S, H, D] of any strides.

    cos, sin: None where nothing was rotated. dy [T, N or more]: where to write them, which may be where dq, dk and dv
    are, side by side; else they are all that is allocated on a GPU. norms: those of q and of k, if they have any, with
    their x [T, H D]; gradients are of x then.
    """
    batch, seq_len, q_heads, head_dim = dq.shape
    width = (q_heads + 2 * dk.shape[2]) * head_dim
    dy = dq.new_empty(batch * seq_len, width) if dy is None else dy
    if cos is None or not use_triton(dq):
        heads = [d if cos is None else rope(d, cos, sin, inverse=True) for d in (dq, dk)]
        if norms:
            heads = [_norm_bwd(d, norm) for d, norm in zip(heads, norms, strict=True)]
        parts = [d.reshape(batch * seq_len, -1) for d in (*heads, dv)]
        for place, part in zip(dy[:, :width].split([part.shape[1] for part in parts], dim=1), parts, strict=True):
            place.copy_(part)  # nothing where it is there already
        return dy
    dq, dk, dv = (d if d.stride(-1) == 1 else d.contiguous() for d in (dq, dk, dv))
    cos, sin = cos.contiguous(), sin.contiguous()
    k_heads = dk.shape[2]
    block_half = next_power_of_2(head_dim // 2)
    block_heads = min(next_power_of_2(k_heads), max(1, 2048 // block_half))
    q_blocks, k_blocks = cdiv(q_heads, block_heads), cdiv(k_heads, block_heads)
    q_norm, k_norm = norms or (HeadNorm(dq, 0.0, dq), HeadNorm(dk, 0.0, dk))
    with device_guard(dq):
        _rope_bwd_kernel[(batch * seq_len, q_blocks + 2 * k_blocks)](
            dq, dk, dv, cos, sin, dy, q_norm.x, k_norm.x, q_norm.weight, k_norm.weight,
            seq_len, q_heads, k_heads, head_dim // 2, q_blocks, k_blocks,
            *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0,
            dy.stride(0), q_norm.x.stride(0), k_norm.x.stride(0), q_norm.eps, k_norm.eps,
            NORM=len(norms) > 0, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        )  # fmt: skip
    return dy


def _norm_bwd(d: Tensor, norm: HeadNorm) -> Tensor:
    """The gradient of norm.x from that of the normalized heads, d [B, S, H, D]."""
    _, x_hat, rstd = reference.rms_norm_fwd(norm.x.view(d.shape), norm.weight, norm.eps)
    return reference.rms_norm_bwd(d, x_hat, rstd, norm.weight)
