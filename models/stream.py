"""A batch [B, S] as one row of its real tokens [1, T], so that nothing is computed for padding.

The layers see one row, a decoder's caller what it called with. Where documents begin is data on the tokens' device
(attention/flash.py: starts), so that a graph recorded for a row of T tokens serves every batch that fits into it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Fill = Callable[[int, int], tuple[int, int]]


class Stream:
    """Which token of the batch is where in the row.

    bounds: of the batch (attention/flash.py); real: bool [B, S] on the host, the tokens that are computed. fill: makes
    of how many tokens and documents there are how many there shall be, by a document of filler at the end that nobody
    reads, and empty ones; None: as many as there are. Allocates 8 (T + B S) bytes on the device by one transfer, for
    which it does not wait.
    starts: int32 [1, N + 1, 1, 1]; mask: which of the row's tokens are real, bool [1, T], None for all of them.
    """

    def __init__(self, bounds: Tensor, real: Tensor, device: torch.device, fill: Fill | None = None):
        self.shape = real.shape
        real = real.numpy().ravel()  # as in masks.py
        first = np.zeros(len(real) + 1, bool)
        first[bounds[0, 0, 0].numpy()] = True
        index = np.flatnonzero(real)
        starts = np.flatnonzero(first[index])
        self.length = len(index)
        counts = self.length, len(starts)
        self.size, n_places = counts if fill is None else fill(*counts)
        sizes = [self.size, len(real), n_places + 1]
        parts = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        rows, places, ends = (part.numpy() for part in parts.split(sizes))
        rows[: self.length] = index
        np.maximum(real.cumsum(dtype=int) - 1, 0, out=places)
        ends[: len(starts)] = starts
        ends[len(starts) :] = self.size
        if self.size > self.length:
            ends[len(starts)] = self.length
        self.rows, self.places, starts = parts.to(device, non_blocking=True).split(sizes)
        self.starts = starts.int()[None, :, None, None]
        self.mask = None
        if self.size > self.length:
            self.mask = (torch.arange(self.size, device=device) < self.length)[None]

    def gather(self, t: Tensor) -> Tensor:
        """[B, S, ...] to [1, T, ...]; filler is a copy of the first token."""
        return t.flatten(0, 1).index_select(0, self.rows)[None]

    def rows_of(self, t: Tensor) -> Tensor:
        """gather of a number a token, [B, S] or the same for all rows, [1, S]."""
        return self.gather(t.expand(self.shape))

    def scatter(self, t: Tensor, padding: Tensor | None = None) -> Tensor:
        """[1, T, C] to [B, S, C]; padding is what it is in another [B, S, C], or else 0."""
        whole = t.new_zeros(self.shape.numel(), t.shape[-1]) if padding is None else padding.flatten(0, 1)
        whole = whole.index_copy(0, self.rows[: self.length], t[0, : self.length])
        return whole.unflatten(0, self.shape)
