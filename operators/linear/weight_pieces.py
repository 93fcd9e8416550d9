"""The frozen W [N, in] of projections that stand side by side, made a piece at a time.

NF4 has to be dequantized before a GEMM, and W of gate or up beside their outputs would be what most memory at the peak
goes to. Pieces of rows (outputs) are what y = x W^T is made of, pieces of columns (inputs) what dx = dy W is: neither
adds up anything that the whole would not, and with many tokens both GEMMs are as efficient as that of the whole while a
piece is some tiles wide. With few tokens a piece would not fill a GPU, and activations are small. Where the peak is
elsewhere nothing is cut: q, k, v in forward, and in backward a W of one projection with no more outputs than inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyclora.operators.dispatch import cdiv
from hyclora.operators.linear.nf4 import dequantize_4bit, is_4bit, state_of

# Bytes. What fits in WHOLE is one piece, neighbours too, for one GEMM: q, k, v of 7B (96 MiB), gate of Llama-3-8B (112)
WHOLE = 2**27
# With many tokens a larger W is cut into equal parts: those of the MLP of 7B (86 MiB) and Llama-3-8B into two, whose
# 2048 rows or columns still fill a GPU in a GEMM
WEIGHT_BUFFER = 56 * 2**20
TILE = 256  # parts end where tiles of GEMMs do
# tokens from which on half of the inputs fills a GPU in a GEMM: 128 tiles of 128 x 256 for 7B
MANY_TOKENS = 2048


@dataclass(frozen=True)
class Piece:
    """Rows and columns of W that are there at one time; linear layers that have them, each with all its rows of W."""

    linears: list[tuple[torch.nn.Module, slice]]
    rows: slice
    columns: slice

    @property
    def in_4bit(self) -> bool:
        return is_4bit(self.linears[0][0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def weight_pieces(
    linears: list[tuple[torch.nn.Module, slice]], dtype: torch.dtype, by_rows: bool, many_tokens: bool
) -> list[Piece]:
    """The pieces of W in dtype for linear layers with their rows of W: by rows, or else by columns.

    Neighbours in NF4 that fit in WHOLE bytes are one run. A run that is cut is in parts of WEIGHT_BUFFER bytes at most,
    or of a tile.
    """
    limit, whole, runs = WEIGHT_BUFFER // dtype.itemsize, WHOLE // dtype.itemsize, []
    for linear, own in linears:
        last = runs[-1] if runs else None
        both = last and last.in_4bit and is_4bit(linear)
        if both and (own.stop - last.rows.start) * linear.in_features <= whole:
            runs[-1] = Piece([*last.linears, (linear, own)], slice(last.rows.start, own.stop), last.columns)
        else:
            runs.append(Piece([(linear, own)], own, slice(0, linear.in_features)))
    pieces = []
    for run in runs:
        n_rows, n_cols = run.shape
        joined, narrow = len(run.linears) > 1, n_rows <= n_cols
        elsewhere = joined if by_rows else narrow and not joined
        if elsewhere or not run.in_4bit or not many_tokens and n_rows * n_cols <= whole:
            pieces.append(run)
        elif by_rows:
            pieces += [replace(run, rows=part) for part in _parts(run.rows, limit // n_cols)]
        else:
            pieces += [replace(run, columns=part) for part in _parts(run.columns, limit // n_rows)]
    return pieces


def _parts(whole: slice, most: int) -> list[slice]:
    """whole in the fewest parts of at most `most`, of equal numbers of tiles as far as that goes; a tile at least."""
    n = whole.stop - whole.start
    if n <= most:
        return [whole]
    step = max(most // TILE, 1) * TILE
    step = cdiv(cdiv(n, cdiv(n, step)), TILE) * TILE
    return [slice(start, min(start + step, whole.stop)) for start in range(whole.start, whole.stop, step)]


def make_pieces(
    pieces: list[Piece], dtype: torch.dtype, below: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, their W in dtype) piece by piece; NF4 is dequantized into the memory of the piece before.

    Allocates the largest piece in NF4, with below under it; a W that is not NF4 is cast if it is of another dtype.

    below: [R, in], which stands below the last rows of W as its rows N to N + R; these have to be dequantized.
    """
    buffer, n_below, last_row = None, 0 if below is None else len(below), pieces[-1].rows.stop
    for piece in pieces:
        rows, columns, (first, _) = piece.rows, piece.columns, piece.linears[0]
        if not piece.in_4bit:
            yield rows, columns, first.weight.to(dtype)
            continue
        if buffer is None:
            shapes = [p.shape for p in pieces if p.in_4bit]
            numel = max((n_rows + n_below) * n_cols for n_rows, n_cols in shapes)
            buffer = torch.empty(numel, dtype=dtype, device=first.weight.device)
        (n_rows, n_cols), extra = piece.shape, n_below if rows.stop == last_row else 0
        weight = buffer[: (n_rows + extra) * n_cols].view(-1, n_cols)
        for linear, own in piece.linears:
            start, stop = max(own.start, rows.start), min(own.stop, rows.stop)
            beneath, more = (below, extra) if extra and stop == rows.stop else (None, 0)
            out = weight[start - rows.start : stop - rows.start + more]
            dequantize_4bit(linear.weight, out, start - own.start, columns.start, beneath, state_of(linear))
        yield slice(rows.start, rows.stop + extra), columns, weight
