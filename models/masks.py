"""Which tokens see which, told in a few numbers instead of Hugging Face's [B, 1, S, S] mask."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def causal_bounds(
    attention_mask, position_ids: Tensor | None, batch: int, seq_len: int,
    unread: Callable[[Tensor], bool] = lambda padding: True, zero: bool = True,
) -> Tensor | None:  # fmt: skip
    """The bounds (attention/flash.py) of a training batch by HF's rules; None where only a mask of HF's will do.

    With a 2-D mask the real tokens of a row are a run, and the padding in front is one that sees nothing and gets 0,
    as in HF if `zero`. Padding behind belongs to the run: real tokens do not see what is later. It sees itself, unlike
    in HF, so its outputs are others, and finite. Where padding (bool [B, S] on the host) is not as in HF it must be
    unread. Without a mask a run ends where position ids do not go on by one. One transfer from the GPU, where HF has
    one too; none if there is neither.
    """
    # numpy takes a tenth of torch's time for so little, and the GPU waits; torch 2.15, which compiles it as its own,
    # sums no bool unless it is told to sum numbers
    first, seeing = np.zeros((batch, seq_len), bool), np.ones((batch, seq_len), bool)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, seq_len):
            return None
        real = attention_mask.bool().cpu().numpy()
        if real.all():
            return _whole_rows(batch, seq_len)
        first[:, 1:] = real[:, 1:] & ~real[:, :-1]
        if (first.sum(1) + real[:, 0] > 1).any():  # padding between real tokens, which see each other in HF
            return None
        in_front = (real.cumsum(1, int) == 0) & real.any(1, keepdims=True)
        padding = ~real & ~in_front if zero else ~real
        if padding.any() and not unread(torch.from_numpy(padding)):
            return None
        seeing = ~in_front
    elif position_ids is not None:
        if position_ids.shape not in ((batch, seq_len), (1, seq_len)):
            return None
        first[:, 1:] = (position_ids.diff(dim=-1) != 1).cpu().numpy()
    else:
        return _whole_rows(batch, seq_len)
    first[:, 0] = True
    starts = np.flatnonzero(first)
    bounds = np.zeros((1, 1, 2, len(starts) + 1), np.int32)
    bounds[0, 0, :, :-1] = starts, seeing.ravel()[starts]
    bounds[0, 0, 0, -1] = batch * seq_len
    return torch.from_numpy(bounds)


def row_bounds(attention_mask, batch: int, seq_len: int) -> Tensor | None:
    """The bounds of an encoder's batch, where the real tokens of a row, wherever they are, see each other: a run each.

    They begin with the first one. None where only a mask of HF's will do. attention_mask: on the host.
    """
    if attention_mask is None:
        return _whole_rows(batch, seq_len)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, seq_len):
        return None
    real = attention_mask.numpy()
    starts = np.flatnonzero(real & (real.cumsum(1, int) == 1))
    bounds = np.ones((1, 1, 2, len(starts) + 1), np.int32)
    bounds[0, 0, 0] = *starts, batch * seq_len
    return torch.from_numpy(bounds)


def _whole_rows(batch: int, seq_len: int) -> Tensor:
    """Each row is a run."""
    starts = range(0, batch * seq_len + 1, seq_len)
    return torch.tensor([[[list(starts), [1] * batch + [0]]]], dtype=torch.int32)
