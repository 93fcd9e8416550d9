"""The MLP's element-wise middle in one kernel each way: LoRA add, SiLU, product and packing.

Forward reads the frozen paths of gate and up once and writes hidden and the packed gate and up; backward reads the
packed slots and dhidden once and writes dgate, dup and hidden. The packed bytes are those of packing/quantize.py,
so either direction can be paired with the unfused other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators.dispatch import cdiv, device_guard, rank_block
from hyclora.operators.linear.low_rank import LowRank
from hyclora.operators.mlp.activation import Activation, silu_mul_grad_tile, silu_mul_tile
from hyclora.operators.packing.fused_tiles import (
    ROWS_A_WARP,
    PackedSlot,
    add_lora,
    load_strips,
    pack_tile,
    prepare_slots,
    range_of_others,
    rounded,
    shared_constants,
    store_strips,
    tile_columns,
    tile_rows,
    unpack_tile,
)
from hyclora.operators.savers import Keeper

BLOCK_ROWS = 64
# of the backward kernel: a few spills cost less than the programs that more registers would keep out
REGISTERS = 128


@triton.jit(do_not_specialize=["n_rows"])
def _fused_mlp_fwd_kernel(
    y_ptr, xa_ptr, b_ptr, hidden_ptr,
    gate_codes_ptr, gate_scale_ptr, gate_mean_ptr, gate_std_ptr,
    up_codes_ptr, up_scale_ptr, up_mean_ptr, up_std_ptr,
    n_rows, n_cols, n_groups, stride_y, stride_rank,
    GATE_BITS: tl.constexpr, GATE_STEP: tl.constexpr, GATE_CENTRE: tl.constexpr,
    UP_BITS: tl.constexpr, UP_STEP: tl.constexpr, UP_CENTRE: tl.constexpr,
    GROUPED: tl.constexpr, GROUP: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, row, live = tile_rows(n_rows, BLOCK_ROWS)
    last = (n_rows - first - 1).to(tl.int32)
    col, inside = tile_columns(tile, n_cols, WHOLE, BLOCK_ROWS)
    y_ptr += first * stride_y
    xa_ptr += first * stride_rank
    gate_low, gate_high = range_of_others(
        y_ptr, gate_mean_ptr, gate_std_ptr, row, tile, n_cols, stride_y, GROUPED, GROUP, WHOLE, BLOCK_ROWS
    )
    up_low, up_high = range_of_others(
        y_ptr + n_cols, up_mean_ptr, up_std_ptr, row, tile, n_cols, stride_y, GROUPED, GROUP, WHOLE, BLOCK_ROWS
    )
    gate = load_strips(y_ptr, row, col, stride_y, inside, BLOCK_ROWS)
    up = load_strips(y_ptr + n_cols, row, col, stride_y, inside, BLOCK_ROWS)
    pack_tile(
        gate, gate_codes_ptr, gate_scale_ptr, gate_mean_ptr, gate_std_ptr, first, row, live, tile, n_cols,
        n_groups, GATE_BITS, GATE_STEP, GATE_CENTRE, GROUPED, GROUP, WHOLE, gate_low, gate_high,
    )  # fmt: skip
    pack_tile(
        up, up_codes_ptr, up_scale_ptr, up_mean_ptr, up_std_ptr, first, row, live, tile, n_cols,
        n_groups, UP_BITS, UP_STEP, UP_CENTRE, GROUPED, GROUP, WHOLE, up_low, up_high,
    )  # fmt: skip
    gate = add_lora(
        gate, xa_ptr, b_ptr, tile, last, n_cols, stride_rank, stride_rank, 1, WHOLE, GATE_RANK, RANK_BLOCK,
    )  # fmt: skip
    up = add_lora(
        up, xa_ptr + GATE_RANK, b_ptr + n_cols * stride_rank + GATE_RANK, tile, last, n_cols, stride_rank,
        stride_rank, 1, WHOLE, UP_RANK, RANK_BLOCK,
    )  # fmt: skip
    # the unfused path rounds gate and up to their dtype before the product
    hidden = silu_mul_tile(rounded(gate, hidden_ptr), rounded(up, hidden_ptr))
    store_strips(hidden_ptr + first * n_cols, hidden, row, col, n_cols, live, inside)


@triton.jit(do_not_specialize=["n_rows"])
def _fused_mlp_bwd_kernel(
    dhidden_ptr, g_ptr, down_ptr, xa_ptr, b_ptr, dy_ptr, hidden_ptr,
    gate_codes_ptr, gate_scale_ptr, gate_mean_ptr, gate_std_ptr,
    up_codes_ptr, up_scale_ptr, up_mean_ptr, up_std_ptr,
    n_rows, n_cols, n_groups, stride_rank, stride_g, stride_dy,
    GATE_BITS: tl.constexpr, GATE_STEP: tl.constexpr, GATE_CENTRE: tl.constexpr,
    UP_BITS: tl.constexpr, UP_STEP: tl.constexpr, UP_CENTRE: tl.constexpr,
    GROUPED: tl.constexpr, GROUP: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr, DOWN_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, row, live = tile_rows(n_rows, BLOCK_ROWS)
    last = (n_rows - first - 1).to(tl.int32)
    col, inside = tile_columns(tile, n_cols, WHOLE, BLOCK_ROWS)
    xa_ptr += first * stride_rank
    gate = unpack_tile(
        gate_codes_ptr, gate_scale_ptr, gate_mean_ptr, gate_std_ptr, first, row, tile, n_cols,
        n_groups, GATE_BITS, GATE_STEP, GATE_CENTRE, GROUPED, GROUP, WHOLE, BLOCK_ROWS,
    )  # fmt: skip
    up = unpack_tile(
        up_codes_ptr, up_scale_ptr, up_mean_ptr, up_std_ptr, first, row, tile, n_cols,
        n_groups, UP_BITS, UP_STEP, UP_CENTRE, GROUPED, GROUP, WHOLE, BLOCK_ROWS,
    )  # fmt: skip
    gate = add_lora(
        gate, xa_ptr, b_ptr, tile, last, n_cols, stride_rank, stride_rank, 1, WHOLE, GATE_RANK, RANK_BLOCK,
    )  # fmt: skip
    up = add_lora(
        up, xa_ptr + GATE_RANK, b_ptr + n_cols * stride_rank + GATE_RANK, tile, last, n_cols, stride_rank,
        stride_rank, 1, WHOLE, UP_RANK, RANK_BLOCK,
    )  # fmt: skip
    dhidden = load_strips(dhidden_ptr + first * n_cols, row, col, n_cols, inside, BLOCK_ROWS)
    dhidden = add_lora(
        dhidden, g_ptr + first * stride_g, down_ptr, tile, last, n_cols, stride_g, 1, n_cols,
        WHOLE, DOWN_RANK, DOWN_BLOCK,
    )  # fmt: skip
    dgate, dup, hidden = silu_mul_grad_tile(dhidden, gate, up)
    dy_ptr += first * stride_dy
    store_strips(dy_ptr, dgate, row, col, stride_dy, live, inside)
    store_strips(dy_ptr + n_cols, dup, row, col, stride_dy, live, inside)
    store_strips(hidden_ptr + first * n_cols, hidden, row, col, n_cols, live, inside)


def _launch(spec, gate: PackedSlot, up: PackedSlot, low_rank: LowRank | None, keeper: Keeper, n_rows: int):
    """Grid, low-rank arguments and constants that both kernels take."""
    ranks = [p.rank for p in spec.gate_up.projections]
    xa, B = (gate.mean, gate.mean) if low_rank is None else (keeper.exact(spec.gate_up.xa_name), low_rank.B)
    constants = gate.constants("GATE_") | up.constants("UP_") | shared_constants([gate, up], ranks)
    constants |= {"GATE_RANK": ranks[0], "UP_RANK": ranks[1], "BLOCK_ROWS": BLOCK_ROWS}
    constants |= {"GROUP": gate.book.group, "WHOLE": gate.is_whole}
    constants["num_warps"] = BLOCK_ROWS // ROWS_A_WARP
    grid = (gate.n_tiles, cdiv(n_rows, BLOCK_ROWS))
    return grid, xa, B, constants


def fits(savers: dict, activation: Activation) -> bool:
    """Whether an activation's kernels take these savers: inputs quantized in groups of one size, others recomputed."""
    books = [getattr(savers[name], "book", None) for name in activation.slots]
    if None in books or len({book.group for book in books}) > 1:
        return False
    return not any(savers[name].stored for name in ("act", "hidden") if name in savers)


