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
from operators.dispatch import as_rows, cdiv, device_guard, use_triton

SCALE_ZERO = tl.constexpr(reference.SCALE_ZERO)
LOG_SCALE_STEPS = tl.constexpr(reference.LOG_SCALE_STEPS)
LOG_SCALE_STEP = tl.constexpr(1 / reference.LOG_SCALE_STEPS)
MIDDLE_STEPS = tl.constexpr(reference.MIDDLE_STEPS)
MIDDLE_STEP = tl.constexpr(1 / reference.MIDDLE_STEPS)
BLOCK_ROWS, BLOCK_GROUPS = 8, 16


@triton.jit
def quantize_tile(x, mean, std, BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr):
    """x fp32 [R, N, W, 8] and its channel statistics to codes int32 [R, N, W, 8] and two scale bytes [R, N] a group.

    x and mean must be 0 where there is no channel.
    """
    inv_std = 1.0 / std
    t = x * inv_std - mean * inv_std
    exponent = tl.full([x.shape[0], x.shape[1]], SCALE_ZERO, tl.float32)
    middle = exponent
    if GROUPED:
        low = tl.minimum(tl.min(tl.min(t, axis=3), axis=2), 0.0)
        high = tl.maximum(tl.max(tl.max(t, axis=3), axis=2), 0.0)
        exponent = tl.log2(tl.maximum((high - low) * 0.5, 1e-30)) * LOG_SCALE_STEPS + (SCALE_ZERO + 0.5)
        exponent = tl.floor(tl.minimum(tl.maximum(exponent, 0.0), 255.0))
        inverse = tl.exp2((exponent - SCALE_ZERO) * -LOG_SCALE_STEP)
        middle = (high + low) * 0.5 * inverse * MIDDLE_STEPS + (SCALE_ZERO + 0.5)
        middle = tl.floor(tl.minimum(tl.maximum(middle, 0.0), 255.0))
        zero = (middle - SCALE_ZERO) * (-MIDDLE_STEP / STEP) + (CENTRE + 0.5)
        t = t * (inverse * (1 / STEP))[:, :, None, None] + zero[:, :, None, None]
    else:
        t = t * (1 / STEP) + (CENTRE + 0.5)
    # the conversion truncates, which is floor from 0 on
    code = tl.minimum(tl.maximum(t, 0.0), float((1 << BITS) - 1)).to(tl.int32)
    return code, exponent.to(tl.uint8), middle.to(tl.uint8)


