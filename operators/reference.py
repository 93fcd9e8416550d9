"""Plain-torch truth of every operator.

Each function here is the definition; the Triton kernels beside it are only faster. CPU tensors run this file, tests
and benchmarks compare against it. Shapes: T tokens, C channels, G channels a group, b bits a code.
"""

import math

import torch
from torch import Tensor

from hyclora.operators.packing.codebook import Codebook

LOG_SCALE_STEPS = 8
MIDDLE_STEPS = 127
SCALE_ZERO = 128
IGNORED = -100
LARGEST = 1e15  # norm of a token that calibration counts: squares of 1e8 of them can be added in fp32
PHILOX_ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al. 2011, table 2)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [T, n, G] in [0, 2^b) into a little-endian bit stream, bytes [T, n, G/8, b].

    Eight consecutive codes make one word of b bytes, whatever the width: code i of a word is its bits b*i .. b*i+b-1.
    """
    codes = codes.unflatten(-1, (-1, 8))
    if bits == 8:
        return codes.to(torch.uint8)
    shifts = torch.arange(8, device=codes.device, dtype=torch.int32) * bits
    words = (codes.to(torch.int32) << shifts).sum(dim=-1, keepdim=True, dtype=torch.int32)
    return words.view(torch.uint8)[..., :bits].contiguous()


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of pack_codes: bytes [T, n, G/8, b] to integer codes [T, n, G]."""
    if bits == 8:
        return packed.flatten(-2)
    shifts = torch.arange(8, device=packed.device, dtype=torch.int32) * bits
    words = torch.nn.functional.pad(packed, (0, 4 - bits)).view(torch.int32)
    return ((words >> shifts) & ((1 << bits) - 1)).flatten(-2)


def to_groups(x: Tensor, group: int) -> Tensor:
    """[T, C] to [T, ceil(C/G), G], the tail filled with zeros."""
    padding = -x.shape[1] % group
    return torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, group))


