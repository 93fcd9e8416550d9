"""A batch [B, S] as one row of its real tokens [1, T], so that nothing is computed for padding.

The layers see one row, a decoder's caller what it called with. Where documents begin is data on the tokens' device
(attention/flash.py: starts), so that a graph recorded for a row of T tokens serves every batch that fits into it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# of documents in starts, or a multiple of it
PLACES = 64
# at least from one size to the next
STEP = 64


class Stream:
    """Which token of the batch is where in the row.

    bounds: of the batch (attention/flash.py); real: bool [B, S] on the host, the tokens that are computed. filled: the
    row has filled_size(T) tokens, the last ones a document of filler that nobody reads. Allocates 8 (T + B S) bytes on
    the device by one transfer, for which it does not wait.
    starts: int32 [1, N + 1, 1, 1]; mask: which of the row's tokens are real, bool [1, T], None for all of them.
    """

    def __init__(self, bounds: Tensor, real: Tensor, device: torch.device, filled: bool):
        self.shape = real.shape
        first = torch.zeros(real.numel() + 1, dtype=torch.bool)
        first[bounds[0, 0, 0].long()] = True
        index = real.flatten().nonzero().flatten()
        self.length = len(index)
        self.size = filled_size(self.length) if filled else self.length
        starts = first[index].nonzero().flatten()
        ends = [self.length] if self.size > self.length else []
        n_places = -(-(len(starts) + len(ends)) // PLACES) * PLACES + 1
        starts = torch.cat([starts, starts.new_tensor(ends)])
        starts = F.pad(starts, (0, n_places - len(starts)), value=self.size)
        places = (real.flatten().cumsum(0) - 1).clamp_min_(0)
        rows = F.pad(index, (0, self.size - self.length))
        parts = torch.cat([rows, places, starts])
        parts = (parts.pin_memory() if device.type == "cuda" else parts).to(device, non_blocking=True)
        self.rows, self.places, starts = parts.split([len(rows), len(places), len(starts)])
        self.starts = starts.int()[None, :, None, None]
        self.mask = None
        if self.size > self.length:
            self.mask = (torch.arange(self.size, device=device) < self.length)[None]

    def gather(self, t: Tensor) -> Tensor:
        """[B, S, ...] to [1, T, ...]; filler is a copy of the first token."""
        return t.flatten(0, 1).index_select(0, self.rows)[None]

    def scatter(self, t: Tensor, padding: Tensor | None = None) -> Tensor:
        """[1, T, C] to [B, S, C]; padding is what it is in another [B, S, C], or else 0."""
        whole = t.new_zeros(self.shape.numel(), t.shape[-1]) if padding is None else padding.flatten(0, 1)
        whole = whole.index_copy(0, self.rows[: self.length], t[0, : self.length])
        return whole.unflatten(0, self.shape)


def filled_size(n: int) -> int:
    """The size of row for n tokens: one of four between 2^k and 2^(k+1), so at most a quarter of n is filler."""
    step = max(STEP, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step
