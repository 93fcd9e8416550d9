"""Quantize and dequantize activations: channel statistics, group scales, uniform codes, packed bits.

The device functions quantize_tile and dequantize_tile are the whole format; fused kernels call them on their own
tiles, so that every kernel writes and reads the same bytes as reference.quantize.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import as_rows, cdiv, device_guard, use_triton
from hyclora.operators.packing.codebook import Codebook, book_constants
from hyclora.operators.packing.layout import carve, packed_shapes
from hyclora.operators.packing.programs import PACK_TILE, UNPACK_TILE, grid_of, row_constants, tile_of

SCALE_ZERO = tl.constexpr(reference.SCALE_ZERO)
LOG_SCALE_STEPS = tl.constexpr(reference.LOG_SCALE_STEPS)
LOG_SCALE_STEP = tl.constexpr(1 / reference.LOG_SCALE_STEPS)
MIDDLE_STEPS = tl.constexpr(reference.MIDDLE_STEPS)
MIDDLE_STEP = tl.constexpr(1 / reference.MIDDLE_STEPS)
# numbers whose bits put an integer into a float's mantissa, or take it from there
MANTISSA = tl.constexpr(23)
INTEGERS, INTEGERS_BITS = tl.constexpr(2.0**23), tl.constexpr(0x4B000000)
ONE_BITS = tl.constexpr(0x3F800000)
# half a range by this, to the 8th power, has the exponent byte as its own exponent
RANGE_TO_POWER = tl.constexpr(0.5 * 2 ** (1.5 / 8))
ROWS_A_PROGRAM = 4


@triton.jit
def to_words(x, GROUP: tl.constexpr):
    """[R, C] as [R, N, W, 8]: groups, words of a group, channels of a word.

    Global memory is accessed in two dimensions only: from four, compilers spread neighbouring threads over rows.
    """
    return tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP // 8, 8))


@triton.jit
def to_float(x):
    """x in fp32. bfloat16 is its upper half: one instruction, where a conversion takes two for each odd element."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_channels(ptr, col, inside, GROUP: tl.constexpr):
    """fp32 [1, N, W, 8] of a vector over channels [C]; 0 outside."""
    return to_words(to_float(tl.load(ptr + col[None, :], mask=inside[None, :], other=0.0)), GROUP)


@triton.jit
def store_tile(x_ptr, x, row, col, stride_row, live, inside):
    """Write [R, N, W, 8] to x at rows [R] and channels [C]."""
    x = tl.reshape(x, (row.shape[0], col.shape[0])).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row[:, None] * stride_row + col[None, :], x, mask=live[:, None] & inside[None, :])


@triton.jit
def round_to_code(t, LAST: tl.constexpr):
    """The integer in [0, LAST] nearest to t * LAST, int32.

    A clamp to [0, 1] is free in the instruction that computed t. The sum is rounded to an integer, which is then the
    low bits of its mantissa: a conversion would run at an eighth of the rate.
    """
    t = tl.minimum(tl.maximum(t, 0.0), 1.0) * LAST + INTEGERS
    return t.to(tl.int32, bitcast=True) - INTEGERS_BITS


@triton.jit
def normalised(x, mean, inv_std):
    """Not x * inv_std - mean * inv_std, which cancels where a channel hardly varies."""
    return (x - mean) * inv_std


