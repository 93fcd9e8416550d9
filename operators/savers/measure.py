"""What calibration has to know of the tokens of a slot: how many there are, sums and extremes of each channel."""

from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import as_rows, cdiv, device_guard, use_triton
from hyclora.operators.token_tiles import token_tiles

MERGED_BY = {"low": torch.minimum, "high": torch.maximum}  # all other measures are sums
NAMES = ("total", "total_square", "low", "high")
BLOCK_ROWS, BLOCK_COLS = 32, 64


@triton.jit(do_not_specialize=["n_rows", "n_cols", "stride"])
def _measure_kernel(
    x_ptr, mask_ptr, out_ptr, n_rows, n_cols, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    live = column < n_cols
    total = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    total_square = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    low = tl.full([BLOCK_COLS], float("inf"), dtype=tl.float32)
    high = tl.full([BLOCK_COLS], float("-inf"), dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        counts = tl.load(mask_ptr + row, mask=row < n_rows, other=0) != 0
        counts = counts[:, None] & live[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=counts, other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x, axis=0)
        total_square += tl.sum(x * x, axis=0)
        low = tl.minimum(low, tl.min(tl.where(counts, x, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(counts, x, float("-inf")), axis=0))
    tl.store(out_ptr + column, total, mask=live)
    tl.store(out_ptr + n_cols + column, total_square, mask=live)
    tl.store(out_ptr + 2 * n_cols + column, low, mask=live)
    tl.store(out_ptr + 3 * n_cols + column, high, mask=live)


@torch.no_grad()
def measure(x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Measures in fp32 of the tokens of x [T, C] that count: their count, and "total" sum x, "total_square" sum x^2,
    "low" min x, "high" max x, each [C]; inf and -inf where there is none.

    Those count that mask [T] (None: all) does not leave out and whose norm is below LARGEST, so that all sums are
    finite: a step that overflows is skipped by whoever trains, and statistics would keep it. Allocates 16 bytes a
    channel and some a token; on a CPU fp32 copies of a tile of tokens as well.
    """
    mask = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if mask is None else mask.to(x.device)
    if use_triton(x):
        return _measure(x, mask)
    return reduce(merge, (reference.measure(x[rows], mask[rows]) for rows in token_tiles(x.shape[0])))


def _measure(x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    x = as_rows(x)
    n_rows, n_cols = x.shape
    mask = mask & (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) < reference.LARGEST)
    out = torch.empty(len(NAMES), n_cols, dtype=torch.float32, device=x.device)
    with device_guard(x):
        _measure_kernel[(cdiv(n_cols, BLOCK_COLS),)](
            x, mask.view(torch.uint8), out, n_rows, n_cols, x.stride(0), BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS
        )
    return {"count": mask.sum().float()} | dict(zip(NAMES, out, strict=True))


def merge(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """What measure gives for the tokens of both."""
    return {name: MERGED_BY.get(name, torch.add)(t, other[name]) for name, t in one.items()}
