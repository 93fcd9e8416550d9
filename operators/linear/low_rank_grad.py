"""Both products that backward makes of dy for an adapter, in one pass over dy: g = dy B and dB = dy^T (x A^T).

Each is bound by reading dy. A program takes a stripe of columns of one projection and a range of rows; g is then summed
over stripes and dB over ranges, always in the same order, so that gradients are the same twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators.dispatch import cdiv, device_guard, rank_block, use_triton
from hyclora.operators.linear.low_rank import SLOTS
from hyclora.operators.packing.fused_tiles import operand

# the fastest of those tried on an H100: bytes are those of a tile of dy, of which three are on their way or in use
BLOCK_ROWS = 32
TILE_BYTES = 2**15
LAUNCH = {"num_warps": 4, "num_stages": 3}
# of a projection; by count, the sums over stripes of a larger one move as many bytes as a second pass
LARGEST_RANK = 32
PROGRAMS = 256  # two for each multiprocessor of a large GPU
SUM_BLOCK = 1024


@triton.jit
def _projection(index, width0, width1, width2, rank0, rank1, BLOCK_COLS: tl.constexpr):
    """First column, number of columns, first rank and stripe within its projection of a stripe."""
    stripes0, stripes1 = tl.cdiv(width0, BLOCK_COLS), tl.cdiv(width1, BLOCK_COLS)
    second, third = index >= stripes0, index >= stripes0 + stripes1
    start = tl.where(third, width0 + width1, tl.where(second, width0, 0))
    width = tl.where(third, width2, tl.where(second, width1, width0))
    first_rank = tl.where(third, rank0 + rank1, tl.where(second, rank0, 0))
    stripe = index - tl.where(third, stripes0 + stripes1, tl.where(second, stripes0, 0))
    return start, width, first_rank, stripe


@triton.jit(do_not_specialize=["n_rows", "rows_a_range"])
def _low_rank_grad_kernel(
    dy_ptr, xa_ptr, b_ptr, g_ptr, db_ptr, n_rows, rows_a_range, stride_dy, stride_xa, stride_b,
    width0, width1, width2, rank0, rank1, rank2,
    BLOCK_RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    index, part = tl.program_id(0), tl.program_id(1)
    start, width, first_rank, stripe = _projection(index, width0, width1, width2, rank0, rank1, BLOCK_COLS)
    n_cols = width0 + width1 + width2
    ranks = tl.where(start == 0, rank0, tl.where(start == width0, rank1, rank2))
    col, rank, place = tl.arange(0, BLOCK_COLS), tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROWS)
    col += stripe * BLOCK_COLS
    inside, own = (col < width)[:, None], (rank < ranks)[None, :]
    b = tl.load(b_ptr + (start + col)[:, None] * stride_b + (first_rank + rank)[None, :], mask=inside & own, other=0.0)
    b = operand(b)
    first = part.to(tl.int64) * rows_a_range
    dy_ptr += first * stride_dy + start
    xa_ptr += first * stride_xa + first_rank
    g_ptr += (index.to(tl.int64) * n_rows + first) * BLOCK_RANK  # what a stripe adds to g
    n_own = tl.minimum(rows_a_range, n_rows - first).to(tl.int32)
    db = tl.zeros([BLOCK_COLS, BLOCK_RANK], tl.float32)
    dy_ptrs = dy_ptr + place[:, None] * stride_dy + col[None, :]
    xa_ptrs = xa_ptr + place[:, None] * stride_xa + rank[None, :]
    g_ptrs = g_ptr + place[:, None] * BLOCK_RANK + rank[None, :]
    for i in range(0, n_own, BLOCK_ROWS):
        live = (place < n_own - i)[:, None]
        dy = operand(tl.load(dy_ptrs, mask=live & (col < width)[None, :], other=0.0))
        xa = operand(tl.load(xa_ptrs, mask=live & own, other=0.0))
        tl.store(g_ptrs, tl.dot(dy, b, input_precision="ieee"), mask=live)
        db = tl.dot(tl.trans(dy), xa, db, input_precision="ieee")
        dy_ptrs += BLOCK_ROWS * stride_dy
        xa_ptrs += BLOCK_ROWS * stride_xa
        g_ptrs += BLOCK_ROWS * BLOCK_RANK
    db_ptr += (part.to(tl.int64) * n_cols + start) * BLOCK_RANK
    tl.store(db_ptr + col[:, None] * BLOCK_RANK + rank[None, :], db, mask=inside)


@triton.jit
def _sum_parts(ptr, stride, count, most):
    """Sum of count [BLOCK] <= most numbers of fp32 that lie stride apart; eight of them are on their way at a time."""
    total = tl.zeros(ptr.shape, tl.float32)
    for i in range(0, most, 8):
        parts = ()
        for j in tl.static_range(8):
            parts += (tl.load(ptr + j * stride, mask=i + j < count, other=0.0),)
        for j in tl.static_range(8):
            total += parts[j]
        ptr += 8 * stride
    return total


@triton.jit(do_not_specialize=["n_rows", "n_ranges"])
def _low_rank_sum_kernel(
    g_parts_ptr, db_parts_ptr, g_ptr, db_ptr, n_rows, n_ranges, stride_g, g_programs,
    width0, width1, width2, rank0, rank1, rank2, rank,
    BLOCK_RANK: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    if program < g_programs:
        element += program * BLOCK
        row, column = element // rank, element % rank
        live = row < n_rows
        second, third = column >= rank0, column >= rank0 + rank1
        stripes0, stripes1 = tl.cdiv(width0, BLOCK_COLS), tl.cdiv(width1, BLOCK_COLS)
        stripes2 = tl.cdiv(width2, BLOCK_COLS)
        stripe = tl.where(third, stripes0 + stripes1, tl.where(second, stripes0, 0))
        count = tl.where(third, stripes2, tl.where(second, stripes1, stripes0))
        count = tl.where(column < rank0 + rank1 + rank2, count, 0)
        column_of = column - tl.where(third, rank0 + rank1, tl.where(second, rank0, 0))
        parts = g_parts_ptr + (stripe.to(tl.int64) * n_rows + row) * BLOCK_RANK + column_of
        most = tl.maximum(stripes0, tl.maximum(stripes1, stripes2))
        total = _sum_parts(parts, n_rows * BLOCK_RANK, tl.where(live, count, 0), most)
        tl.store(g_ptr + row.to(tl.int64) * stride_g + column, total.to(g_ptr.dtype.element_ty), mask=live)
    else:
        element += (program - g_programs) * BLOCK
        size0, size1, size2 = width0 * rank0, width1 * rank1, width2 * rank2
        second, third = element >= size0, element >= size0 + size1
        own = element - tl.where(third, size0 + size1, tl.where(second, size0, 0))
        ranks = tl.where(third, tl.maximum(rank2, 1), tl.where(second, tl.maximum(rank1, 1), tl.maximum(rank0, 1)))
        col = own // ranks + tl.where(third, width0 + width1, tl.where(second, width0, 0))
        live = element < size0 + size1 + size2
        parts = db_parts_ptr + col * BLOCK_RANK + own % ranks
        size = (width0 + width1 + width2) * BLOCK_RANK
        total = _sum_parts(parts, size, tl.where(live, n_ranges, 0), n_ranges)
        tl.store(db_ptr + element, total, mask=live)


def in_one_pass(dy: Tensor, ranks: list[int]) -> bool:
    """Whether low_rank_grads has a kernel for these projections that is worth it."""
    return use_triton(dy) and len(ranks) <= SLOTS and 0 < max(ranks) <= LARGEST_RANK


def low_rank_grads(dy: Tensor, xa: Tensor, B: Tensor, widths: list[int], ranks: list[int], g: Tensor) -> list[Tensor]:
    """Writes g = dy B into g [T, R]; the dB of each projection [N_p, r_p] in fp32.

    dy [T, N], the columns of all projections; xa [T, R] and B [N, R], block-diagonal, of operators/linear/low_rank.py.
    Allocates dB in one piece; temporary, with r the largest rank as a power of two from 16 on: 4 r bytes a token and
    stripe of 512 columns (256 in fp32 or of r = 32), and 4 r N for each of at most 256 / stripes ranges of rows.
    """
    n_rows, rank = dy.shape[0], B.shape[1]
    block_rank = rank_block(max(ranks))
    block_cols = min(512 * 16 // block_rank, TILE_BYTES // BLOCK_ROWS // dy.itemsize)
    stripes = sum(cdiv(width, block_cols) for width in widths)
    rows_a_range = cdiv(cdiv(n_rows, max(1, PROGRAMS // stripes)), BLOCK_ROWS) * BLOCK_ROWS
    n_ranges = cdiv(n_rows, rows_a_range)
    g_parts = torch.empty(stripes, n_rows, block_rank, dtype=torch.float32, device=dy.device)
    db_parts = torch.empty(n_ranges, sum(widths), block_rank, dtype=torch.float32, device=dy.device)
    sizes = [width * r for width, r in zip(widths, ranks, strict=True)]
    dB = torch.empty(sum(sizes), dtype=torch.float32, device=dy.device)
    shape = [*widths, *[0] * (SLOTS - len(widths)), *ranks, *[0] * (SLOTS - len(ranks))]
    g_programs = cdiv(n_rows * rank, SUM_BLOCK)
    with device_guard(dy):
        _low_rank_grad_kernel[(stripes, n_ranges)](
            dy, xa, B, g_parts, db_parts, n_rows, rows_a_range, dy.stride(0), xa.stride(0), B.stride(0), *shape,
            BLOCK_RANK=block_rank, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=block_cols, **LAUNCH,
        )  # fmt: skip
        _low_rank_sum_kernel[(g_programs + cdiv(sum(sizes), SUM_BLOCK),)](
            g_parts, db_parts, g, dB, n_rows, n_ranges, g.stride(0), g_programs, *shape, rank,
            BLOCK_RANK=block_rank, BLOCK_COLS=block_cols, BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    parts = zip(dB.split(sizes), widths, ranks, strict=True)
    return [part.view(width, r) for part, width, r in parts]
