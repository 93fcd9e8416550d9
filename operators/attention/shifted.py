"""Shifted sparse attention (S2-Attn; LongLoRA, Chen et al. 2024): a token sees what is before it in its own group.

In the second half of the heads groups begin half a group later, so that what a layer takes from a group reaches the
neighbours in the next layer. LongLoRA rolls these heads, and back. Here groups are runs of flash attention instead:
nothing is moved, and the half groups at both ends of a row are runs of their own, so that no token sees ahead.
"""

import torch
from torch import Tensor

from hyclora.operators.attention.flash import flash_attention, takes_varlen


def shifted_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, group: int, scaling: float, dropout: float = 0.0
) -> Tensor:  # fmt: skip
    """reference.shifted_sparse_attention on any device, also of rows that are no multiple of group, which is 2 or more.

    q, o [B, S, H, D]; k, v [B, S, H_kv, D]. Under autograd torch keeps as much as for flash_attention of all heads; k
    and v are repeated to H heads first if H_kv is odd, as one of their heads would be in both halves. ValueError for a
    single head, which has no halves.
    """
    if q.shape[2] < 2:
        raise ValueError("shifted sparse attention shifts half of the heads, and there is one: use full attention")
    if k.shape[2] % 2:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    halves = zip(*((t[:, :, : t.shape[2] // 2], t[:, :, t.shape[2] // 2 :]) for t in (q, k, v)), strict=True)
    # the kernel for runs reads them where the tokens are, else the host does, which would wait for a GPU
    device = q.device if takes_varlen(q, dropout) else torch.device("cpu")
    o = []
    for heads, first in zip(halves, (group, group // 2), strict=True):
        runs = _starts(*q.shape[:2], first, group, device)
        o.append(flash_attention(*(t.flatten(0, 1)[None] for t in heads), runs, None, scaling, dropout))
    return torch.cat(o, dim=2).view(q.shape)


def _starts(batch: int, seq_len: int, first: int, group: int, device: torch.device) -> Tensor:
    """Where groups begin, as starts (flash.py) of all rows as one: in each at 0, first, first + group, ..."""
    in_row = torch.arange(first - group, seq_len, group, dtype=torch.int32, device=device).clamp_(min=0)
    rows = torch.arange(0, batch * seq_len, seq_len, dtype=torch.int32, device=device)
    starts = (rows[:, None] + in_row).flatten()
    return torch.cat([starts, starts.new_full((1,), batch * seq_len)])[None, :, None, None]
