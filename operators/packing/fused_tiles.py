"""What the fused kernels share: the place of a tile, its LoRA part, packing and restoring it, and a slot as arguments.

A tile is R rows of TILE channels, fp32 [R, 1, W, 8]: words of the tile, channels of a word. In memory it is S strips of
32 channels, stacked to [S R, 32], R being 16 rows a warp. Compilers then give a thread of either form, and of tl.dot's
result with its rows and columns in the order of add_lora, the same numbers: 8 neighbouring channels of each strip, of 2
rows. So nothing is exchanged but the range of a tile, among 4 threads.

A group is one tile or several. A program that packs looks at the range of its group's other tiles first: a thread that
had a whole group would have twice the numbers, for which there are no registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import dispatch
from hyclora.operators.dispatch import rank_block
from hyclora.operators.packing.codebook import GROUP, Codebook
from hyclora.operators.packing.layout import carve, packed_shapes
from hyclora.operators.packing.quantize import dequantize_tile, normalised, quantize_tile

INTERPRETING = tl.constexpr(dispatch.INTERPRETING)
ROWS_A_WARP = 16
TILE = tl.constexpr(GROUP)  # channels of a tile


@triton.jit
def operand(x):
    """A factor of tl.dot: the interpreter's products are of fp32 only."""
    return x.to(tl.float32) if INTERPRETING else x


