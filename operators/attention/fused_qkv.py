"""Between the q/k/v projections and attention in one kernel each way: LoRA add, norms of heads, RoPE and packing.

Forward reads the frozen paths [q, k, v] once, packs them, and leaves the rotated q and k and the sum v in their place;
backward restores the same from the packed slots. A program takes a tile (64 channels) of one half of a head and the
tile of the other half that RoPE mixes it with, so half a head must be whole tiles, and a single one where a head is
normalized; other heads take the unfused path. Without RoPE a program takes any tile of a slot, in a kernel of its own.
Groups are tiles here: a program writes over what others would look at. The packed bytes are those of
operators/packing/quantize.py.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators.attention.rope import HeadNorm
from hyclora.operators.dispatch import cdiv, device_guard
from hyclora.operators.linear.low_rank import LowRank
from hyclora.operators.packing.codebook import GROUP
from hyclora.operators.packing.fused_tiles import (
    ROWS_A_WARP,
    TILE,
    PackedSlot,
    add_lora,
    load_statistics,
    load_strips,
    pack_tile,
    prepare_slots,
    rounded,
    shared_constants,
    store_strips,
    tile_columns,
    tile_rows,
    unpack_tile,
)
from hyclora.operators.savers import Keeper

BLOCK_ROWS = 64


@triton.jit
def _slot_tile(
    y_ptr, xa_ptr, b_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, live, last, tile, n_cols,
    stride_y, stride_rank,
    PACK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of one slot: packed from y or restored, the LoRA part added, rounded to y's dtype; and its channels."""
    n_groups = n_cols // TILE
    col, inside = tile_columns(tile, n_cols, True, ROWS)
    if PACK:
        x = load_strips(y_ptr, row, col, stride_y, inside, ROWS)
        pack_tile(
            x, codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, live, tile, n_cols, n_groups,
            BITS, STEP, CENTRE, GROUPED, TILE, True,
        )  # fmt: skip
    else:
        x = unpack_tile(
            codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, tile, n_cols, n_groups,
            BITS, STEP, CENTRE, GROUPED, TILE, True, ROWS,
        )  # fmt: skip
        # a slot comes back in the dtype that it was packed in
        x = rounded(x, y_ptr)
    x = add_lora(
        x, xa_ptr, b_ptr, tile, last, n_cols, stride_rank, stride_rank, 1, True, RANK, RANK_BLOCK,
    )  # fmt: skip
    return rounded(x, y_ptr), col, inside


@triton.jit
def _normalized(x1, x2, weight_ptr, y_ptr, eps, HALF: tl.constexpr):
    """Heads whose halves are the tiles x1 and x2 through their RMSNorm."""
    ROWS: tl.constexpr = x1.shape[0]
    squares = tl.sum(tl.sum(x1 * x1 + x2 * x2, axis=3), axis=2)
    rstd = tl.rsqrt(squares / (2 * HALF) + eps)[:, :, None, None]
    # HF rounds x_hat before the weight multiplies it
    x1 = rounded(x1 * rstd, y_ptr) * load_statistics(weight_ptr, 0, 2 * HALF, True, ROWS).to(tl.float32)
    x2 = rounded(x2 * rstd, y_ptr) * load_statistics(weight_ptr, 1, 2 * HALF, True, ROWS).to(tl.float32)
    return x1, x2


