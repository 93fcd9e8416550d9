"""What the fused kernels share: the LoRA part of a tile, packing and restoring a tile, and a slot as kernel arguments.

A tile is fp32 [R, N, W, 8]: rows, groups, words of a group, channels of a word. first is the tile's first row (int64);
rows inside the tile count from it in int32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators.codebook import Codebook
from operators.dispatch import next_power_of_2
from operators.quantize import (
    dequantize_tile,
    empty_packed,
    load_codes,
    load_scale,
    quantize_tile,
    rows_of_codes,
    store_codes,
    store_scale,
    tile_index,
)


@triton.jit
def load_tile(x_ptr, row, col, stride_row, live, inside):
    """x [R, N, W, 8] of channels [N, W, 8]; 0 outside."""
    offset = row[:, None, None, None] * stride_row + col[None]
    return tl.load(x_ptr + offset, mask=live[:, None, None, None] & inside[None], other=0.0).to(tl.float32)


@triton.jit
def store_tile(x_ptr, x, row, col, stride_row, live, inside):
    """Write a tile where load_tile read it."""
    offset = row[:, None, None, None] * stride_row + col[None]
    tl.store(x_ptr + offset, x.to(x_ptr.dtype.element_ty), mask=live[:, None, None, None] & inside[None])


@triton.jit
def add_lora(x, xa_ptr, b_ptr, row, first_col, n_cols, live, stride_rank, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """x + xa B^T in fp32; xa [T, R] and B [N, R] of row stride stride_rank."""
    n_tile: tl.constexpr = x.shape[1] * x.shape[2] * x.shape[3]
    if RANK > 0:
        rank = tl.arange(0, RANK_BLOCK)
        col = first_col + tl.arange(0, n_tile)
        xa = tl.load(
            xa_ptr + row[:, None] * stride_rank + rank[None, :],
            mask=live[:, None] & (rank < RANK)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + col[None, :] * stride_rank + rank[:, None],
            mask=(col < n_cols)[None, :] & (rank < RANK)[:, None], other=0.0,
        )  # fmt: skip
        # half-precision operands are exact in tf32, so they go through the tensor cores without a rounding
        precision: tl.constexpr = "ieee" if xa_ptr.dtype.element_ty == tl.float32 else "tf32"
        lora = tl.dot(xa.to(tl.float32), b.to(tl.float32), input_precision=precision)
        x += tl.reshape(lora, x.shape)
    return x


@triton.jit
def pack_tile(
    x, codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, group, col, live, inside, n_groups, one,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Quantize a tile into the packed layout of operators/quantize.py."""
    mean = tl.load(mean_ptr + col, mask=inside, other=0.0)[None]
    std = tl.load(std_ptr + col, mask=inside, other=1.0)[None]
    code, exponent, middle = quantize_tile(x, mean, std, BITS, STEP, CENTRE, GROUPED)
    word, unit = tile_index(row, group, n_groups, one, GROUP)
    mask = live[:, None] & (group < n_groups)[None, :]
    store_codes(rows_of_codes(codes_ptr, first, n_groups, BITS, GROUP), word, code, mask[:, :, None], BITS)
    store_scale(scale_ptr + first * n_groups * 2, unit, exponent, middle, mask, GROUPED)


@triton.jit
def unpack_tile(
    codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, group, col, live, inside, n_groups, one,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile that pack_tile packed."""
    word, unit = tile_index(row, group, n_groups, one, GROUP)
    mask = live[:, None] & (group < n_groups)[None, :]
    code = load_codes(rows_of_codes(codes_ptr, first, n_groups, BITS, GROUP), word, mask[:, :, None], BITS)
    exponent, middle = load_scale(scale_ptr + first * n_groups * 2, unit, mask, GROUPED)
    mean = tl.load(mean_ptr + col, mask=inside, other=0.0)[None]
    std = tl.load(std_ptr + col, mask=inside, other=1.0)[None]
    return dequantize_tile(code, exponent, middle, mean, std, STEP, CENTRE, GROUPED)


@dataclass
class PackedSlot:
    """A quantized slot [T, C] without exact channels, as a kernel takes it."""

    codes: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor
    book: Codebook

    @classmethod
    def empty(cls, n_rows: int, saver, device: torch.device) -> "PackedSlot":
        """Room for the slot of a calibrated ChannelQuant."""
        codes, scale = empty_packed(n_rows, saver.mean.numel(), saver.book, device)
        return cls(codes, scale, saver.mean, saver.std, saver.book)

    @classmethod
    def kept(cls, name: str, keeper) -> "PackedSlot":
        """The slot as a keeper has it; it can be taken once."""
        codes, scale, _, mean, std, _ = keeper.take(name)
        return cls(codes, scale, mean, std, keeper.saver(name).book)

    @property
    def n_groups(self) -> int:
        return self.codes.shape[1]

    def arguments(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.mean, self.std

    def constants(self, prefix: str = "") -> dict:
        """BITS, STEP and CENTRE of this slot; GROUPED and GROUP are one for all slots of a kernel."""
        return {f"{prefix}BITS": self.book.bits, f"{prefix}STEP": self.book.step, f"{prefix}CENTRE": self.book.centre}

    def unpack(self, dtype: torch.dtype) -> Tensor:
        from operators.quantize import dequantize

        return dequantize(self.codes, self.scale, self.mean, self.std, self.book, dtype)


def shared_constants(slots: list[PackedSlot], ranks: list[int]) -> dict:
    """Constants that all slots of a kernel have in common."""
    book = slots[0].book
    rank_block = max(16, next_power_of_2(max(ranks)))
    return {"GROUPED": book.grouped, "GROUP": book.group, "RANK_BLOCK": rank_block}
