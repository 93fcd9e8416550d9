"""Which tokens see which, told in a few numbers instead of Hugging Face's [B, 1, S, S] mask."""

from collections.abc import Callable

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
    first = torch.zeros(batch, seq_len, dtype=torch.bool)
    seeing = torch.ones(batch, seq_len, dtype=torch.bool)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, seq_len):
            return None
        real = attention_mask.bool().cpu()
        if real.all():  # by far the commonest, and the GPU waits
            return _whole_rows(batch, seq_len)
        first[:, 1:] = real[:, 1:] & ~real[:, :-1]
        if (first.sum(1) + real[:, 0] > 1).any():  # padding between real tokens, which see each other in HF
            return None
        in_front = (real.cumsum(1) == 0) & real.any(1, keepdim=True)
        padding = ~real & ~in_front if zero else ~real
        if padding.any() and not unread(padding):
            return None
        seeing = ~in_front
    elif position_ids is not None:
        if position_ids.shape not in ((batch, seq_len), (1, seq_len)):
            return None
        first[:, 1:] = (position_ids.diff(dim=-1) != 1).cpu()
    else:
        return _whole_rows(batch, seq_len)
    first[:, 0] = True
    starts = first.flatten().nonzero().flatten()
    bounds = torch.stack([starts, seeing.flatten()[starts]])
    return torch.cat([bounds, bounds.new_tensor([[batch * seq_len], [0]])], dim=1).int()[None, None]


def _whole_rows(batch: int, seq_len: int) -> Tensor:
    """Each row is a run."""
    starts = range(0, batch * seq_len + 1, seq_len)
    return torch.tensor([[[list(starts), [1] * batch + [0]]]], dtype=torch.int32)