@triton.jit
def quantize_tile(
    x, mean, inv_std, BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    low=0.0, high=0.0,
):  # fmt: skip
    """x fp32 [R, N, W, 8] and its channel statistics to codes int32 [R, N, W, 8] and scale int32 [R, N] of a group.

    x, mean and inv_std must be 0 where there is no channel. scale is both bytes, the exponent the lower one. low, high:
    what the range of a group has to include, 0 and what of it is not in x.
    """
    LAST: tl.constexpr = (1 << BITS) - 1
    t = normalised(x, mean, inv_std)
    scale = tl.zeros([x.shape[0], x.shape[1]], tl.int32)
    if GROUPED:
        low = tl.minimum(tl.min(tl.min(t, axis=3), axis=2), low)
        high = tl.maximum(tl.max(tl.max(t, axis=3), axis=2), high)
        # floor(8 log2) is the exponent of the 8th power; where a float's exponent ends the byte ends as well
        power = (high - low) * RANGE_TO_POWER
        power *= power
        power *= power
        power *= power
        exponent = power.to(tl.int32, bitcast=True) >> MANTISSA
        inverse = tl.exp2((exponent.to(tl.float32) - SCALE_ZERO) * -LOG_SCALE_STEP)
        middle = round_to_code((high + low) * (inverse * (0.5 * MIDDLE_STEPS / 255)) + SCALE_ZERO / 255, 255)
        zero = (middle.to(tl.float32) - SCALE_ZERO) * (-MIDDLE_STEP / STEP / LAST) + CENTRE / LAST
        t = t * (inverse * (1 / STEP / LAST))[:, :, None, None] + zero[:, :, None, None]
        scale = exponent | (middle << 8)
    else:
        t = t * (1 / STEP / LAST) + CENTRE / LAST
    return round_to_code(t, LAST), scale


@triton.jit
def dequantize_tile(
    code, scale, mean, std, BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr
):
    """Inverse of quantize_tile: fp32 [R, N, W, 8]; here scale is that of each word, int32 [R, N, W]."""
    # 1 + code / 2^BITS has the code as the top of its mantissa, exactly, and the scale undoes both
    t = ((code << (MANTISSA - BITS)) | ONE_BITS).to(tl.float32, bitcast=True)
    SPREAD: tl.constexpr = STEP * (1 << BITS)
    if GROUPED:
        half = tl.exp2(((scale & 255).to(tl.float32) - SCALE_ZERO) * LOG_SCALE_STEP)
        zero = (((scale >> 8) & 255).to(tl.float32) - SCALE_ZERO) * MIDDLE_STEP - (CENTRE * STEP + SPREAD)
        t = t * (half * SPREAD)[:, :, :, None] + (zero * half)[:, :, :, None]
    else:
        t = t * SPREAD - (CENTRE * STEP + SPREAD)
    return t * std + mean


