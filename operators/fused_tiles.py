"""What the fused kernels share: the LoRA part of a tile, packing and restoring a tile, and a slot as kernel arguments.

A tile is fp32 [R, N, W, 8]: rows, groups, words of a group, channels of a word. first is the tile's first row (int64);
rows inside the tile count from it in int32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators import dispatch
from operators.codebook import Codebook
from operators.dispatch import next_power_of_2
from operators.packed_layout import carve, packed_shapes
from operators.quantize import (
    dequantize_tile,
    load_channels,
    load_packed,
    quantize_tile,
    store_packed,
)

INTERPRETING = tl.constexpr(dispatch.INTERPRETING)


@triton.jit
def add_lora(
    x, xa_ptr, b_ptr, row, first_col, n_cols, live, stride_xa, stride_b, stride_rank,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    """x + xa B^T in fp32; xa [T, R] of row stride stride_xa, B [N, R] of strides stride_b, stride_rank."""
    n_tile: tl.constexpr = x.shape[1] * x.shape[2] * x.shape[3]
    if RANK > 0:
        rank = tl.arange(0, RANK_BLOCK)
        col = first_col + tl.arange(0, n_tile)
        xa = tl.load(
            xa_ptr + row[:, None] * stride_xa + rank[None, :],
            mask=live[:, None] & (rank < RANK)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + col[None, :] * stride_b + rank[:, None] * stride_rank,
            mask=(col < n_cols)[None, :] & (rank < RANK)[:, None], other=0.0,
        )  # fmt: skip
        if INTERPRETING:
            # whose products are of fp32 only
            xa, b = xa.to(tl.float32), b.to(tl.float32)
        lora = tl.dot(xa, b, input_precision="ieee")
        x += tl.reshape(lora, x.shape)
    return x


@triton.jit
def pack_tile(
    x, codes_ptr, scale_ptr, mean_ptr, inv_std_ptr, first, row, first_group, col, live, inside, n_groups,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Quantize a tile into the packed layout of operators/quantize.py."""
    mean, inv_std = load_channels(mean_ptr, col, inside, GROUP), load_channels(inv_std_ptr, col, inside, GROUP)
    code, scale = quantize_tile(x, mean, inv_std, BITS, STEP, CENTRE, GROUPED)
    store_packed(codes_ptr, scale_ptr, code, scale, first, row, first_group, live, n_groups, BITS, GROUPED, GROUP)


@triton.jit
def unpack_tile(
    codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, first_group, col, live, inside, n_groups, N: tl.constexpr,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile of N groups that pack_tile packed."""
    code, scale = load_packed(codes_ptr, scale_ptr, first, row, first_group, live, n_groups, N, BITS, GROUPED, GROUP)
    mean, std = load_channels(mean_ptr, col, inside, GROUP), load_channels(std_ptr, col, inside, GROUP)
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
        """Room for the slots of calibrated ChannelQuants, in one allocation."""
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

    def arguments(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.mean, self.spread

    def constants(self, prefix: str = "") -> dict:
        """BITS, STEP and CENTRE of this slot; GROUPED and GROUP are one for all slots of a kernel."""
        return {f"{prefix}BITS": self.book.bits, f"{prefix}STEP": self.book.step, f"{prefix}CENTRE": self.book.centre}


def prepare_slots(names: str | tuple[str, ...], columns: list[slice], y: Tensor, keeper) -> list[PackedSlot]:
    """Room for slots that are columns of y [T, N], calibrated on them if need be and kept in advance."""
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
    book = slots[0].book
    rank_block = max(16, next_power_of_2(max(ranks)))
    return {"GROUPED": book.grouped, "GROUP": book.group, "RANK_BLOCK": rank_block}