def quantize(x: Tensor, mean: Tensor, inv_std: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """Quantize x [T, C] to packed codes and group scales.

    t = (x - mean) * inv_std with the calibrated statistics (fp32 [C]). With book.grouped each token's group of G
    channels is moved and scaled into [-1, 1]: half and middle of its range (which is made to include 0) are kept in a
    byte each, e = round(8 log2 half) + 128 and m = round(127 middle / half) + 128. Then code = book.encode(t).
    Returns codes uint8 [T, n, G/8, b] and scale uint8 [T, n, 2] = (e, m), or [T, 0, 2] when not grouped.
    """
    t = to_groups((x.float() - mean) * inv_std, book.group)
    scale = torch.empty(x.shape[0], 0, 2, dtype=torch.uint8, device=x.device)
    if book.grouped:
        low, high = t.amin(dim=-1).clamp_max(0), t.amax(dim=-1).clamp_min(0)
        exponent = torch.floor(((high - low) / 2).clamp_min(1e-30).log2() * LOG_SCALE_STEPS + (SCALE_ZERO + 0.5))
        exponent = exponent.clamp(0, 255)
        inverse = torch.exp2((SCALE_ZERO - exponent) / LOG_SCALE_STEPS)
        middle = torch.floor((high + low) / 2 * inverse * MIDDLE_STEPS + (SCALE_ZERO + 0.5)).clamp(0, 255)
        scale = torch.stack((exponent, middle), dim=-1).to(torch.uint8)
        t = t * inverse.unsqueeze(-1) - ((middle - SCALE_ZERO) / MIDDLE_STEPS).unsqueeze(-1)
    return pack_codes(book.encode(t), book.bits), scale


def dequantize(packed: Tensor, scale: Tensor, mean: Tensor, std: Tensor, book: Codebook, dtype: torch.dtype) -> Tensor:
    """Inverse of quantize up to rounding: x = (book.decode(code) + middle) * half * std + mean, [T, C] in dtype."""
    t = book.decode(unpack_codes(packed, book.bits).float())
    if book.grouped:
        exponent, middle = scale.float().unbind(dim=-1)
        half = torch.exp2((exponent - SCALE_ZERO) / LOG_SCALE_STEPS).unsqueeze(-1)
        t = (t + ((middle - SCALE_ZERO) / MIDDLE_STEPS).unsqueeze(-1)) * half
    t = t.flatten(1)[:, : mean.numel()]
    return (t * std + mean).to(dtype)


def measure(x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Measures of the tokens of x [T, C] that mask [T] has and that are not too large: operators/savers/measure.py."""
    x = x.float()
    mask = mask[:, None] & (torch.linalg.vector_norm(x, dim=1, keepdim=True) < LARGEST)
    x = torch.where(mask, x, 0.0)
    return {
        "count": mask.sum().float(),
        "total": x.sum(dim=0),
        "total_square": x.square().sum(dim=0),
        "low": torch.where(mask, x, math.inf).amin(dim=0),
        "high": torch.where(mask, x, -math.inf).amax(dim=0),
    }


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = x_hat * w, x_hat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps) over the last dim of x [T, C].

    Returns y (promoted dtype of w and x), x_hat (x's dtype, as HF rounds it) and rstd (fp32 [T]).
    """
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(dim=-1) + eps)
    x_hat = (x32 * rstd.unsqueeze(-1)).to(x.dtype)
    return weight * x_hat, x_hat, rstd


def rms_norm_bwd(dy: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor, dresidual: Tensor | None = None) -> Tensor:
    """dx = rstd * (g - x_hat * mean(g * x_hat)), g = dy * w; no mean term of g (that is LayerNorm's).

    dresidual [T, C], the gradient of the branch around the norm, is added before dx is rounded to dy's dtype.
    """
    g = dy.float() * weight.float()
    x_hat = x_hat.float()
    dx = (g - x_hat * (g * x_hat).mean(dim=-1, keepdim=True)) * rstd.unsqueeze(-1)
    return (dx if dresidual is None else dx + dresidual).to(dy.dtype)


def layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, seed: Tensor | None = None, p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y = x_hat * w + b, x_hat = (s - mean(s)) * rstd, rstd = 1 / sqrt(var(s) + eps), s = residual + dropout(x).

    x, residual [T, C], mean and variance over C; dropout as dropped(x, seed, 0, p), none at p = 0. Returns y and x_hat
    in dtype (None: the wider one of x and residual) and rstd [T] in fp32 or more.
    """
    dtype = dtype or torch.promote_types(x.dtype, residual.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    kept = x.to(exact) * dropout_factors(x, seed, 0, p) if p else x.to(exact)
    total = kept + residual.to(exact)
    centred = total - total.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1) + eps)
    x_hat = centred * rstd.unsqueeze(-1)
    return (x_hat * weight + bias).to(dtype), x_hat.to(dtype), rstd


def layer_norm_bwd(
    dy: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor | None = None, p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dresidual = rstd * (g - mean(g) - x_hat * mean(g * x_hat)), g = dy * w, in dy's dtype; dx = dropout(dresidual).

    dx has the mask of forward, is in dtype (None: dy's), and is computed before dresidual is rounded.
    """
    exact = torch.promote_types(dy.dtype, torch.float32)
    g, x_hat = dy.to(exact) * weight, x_hat.to(exact)
    ds = g - g.mean(dim=-1, keepdim=True) - x_hat * (g * x_hat).mean(dim=-1, keepdim=True)
    ds *= rstd.unsqueeze(-1)
    dx = ds * dropout_factors(ds, seed, 0, p) if p else ds
    return ds.to(dy.dtype), dx.to(dtype or dy.dtype)


def add_residual(y: Tensor, xa: Tensor | None, B: Tensor | None, residual: Tensor) -> Tensor:
    """y + xa B^T + residual [T, N], rounded once to the wider dtype of y and residual; xa [T, R], B [N, R] or None."""
    dtype = torch.promote_types(y.dtype, residual.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    total = y.to(exact) + residual.to(exact)
    return (total if xa is None else total.addmm_(xa.to(exact), B.to(exact).t())).to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate x [B, S, H, D] by cos, sin [B or 1, S, D]: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin (halves of D).

    The gradient of a rotation is the rotation by the opposite angle: dx = rope(dy, inverse=True).
    """
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    sin = -sin if inverse else sin
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def silu_mul_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """hidden = silu(gate) * up, computed in fp32, returned in gate's dtype."""
    gate32 = gate.float()
    return (gate32 * torch.sigmoid(gate32) * up.float()).to(gate.dtype)


def silu_mul_bwd(dhidden: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dgate = dhidden * up * s (1 + gate (1 - s)), dup = dhidden * gate * s, s = sigmoid(gate); hidden as well."""
    dhidden32, gate32, up32 = dhidden.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(gate32)
    act = gate32 * sigmoid
    dgate = dhidden32 * up32 * sigmoid * (1 + gate32 * (1 - sigmoid))
    return dgate.to(gate.dtype), (dhidden32 * act).to(gate.dtype), (act * up32).to(gate.dtype)


def gelu_fwd(up: Tensor) -> Tensor:
    """hidden = up * P, P = (1 + erf(up / sqrt(2))) / 2, the exact one; computed in fp32 or more, in up's dtype."""
    exact = torch.promote_types(up.dtype, torch.float32)
    return torch.nn.functional.gelu(up.to(exact)).to(up.dtype)


def gelu_bwd(dhidden: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dup = dhidden * (P + up exp(-up^2 / 2) / sqrt(2 pi)), P as in gelu_fwd; hidden as well."""
    exact = torch.promote_types(up.dtype, torch.float32)
    x = up.to(exact)
    share = (1 + torch.erf(x * math.sqrt(0.5))) / 2
    dup = dhidden.to(exact) * (share + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi))
    return dup.to(up.dtype), (x * share).to(up.dtype)


def softmax_bwd(dprob: Tensor, prob: Tensor) -> Tensor:
    """dscore = prob * (dprob - sum(prob * dprob)) over the last dim, fp32 inside, prob's dtype out."""
    prob32, dprob32 = prob.float(), dprob.float()
    return (prob32 * (dprob32 - (prob32 * dprob32).sum(dim=-1, keepdim=True))).to(prob.dtype)


def shifted_sparse_attention(q: Tensor, k: Tensor, v: Tensor, group: int, scaling: float) -> Tensor:
    """Causal attention within groups of tokens, which begin half a group later for the second half of the heads.

    q, o [B, S, H, D]; k, v [B, S, H_kv, D]; S is a multiple of group. As LongLoRA writes it: heads from H / 2 on are
    rolled by group // 2 tokens, all attend within groups, and o is rolled back by as many. Other than there what the
    roll puts behind the row's end, its first tokens, does not see that end.
    """
    half, shift, n_heads = q.shape[2] // 2, group // 2, q.shape[2]

    def roll(t: Tensor, by: int) -> Tensor:
        return torch.cat([t[:, :, :half], t[:, :, half:].roll(by, dims=1)], dim=2)

    k, v = (t.repeat_interleave(n_heads // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (roll(t, -shift).unflatten(1, (-1, group)) for t in (q, k, v))
    scores = torch.einsum("bgqhd,bgkhd->bghqk", q, k) * scaling
    seen = torch.ones(group, group, dtype=torch.bool, device=q.device).tril().repeat(q.shape[1], n_heads, 1, 1)
    first = torch.arange(group, device=q.device) >= group - shift
    seen[-1, half:] &= first[:, None] == first
    prob = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return roll(torch.einsum("bghqk,bgkhd->bgqhd", prob, v).flatten(1, 2), shift)


def padded_rank(rank: int) -> int:
    """The next multiple of 16."""
    return -(-rank // 16) * 16


def stack_adapters(
    adapters: list[tuple[Tensor, Tensor] | None], scalings: list[float], widths: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Adapters of projections with one input as one: A = [scaling_i A_i] [R, in], B = diag(B_i) [N, R].

    adapters: (lora_A [r_i, in], lora_B [N_i, r_i]), or None for a projection without one, which has N_i rows of zeros.
    R = padded_rank(sum r_i); the padding is zero.
    """
    A = torch.cat([a[0].float() * s for a, s in zip(adapters, scalings, strict=True) if a is not None])
    A = torch.nn.functional.pad(A, (0, 0, 0, padded_rank(len(A)) - len(A)))
    B = torch.zeros(sum(widths), A.shape[0], dtype=torch.float32, device=A.device)
    row = col = 0
    for adapter, width in zip(adapters, widths, strict=True):
        if adapter is not None:
            rank = adapter[0].shape[0]
            B[row : row + width, col : col + rank] = adapter[1].float()
            col += rank
        row += width
    return A.to(dtype), B.to(dtype)


def dropout_constants(p: float) -> tuple[int, float]:
    """The least of 16 random bits that keeps an element, and what it is then multiplied by: 1 / (1 - p)."""
    return round(p * 2**16), 1 / (1 - p) if p < 1 else 0.0


def dropout_factors(x: Tensor, seed: Tensor, which: int, p: float) -> Tensor:
    """mask / (1 - p) for x [T, C], in fp32 or more: 0 with probability p (to 2^-17), else 1 / (1 - p).

    Element (t, c) is kept if piece c % 8 of Philox-4x32's output is not below 2^16 p: the four words are eight pieces
    of 16 bits, the low half of a word before the high one. Key: seed (int64 [1]); counter: (c // 8, t, which, 0).
    """
    (n_rows, n_cols), low = x.shape, 0xFFFFFFFF
    least, scale = dropout_constants(p)
    key = seed & low, (seed >> 32) & low
    # as small as they are for as long as they can be: the first rounds are of rows or of columns alone
    c0, c1 = torch.arange(-(-n_cols // 8), device=seed.device)[None], torch.arange(n_rows, device=seed.device)[:, None]
    c2, c3 = torch.full_like(c0[:, :1], which), torch.zeros_like(c0[:, :1])
    for i in range(PHILOX_ROUNDS):
        k0, k1 = (key[0] + i * 0x9E3779B9) & low, (key[1] + i * 0xBB67AE85) & low
        # the product's bits are those of 64 without a sign, whose upper half the mask brings back
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & low ^ c1 ^ k0, b & low, (a >> 32) & low ^ c3 ^ k1, a & low
    words = torch.broadcast_tensors(c0, c1, c2, c3)
    pieces = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (pieces.flatten(1)[:, :n_cols] >= least).to(torch.promote_types(x.dtype, torch.float32)) * scale


def dropped(x: Tensor, seed: Tensor, which: int, p: float) -> Tensor:
    """x [T, C] * mask / (1 - p), in x's dtype; computed in fp32 or more."""
    return (x * dropout_factors(x, seed, which, p)).to(x.dtype)


def add_dropped(y: Tensor, x: Tensor, seed: Tensor, which: int, p: float) -> Tensor:
    """y [T, C] += x * mask / (1 - p) in place, rounded once."""
    return y.copy_(y + x * dropout_factors(x, seed, which, p))


def low_rank_grads(
    dy: Tensor, xa: Tensor, B: Tensor, widths: list[int], ranks: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """g = dy B [T, R] in dy's dtype and, in fp32 or more, the dB = dy^T xa [N_p, r_p] of each projection's own columns.

    dy [T, N]; xa = x A^T [T, R]; B [N, R] block-diagonal, as from stack_adapters.
    """
    exact = torch.promote_types(dy.dtype, torch.float32)
    parts = zip(dy.to(exact).split(widths, dim=1), xa.to(exact)[:, : sum(ranks)].split(ranks, dim=1), strict=True)
    return dy @ B, [dy_p.t() @ xa_p for dy_p, xa_p in parts]


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """loss = logsumexp(z) - z[label] of each row of z [R, V], computed and returned in fp32 [R].

    z is overwritten by its gradient softmax(z) - onehot(label). A row with label -100 has loss 0 and gradient 0.
    """
    log_prob = torch.log_softmax(logits.float(), dim=-1)
    loss = torch.nn.functional.nll_loss(log_prob, labels, reduction="none", ignore_index=IGNORED)
    ignored = (labels == IGNORED).unsqueeze(-1)
    index = labels.unsqueeze(-1).masked_fill(ignored, 0)
    grad = log_prob.exp_().scatter_add_(-1, index, torch.full_like(index, -1, dtype=torch.float32))
    logits.copy_(grad.masked_fill_(ignored, 0))
    return loss
