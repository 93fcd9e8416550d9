"""What is between the linear layers of an MLP without a gate, in one kernel each way: LoRA add, GELU and packing.

Forward reads the frozen path of up once and writes hidden and the packed up; backward reads the packed slot and dhidden
once and writes dup and hidden. The packed bytes are those of packing/quantize.py, as with a gate (fused_mlp.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators.dispatch import cdiv, device_guard, rank_block
from hyclora.operators.linear.low_rank import LowRank
from hyclora.operators.mlp.activation import gelu_grad_tile, gelu_share
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


@triton.jit(do_not_specialize=["n_rows"])
def _fused_gelu_fwd_kernel(
    y_ptr, xa_ptr, b_ptr, hidden_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr,
    n_rows, n_cols, n_groups, stride_y, stride_rank,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, row, live = tile_rows(n_rows, BLOCK_ROWS)
    last = (n_rows - first - 1).to(tl.int32)
    col, inside = tile_columns(tile, n_cols, WHOLE, BLOCK_ROWS)
    y_ptr += first * stride_y
    low, high = range_of_others(
        y_ptr, mean_ptr, std_ptr, row, tile, n_cols, stride_y, GROUPED, GROUP, WHOLE, BLOCK_ROWS
    )
    up = load_strips(y_ptr, row, col, stride_y, inside, BLOCK_ROWS)
    pack_tile(
        up, codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, live, tile, n_cols, n_groups,
        BITS, STEP, CENTRE, GROUPED, GROUP, WHOLE, low, high,
    )  # fmt: skip
    up = add_lora(
        up, xa_ptr + first * stride_rank, b_ptr, tile, last, n_cols, stride_rank, stride_rank, 1, WHOLE, RANK,
        RANK_BLOCK,
    )  # fmt: skip
    # the unfused path rounds up to its dtype before
    up = rounded(up, hidden_ptr)
    store_strips(hidden_ptr + first * n_cols, up * gelu_share(up), row, col, n_cols, live, inside)


@triton.jit(do_not_specialize=["n_rows"])
def _fused_gelu_bwd_kernel(
    dhidden_ptr, g_ptr, down_ptr, xa_ptr, b_ptr, dy_ptr, hidden_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr,
    n_rows, n_cols, n_groups, stride_rank, stride_g, stride_dy,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    RANK: tl.constexpr, DOWN_RANK: tl.constexpr, DOWN_BLOCK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, row, live = tile_rows(n_rows, BLOCK_ROWS)
    last = (n_rows - first - 1).to(tl.int32)
    col, inside = tile_columns(tile, n_cols, WHOLE, BLOCK_ROWS)
    up = unpack_tile(
        codes_ptr, scale_ptr, mean_ptr, std_ptr, first, row, tile, n_cols, n_groups,
        BITS, STEP, CENTRE, GROUPED, GROUP, WHOLE, BLOCK_ROWS,
    )  # fmt: skip
    up = add_lora(
        up, xa_ptr + first * stride_rank, b_ptr, tile, last, n_cols, stride_rank, stride_rank, 1, WHOLE, RANK,
        RANK_BLOCK,
    )  # fmt: skip
    dhidden = load_strips(dhidden_ptr + first * n_cols, row, col, n_cols, inside, BLOCK_ROWS)
    dhidden = add_lora(
        dhidden, g_ptr + first * stride_g, down_ptr, tile, last, n_cols, stride_g, 1, n_cols,
        WHOLE, DOWN_RANK, DOWN_BLOCK,
    )  # fmt: skip
    dup, hidden = gelu_grad_tile(dhidden, up)
    store_strips(dy_ptr + first * stride_dy, dup, row, col, stride_dy, live, inside)
    store_strips(hidden_ptr + first * n_cols, hidden, row, col, n_cols, live, inside)


def _launch(spec, up: PackedSlot, low_rank: LowRank | None, keeper: Keeper, n_rows: int):
    """Grid, low-rank arguments and constants that both kernels take."""
    rank = spec.gate_up.projections[0].rank
    xa, B = (up.mean, up.mean) if low_rank is None else (keeper.exact(spec.gate_up.xa_name), low_rank.B)
    constants = up.constants("") | shared_constants([up], [rank]) | {"RANK": rank, "BLOCK_ROWS": BLOCK_ROWS}
    constants |= {"GROUP": up.book.group, "WHOLE": up.is_whole}
    constants["num_warps"] = BLOCK_ROWS // ROWS_A_WARP
    return (up.n_tiles, cdiv(n_rows, BLOCK_ROWS)), xa, B, constants


def fused_gelu_fwd(spec, y: Tensor, low_rank: LowRank | None, keeper: Keeper) -> Tensor:
    """hidden = gelu(up + LoRA) [T, F] from the frozen path y of up, packed on the way.

    Allocates hidden and the packed bytes of up.
    """
    (up,) = prepare_slots(("up",), spec.gate_up.columns, y, keeper)
    hidden = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grid, xa, B, constants = _launch(spec, up, low_rank, keeper, len(y))
    with device_guard(y):
        _fused_gelu_fwd_kernel[grid](
            y, xa, B, hidden, *up.arguments(), *y.shape, up.n_groups, y.stride(0), B.stride(0), **constants
        )
    return hidden


def fused_gelu_bwd(
    spec, dhidden: Tensor, down: tuple[Tensor, Tensor] | None, low_rank: LowRank | None, keeper: Keeper
) -> tuple[Tensor, Tensor]:
    """dup, spec.gate_up.buffer(...), and hidden [T, F] from dhidden and the packed slot.

    hidden takes the place of dhidden. down: g [T, R] and A [R, F], whose product is still to be added to dhidden.
    Allocates dup alone.
    """
    up = PackedSlot.kept("up", keeper)
    dy = spec.gate_up.buffer(len(dhidden), low_rank, dhidden)
    grid, xa, B, constants = _launch(spec, up, low_rank, keeper, len(dhidden))
    g, A = (dhidden, dhidden) if down is None else down
    down_rank = 0 if down is None else len(A)
    with device_guard(dhidden):
        _fused_gelu_bwd_kernel[grid](
            dhidden, g, A, xa, B, dy, dhidden, *up.arguments(), *dhidden.shape, up.n_groups, B.stride(0), g.stride(0),
            dy.stride(0), **constants, DOWN_RANK=down_rank, DOWN_BLOCK=rank_block(down_rank),
        )  # fmt: skip
    return dy, dhidden
