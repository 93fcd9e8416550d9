"""Attention block: q/k/v projections, RoPE, softmax attention, output projection, in one autograd Function.

Some families normalize the heads of q and k before RoPE; backward does both again from what was before them. Some have
no RoPE.

Two cores. FlashCore runs flash attention (flash.py, or the model's own FlashAttention), and no S x S tensor
exists unless the caller brings a mask of that size. It runs it again in backward on the restored q, k, v, so that
probabilities stay normalised and attn_out comes for free; or it keeps lse, where q, k, v and attn_out are restored so
nearly that probabilities add up by themselves. EagerCore is the paper's: it keeps the softmax map through its saver.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from hyclora.operators.attention.flash import backward_pieces, flash_attention, place_heads, tells_runs
from hyclora.operators.attention.fused_qkv import fused_norms, fused_qkv_fwd, fused_qkv_restore, packed_qkv
from hyclora.operators.attention.hollow_graph import HollowGraph, record
from hyclora.operators.attention.rope import HeadNorm, rope, rope_bwd
from hyclora.operators.attention.softmax import softmax_bwd
from hyclora.operators.dispatch import as_output, use_triton
from hyclora.operators.first_order import first_order
from hyclora.operators.linear.dropout import draw_seed, dropped
from hyclora.operators.linear.lora import ProjectionGroup
from hyclora.operators.linear.residual import overwritable
from hyclora.operators.random_state import get_rng_state, replayed_rng
from hyclora.operators.savers import Keeper


class FlashCore:
    """o = softmax(scaling q k^T + mask) v; gradients by torch's own, run again under autograd or from a kept lse.

    q [B, S, H, D], k, v [B, S, H_kv, D] to o [B, S, H, D]. mask: bounds, for flash_attention; or what HF made for
    interface, an attention function of its own. window: keys that a query sees, itself included; None: all before it.
    dropout: where the module has its probability. Keeps nothing of its own, or lse: 4 H bytes a token.
    """

    def __init__(self, module, interface, window: int | None, dropout: str = "attention_dropout"):
        self.module, self.interface, self.window, self.dropout = module, interface, window, attrgetter(dropout)

    def run(self, q, k, v, mask, kwargs) -> Tensor:
        """o, and what autograd needs if it is on."""
        dropout = self.dropout(self.module) if self.module.training else 0.0
        if tells_runs(mask):
            return flash_attention(
                q, k, v, mask, self.window, self.module.scaling, dropout, self.module.is_causal
            )  # fmt: skip
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        if self.window is not None:
            kwargs = kwargs | {"sliding_window": self.window}
        return self.interface(
            self.module, *heads_first, mask, dropout=dropout, scaling=self.module.scaling, **kwargs
        )[0]  # fmt: skip

    def forward(self, q, k, v, mask, kwargs, keeper: Keeper, rng: dict) -> tuple[Tensor, list[HollowGraph] | None]:
        """o, and its graphs if lse is kept, one a piece of heads in which the backward goes; [] where one has none."""
        if self.dropout(self.module) > 0:
            rng["attention"] = get_rng_state(q.device)
        if not keeper.keeps("lse"):
            return self.run(q, k, v, mask, kwargs), None
        n = self._pieces(q, k, mask)
        o, graphs, rests = self._record(zip(*(t.chunk(n, dim=2) for t in (q, k, v)), strict=True), n, mask, kwargs)
        for i, rest in enumerate(rests):
            part = keeper.part(i)
            for j, t in enumerate(rest):
                part.keep("lse", t) if t.is_floating_point() else part.keep_exact(f"rest{j}", t)
        return o, [] if None in graphs else graphs

    def _record(self, pieces: Iterable, n: int, mask, kwargs, hollow: bool = False) -> tuple:
        """o of n pieces of q, k, v, joined, their graphs, and what these save beside them (hollow_graph.py).

        hollow: three times None as soon as a piece has no such graph.
        """
        o, graphs, rests = None, [], []
        for i, piece in enumerate(pieces):
            part, graph, rest = record(partial(self.run, mask=mask, kwargs=kwargs), *piece)
            if hollow and graph is None:
                return None, None, None
            o = place_heads(o, part, i, n)
            graphs.append(graph)
            rests.append(rest)
        return o, graphs, rests

    def backward(
        self, do_fn, heads, attn_out, mask, kwargs, keeper: Keeper, rng: dict, graphs: list[HollowGraph] | None,
        overwrite: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk, dv; heads is q, k, v, emptied on the way; do_fn maps o (attn_out if that is kept) to its gradient.

        overwrite: of q, k and v, whether gradients found piece by piece may take their memory. graphs: as of forward.
        """
        n = len(graphs) if graphs else self._pieces(*heads[:2], mask)
        device, shapes = heads[0].device, [t.shape for t in heads]
        # .data: autograd need not know, as a piece that is still to be done has other memory
        grads = [t.data if may else None for t, may in zip(heads, overwrite, strict=True)] if n > 1 else []
        pieces = [list(piece) for piece in zip(*(t.detach().chunk(n, dim=2) for t in heads), strict=True)]
        heads.clear()
        outputs, o, rests = [], attn_out, None
        if graphs is None and n > 1:  # an o of each piece in its graph would be there beside all of it; []: in vain
            o, graphs, rests = self._record(pieces, n, mask, kwargs, hollow=True)
        if not graphs:
            random = nullcontext() if "attention" not in rng else replayed_rng(device, rng["attention"])
            with torch.enable_grad(), random:
                outputs = [self.run(*(t.requires_grad_() for t in piece), mask, kwargs) for piece in pieces]
            for i, part in enumerate(outputs if attn_out is None else ()):
                o = place_heads(o, part.detach(), i, n)
        attn_out = o if attn_out is None else attn_out
        do = do_fn(attn_out).view(shapes[0])
        kept = o.view(shapes[0]).chunk(n, dim=2) if graphs else ()
        del attn_out, o
        grads = [do.new_empty(shape) if t is None else t for t, shape in zip(grads, shapes, strict=False)]
        for i, (do_n, *wholes) in enumerate(zip(*(t.chunk(n, dim=2) for t in (do, *grads)), strict=True)):
            if not graphs:
                # cuDNN wants it as its output is, and warns before it makes a copy by itself
                parts = torch.autograd.grad(outputs.pop(0), pieces.pop(0), do_n.contiguous())
            else:
                rest = _rest(keeper.part(i), graphs[i]) if rests is None else rests.pop(0)
                parts = graphs[i].backward([*pieces.pop(0), kept[i]], rest, do_n)
                del rest
            if n == 1:
                return parts
            torch._foreach_copy_(wholes, parts)
            del parts
        return tuple(grads)

    def _pieces(self, q: Tensor, k: Tensor, mask) -> int:
        """In how many pieces of heads the backward goes."""
        if not tells_runs(mask):
            return 1
        dropout = self.dropout(self.module) if self.module.training else 0.0
        return backward_pieces(q, k, mask, self.window, dropout)