@triton.jit
def store_packed(
    codes_ptr, scale_ptr, code, scale, first, row, first_group, live, n_groups,
    BITS: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Pack codes [R, N, S, K] and scales [R, N] of rows first + [R] and groups first_group + [N].

    S: the shares of a group, one a thread, of K channels: a word or two.
    """
    n_shares: tl.constexpr = code.shape[2]
    n_words: tl.constexpr = code.shape[1] * (GROUP // 8)
    word = first_group * (GROUP // 8) + tl.arange(0, n_words)
    words_a_row = n_groups * (GROUP // 8)
    codes_ptr += first * words_a_row * BITS
    if BITS == 8:
        byte = first_group * GROUP + tl.arange(0, n_words * 8)
        inside = live[:, None] & (byte < words_a_row * 8)[None, :]
        place = codes_ptr + (row[:, None] * (words_a_row * 8) + byte[None, :])
        tl.store(place, tl.reshape(code, inside.shape).to(tl.uint8), mask=inside)
    else:
        code = tl.reshape(code, (code.shape[0], n_words, 8))
        words = tl.sum(code << (tl.arange(0, 8)[None, None, :] * BITS), axis=2)
        if BITS == 3:
            # 48 bits of two words are three pieces of 16
            first_word, second = tl.split(tl.reshape(words, (code.shape[0], n_words // 2, 2)))
            pair = first_group * (GROUP // 16) + tl.arange(0, n_words // 2)
            place = codes_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
            place += (row[:, None] * (words_a_row // 2) + pair[None, :]) * 3
            inside = live[:, None] & (pair < words_a_row // 2)[None, :]
            tl.store(place, first_word.to(tl.int16), mask=inside)
            tl.store(place + 1, ((first_word >> 16) | (second << 8)).to(tl.int16), mask=inside)
            tl.store(place + 2, (second >> 8).to(tl.int16), mask=inside)
        else:
            index = row[:, None] * words_a_row + word[None, :]
            inside = live[:, None] & (word < words_a_row)[None, :]
            if BITS == 2:
                place = codes_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + index
                tl.store(place, words.to(tl.int16), mask=inside)
            else:
                tl.store(codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + index, words, mask=inside)
    if GROUPED:
        # every thread of a group has its scale: the first stores it, and no thread needs another's
        share = first_group * n_shares + tl.arange(0, scale.shape[1] * n_shares)
        inside = live[:, None] & (share % n_shares == 0)[None, :] & (share < n_groups * n_shares)[None, :]
        place = scale_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + first * n_groups
        place += row[:, None] * n_groups + share[None, :] // n_shares
        scale = tl.broadcast_to(scale[:, :, None], (scale.shape[0], scale.shape[1], n_shares))
        tl.store(place, tl.reshape(scale, inside.shape).to(tl.int16), mask=inside)


@triton.jit
def load_words(
    codes_ptr, scale_ptr, first, row, first_group, live, n_groups,
    N: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr, IN_ORDER: tl.constexpr = False,
):  # fmt: skip
    """What unpack_words takes, of N groups: words [R, NW] (8 bit: bytes [R, C]) and the scale of each word [R, NW].

    IN_ORDER: not before the volatile loads above, which ptxas would put off until these have arrived and are used.
    """
    n_words: tl.constexpr = N * (GROUP // 8)
    word = first_group * (GROUP // 8) + tl.arange(0, n_words)
    words_a_row = n_groups * (GROUP // 8)
    codes_ptr += first * words_a_row * BITS
    mask = live[:, None] & (word < words_a_row)[None, :]
    index = row[:, None] * words_a_row + word[None, :]
    if BITS == 8:
        byte = first_group * GROUP + tl.arange(0, N * GROUP)
        inside = live[:, None] & (byte < words_a_row * 8)[None, :]
        place = codes_ptr + (row[:, None] * (words_a_row * 8) + byte[None, :])
        words = tl.load(place, mask=inside, other=0, volatile=IN_ORDER)
    elif BITS == 3:
        # 24 bits lie in two neighbours of 16, from the first byte or from the second
        place = codes_ptr.to(tl.pointer_type(tl.uint16), bitcast=True) + (index // 2 * 3 + index % 2)
        words = tl.load(place, mask=mask, other=0, volatile=IN_ORDER).to(tl.int32)
        words |= tl.load(place + 1, mask=mask, other=0, volatile=IN_ORDER).to(tl.int32) << 16
        words >>= index % 2 * 8
    else:
        place = codes_ptr.to(tl.pointer_type(tl.int16 if BITS == 2 else tl.int32), bitcast=True) + index
        words = tl.load(place, mask=mask, other=0, volatile=IN_ORDER)
    scale = tl.zeros([row.shape[0], n_words], tl.int16)
    if GROUPED:
        # a load for each thread that needs it is cheaper than an exchange
        scale_ptr = scale_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + first * n_groups
        place = scale_ptr + (row[:, None] * n_groups + word[None, :] // (GROUP // 8))
        scale = tl.load(place, mask=mask, other=0, volatile=IN_ORDER)
    return words, scale


@triton.jit
def unpack_words(words, scale, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Codes int32 [R, N, W, 8] and the scale of each word int32 [R, N, W]."""
    scale = tl.reshape(scale.to(tl.int32), (scale.shape[0], scale.shape[1] * 8 // GROUP, GROUP // 8))
    if BITS == 8:
        code = to_words(words.to(tl.int32), GROUP)
    else:
        words = tl.reshape(words.to(tl.int32), (scale.shape[0], scale.shape[1], scale.shape[2], 1))
        code = (words >> (tl.arange(0, 8)[None, None, None, :] * BITS)) & ((1 << BITS) - 1)
    return code, scale


@triton.jit
def load_packed(
    codes_ptr, scale_ptr, first, row, first_group, live, n_groups,
    N: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The codes [R, N, W, 8] that store_packed packed, and the scale of each word [R, N, W]."""
    words, scale = load_words(codes_ptr, scale_ptr, first, row, first_group, live, n_groups, N, BITS, GROUPED, GROUP)
    return unpack_words(words, scale, BITS, GROUP)


@triton.jit
def pair_words(x, GROUP: tl.constexpr):
    """[2, C / 2], the even words of a row and the odd ones, as fp32 [1, N, S, 16]: groups, shares of two words."""
    x = tl.permute(tl.reshape(to_float(x), (2, x.shape[1] // 8, 8)), (1, 0, 2))
    return tl.reshape(x, (1, x.shape[0] * 16 // GROUP, GROUP // 16, 16))


@triton.jit
def _place(n_groups, ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """First row and group of a program: neighbours take the blocks of the same rows, which is faster by 1 us."""
    program, blocks = tl.program_id(0), tl.cdiv(n_groups, BLOCK_GROUPS)
    return (program // blocks).to(tl.int64) * ROWS, program % blocks * BLOCK_GROUPS


@triton.jit(do_not_specialize=["n_rows"])
def _quantize_kernel(
    x_ptr, mean_ptr, inv_std_ptr, codes_ptr, scale_ptr, n_rows, n_cols, n_groups, stride_row,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    first, first_group = _place(n_groups, ROWS, BLOCK_GROUPS)
    n_rows = (n_rows - first).to(tl.int32)
    # a thread takes the even word and the odd one: 16 channels share what it computes of their group
    place = tl.arange(0, BLOCK_GROUPS * GROUP // 2)
    col = first_group * GROUP + (place // 8 * 16 + place % 8)[None, :] + tl.arange(0, 2)[:, None] * 8
    inside = col < n_cols
    x_ptr += first * stride_row
    one = tl.arange(0, 1)
    rows = ()
    for i in tl.static_range(ROWS):
        mask = inside & (one + i < n_rows)
        rows += (tl.load(x_ptr + i * stride_row + col, mask=mask, other=0.0, eviction_policy="evict_first"),)
    # as many bytes as the rows have: other programs on this multiprocessor find them in its cache
    mean = tl.load(mean_ptr + col, mask=inside, other=0.0, eviction_policy="evict_last")
    inv_std = tl.load(inv_std_ptr + col, mask=inside, other=0.0, eviction_policy="evict_last")
    mean, inv_std = pair_words(mean, GROUP), pair_words(inv_std, GROUP)
    for i in tl.static_range(ROWS):
        x = pair_words(rows[i], GROUP)
        code, scale = quantize_tile(x, mean, inv_std, BITS, STEP, CENTRE, GROUPED)
        store_packed(
            codes_ptr, scale_ptr, code, scale, first + i, one, first_group, one + i < n_rows, n_groups,
            BITS, GROUPED, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _dequantize_kernel(
    codes_ptr, scale_ptr, mean_ptr, std_ptr, x_ptr, n_rows, n_cols, n_groups,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    first, first_group = _place(n_groups, ROWS, BLOCK_GROUPS)
    n_rows = (n_rows - first).to(tl.int32)
    col = first_group * GROUP + tl.arange(0, BLOCK_GROUPS * GROUP)
    inside = col < n_cols
    one = tl.arange(0, 1)
    packed = ()
    for i in tl.static_range(ROWS):
        packed += (
            load_words(
                codes_ptr, scale_ptr, first + i, one, first_group, one + i < n_rows, n_groups, BLOCK_GROUPS, BITS,
                GROUPED, GROUP,
            ),
        )  # fmt: skip
    mean, std = load_channels(mean_ptr, col, inside, GROUP), load_channels(std_ptr, col, inside, GROUP)
    for i in tl.static_range(ROWS):
        code, scale = unpack_words(packed[i][0], packed[i][1], BITS, GROUP)
        x = dequantize_tile(code, scale, mean, std, BITS, STEP, CENTRE, GROUPED)
        store_tile(x_ptr + (first + i) * n_cols, x, one, col, n_cols, one + i < n_rows, inside)


@triton.jit(do_not_specialize=["n_rows"])
def _dequantize_rows_kernel(
    codes_ptr, scale_ptr, mean_ptr, std_ptr, outliers_ptr, kept_ptr, weight_ptr, x_ptr,
    n_rows, n_cols, n_groups, n_outliers,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_OUTLIERS: tl.constexpr,
):  # fmt: skip
    one = tl.arange(0, 1)
    col = tl.arange(0, BLOCK_GROUPS * GROUP)
    inside = col < n_cols
    mean, std = load_channels(mean_ptr, col, inside, GROUP), load_channels(std_ptr, col, inside, GROUP)
    place = tl.arange(0, BLOCK_OUTLIERS)
    outlier = tl.load(outliers_ptr + place, mask=place < n_outliers, other=0)
    if WEIGHTED:
        weight = load_channels(weight_ptr, col, inside, GROUP)
        outlier_weight = tl.load(weight_ptr + outlier, mask=place < n_outliers, other=0.0).to(tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        live = one < n_rows - row
        code, scale = load_packed(codes_ptr, scale_ptr, row, one, 0, live, n_groups, BLOCK_GROUPS, BITS, GROUPED, GROUP)
        x = dequantize_tile(code, scale, mean, std, BITS, STEP, CENTRE, GROUPED)
        kept_mask = (place < n_outliers) & live
        kept = tl.load(kept_ptr + row * n_outliers + place, mask=kept_mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= weight
            kept *= outlier_weight
        store_tile(x_ptr + row * n_cols, x, one, col, n_cols, live, inside)
        # other threads write the same channels once more
        tl.debug_barrier()
        tl.store(x_ptr + row * n_cols + outlier, kept.to(x_ptr.dtype.element_ty), mask=kept_mask)


def quantize(x: Tensor, mean: Tensor, inv_std: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """reference.quantize on any device: x [T, C] to codes and scale (packed_shapes), all that it allocates on a GPU."""
    if not use_triton(x):
        return reference.quantize(x, mean, inv_std, book)
    x = as_rows(x)
    n_rows, n_cols = x.shape
    codes, scale = carve(packed_shapes(n_rows, n_cols, book), x.device)
    n_groups, tile = codes.shape[1], tile_of(PACK_TILE, book)
    with device_guard(x):
        _quantize_kernel[grid_of(n_rows, n_groups, tile)](
            x, mean, inv_std, codes, scale, n_rows, n_cols, n_groups, x.stride(0),
            **book_constants(book), **tile,
        )  # fmt: skip
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, mean: Tensor, std: Tensor, book: Codebook, dtype: torch.dtype) -> Tensor:
    """reference.dequantize on any device: x [T, C] in dtype, all that it allocates on a GPU."""
    if not use_triton(codes):
        return reference.dequantize(codes, scale, mean, std, book, dtype)
    n_rows, n_groups = codes.shape[:2]
    tile = tile_of(UNPACK_TILE, book)
    x = torch.empty(n_rows, mean.numel(), dtype=dtype, device=codes.device)
    with device_guard(codes):
        _dequantize_kernel[grid_of(n_rows, n_groups, tile)](
            codes, scale, mean, std, x, n_rows, mean.numel(), n_groups,
            **book_constants(book), **tile,
        )  # fmt: skip
    return x


def dequantize_rows(
    codes: Tensor, scale: Tensor, kept: Tensor, mean: Tensor, std: Tensor, outliers: Tensor, book: Codebook,
    dtype: torch.dtype, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dequantize with the channels outliers [n] taken from kept [T, n], times weight [C] if given.

    mean and std must be 0 at these channels. Allocates nothing but its result on a GPU.
    """
    if not use_triton(codes):
        x = reference.dequantize(codes, scale, mean, std, book, torch.float32)
        x = x.index_copy_(1, outliers, kept.float())
        return (x if weight is None else x * weight.float()).to(dtype)
    n_rows, n_groups = codes.shape[:2]
    x = torch.empty(n_rows, mean.numel(), dtype=dtype, device=codes.device)
    with device_guard(codes):
        _dequantize_rows_kernel[(cdiv(n_rows, ROWS_A_PROGRAM),)](
            codes, scale, mean, std, outliers, kept, mean if weight is None else weight, x,
            n_rows, mean.numel(), n_groups, kept.shape[1], WEIGHTED=weight is not None, ROWS=ROWS_A_PROGRAM,
            **book_constants(book), **row_constants(n_groups, book, kept.shape[1]),
        )  # fmt: skip
    return x