@triton.jit
def dequantize_tile(code, exponent, middle, mean, std, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr):
    """Inverse of quantize_tile: fp32 [R, N, W, 8]."""
    if GROUPED:
        half = tl.exp2((exponent.to(tl.float32) - SCALE_ZERO) * LOG_SCALE_STEP)
        zero = ((middle.to(tl.float32) - SCALE_ZERO) * MIDDLE_STEP - CENTRE * STEP) * half
        t = code.to(tl.float32) * (half * STEP)[:, :, None, None] + zero[:, :, None, None]
    else:
        t = (code.to(tl.float32) - CENTRE) * STEP
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
def store_codes(codes_ptr, word, code, mask, BITS: tl.constexpr):
    """Pack codes [R, N, W, 8] into the words at index [R, N, W]; mask [R, N, W]."""
    lane = tl.arange(0, 8)[None, None, None, :]
    if BITS == 8:
        tl.store(codes_ptr + word[:, :, :, None] * 8 + lane, code.to(tl.uint8), mask=mask[:, :, :, None])
    else:
        words = tl.sum(code << (lane * BITS), axis=3)
        if BITS == 3:
            for p in tl.static_range(3):
                tl.store(codes_ptr + word * 3 + p, ((words >> (8 * p)) & 255).to(tl.uint8), mask=mask)
        else:
            tl.store(codes_ptr + word, words.to(codes_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_codes(codes_ptr, word, mask, BITS: tl.constexpr):
    """The integer codes [R, N, W, 8] that store_codes packed."""
    lane = tl.arange(0, 8)[None, None, None, :]
    if BITS == 8:
        code = tl.load(codes_ptr + word[:, :, :, None] * 8 + lane, mask=mask[:, :, :, None], other=0).to(tl.int32)
    else:
        if BITS == 3:
            words = tl.load(codes_ptr + word * 3, mask=mask, other=0).to(tl.int32)
            words |= tl.load(codes_ptr + word * 3 + 1, mask=mask, other=0).to(tl.int32) << 8
            words |= tl.load(codes_ptr + word * 3 + 2, mask=mask, other=0).to(tl.int32) << 16
        else:
            words = tl.load(codes_ptr + word, mask=mask, other=0).to(tl.int32)
        code = (words[:, :, :, None] >> (lane * BITS)) & ((1 << BITS) - 1)
    return code


@triton.jit
def tile_index(row, group, n_groups, one, GROUP: tl.constexpr):
    """Word index [R, N, W] and scale index [R, N] of rows [R] and groups [N], int32 relative to the tile's first row.

    one is 1, but the compiler must not know: it would give a thread several neighbouring words to load, which are then
    spread over the threads again through shared memory, because a thread's 8 codes fill its widest access to x.
    """
    unit = row[:, None] * n_groups + group[None, :]
    word = (unit[:, :, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, None, :]) * one
    return word, unit


@triton.jit
def rows_of_codes(codes_ptr, row, n_groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Pointer to the first word of a row (int64): 16 or 32 bits wide for 2 and 4 bit codes, bytes for the others."""
    codes_ptr += row * n_groups * (GROUP // 8 * BITS)
    if BITS == 2:
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    elif BITS == 4:
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return codes_ptr


@triton.jit
def tile_columns(group, GROUP: tl.constexpr):
    """Channels [N, W, 8] of groups [N]."""
    word = tl.arange(0, GROUP // 8)[None, :, None]
    return group[:, None, None] * GROUP + word * 8 + tl.arange(0, 8)[None, None, :]


@triton.jit
def pick_outliers(x, slot_ptr, kept_ptr, row, col, mask, live, n_outliers):
    """x [R, N, W, 8] with the exact values of the outlier channels [N, W, 8] put in; slot is -1 for all others."""
    slot = tl.load(slot_ptr + col, mask=mask, other=-1)[None]
    at = row[:, None, None, None] * n_outliers + slot
    kept = tl.load(kept_ptr + at, mask=(slot >= 0) & live[:, None, None, None], other=0.0)
    return tl.where(slot >= 0, kept.to(tl.float32), x)


@triton.jit
def keep_outliers(x, slot_ptr, kept_ptr, row, col, mask, live, n_outliers):
    """Write the outlier channels [N, W, 8] of x [R, N, W, 8] to kept [R, n_outliers]."""
    slot = tl.load(slot_ptr + col, mask=mask, other=-1)[None]
    at = row[:, None, None, None] * n_outliers + slot
    tl.store(kept_ptr + at, x.to(kept_ptr.dtype.element_ty), mask=(slot >= 0) & live[:, None, None, None])


@triton.jit(do_not_specialize=["n_rows", "one"])
def _quantize_kernel(
    x_ptr, mean_ptr, std_ptr, codes_ptr, scale_ptr, slot_ptr, kept_ptr,
    n_rows, n_cols, n_groups, stride_row, n_outliers, one,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    col = tile_columns(group, GROUP)
    live, inside = row < n_rows - first, col < n_cols
    x = tl.load(
        x_ptr + first * stride_row + (row[:, None, None, None] * stride_row + col[None]),
        mask=live[:, None, None, None] & inside[None], other=0.0,
    )  # fmt: skip
    mean = tl.load(mean_ptr + col, mask=inside, other=0.0)[None]
    std = tl.load(std_ptr + col, mask=inside, other=1.0)[None]
    code, exponent, middle = quantize_tile(x.to(tl.float32), mean, std, BITS, STEP, CENTRE, GROUPED)
    word, unit = tile_index(row, group, n_groups, one, GROUP)
    mask = live[:, None] & (group < n_groups)[None, :]
    store_codes(rows_of_codes(codes_ptr, first, n_groups, BITS, GROUP), word, code, mask[:, :, None], BITS)
    store_scale(scale_ptr + first * n_groups * 2, unit, exponent, middle, mask, GROUPED)
    if OUTLIERS:
        keep_outliers(x, slot_ptr, kept_ptr + first * n_outliers, row, col, inside, live, n_outliers)


@triton.jit(do_not_specialize=["n_rows", "one"])
def _dequantize_kernel(
    codes_ptr, scale_ptr, mean_ptr, std_ptr, slot_ptr, kept_ptr, weight_ptr, x_ptr,
    n_rows, n_cols, n_groups, n_outliers, one,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, OUTLIERS: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    col = tile_columns(group, GROUP)
    live, inside = row < n_rows - first, col < n_cols
    word, unit = tile_index(row, group, n_groups, one, GROUP)
    mask = live[:, None] & (group < n_groups)[None, :]
    code = load_codes(rows_of_codes(codes_ptr, first, n_groups, BITS, GROUP), word, mask[:, :, None], BITS)
    exponent, middle = load_scale(scale_ptr + first * n_groups * 2, unit, mask, GROUPED)
    mean = tl.load(mean_ptr + col, mask=inside, other=0.0)[None]
    std = tl.load(std_ptr + col, mask=inside, other=1.0)[None]
    x = dequantize_tile(code, exponent, middle, mean, std, STEP, CENTRE, GROUPED)
    if OUTLIERS:
        x = pick_outliers(x, slot_ptr, kept_ptr + first * n_outliers, row, col, inside, live, n_outliers)
    if WEIGHTED:
        x *= tl.load(weight_ptr + col, mask=inside, other=0.0)[None].to(tl.float32)
    tl.store(
        x_ptr + first * n_cols + (row[:, None, None, None] * n_cols + col[None]),
        x.to(x_ptr.dtype.element_ty), mask=live[:, None, None, None] & inside[None],
    )  # fmt: skip


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
    n_groups = cdiv(n_cols, book.group)
    codes = torch.empty(n_rows, n_groups, book.group // 8, book.bits, dtype=torch.uint8, device=device)
    return codes, torch.empty(n_rows, n_groups * book.grouped, 2, dtype=torch.uint8, device=device)


def _grid(n_rows: int, n_groups: int) -> tuple[int, int]:
    return cdiv(n_rows, BLOCK_ROWS), cdiv(n_groups, BLOCK_GROUPS)


def quantize(
    x: Tensor, mean: Tensor, std: Tensor, book: Codebook, slots: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """reference.quantize on any device: x [T, C] to codes uint8 [T, n, G/8, b] and scale uint8 [T, n, 2].

    With slots (int32 [C], the column of kept for an outlier channel, else -1) these channels are written to kept.
    """
    if not use_triton(x):
        if kept is not None:
            kept.copy_(x[:, slots >= 0])
        return reference.quantize(x, mean, std, book)
    x = as_rows(x)
    n_rows, n_cols = x.shape
    codes, scale = empty_packed(n_rows, n_cols, book, x.device)
    n_groups = codes.shape[1]
    with device_guard(x):
        _quantize_kernel[_grid(n_rows, n_groups)](
            x, mean, std, codes, scale, mean if kept is None else slots, x if kept is None else kept,
            n_rows, n_cols, n_groups, x.stride(0), 0 if kept is None else kept.shape[1], 1,
            **book_constants(book), OUTLIERS=kept is not None, BLOCK_ROWS=BLOCK_ROWS, BLOCK_GROUPS=BLOCK_GROUPS,
        )  # fmt: skip
    return codes, scale


def dequantize(
    codes: Tensor, scale: Tensor, mean: Tensor, std: Tensor, book: Codebook, dtype: torch.dtype,
    slots: Tensor | None = None, kept: Tensor | None = None, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """reference.dequantize on any device: x [T, C] in dtype, outlier channels from kept, times weight [C] if given."""
    if not use_triton(codes):
        x = reference.dequantize(codes, scale, mean, std, book, torch.float32)
        if kept is not None:
            x[:, slots >= 0] = kept.float()
        return (x if weight is None else x * weight.float()).to(dtype)
    n_rows, n_groups = codes.shape[:2]
    x = torch.empty(n_rows, mean.numel(), dtype=dtype, device=codes.device)
    with device_guard(codes):
        _dequantize_kernel[_grid(n_rows, n_groups)](
            codes, scale, mean, std, mean if kept is None else slots, x if kept is None else kept,
            mean if weight is None else weight, x, n_rows, mean.numel(), n_groups,
            0 if kept is None else kept.shape[1], 1, **book_constants(book), OUTLIERS=kept is not None,
            WEIGHTED=weight is not None, BLOCK_ROWS=BLOCK_ROWS, BLOCK_GROUPS=BLOCK_GROUPS,
        )  # fmt: skip
    return x