def _rest(keeper: Keeper, graph: HollowGraph) -> list[Tensor]:
    """What a graph saves beside q, k, v and o, as a keeper kept it."""
    found = [keeper.exact(f"rest{i}") for i in range(len(graph.others))]
    return [keeper.restore("lse") if t is None else t for t in found]


class EagerCore:
    """The paper's attention: prob = softmax(scaling q k^T + mask) is kept (sparse), o = prob v.

    dv = prob^T do, dprob = do v^T, dscore = softmax_bwd(dprob, prob), dq = scaling dscore k, dk = scaling dscore^T q;
    q, o [B, S, H, D]; k, v [B, S, H_kv, D], repeated for grouped queries only while used; prob
    [B, H_kv, H / H_kv, S, S] in q's dtype, softmax in fp32; mask None (causal if the module is), or HF's, bool or
    additive [B, 1, S, S]. dropout: where the module has its probability; prob is kept as before it, o and dv are of
    dropped(prob), dprob = dropped(do v^T). Keeps prob by its saver, and a seed; S x S maps live each way, in forward
    two of them in fp32.
    """

    def __init__(self, module, interface, window: int | None, dropout: str = "attention_dropout"):
        self.module, self.dropout = module, attrgetter(dropout)

    @staticmethod
    def _drop(prob: Tensor, seed: Tensor | None, p: float) -> Tensor:
        """prob after dropout by the mask of a seed; itself without one."""
        return prob if seed is None else dropped(prob.reshape(-1, prob.shape[-1]), seed, 0, p).view(prob.shape)

    def _grouped(self, t: Tensor, groups: int) -> Tensor:
        """[B, S, H, D] to [B, H_kv, H / H_kv, S, D]; H_kv = H / groups."""
        batch, seq_len, n_heads, head_dim = t.shape
        return t.view(batch, seq_len, n_heads // groups, groups, head_dim).permute(0, 2, 3, 1, 4)

    def forward(self, q, k, v, mask, kwargs, keeper: Keeper, rng: dict) -> tuple[Tensor, None]:
        groups = q.shape[2] // k.shape[2]
        scores = self._grouped(q, groups) @ self._grouped(k, 1).transpose(-1, -2) * self.module.scaling
        prob = torch.softmax(self._masked(scores, mask).float(), dim=-1).to(q.dtype)
        if mask is not None and mask.dtype == torch.bool:
            prob *= mask.any(-1, keepdim=True).unsqueeze(2)  # as from SDPA, 0 where padding sees nothing
        keeper.keep("prob", prob)
        p = rng["map"] = self.dropout(self.module) if self.module.training else 0.0
        seed = keeper.drawn(draw_seed, q.device) if p > 0 else None
        keeper.keep_exact("prob_seed", seed)
        o = self._drop(prob, seed, p) @ self._grouped(v, 1)
        return o.permute(0, 3, 1, 2, 4).reshape(q.shape), None

    def backward(
        self, do_fn, heads, attn_out, mask, kwargs, keeper: Keeper, rng: dict, graphs: None, overwrite: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v = heads
        groups = q.shape[2] // k.shape[2]
        prob = keeper.restore("prob")
        value, drop = self._grouped(v, 1), (keeper.exact("prob_seed"), rng["map"])
        kept = self._drop(prob, *drop)
        o = (kept @ value).permute(0, 3, 1, 2, 4).reshape(q.shape) if attn_out is None else attn_out
        do = self._grouped(do_fn(o).view_as(q), groups)
        dv = (kept.transpose(-1, -2) @ do).sum(dim=2)
        del kept
        dscore = softmax_bwd(self._drop(do @ value.transpose(-1, -2), *drop), prob)
        dq = (dscore @ self._grouped(k, 1)).mul_(self.module.scaling)
        dk = (dscore.transpose(-1, -2) @ self._grouped(q, groups)).sum(dim=2).mul_(self.module.scaling)
        return dq.permute(0, 3, 1, 2, 4).reshape(q.shape), dk.transpose(1, 2), dv.transpose(1, 2)

    def _masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Apply HF's mask: None (causal or nothing), bool (True keeps) or additive, to [B, H_kv, groups, S, S]."""
        lowest = max(torch.finfo(dtype).min for dtype in (scores.dtype, torch.float32))  # finite in softmax's fp32 too
        if mask is None and not self.module.is_causal:
            return scores
        if mask is None:
            seq_len = scores.shape[-1]
            causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=scores.device).tril()
            return scores.masked_fill(~causal, lowest)
        mask = mask.unsqueeze(2)
        return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask


CORES = {"flash": FlashCore, "eager": EagerCore}


@dataclass
class AttentionSpec:
    """The frozen description of one attention block.

    qkv and out: projection groups; core: FlashCore or EagerCore; compensate: keep the frozen paths of q, k, v before
    RoPE and add the LoRA part back (else q, k, v are kept after RoPE, or with norms before); fused: LoRA add, RoPE and
    packing in one kernel each way; head_dim; norms: frozen RMSNorms of the heads of q and k before RoPE, or {}.
    """

    qkv: ProjectionGroup
    out: ProjectionGroup
    core: FlashCore | EagerCore
    compensate: bool
    fused: bool
    head_dim: int
    norms: dict[str, nn.Module] = field(default_factory=dict)

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.qkv.parameters() + self.out.parameters()

    @property
    def can_fuse(self) -> bool:
        """Whether the fused kernels run on a GPU; what they pack is the same either way."""
        return self.fused and not self.qkv.has_lora_bias

    def fuses(self, y: Tensor) -> bool:
        """Whether they run on y; Triton 3.6 scales normalized heads in fp32 by the RMS of another row (on an H200)."""
        return self.can_fuse and use_triton(y) and not (self.norms and y.dtype == torch.float32)

    def to_heads(self, x: Tensor, batch: int) -> Tensor:
        """[T, H D] to [B, S, H, D]."""
        return x.view(batch, x.shape[0] // batch, -1, self.head_dim)

    def norm(self, name: str, keeper: Keeper) -> HeadNorm | None:
        """The norm of slot q's or k's heads with the weight that forward kept, if there is one."""
        if name not in self.norms:
            return None
        return HeadNorm(keeper.exact(f"{name}_norm"), self.norms[name].variance_epsilon)


class AttentionFunction(torch.autograd.Function):
    """y = o W_o^T + LoRA (+ residual), o = attention(rope(q), rope(k), v), q/k/v = x W^T + LoRA (q, k normalized).

    x, y [B, S, C]; residual: of y's shape, or None; overwrite: y may take its memory; cos, sin [B or 1, S, D], or None
    for no rotation; mask and kwargs as the core takes them; source: where the norm keeps x_hat, if attn_in is derived;
    parameters as spec.parameters(). Slots: attn_in, q, k, v, prob, lse, attn_out. Gradients: those of linear/lora.py
    for the projections, the core for q, k, v, the opposite rotation for RoPE, dy for the residual. Keeps what savers of
    slots do (an exact v all of q, k, v), what the core does, and x A^T of both groups; cos, sin, mask by reference.
    Temporary with flash and fused, a token: q, k, v, o, in backward their gradients (of long rows o's), and 4 H bytes.
    """

    @staticmethod
    def forward(
        ctx, x, residual, overwrite, cos, sin, mask, spec: AttentionSpec, kwargs, keeper: Keeper, source, *parameters
    ):
        batch = x.shape[0]
        rows = x.reshape(-1, x.shape[-1])
        n_qkv = len(spec.qkv.parameters())
        rng, switches = {}, {}
        for name, norm in spec.norms.items():
            keeper.keep_exact(f"{name}_norm", norm.weight)
        if spec.qkv.needs_input:
            keeper.derive("attn_in", source) if source else keeper.keep("attn_in", rows)
        y, low_rank = spec.qkv.project(rows, parameters[:n_qkv], keeper, switches)
        fused = spec.fuses(y)
        if fused:
            y = fused_qkv_fwd(spec, y, cos, sin, batch, low_rank, keeper)
            heads = [spec.to_heads(y[:, columns], batch) for columns in spec.qkv.columns]
        else:
            heads = _rotate_fwd(spec, y, cos, sin, batch, low_rank, keeper)
        del y, low_rank
        o, ctx.graphs = spec.core.forward(*heads, mask, kwargs, keeper, rng)
        del heads
        o = o.reshape(rows.shape[0], -1)
        if spec.out.needs_input or ctx.graphs:
            keeper.keep("attn_out", o)
        branch = None if residual is None else residual.reshape(len(rows), -1)
        overwrite = overwrite and overwritable(branch, o.dtype)
        y = spec.out.forward(o, parameters[n_qkv:], keeper, switches, branch, overwrite)
        for name, tensor in (("cos", cos), ("sin", sin), ("mask", mask)):
            keeper.keep_exact(name, tensor)
        keeper.save(ctx)
        ctx.spec, ctx.kwargs, ctx.rng, ctx.switches = spec, kwargs, rng, switches
        ctx.shape, ctx.fused, ctx.dtype = x.shape, fused, x.dtype
        ctx.keeps_once = keeper.step.runs_again
        return as_output(y, x.shape)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        spec, switches, keeper = ctx.spec, ctx.switches, Keeper.load(ctx)
        batch = ctx.shape[0]
        cos, sin, mask = (keeper.exact(name) for name in ("cos", "sin", "mask"))
        n_qkv = len(spec.qkv.parameters())
        needs = ctx.needs_input_grad[10:]
        dresidual, dy = dy if ctx.needs_input_grad[1] else None, dy.reshape(-1, dy.shape[-1]).to(ctx.dtype)
        out_grads = []

        def do_fn(o):
            o = o.reshape(dy.shape[0], -1)
            low_rank = spec.out.kept_low_rank(keeper, switches, dy.dtype)
            g, dB = spec.out.backward_low_rank(dy, low_rank, keeper)
            do = spec.out.backward_input(dy, g, low_rank, keeper)
            out_grads.extend(spec.out.backward_parameters(dy, g, dB, o, keeper, needs[n_qkv:]))
            return do

        low_rank = spec.qkv.kept_low_rank(keeper, switches, dy.dtype)
        place = None
        if ctx.fused:
            slots = packed_qkv(keeper)
            place = fused_qkv_restore(spec, slots, cos, sin, batch, dy.dtype, low_rank, keeper)
            heads = [spec.to_heads(place[:, columns], batch) for columns in spec.qkv.columns]
            if not spec.norms:  # nobody reads them again, and attention's backward is the peak
                slots.clear()
            overwrite = [True] * 3
        else:
            heads, norms, overwrite = _rotate_restored(spec, cos, sin, batch, low_rank, keeper, ctx.keeps_once)
        attn_out = keeper.restore("attn_out")
        dheads = spec.core.backward(do_fn, heads, attn_out, mask, ctx.kwargs, keeper, ctx.rng, ctx.graphs, overwrite)
        del attn_out
        if ctx.fused:
            norms = fused_norms(spec, slots, cos, sin, batch, dy.dtype, low_rank, keeper)
            del slots
        # q, k and v have been read: gradients go where they were, and are there already if they came in pieces of heads
        place = spec.qkv.buffer(dy.shape[0], low_rank, dy) if place is None else place
        dqkv = rope_bwd(*dheads, cos, sin, place, norms)
        del dheads, norms
        g, dB = spec.qkv.backward_low_rank(dqkv, low_rank, keeper)
        x = keeper.restore("attn_in", dy.dtype)
        grads = spec.qkv.backward_parameters(dqkv, g, dB, x, keeper, needs[:n_qkv])
        del x  # before there is a dx
        dx = spec.qkv.backward_input(dqkv, g, low_rank, keeper) if ctx.needs_input_grad[0] else None
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, dresidual, *[None] * 8, *grads, *out_grads


def _rotate_fwd(spec: AttentionSpec, y: Tensor, cos, sin, batch: int, low_rank, keeper: Keeper) -> list[Tensor]:
    """Heads q, k (rotated), v [B, S, H, D] from the frozen paths y [T, N]; keeps the slots q, k, v.

    In a layer's second run q and k go back into y's memory where nothing reads what was before, but not exact ones
    without an exact v: they would hold all of y.
    """
    if spec.compensate:
        for name, columns in zip("qkv", spec.qkv.columns, strict=True):
            keeper.keep(name, y[:, columns])
    y = spec.qkv.add(y, low_rank, keeper, in_place=not (spec.compensate and keeper.aliases(*"qkv")))
    heads = [spec.to_heads(y[:, columns], batch) for columns in spec.qkv.columns]
    rotated = heads
    if cos is not None:
        rotated = [rope(x, cos, sin, norm=spec.norm(name, keeper)) for name, x in zip("qk", heads[:2], strict=True)]
        apart = spec.compensate or spec.norms or keeper.aliases("q", "k") and not keeper.aliases("v")
        if keeper.step.runs_again and not apart:
            rotated = [x.copy_(r) for x, r in zip(heads, rotated, strict=False)]
        rotated.append(heads[2])
    if not spec.compensate:
        for name, head in zip("qkv", heads if spec.norms else rotated, strict=True):
            keeper.keep(name, head.flatten(0, 1).flatten(1))
    return rotated


def _rotate_restored(
    spec: AttentionSpec, cos, sin, batch: int, low_rank, keeper: Keeper, kept_once: bool
) -> tuple[list[Tensor], list[HeadNorm], list[bool]]:
    """The heads of _rotate_fwd from the restored slots, the norms of q and k with what they normalized, and which heads
    have memory of their own: an exact slot has, if it was kept for this backward alone."""
    heads, norms, own = [], [], []
    for i, name in enumerate("qkv"):
        aliases = keeper.saver(name).aliases
        slot, norm = keeper.restore(name), spec.norm(name, keeper)
        y = slot
        if spec.compensate:
            y = spec.qkv.add(y, low_rank, keeper, i, in_place=False)
        if norm is not None:
            norms.append(replace(norm, x=y))
        rotates = cos is not None and name != "v" and (spec.compensate or norm is not None)
        own.append(rotates or norm is None and (kept_once or y is not slot or not aliases))
        y = spec.to_heads(y, batch)
        heads.append(rope(y, cos, sin, norm=norm) if rotates else y)
    return heads, norms, own
