"""A softmax map kept as the largest probabilities of each row (paper section 4.1: softmax outliers)."""

import math

import torch
from torch import Tensor

from hyclora.operators.savers.base import Step, StoringSaver


class Sparse(StoringSaver):
    """Keeps the ceil(ratio * S) largest entries of each row of prob [..., S]: values and their columns.

    The capacity depends on the shape alone, so nothing is counted on the device and no host sync is needed. Columns
    are int16 while they fit, to S = 32767, then int32: 4 bytes an entry, later 6, of each row (a token and head).
    topk's int64 columns, 8 bytes an entry, are temporary.
    """

    def __init__(self, ratio: float):
        self.ratio = ratio

    def __str__(self) -> str:
        return f"sparse (top {self.ratio:g})"

    def row(self, n_cols: int) -> tuple[int, torch.dtype]:
        """How many entries of a row of n_cols are kept, and the dtype of their columns."""
        dtype = torch.int16 if n_cols <= torch.iinfo(torch.int16).max else torch.int32
        return min(n_cols, max(1, math.ceil(self.ratio * n_cols))), dtype

    def bits(self, n_cols: int) -> float:
        capacity, dtype = self.row(n_cols)
        return capacity * (16.0 + 8 * dtype.itemsize)

    def pack(self, x: Tensor, step: Step) -> tuple[Tensor, ...]:
        capacity, dtype = self.row(x.shape[-1])
        values, columns = x.topk(capacity, dim=-1, sorted=False)
        return values, columns.to(dtype)

    def unpack(
        self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype, weight: Tensor | None = None
    ) -> Tensor:
        values, columns = packed
        x = torch.zeros(shape, dtype=dtype, device=values.device).scatter_(-1, columns.long(), values)
        return x if weight is None else x * weight
