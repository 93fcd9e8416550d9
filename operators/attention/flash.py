"""Attention of runs of tokens, with a sliding window and grouped queries, in memory linear in the tokens.

A run is a row of the batch, a document packed into one, the padding in front of a row or the rest of it.
Which tokens see which is told by bounds, an int32 tensor on the host (to read it never waits for a GPU), [1, 1, 2, N+1]
as Hugging Face hands on whatever mask has four dimensions. [0, 0, 0]: where the N runs begin, counted over the B S
tokens of the batch, and B S; no run crosses rows. [0, 0, 1]: 1, or 0 for padding in front, whose tokens see nothing.

Or by starts, an int32 tensor on the tokens' device, [1, N+1, 1, 1], which is no shape of a mask for more than one key:
where the runs of a batch of one row begin, in order, and its length, which fills up what is left of N places: such runs
are empty. Kernels read it, so a graph can be replayed for other runs.
"""

from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

from hyclora.operators.attention import flash4
from hyclora.operators.attention.flash4 import HALF

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    VARLEN_OPTIONS = frozenset()
else:
    VARLEN_OPTIONS = frozenset(signature(varlen_attn).parameters)

# grouped queries are a matter of course before torch had a switch for them
GROUPED = {"enable_gqa": True} if "enable_gqa" in VARLEN_OPTIONS else {}
# tokens that the backward of flash's kernel for runs takes memory for with each run, be it empty
PLACE = 128
# tokens whose memory is not worth being saved, as each piece of a backward costs some launches
SMALL = 4096
# tokens times heads of q that one piece of a backward has: 8192 of 32, which keep any GPU busy, so that what it works
# in does not grow with the tokens
AT_ONCE = 2**18


