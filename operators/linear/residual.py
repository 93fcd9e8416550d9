"""Where a block ends: the frozen path, the low-rank path and the residual branch around the block in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import cdiv, device_guard, rank_block, use_triton
from hyclora.operators.packing.codebook import GROUP
from hyclora.operators.packing.fused_tiles import (
    ROWS_A_WARP,
    add_lora,
    load_strips,
    store_strips,
    tile_columns,
    tile_rows,
)

BLOCK_ROWS = 64
LARGEST_RANK = 128  # all of it is in shared memory


@triton.jit(do_not_specialize=["n_rows"])
def _add_residual_kernel(
    y_ptr, xa_ptr, b_ptr, residual_ptr, out_ptr, n_rows, n_cols, stride_xa, stride_b,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first, row, live = tile_rows(n_rows, BLOCK_ROWS)
    last = (n_rows - first - 1).to(tl.int32)
    col, inside = tile_columns(tile, n_cols, WHOLE, BLOCK_ROWS)
    y = load_strips(y_ptr + first * n_cols, row, col, n_cols, inside, BLOCK_ROWS)
    residual = load_strips(residual_ptr + first * n_cols, row, col, n_cols, inside, BLOCK_ROWS)
    y = add_lora(
        y, xa_ptr + first * stride_xa, b_ptr, tile, last, n_cols, stride_xa, stride_b, 1, WHOLE, RANK, RANK_BLOCK
    )
    store_strips(out_ptr + first * n_cols, y + residual, row, col, n_cols, live, inside)


def overwritable(residual: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a sum with y of dtype fits into the residual's memory."""
    return (
        residual is not None
        and residual.is_contiguous()
        and torch.promote_types(dtype, residual.dtype) == residual.dtype
    )


def add_residual(y: Tensor, xa: Tensor | None, B: Tensor | None, residual: Tensor, overwrite: bool) -> Tensor:
    """reference.add_residual on any device: y + xa B^T + residual [T, N].

    In residual's memory if overwrite (see overwritable), else in y's unless the sum is of a wider dtype, which alone is
    then allocated (on a GPU, and for a contiguous residual). Autograd is not told of either.
    """
    dtype = torch.promote_types(y.dtype, residual.dtype)
    into = residual.detach() if overwrite else y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    if xa is not None and xa.shape[1] > LARGEST_RANK and use_triton(y):
        y, xa, B = y.addmm_(xa, B.t()), None, None
    if not use_triton(y):
        return into.copy_(reference.add_residual(y, xa, B, residual))
    residual = residual.contiguous()
    n_rows, n_cols = y.shape
    rank = 0 if xa is None else xa.shape[1]
    xa, B = (y, y) if xa is None else (xa, B)
    with device_guard(y):
        _add_residual_kernel[(cdiv(n_cols, GROUP), cdiv(n_rows, BLOCK_ROWS))](
            y, xa, B, residual, into, n_rows, n_cols, xa.stride(0), B.stride(0), RANK=rank,
            RANK_BLOCK=rank_block(rank), WHOLE=n_cols % GROUP == 0, BLOCK_ROWS=BLOCK_ROWS,
            num_warps=BLOCK_ROWS // ROWS_A_WARP,
        )  # fmt: skip
    return into
