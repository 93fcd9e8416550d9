"""Quantize and dequantize activations: channel statistics, group scales, uniform codes, packed bits.

The device functions quantize_tile and dequantize_tile are the whole format; fused kernels call them on their own
tiles, so that every kernel writes and reads the same bytes as reference.quantize.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators import reference
from operators.codebook import Codebook
from operators.dispatch import as_rows, device_guard, use_triton

LOG_SCALE_STEPS = tl.constexpr(reference.LOG_SCALE_STEPS)
MIDDLE_STEPS = tl.constexpr(reference.MIDDLE_STEPS)
SCALE_ZERO = tl.constexpr(reference.SCALE_ZERO)
WORD_DTYPE = {2: torch.int16, 3: torch.uint8, 4: torch.int32, 8: torch.int64}


@triton.jit
def quantize_tile(
    x, mean, inv_std, BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """x fp32 [R, N, W, 8] and its channel statistics to words [R, N, W] and the two scale bytes [R, N] of a group.

    x and mean must be 0 where there is no channel.
    """
    t = (x - mean) * inv_std
    exponent = tl.full([x.shape[0], x.shape[1]], SCALE_ZERO, tl.float32)
    middle = exponent
    if GROUPED:
        low = tl.minimum(tl.min(tl.min(t, axis=3), axis=2), 0.0)
        high = tl.maximum(tl.max(tl.max(t, axis=3), axis=2), 0.0)
        exponent = tl.log2(tl.maximum((high - low) / 2, 1e-30)) * LOG_SCALE_STEPS + SCALE_ZERO
        exponent = tl.minimum(tl.maximum(tl.floor(exponent + 0.5), 0.0), 255.0)
        inverse = tl.exp2(-(exponent - SCALE_ZERO) / LOG_SCALE_STEPS)
        middle = tl.floor((high + low) / 2 * inverse * MIDDLE_STEPS + SCALE_ZERO + 0.5)
        middle = tl.minimum(tl.maximum(middle, 0.0), 255.0)
        t = t * inverse[:, :, None, None] - ((middle - SCALE_ZERO) / MIDDLE_STEPS)[:, :, None, None]
    code = tl.floor(t * (1 / STEP) + CENTRE + 0.5)
    code = tl.minimum(tl.maximum(code, 0.0), float((1 << BITS) - 1))
    shift = tl.arange(0, 8)[None, None, None, :] * BITS
    if BITS == 8:
        words = tl.sum(code.to(tl.int64) << shift.to(tl.int64), axis=3)
    else:
        words = tl.sum(code.to(tl.int32) << shift, axis=3)
    return words, exponent.to(tl.uint8), middle.to(tl.uint8)


@triton.jit
def dequantize_tile(
    words, exponent, middle, mean, std, BITS: tl.constexpr, STEP: tl.constexpr,
    CENTRE: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Inverse of quantize_tile: fp32 [R, N, W, 8]."""
    shift = tl.arange(0, 8)[None, None, None, :] * BITS
    if BITS == 8:
        code = (words[:, :, :, None] >> shift.to(tl.int64)) & 255
    else:
        code = (words[:, :, :, None] >> shift) & ((1 << BITS) - 1)
    t = (code.to(tl.float32) - CENTRE) * STEP
    if GROUPED:
        half = tl.exp2((exponent.to(tl.float32) - SCALE_ZERO) / LOG_SCALE_STEPS)
        t = (t + ((middle.to(tl.float32) - SCALE_ZERO) / MIDDLE_STEPS)[:, :, None, None]) * half[:, :, None, None]
    return t * std + mean


@triton.jit
def store_scale(scale_ptr, unit, exponent, middle, mask, GROUPED: tl.constexpr):
    """Write the scale bytes of groups [R, N] at unit index."""
    if GROUPED:
        tl.store(scale_ptr + unit * 2, exponent, mask=mask)
        tl.store(scale_ptr + unit * 2 + 1, middle, mask=mask)


@triton.jit
def load_scale(scale_ptr, unit, mask, GROUPED: tl.constexpr):
    """Read the scale bytes that store_scale wrote."""
    exponent = tl.full(unit.shape, SCALE_ZERO, tl.uint8)
    middle = exponent
    if GROUPED:
        exponent = tl.load(scale_ptr + unit * 2, mask=mask, other=0)
        middle = tl.load(scale_ptr + unit * 2 + 1, mask=mask, other=0)
    return exponent, middle