@triton.jit
def _head_tile(
    y_ptr, xa_ptr, b_ptr, cos_ptr, sin_ptr, weight_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr, pair, n_heads, n_rows,
    seq_len, stride_y, stride_rank, stride_cos, eps,
    PACK: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
    CENTRE: tl.constexpr, GROUPED: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A pair of tiles of one slot, from either half of a head, rotated if ROTATE, into y [T, ...] at their columns."""
    PAIRS: tl.constexpr = HALF // TILE
    first, row, live = tile_rows(n_rows, ROWS)
    last = (n_rows - first - 1).to(tl.int32)
    y_ptr += first * stride_y
    xa_ptr += first * stride_rank
    tile = pair // PAIRS * (2 * PAIRS) + pair % PAIRS
    n_cols = n_heads * 2 * HALF
    x1, col1, inside = _slot_tile(
        y_ptr, xa_ptr, b_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, live, last, tile, n_cols,
        stride_y, stride_rank, PACK, BITS, STEP, CENTRE, GROUPED, RANK, RANK_BLOCK, ROWS,
    )  # fmt: skip
    x2, col2, inside = _slot_tile(
        y_ptr, xa_ptr, b_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, live, last, tile + PAIRS, n_cols,
        stride_y, stride_rank, PACK, BITS, STEP, CENTRE, GROUPED, RANK, RANK_BLOCK, ROWS,
    )  # fmt: skip
    if NORM:
        x1, x2 = _normalized(x1, x2, weight_ptr, y_ptr, eps, HALF)
    if ROTATE:
        token = first.to(tl.int32) + row
        place = token // seq_len * stride_cos + token % seq_len * (2 * HALF)
        angle, inside = tile_columns(pair % PAIRS, HALF, True, ROWS)
        cos = load_strips(cos_ptr, place, angle, 1, inside, ROWS)
        sin = load_strips(sin_ptr, place, angle, 1, inside, ROWS)
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    else:
        y1, y2 = x1, x2
    store_strips(y_ptr, y1, row, col1, stride_y, live, inside)
    store_strips(y_ptr, y2, row, col2, stride_y, live, inside)


@triton.jit(do_not_specialize=["n_rows", "seq_len"])
def _fused_qkv_kernel(
    y_ptr, xa_ptr, b_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    q_codes_ptr, q_scale_ptr, q_mean_ptr, q_std_ptr,
    k_codes_ptr, k_scale_ptr, k_mean_ptr, k_std_ptr,
    v_codes_ptr, v_scale_ptr, v_mean_ptr, v_std_ptr,
    n_rows, seq_len, q_heads, k_heads, stride_y, stride_rank, stride_cos, q_eps, k_eps,
    PACK: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, HALF: tl.constexpr,
    Q_BITS: tl.constexpr, Q_STEP: tl.constexpr, Q_CENTRE: tl.constexpr,
    K_BITS: tl.constexpr, K_STEP: tl.constexpr, K_CENTRE: tl.constexpr,
    V_BITS: tl.constexpr, V_STEP: tl.constexpr, V_CENTRE: tl.constexpr,
    GROUPED: tl.constexpr, Q_RANK: tl.constexpr, K_RANK: tl.constexpr, V_RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    q_cols, k_cols = q_heads * 2 * HALF, k_heads * 2 * HALF
    q_pairs, k_pairs = q_heads * (HALF // TILE), k_heads * (HALF // TILE)
    if pair < q_pairs:
        _head_tile(
            y_ptr, xa_ptr, b_ptr, cos_ptr, sin_ptr, q_weight_ptr, q_codes_ptr, q_scale_ptr, q_mean_ptr, q_std_ptr,
            pair, q_heads, n_rows, seq_len, stride_y, stride_rank, stride_cos, q_eps, PACK, NORM, ROTATE,
            Q_BITS, Q_STEP, Q_CENTRE, GROUPED, Q_RANK, RANK_BLOCK, HALF, BLOCK_ROWS,
        )  # fmt: skip
    elif pair < q_pairs + k_pairs:
        _head_tile(
            y_ptr + q_cols, xa_ptr + Q_RANK, b_ptr + q_cols * stride_rank + Q_RANK, cos_ptr, sin_ptr, k_weight_ptr,
            k_codes_ptr, k_scale_ptr, k_mean_ptr, k_std_ptr, pair - q_pairs, k_heads, n_rows, seq_len, stride_y,
            stride_rank, stride_cos, k_eps, PACK, NORM, ROTATE,
            K_BITS, K_STEP, K_CENTRE, GROUPED, K_RANK, RANK_BLOCK, HALF, BLOCK_ROWS,
        )  # fmt: skip
    else:
        _head_tile(
            y_ptr + q_cols + k_cols, xa_ptr + Q_RANK + K_RANK,
            b_ptr + (q_cols + k_cols) * stride_rank + Q_RANK + K_RANK, cos_ptr, sin_ptr, k_weight_ptr, v_codes_ptr,
            v_scale_ptr, v_mean_ptr, v_std_ptr, pair - q_pairs - k_pairs, k_heads, n_rows, seq_len, stride_y,
            stride_rank, stride_cos, k_eps, PACK, False, False,
            V_BITS, V_STEP, V_CENTRE, GROUPED, V_RANK, RANK_BLOCK, HALF, BLOCK_ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _fused_add_kernel(
    y_ptr, xa_ptr, b_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr, n_rows, n_cols, n_groups, stride_y, stride_xa,
    stride_b, PACK: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, row, live = tile_rows(n_rows, BLOCK_ROWS)
    last = (n_rows - first - 1).to(tl.int32)
    col, inside = tile_columns(tile, n_cols, WHOLE, BLOCK_ROWS)
    y_ptr += first * stride_y
    if PACK:
        x = load_strips(y_ptr, row, col, stride_y, inside, BLOCK_ROWS)
        pack_tile(
            x, codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, live, tile, n_cols, n_groups,
            BITS, STEP, CENTRE, GROUPED, TILE, WHOLE,
        )  # fmt: skip
    else:
        x = unpack_tile(
            codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, tile, n_cols, n_groups,
            BITS, STEP, CENTRE, GROUPED, TILE, WHOLE, BLOCK_ROWS,
        )  # fmt: skip
        x = rounded(x, y_ptr)
    x = add_lora(
        x, xa_ptr + first * stride_xa, b_ptr, tile, last, n_cols, stride_xa, stride_b, 1, WHOLE, RANK,
        RANK_BLOCK,
    )  # fmt: skip
    store_strips(y_ptr, x, row, col, stride_y, live, inside)


def fits(head_dim: int, savers: dict, norms: bool = False, rotary: bool = True) -> bool:
    """Whether the kernels take these heads and savers: all quantized, in groups of 64 channels, of which half a head
    is a power of two.

    With norms of heads half a head is 64 channels, as a program has a whole head then; without RoPE it may be any size.
    """
    if any(not hasattr(savers[name], "book") or savers[name].book.group != GROUP for name in "qkv"):
        return False
    if not rotary:
        return not norms
    half = head_dim // 2
    return half % GROUP == 0 and (half // GROUP).bit_count() == 1 and not (norms and half > GROUP)


def _launch(
    spec, y: Tensor, cos, sin, batch: int, slots: list[PackedSlot], low_rank: LowRank | None, keeper,
    pack: bool = False, rotate: bool = True,
):  # fmt: skip
    if cos is None:
        return _launch_plain(spec, y, slots, low_rank, keeper, pack)
    group = spec.qkv
    ranks = [p.rank for p in group.projections]
    heads = [p.width // spec.head_dim for p in group.projections]
    xa, B = (slots[0].mean, slots[0].mean) if low_rank is None else (keeper.exact(group.xa_name), low_rank.B)
    norms = [spec.norm(name, keeper) for name in "qk"] if spec.norms else [HeadNorm(slots[0].mean, 0.0)] * 2
    cos, sin = cos.contiguous(), sin.contiguous()
    constants = shared_constants(slots, ranks)
    for name, slot, rank in zip("QKV", slots, ranks, strict=True):
        constants |= slot.constants(f"{name}_") | {f"{name}_RANK": rank}
    with device_guard(y):
        _fused_qkv_kernel[(y.shape[1] // (2 * GROUP), cdiv(y.shape[0], BLOCK_ROWS))](
            y, xa, B, cos, sin, *(norm.weight for norm in norms), *(t for slot in slots for t in slot.arguments()),
            y.shape[0], y.shape[0] // batch, *heads[:2], y.stride(0), B.stride(0),
            cos.stride(0) if cos.shape[0] > 1 else 0, *(norm.eps for norm in norms),
            PACK=pack, NORM=rotate and len(spec.norms) > 0, ROTATE=rotate, HALF=spec.head_dim // 2,
            BLOCK_ROWS=BLOCK_ROWS, num_warps=BLOCK_ROWS // ROWS_A_WARP, **constants,
        )  # fmt: skip


def _launch_plain(spec, y: Tensor, slots: list[PackedSlot], low_rank: LowRank | None, keeper, pack: bool) -> None:
    """Without RoPE: a slot after the other, whatever its heads."""
    for slot, own, ranks in zip(slots, spec.qkv.columns, spec.qkv.ranks, strict=True):
        part, rank = y[:, own], ranks.stop - ranks.start
        xa, B = (part, part) if not rank else (keeper.exact(spec.qkv.xa_name)[:, ranks], low_rank.B[own, ranks])
        constants = slot.constants("") | shared_constants([slot], [rank]) | {"PACK": pack, "RANK": rank}
        whole = part.shape[1] % GROUP == 0
        with device_guard(y):
            _fused_add_kernel[(slot.n_groups, cdiv(len(y), BLOCK_ROWS))](
                part, xa, B, *slot.arguments(), *part.shape, slot.n_groups, part.stride(0), xa.stride(0), B.stride(0),
                WHOLE=whole, BLOCK_ROWS=BLOCK_ROWS, num_warps=BLOCK_ROWS // ROWS_A_WARP, **constants,
            )  # fmt: skip


def fused_qkv_fwd(spec, y: Tensor, cos, sin, batch: int, low_rank: LowRank | None, keeper: Keeper) -> Tensor:
    """[rope(q + LoRA), rope(k + LoRA), v + LoRA] in place of the frozen paths y [T, N], which are packed on the way.

    cos, sin: None for no rotation.
    q and k go through the norms of their heads before, if the spec has any. Allocates the packed bytes of q, k, v
    alone, in one piece.
    """
    slots = prepare_slots("qkv", spec.qkv.columns, y, keeper)
    _launch(spec, y, cos, sin, batch, slots, low_rank, keeper, pack=True)
    return y


def packed_qkv(keeper: Keeper) -> list[PackedSlot]:
    """The slots q, k, v; they can be taken once."""
    return [PackedSlot.kept(name, keeper) for name in "qkv"]


def fused_qkv_restore(
    spec, slots: list[PackedSlot], cos, sin, batch: int, dtype, low_rank: LowRank | None, keeper: Keeper,
    rotate: bool = True,
) -> Tensor:  # fmt: skip
    """The same [T, N or more] again from the packed slots, with the room that gradients in its place will need; not
    rotated: q + LoRA and k + LoRA alone, which the norms get.

    It is all that is allocated.
    """
    n_rows, like = slots[0].codes.shape[0], slots[0].codes.new_empty(0, dtype=dtype)
    y = spec.qkv.buffer(n_rows, low_rank, like) if rotate else like.new_empty(n_rows, spec.qkv.columns[1].stop)
    _launch(spec, y, cos, sin, batch, slots, low_rank, keeper, rotate=rotate)
    return y


def fused_norms(
    spec, slots: list[PackedSlot], cos, sin, batch: int, dtype, low_rank: LowRank | None, keeper: Keeper
) -> list[HeadNorm]:
    """The norms of q and k with what they normalized, restored once more rather than held while attention runs."""
    if not spec.norms:
        return []
    y = fused_qkv_restore(spec, slots, cos, sin, batch, dtype, low_rank, keeper, rotate=False)
    return [replace(spec.norm(name, keeper), x=y[:, own]) for name, own in zip("qk", spec.qkv.columns, strict=False)]