@triton.jit
def tile_rows(n_rows, ROWS: tl.constexpr):
    """First row (int64) of a program's tile, and [S R] rows from there on and which exist; others repeat the last."""
    first = tl.program_id(1).to(tl.int64) * ROWS
    last = (n_rows - first - 1).to(tl.int32)
    row = tl.arange(0, TILE // 32 * ROWS) % ROWS
    return first, tl.minimum(row, last), row <= last


@triton.jit
def tile_columns(tile, n_cols, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    """Channels [S R, 32] of a tile, and which exist: all if n_cols is WHOLE groups, which saves the masks."""
    strip = tl.arange(0, TILE // 32 * ROWS) // ROWS
    col = tile * TILE + strip[:, None] * 32 + tl.arange(0, 32)[None, :]
    return col, (col < n_cols) | WHOLE


@triton.jit
def from_strips(x, ROWS: tl.constexpr):
    """[S R, C] or its words [S R, 4] as [R, 1, W, C / 4]."""
    S: tl.constexpr = x.shape[0] // ROWS
    x = tl.permute(tl.reshape(x, (S, ROWS, 4, x.shape[1] // 4)), (1, 0, 2, 3))
    return tl.reshape(x, (ROWS, 1, S * 4, x.shape[3]))


@triton.jit
def to_strips(x):
    """Inverse of from_strips."""
    S: tl.constexpr = x.shape[2] // 4
    x_strips = tl.permute(tl.reshape(x, (x.shape[0], S, 4, x.shape[3])), (1, 0, 2, 3))
    return tl.reshape(x_strips, (S * x.shape[0], 4 * x.shape[3]))


@triton.jit
def load_strips(x_ptr, row, col, stride_row, inside, ROWS: tl.constexpr):
    """The tile of x at rows [S R] and channels [S R, 32]; 0 where there is no channel."""
    return from_strips(tl.load(x_ptr + (row[:, None] * stride_row + col), mask=inside, other=0.0).to(tl.float32), ROWS)


@triton.jit
def store_strips(x_ptr, x, row, col, stride_row, live, inside):
    """Write a tile where load_strips read it."""
    x = to_strips(x).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + (row[:, None] * stride_row + col), x, mask=live[:, None] & inside)


@triton.jit
def load_statistics(ptr, tile, n_cols, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    """A vector over channels as a tile, each thread with what it needs of it, read once for its 2 rows."""
    S: tl.constexpr = TILE // 32
    strip, place = tl.arange(0, S * (ROWS // 2)) // (ROWS // 2), tl.arange(0, 16)
    # 4 channels are the most that a load takes, and 8 are neighbours in a thread
    col = tile * TILE + strip[:, None] * 32 + (place // 4 * 8 + place % 4)[None, :]
    low = tl.load(ptr + col, mask=(col < n_cols) | WHOLE, other=0.0)
    high = tl.load(ptr + (col + 4), mask=(col + 4 < n_cols) | WHOLE, other=0.0)
    x = tl.permute(tl.reshape(tl.join(low, high), (S, ROWS // 2, 4, 4, 2)), (1, 0, 2, 4, 3))
    x = tl.broadcast_to(tl.reshape(x, (1, ROWS // 2, 1, S * 4, 8)), (2, ROWS // 2, 1, S * 4, 8))
    return tl.reshape(x, (ROWS, 1, S * 4, 8))


@triton.jit
def rounded(x, ptr):
    """fp32 x rounded to the dtype that ptr points to."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype == tl.bfloat16 and not INTERPRETING:
        # with a zero as the lower half, one packed conversion; there and back is two, one at an eighth of the rate
        x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def add_lora(
    x, xa_ptr, b_ptr, tile, last, n_cols, stride_xa, stride_b, stride_rank,
    WHOLE: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """x + xa B^T in fp32; xa [T, R] of row stride stride_xa, B [N, R] of strides stride_b, stride_rank."""
    if RANK > 0:
        ROWS: tl.constexpr = x.shape[0]
        S: tl.constexpr = TILE // 32
        WARPS: tl.constexpr = ROWS // 16
        place, n, rank = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, RANK_BLOCK)
        # a thread of the product has pairs of columns in steps of 8, and rows in steps of 8
        row = tl.minimum(place // 8 % 2 * (ROWS // 2) + place // 16 * 8 + place % 8, last)
        col = tile * TILE + n // 32 * 32 + n // 2 % 4 * 8 + n // 8 % 4 * 2 + n % 2
        # loaded as [rank, row]: a tile of the same shape as load_statistics' would change its layout
        xa = tl.load(
            xa_ptr + (row[None, :] * stride_xa + rank[:, None]), mask=(rank < RANK)[:, None] & (row >= 0)[None, :],
            other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + (col[None, :] * stride_b + rank[:, None] * stride_rank),
            mask=((col < n_cols) | WHOLE)[None, :] & (rank < RANK)[:, None], other=0.0,
        )  # fmt: skip
        xa, b = operand(xa), operand(b)
        x = tl.permute(tl.reshape(x, (2, WARPS, 8, S, 4, 4, 2)), (1, 0, 2, 3, 5, 4, 6))
        x = tl.dot(tl.trans(xa), b, tl.reshape(x, (ROWS, TILE)), input_precision="ieee")
        x = tl.permute(tl.reshape(x, (WARPS, 2, 8, S, 4, 4, 2)), (1, 0, 2, 3, 5, 4, 6))
        x = tl.reshape(x, (ROWS, 1, S * 4, 8))
    return x


@triton.jit
def packed_place(
    codes_ptr, scale_ptr, first, row, tile, n_groups, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """Pointers to a tile's words (3 bit: their first bytes; 8 bit: bytes [S R, 32]) and their scales, both [S R, 4]."""
    W: tl.constexpr = TILE // 8
    n_tiles = n_groups * (GROUP // TILE)
    first_word = tl.arange(0, row.shape[0]) // ROWS * 4
    index = (row[:, None] * n_tiles + tile) * W + first_word[:, None]
    codes_ptr += first * n_tiles * (W * BITS)
    if BITS == 8:
        # a thread takes 8 bytes, as many as it has codes
        place = tl.multiple_of(codes_ptr + (index * 8 + tl.arange(0, 32)[None, :]), (8, 8))
    elif BITS == 3:
        place = codes_ptr + (index + tl.arange(0, 4)[None, :]) * 3
    else:
        # a thread takes one word even where four are side by side
        pointer: tl.constexpr = tl.pointer_type(tl.int32 if BITS == 4 else tl.int16)
        place = tl.multiple_of(codes_ptr.to(pointer, bitcast=True) + (index + tl.arange(0, 4)[None, :]), (1, 1))
    scale_ptr = scale_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + first * n_groups
    group = tile // (GROUP // TILE)
    return place, scale_ptr + (row[:, None] * n_groups + group + tl.zeros([1, 4], tl.int32))


@triton.jit
def range_of_others(
    x_ptr, mean_ptr, inv_std_ptr, row, tile, n_cols, stride_row,
    GROUPED: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Least and largest normalised number [R, 1] of a tile's group without the tile itself, and 0: all if it is alone.

    Programs of one group run side by side, so what they read of each other comes from the cache.
    """
    low, high = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    TILES: tl.constexpr = GROUP // TILE
    if GROUPED:
        for i in tl.static_range(1, TILES):
            other = tile // TILES * TILES + (tile + i) % TILES
            col, inside = tile_columns(other, n_cols, WHOLE, ROWS)
            mean = load_statistics(mean_ptr, other, n_cols, WHOLE, ROWS)
            inv_std = load_statistics(inv_std_ptr, other, n_cols, WHOLE, ROWS)
            t = normalised(load_strips(x_ptr, row, col, stride_row, inside, ROWS), mean, inv_std)
            low = tl.minimum(low, tl.min(tl.min(t, axis=3), axis=2))
            high = tl.maximum(high, tl.max(tl.max(t, axis=3), axis=2))
    return low, high


@triton.jit
def pack_tile(
    x, codes_ptr, scale_ptr, mean_ptr, inv_std_ptr, first, row, live, tile, n_cols, n_groups,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr, low=0.0, high=0.0,
):  # fmt: skip
    """Quantize a tile into the packed layout of operators/packing/quantize.py; low, high: range_of_others."""
    ROWS: tl.constexpr = x.shape[0]
    mean = load_statistics(mean_ptr, tile, n_cols, WHOLE, ROWS)
    inv_std = load_statistics(inv_std_ptr, tile, n_cols, WHOLE, ROWS)
    code, scale = quantize_tile(x, mean, inv_std, BITS, STEP, CENTRE, GROUPED, low, high)
    place, scale_place = packed_place(codes_ptr, scale_ptr, first, row, tile, n_groups, BITS, GROUP, ROWS)
    live = live[:, None]
    if BITS == 8:
        tl.store(place, to_strips(code).to(tl.uint8), mask=live)
    else:
        words = tl.sum(code << (tl.arange(0, 8)[None, None, None, :] * BITS), axis=3)
        words = to_strips(words[:, :, :, None])
        if BITS == 3:
            for i in tl.static_range(3):
                tl.store(place + i, (words >> (8 * i)).to(tl.uint8), mask=live)
        else:
            tl.store(place, words.to(place.dtype.element_ty), mask=live)
    if GROUPED:
        # every thread of a group has its scale: the first of its first tile stores it
        scale = to_strips(tl.broadcast_to(scale[:, :, None, None], (ROWS, 1, TILE // 8, 1))).to(tl.int16)
        one = (tl.arange(0, row.shape[0]) < ROWS)[:, None] & (tl.arange(0, 4) + tile % (GROUP // TILE) == 0)[None, :]
        tl.store(scale_place, scale, mask=live & one)


@triton.jit
def unpack_tile(
    codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, tile, n_cols, n_groups,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tile that pack_tile packed."""
    place, scale_place = packed_place(codes_ptr, scale_ptr, first, row, tile, n_groups, BITS, GROUP, ROWS)
    code = tl.load(place).to(tl.int32)
    if BITS == 3:
        code |= (tl.load(place + 1).to(tl.int32) << 8) | (tl.load(place + 2).to(tl.int32) << 16)
    code = from_strips(code, ROWS)
    if BITS < 8:
        code = (code >> (tl.arange(0, 8)[None, None, None, :] * BITS)) & ((1 << BITS) - 1)
    scale = tl.zeros([ROWS, 1, TILE // 8], tl.int32)
    if GROUPED:
        scale = tl.reshape(from_strips(tl.load(scale_place), ROWS), (ROWS, 1, TILE // 8)).to(tl.int32)
    mean = load_statistics(mean_ptr, tile, n_cols, WHOLE, ROWS)
    std = load_statistics(std_ptr, tile, n_cols, WHOLE, ROWS)
    return dequantize_tile(code, scale, mean, std, BITS, STEP, CENTRE, GROUPED)


@dataclass
class PackedSlot:
    """A quantized slot [T, C] without exact channels as a kernel takes it; spread: inv_std to pack, std to unpack."""

    codes: Tensor
    scale: Tensor
    mean: Tensor
    spread: Tensor
    book: Codebook

    @classmethod
    def empty(cls, n_rows: int, savers: list, device: torch.device) -> "list[PackedSlot]":
        """Room for the slots of calibrated ChannelQuants, in one allocation (layout.carve)."""
        shapes = [shape for saver in savers for shape in packed_shapes(n_rows, saver.mean.numel(), saver.book)]
        tensors = iter(carve(shapes, device))
        return [cls(next(tensors), next(tensors), saver.mean, saver.inv_std, saver.book) for saver in savers]

    @classmethod
    def kept(cls, name: str, keeper) -> "PackedSlot":
        """The slot as a keeper has it; it can be taken once."""
        codes, scale, _, mean, std, _ = keeper.take(name)
        return cls(codes, scale, mean, std, keeper.saver(name).book)

    @property
    def n_groups(self) -> int:
        return self.codes.shape[1]

    @property
    def n_tiles(self) -> int:
        return self.n_groups * (self.book.group // GROUP)

    @property
    def is_whole(self) -> bool:
        """Whether all channels of its groups exist."""
        return self.mean.numel() % self.book.group == 0

    def arguments(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.mean, self.spread

    def constants(self, prefix: str) -> dict:
        """BITS, STEP and CENTRE of this slot; the rest of the book is one for all slots of a kernel."""
        return {f"{prefix}BITS": self.book.bits, f"{prefix}STEP": self.book.step, f"{prefix}CENTRE": self.book.centre}


def prepare_slots(names: str | tuple[str, ...], columns: list[slice], y: Tensor, keeper) -> list[PackedSlot]:
    """Room for slots that are columns of y [T, N], calibrated on them if need be and kept in advance.

    Allocates their packed bytes, and while calibrating what ChannelQuant measures with.
    """
    savers = [keeper.savers[name] for name in names]
    for saver, own in zip(savers, columns, strict=True):
        saver.prepare(y[:, own], keeper.step)
    slots = PackedSlot.empty(y.shape[0], savers, y.device)
    for name, saver, slot in zip(names, savers, slots, strict=True):
        shape = torch.Size((y.shape[0], saver.mean.numel()))
        keeper.adopt(name, saver.packed(slot.codes, slot.scale), shape, y.dtype)
    return slots


def shared_constants(slots: list[PackedSlot], ranks: list[int]) -> dict:
    """Constants that all slots of a kernel have in common."""
    return {"GROUPED": slots[0].book.grouped, "RANK_BLOCK": rank_block(max(ranks))}