@triton.jit
def store_words(codes_ptr, index, words, mask, BITS: tl.constexpr):
    """Write words [R, N, W] at word index; a 3-bit word is three single bytes, all others one access."""
    if BITS == 3:
        for p in tl.static_range(3):
            tl.store(codes_ptr + index * 3 + p, ((words >> (8 * p)) & 255).to(tl.uint8), mask=mask)
    else:
        tl.store(codes_ptr + index, words.to(codes_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_words(codes_ptr, index, mask, BITS: tl.constexpr):
    """Read words [R, N, W] that store_words wrote: int32, or int64 for 8 bit."""
    if BITS == 3:
        words = tl.load(codes_ptr + index * 3, mask=mask, other=0).to(tl.int32)
        words |= tl.load(codes_ptr + index * 3 + 1, mask=mask, other=0).to(tl.int32) << 8
        words |= tl.load(codes_ptr + index * 3 + 2, mask=mask, other=0).to(tl.int32) << 16
    elif BITS == 8:
        words = tl.load(codes_ptr + index, mask=mask, other=0)
    else:
        words = tl.load(codes_ptr + index, mask=mask, other=0).to(tl.int32)
    return words


@triton.jit
def tile_index(row, group, n_groups, GROUP: tl.constexpr):
    """Word index [R, N, W] and scale index [R, N] of rows [R] and groups [N]."""
    unit = row[:, None].to(tl.int64) * n_groups + group[None, :]
    word = unit[:, :, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, None, :]
    return word, unit


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_kernel(
    x_ptr, mean_ptr, std_ptr, codes_ptr, scale_ptr, n_rows, n_cols, n_groups, stride_row,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    col = group[:, None, None] * GROUP + tl.arange(0, GROUP // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    col_mask = col < n_cols
    mask = (row < n_rows)[:, None, None, None] & col_mask[None]
    x = tl.load(x_ptr + row[:, None, None, None].to(tl.int64) * stride_row + col[None], mask=mask, other=0.0)
    mean = tl.load(mean_ptr + col, mask=col_mask, other=0.0)[None]
    inv_std = 1.0 / tl.load(std_ptr + col, mask=col_mask, other=1.0)[None]
    words, exponent, middle = quantize_tile(x.to(tl.float32), mean, inv_std, BITS, STEP, CENTRE, GROUPED)
    word, unit = tile_index(row, group, n_groups, GROUP)
    unit_mask = (row < n_rows)[:, None] & (group < n_groups)[None, :]
    store_words(codes_ptr, word, words, unit_mask[:, :, None], BITS)
    store_scale(scale_ptr, unit, exponent, middle, unit_mask, GROUPED)


@triton.jit(do_not_specialize=["n_rows"])
def _dequantize_kernel(
    codes_ptr, scale_ptr, mean_ptr, std_ptr, x_ptr, n_rows, n_cols, n_groups,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    word, unit = tile_index(row, group, n_groups, GROUP)
    unit_mask = (row < n_rows)[:, None] & (group < n_groups)[None, :]
    words = load_words(codes_ptr, word, unit_mask[:, :, None], BITS)
    exponent, middle = load_scale(scale_ptr, unit, unit_mask, GROUPED)
    col = group[:, None, None] * GROUP + tl.arange(0, GROUP // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    col_mask = col < n_cols
    mean = tl.load(mean_ptr + col, mask=col_mask, other=0.0)[None]
    std = tl.load(std_ptr + col, mask=col_mask, other=1.0)[None]
    x = dequantize_tile(words, exponent, middle, mean, std, BITS, STEP, CENTRE, GROUPED)
    mask = (row < n_rows)[:, None, None, None] & col_mask[None]
    offset = row[:, None, None, None].to(tl.int64) * n_cols + col[None]
    tl.store(x_ptr + offset, x.to(x_ptr.dtype.element_ty), mask=mask)


def book_constants(book: Codebook) -> dict:
    """A code book as the constexpr arguments of a kernel."""
    return {
        "BITS": book.bits,
        "STEP": book.step,
        "CENTRE": book.centre,
        "GROUPED": book.grouped,
        "GROUP": book.group,
    }


def empty_packed(n_rows: int, n_cols: int, book: Codebook, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes uint8 [T, n, G/8, b] and scale uint8 [T, n, 2] ([T, 0, 2] without group scales)."""
    n_groups = triton.cdiv(n_cols, book.group)
    codes = torch.empty(n_rows, n_groups, book.group // 8, book.bits, dtype=torch.uint8, device=device)
    return codes, torch.empty(n_rows, n_groups * book.grouped, 2, dtype=torch.uint8, device=device)


def as_words(codes: Tensor, book: Codebook) -> Tensor:
    """The bytes of packed codes as the integer type that kernels load and store."""
    return codes.view(WORD_DTYPE[book.bits])


def quantize(x: Tensor, mean: Tensor, std: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """reference.quantize on any device: x [T, C] to codes uint8 [T, n, G/8, b] and scale uint8 [T, n, 2]."""
    if not use_triton(x):
        return reference.quantize(x, mean, std, book)
    x = as_rows(x)
    n_rows, n_cols = x.shape
    codes, scale = empty_packed(n_rows, n_cols, book, x.device)
    n_groups = codes.shape[1]
    blocks = {"BLOCK_ROWS": 16, "BLOCK_GROUPS": 4}
    grid = (triton.cdiv(n_rows, blocks["BLOCK_ROWS"]), triton.cdiv(n_groups, blocks["BLOCK_GROUPS"]))
    with device_guard(x):
        _quantize_kernel[grid](
            x, mean, std, as_words(codes, book), scale, n_rows, n_cols, n_groups, x.stride(0),
            **book_constants(book), **blocks,
        )  # fmt: skip
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, mean: Tensor, std: Tensor, book: Codebook, dtype: torch.dtype) -> Tensor:
    """reference.dequantize on any device: x [T, C] in dtype."""
    if not use_triton(codes):
        return reference.dequantize(codes, scale, mean, std, book, dtype)
    n_rows, n_groups = codes.shape[:2]
    x = torch.empty(n_rows, mean.numel(), dtype=dtype, device=codes.device)
    blocks = {"BLOCK_ROWS": 16, "BLOCK_GROUPS": 4}
    grid = (triton.cdiv(n_rows, blocks["BLOCK_ROWS"]), triton.cdiv(n_groups, blocks["BLOCK_GROUPS"]))
    with device_guard(codes):
        _dequantize_kernel[grid](
            as_words(codes, book), scale, mean, std, x, n_rows, mean.numel(), n_groups, **book_constants(book), **blocks
        )
    return x