def fused_mlp_fwd(spec, y: Tensor, low_rank: LowRank | None, keeper: Keeper) -> Tensor:
    """hidden = silu(gate + LoRA) * (up + LoRA) [T, F] from the frozen paths y = [gate, up], packed on the way.

    Allocates hidden and the packed bytes of gate and up, in one piece.
    """
    n_rows, n_cols = y.shape[0], y.shape[1] // 2
    slots = prepare_slots(("gate", "up"), spec.gate_up.columns, y, keeper)
    hidden = torch.empty(n_rows, n_cols, dtype=y.dtype, device=y.device)
    grid, xa, B, constants = _launch(spec, *slots, low_rank, keeper, n_rows)
    with device_guard(y):
        _fused_mlp_fwd_kernel[grid](
            y, xa, B, hidden, *slots[0].arguments(), *slots[1].arguments(),
            n_rows, n_cols, slots[0].n_groups, y.stride(0), B.stride(0), **constants,
        )  # fmt: skip
    return hidden


def fused_mlp_bwd(
    spec, dhidden: Tensor, down: tuple[Tensor, Tensor] | None, low_rank: LowRank | None, keeper: Keeper
) -> tuple[Tensor, Tensor]:
    """dy = [dgate, dup], spec.gate_up.buffer(...), and hidden [T, F] from dhidden and the packed slots.

    hidden takes the place of dhidden. down: g [T, R] and A [R, F], whose product is still to be added to dhidden.
    Allocates dy alone.
    """
    slots = [PackedSlot.kept(name, keeper) for name in ("gate", "up")]
    n_rows, n_cols = dhidden.shape
    dy = spec.gate_up.buffer(n_rows, low_rank, dhidden)
    grid, xa, B, constants = _launch(spec, *slots, low_rank, keeper, n_rows)
    g, A = (dhidden, dhidden) if down is None else down
    down_rank = 0 if down is None else len(A)
    with device_guard(dhidden):
        _fused_mlp_bwd_kernel[grid](
            dhidden, g, A, xa, B, dy, dhidden, *slots[0].arguments(), *slots[1].arguments(),
            n_rows, n_cols, slots[0].n_groups, B.stride(0), g.stride(0), dy.stride(0), **constants,
            DOWN_RANK=down_rank, DOWN_BLOCK=rank_block(down_rank), maxnreg=REGISTERS,
        )  # fmt: skip
    return dy, dhidden