def is_bounds(mask) -> bool:
    """Whether an attention mask is bounds; Hugging Face's own are bool or floating point, a user's may be anything."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[2] == 2


def is_starts(mask) -> bool:
    """Whether an attention mask is starts."""
    known = isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4
    return known and mask.shape == (1, mask.shape[1], 1, 1)


def tells_runs(mask) -> bool:
    """Whether an attention mask is for flash_attention."""
    return is_bounds(mask) or is_starts(mask)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Tensor, window: int | None, scaling: float, dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:  # fmt: skip
    """o = softmax(scaling q k^T) v, where token i of a run sees the tokens i - window + 1 to i of that run.

    q, o [B, S, H, D]; k, v [B, S, H_kv, D]; runs: bounds or starts; window None: all of the run up to i, or, if
    not causal, all of it. o is 0 where nothing is seen. Under autograd torch keeps q, k, v, o and 4 H bytes a token for
    lse. Without torch's varlen kernel a window also makes a mask of 2 window^2 elements, and keeps keys and values of
    each chunk twice, with the chunk before.
    """
    if is_starts(runs):
        starts, seeing, longest = runs[0, :, 0, 0], None, q.shape[1]
        if takes_varlen(q, dropout):
            window = None if window is None else min(window, longest)
            return _varlen(q, k, v, starts, seeing, longest, window, scaling, causal)
        lengths = [n for n in starts.diff().tolist() if n]
        seeing = torch.ones(len(lengths))
    else:
        starts, seeing = runs[0, 0]
        lengths, seeing = starts.diff().tolist(), seeing[:-1]
        longest = max(lengths)
    if window is not None and window >= longest:
        window = None
    rows_are_runs = len(lengths) == q.shape[0]
    if (window is not None or not rows_are_runs) and takes_varlen(q, dropout):
        return _varlen(q, k, v, starts, seeing, longest, window, scaling, causal)
    if rows_are_runs:
        return _of_rows(q, k, v, window, scaling, dropout, causal)
    runs = zip(*(t.flatten(0, 1)[None].split(lengths, dim=1) for t in (q, k, v)), strict=True)
    o = [
        _of_rows(*run, window, scaling, dropout, causal) if sees else torch.zeros_like(run[0])
        for run, sees in zip(runs, seeing, strict=True)
    ]
    return torch.cat(o, dim=1).view(q.shape)


def backward_pieces(q: Tensor, k: Tensor, runs: Tensor, window: int | None, dropout: float) -> int:
    """In how many pieces, of as many heads each, the backward of flash_attention should go; arguments as there.

    With dropout in one, as the forward drew for all heads at once.
    """
    n_tokens, n_runs = q.shape[0] * q.shape[1], runs.numel() - 1 if is_starts(runs) else runs.shape[-1] - 1
    whole = not is_starts(runs) and n_runs == q.shape[0] and window is None
    if whole or not takes_varlen(q, dropout):
        n_runs = 0
    return 1 if dropout else head_pieces(n_tokens, n_runs, q.shape[2], k.shape[2])


def head_pieces(n_tokens: int, n_runs: int, n_heads: int, n_kv_heads: int) -> int:
    """In how many pieces of the n_kv_heads heads of k a backward should go; n_runs: 0 without the kernel for runs.

    It takes fp32 memory of the size of dq, and room for the gradients of a piece. A piece has AT_ONCE at most. The
    kernel for runs takes fp32 memory for PLACE tokens more with each run: where that is more than of two q, and of
    SMALL tokens, pieces take that of one q at most. Both as far as heads can be parted so.
    """
    places = n_tokens + PLACE * n_runs
    least = -(-n_tokens * n_heads // AT_ONCE)
    if places > max(2 * n_tokens, SMALL):
        least = max(least, -(-places // n_tokens))
    return next((n for n in range(least, n_kv_heads) if n_kv_heads % n == 0), n_kv_heads)


def place_heads(whole: Tensor | None, piece: Tensor, i: int, n: int) -> Tensor:
    """[B, S, H, D] with piece i of n [B, S, H / n, D] at its place; whole: what those before gave, None for the first.

    What is whole is not copied.
    """
    if n == 1:
        return piece
    batch, seq_len, n_heads, head_dim = piece.shape
    whole = piece.new_empty(batch, seq_len, n * n_heads, head_dim) if whole is None else whole
    whole.chunk(n, dim=2)[i].copy_(piece)
    return whole


def takes_varlen(q: Tensor, dropout: float) -> bool:
    """Whether torch's flash kernel for runs of any length can have this one; sdpa_kernel and the like switch it too."""
    return (
        q.is_cuda
        and q.dtype in HALF
        and dropout == 0
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and {"window_size", "scale"} <= VARLEN_OPTIONS
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _varlen(q, k, v, starts, seeing, longest: int, window: int | None, scaling: float, causal: bool) -> Tensor:
    """All runs in one kernel."""
    on_device = starts.to(q.device, non_blocking=True)
    tokens = [t.flatten(0, 1) for t in (q, k, v)]
    if flash4.takes(q, 0.0, len(tokens[0]), "runs", q.shape[2] // k.shape[2], window is None, causal):
        o = flash4.of_runs(*tokens, on_device, longest, window, scaling, causal)
    else:
        window_size = (-1 if window is None else window - 1, 0 if causal else -1)
        o = varlen_attn(
            *tokens, on_device, on_device, longest, longest, scale=scaling, window_size=window_size, **GROUPED
        )  # fmt: skip
    if seeing is not None and not seeing.all():
        o = o * seeing.repeat_interleave(starts.diff()).to(q.device, q.dtype, non_blocking=True)[:, None, None]
    return o.view(q.shape)


def _of_rows(q, k, v, window: int | None, scaling: float, dropout: float, causal: bool) -> Tensor:
    """Attention within each row, torch's by chunks of `window` queries, which see their own and the one before."""
    if flash4.takes(q, dropout, q.shape[1], "rows", q.shape[2] // k.shape[2], window is None, causal):
        return flash4.of_rows(q, k, v, window, scaling, causal)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if window is None or window >= q.shape[2]:
        return _sdpa(q, k, v, None, scaling, dropout, causal).transpose(1, 2)
    # one additive mask for all chunks: query r sees keys r + 1 to r + window of the two chunks
    seen = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).tril(window).triu(1)
    mask = q.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    q, k, v = (t.split(window, dim=2) for t in (q, k, v))
    o = [_sdpa(q[0], k[0], v[0], None, scaling, dropout)]
    for i in range(1, len(q)):
        n = q[i].shape[2]
        keys, values = (torch.cat(t[i - 1 : i + 1], dim=2) for t in (k, v))
        o.append(_sdpa(q[i], keys, values, mask[:n, : window + n], scaling, dropout))
    return torch.cat(o, dim=2).transpose(1, 2)


def _sdpa(q, k, v, mask: Tensor | None, scaling: float, dropout: float, causal: bool = True) -> Tensor:
    """torch's attention; causal: without a mask; q [B, H, S, D], k, v [B, H_kv, S_k, D], never repeated."""
    options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": causal and mask is None, "scale": scaling}
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda and (mask is not None or q.dtype not in HALF):
        # on a GPU only flash takes grouped heads, and no mask nor fp32; else torch repeats them and makes whole scores
        heads = [F.scaled_dot_product_attention(q[:, i::groups], k, v, **options) for i in range(groups)]
        return torch.stack(heads, dim=2).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=groups > 1)
