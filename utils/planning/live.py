"""What is alive at once in a micro-step of LLaMA's kind of decoder, in bytes, by moments of it.

Each moment is a line of the forward or backward of operators/, read off the code: what it has allocated, what its
callers still hold, and what autograd or the store keep. The peak is the largest of them. Counted are live tensors, as
torch.cuda.max_memory_allocated does; what the allocator takes beside them is need.py's.
"""

from dataclasses import replace
from itertools import chain

from hyclora.operators.attention.flash import PLACE, head_pieces
from hyclora.operators.cross_entropy import CHUNK_BYTES, TILE_ROWS
from hyclora.operators.savers import Difference, Exact
from hyclora.operators.store.store import GROUP_BYTES
from hyclora.operators.token_tiles import TILE_TOKENS
from hyclora.utils.planning.kept import E, Savers, Units
from hyclora.utils.planning.need import Need
from hyclora.utils.planning.shape import TRAINED

# of a GEMM library, for each thread and stream that uses it: 32 MiB on Hopper, 8 on others
WORKSPACE = 2**25


def count(
    savers: Savers, batch: int, length: int, checkpointing: bool = False, documents: int | None = None,
    processes: int = 1, steps: bool = True,
) -> Need:  # fmt: skip
    """The Need of a micro-step of batch rows of length tokens, without padding. Arithmetic alone.

    checkpointing: gradient checkpointing, with layer_in kept by its saver. documents: how many there are in all of rows
    that are packed, and so attention by the kernel for runs. processes: more than one train data parallel. steps: with
    a step of torch's AdamW, which has for a time a copy of what is trained (foreach; its fused form has none). It runs
    when all but the graphs' memory is free.
    Of layers that keep alike, above others that do, the last is looked at: most is there of those before it. With
    graphs that is once the last layer of all, and once the last of those below it.
    """
    shape, config, T = savers.shape, savers.config, batch * length
    # by itself it is off with attention=eager
    graphs = config.cuda_graphs is True or config.cuda_graphs == "auto" and config.attention == "flash"
    windows = any(window is not None and window < length for window in shape.windows)
    runs = documents or (batch if windows else 0)
    again = [checkpointing or own for own in savers.again]
    kept_by = [x if own else unit for x, unit, own in zip(savers.inputs_kept, savers.units, again, strict=True)]
    pairs = zip([None, *kept_by], kept_by, strict=False)
    highest = {(pair, graphs and i == savers.n - 1): i for i, pair in enumerate(pairs)}.values()
    tops = [_Step(savers, T, length, runs, graphs, again, top, checkpointing) for top in highest]
    elsewhere = shape.embeddings if config.offload_embeddings else 0
    static = {
        "weights": shape.weights - elsewhere,
        "adapters, gradients, Adam": shape.trained,
        "statistics of quantizers": savers.statistics,
        # the main thread's and autograd's; a recording gives all back, and only the loss makes one anew (recording.py)
        "GEMM workspaces": WORKSPACE if graphs else 2 * WORKSPACE,
    }
    if processes > 1:
        static["DDP's buckets"] = shape.trained // TRAINED  # a copy of all gradients, which is what is reduced
    host = 0
    if config.offload:
        # the last norm's slot is sent if it is a group by itself
        last = T * savers.last.bits(shape.hidden) / 8
        kept, sent = zip(again, savers.inputs_kept, savers.units, strict=True), savers.low_rank(T)[1].layer
        host = T * sum(x if run_again else unit.layer + sent for run_again, x, unit in kept)
        host += T * sum(savers.map_kept(i, length) for i, run_again in enumerate(again) if not run_again)
        host += last if last >= GROUP_BYTES else 0
    found = [top.moments() for top in tops]
    moments = {name: int(max(one.get(name, 0) for one in found)) for name in dict.fromkeys(chain(*found))}
    optimizer = shape.trained // TRAINED if steps else 0
    if graphs:
        return Need(static, moments, max(int(tops[0].loss()), optimizer), int(host), embeddings=elsewhere)
    moments |= {"the optimizer's step": optimizer}
    return Need(static, moments, 0, int(host), embeddings=elsewhere)


class _Step:
    """The moments of a micro-step of T tokens at its top layer; t of them are an MLP's tile.

    again: of each layer, whether it keeps its input alone. The top layer is that whose backward is looked at, with all
    that is kept of those before. above: of a recorded backward that has been through other layers, dx of the caller of
    autograd.grad, and the gradients found for the layer before (models/graphs/layer_graphs.py: backward).
    embeddings: what has their memory till the end, beside all else. With checkpointing they need a gradient, and are a
    leaf that autograd holds. And the place of a graph's input is that of its output too, but not where a layer before
    the output keeps its input exactly, and so does not write there. Of resident exact inputs the first is that memory.
    ahead: of a token, what a store has on the way: of the layer below, its input or the half asked for next.
    """

    def __init__(
        self, savers: Savers, T: int, length: int, runs: int, graphs: bool, again: list[bool], top: int,
        checkpointing: bool,
    ):  # fmt: skip
        self.shape, self.savers, self.T, self.t = savers.shape, savers, T, min(T, TILE_TOKENS)
        self.runs, self.graphs, self.again, self.top = runs, graphs, again[top], top
        self.offload, shape, groups = savers.config.offload, savers.shape, savers.shape.groups
        # cos and sin of all rows, and a recording's own (layer_graphs.py: _capture)
        self.angles = (2 if graphs else 1) * 2 * E * shape.head_dim * length
        self.x, self.f = E * shape.hidden, E * shape.ffn
        self.q, self.kv = E * shape.q, E * shape.k
        self.qkv, self.out, self.gate_up, self.down = (groups[n] for n in ("qkv", "out", "gate_up", "down"))
        # x A^T of the four groups, and 4 bytes for each norm; of layers that are not run again a store may have a part
        stays, large = savers.low_rank(T)
        sent = [Units(0, 0, 0, 0) if run_again else large for run_again in again]
        self.sent = sent[top]
        self.low_rank = (1 + again[:top].count(False)) * (stays.layer + 8) + (large.layer if self.again else 0)
        units = [
            replace(unit, attention=unit.attention + savers.map_kept(i, length) + x.attention, mlp=unit.mlp + x.mlp)
            for i, (unit, x) in enumerate(zip(savers.units, sent, strict=True))
        ]
        # of a layer that is run again all slots are there for a time, but of its late MLP x alone, exactly
        self.unit = units[self.top]
        if self.again:
            norm_in, mlp_in = savers.norms[self.top]["mlp"]["norm_in"], savers.halves[self.top]["mlp"]["mlp_in"]
            self.unit = replace(self.unit, mlp=self.x if mlp_in.stored or not isinstance(norm_in, Exact) else 0)
        self.slots = [unit for unit, run_again in zip(units[:top], again, strict=False) if not run_again]
        alone = [saver if run_again else None for saver, run_again in zip(savers.inputs, again, strict=True)]
        exact = [isinstance(saver, Exact) for saver in alone]
        counted = not self.offload and any(exact[:top])
        leaf, place = checkpointing and (graphs or not counted), graphs and any(exact) and not counted
        self.embeddings = T * self.x * (leaf + place)
        # of a chain of differences, what is restored of the last input while the layer runs for the first time
        self.restored = self.x if any(isinstance(saver, Difference) for saver in alone[: top + 1]) else 0
        self.inputs = [x for x, run_again in zip(savers.inputs_kept[: top + 1], again, strict=False) if run_again]
        self.ahead = 0
        if top:
            below = units[top - 1]
            self.ahead = savers.inputs_kept[top - 1] if again[top - 1] else below.mlp_norm + below.mlp
        # an attention map of all heads, in 16 bit, and what is kept of it a token; 0 where none is made
        self.map_kept = savers.map_kept(self.top, length)
        self.map = E * T * length * shape.q // shape.head_dim if savers.config.attention == "eager" else 0
        grads = sum(group.grads for group in groups.values())
        self.above = T * self.x + grads if graphs and top < savers.n - 1 else 0

    def kept(self, where: str) -> float:
        """Bytes of slots on the device when the top layer's backward is at its MLP or attention, or forward at its end.

        Of a store half a layer is on the device, and the half asked for next (store.py: window, ahead). A norm's slot
        of 64 MiB is fetched by itself, but as early: a block asks for the slot of the norm before it, of which it
        derives its input. In attention's backward its own slots are free, but for heads with norms.
        """
        T, top = self.T, self.unit
        own = top.attention_norm + (top.attention if self._keeps_packed else self.sent.attention)
        if self.offload and not self.again:
            halves = {
                "mlp": top.layer,
                "attention": own + self.ahead,
                "end": top.layer if self.graphs else top.mlp_norm + top.mlp,
            }
            return T * halves[where]
        others = 0 if self.offload else sum(unit.layer for unit in self.slots)
        here = {"mlp": top.layer, "attention": own, "end": 0 if self.again else top.layer}
        return T * (others + here[where]) + self._inputs(where)

    @property
    def _keeps_packed(self) -> bool:
        unfused = not (self._heads_are_slots or self.savers.fuses_attention(self.top))
        return bool(self.shape.family.head_norms) or unfused

    @property
    def _heads_are_slots(self) -> bool:
        """Whether attention reads exact slots as they are, and frees them."""
        exact = self.savers.again[self.top] and isinstance(self.savers.halves[self.top]["attention"]["v"], Exact)
        return exact and not self.shape.family.head_norms

    def _inputs(self, where: str) -> float:
        """Kept layer inputs, of a store what is asked for next, or the last; and dy of a layer that is run again beside
        its attention's.

        At a late MLP it is that of the MLP. Our second run has the layer's own input as it was, in the memory of the
        residual stream, and what was kept of it is gone.
        """
        again, backward = self.again, where != "end"
        if self.offload:
            kept = self.ahead if backward else self.inputs[-1]
        else:
            kept = sum(self.inputs[:-1] if again and backward else self.inputs)
        return self.T * (kept + (self.x if again and where != "mlp" else 0))

    def moments(self) -> dict[str, float]:
        T, low_rank = self.T, self.T * self.low_rank + self.angles + self.embeddings
        found, forward = {}, {}
        for name, size in self._mlp_backward().items():
            found[f"backward of an MLP: {name}"] = size + low_rank + self.kept("mlp") + self.above
        fixed = T * self.x if self.graphs else 0  # the graphs' input, output and its gradient, in one place
        gradients = self.mlp_grads + self.out.grads if self.graphs else self.out.grads
        beside = low_rank + self.kept("attention") + self.above + fixed + gradients
        for name, size in self._attention_backward().items():
            found[f"backward of attention: {name}"] = size + beside
        for name, size in (self._second_forward() if self.again else {}).items():
            found[f"second forward: {name}"] = size + low_rank + self.above
        for name, size in self._mlp_forward().items():
            forward[f"forward of an MLP: {name}"] = size + low_rank + self.kept("end" if self.again else "mlp")
        if self.map or not self.again:
            forward[f"forward of attention: {'softmax' if self.map else 'core'}"] = self._attention_forward() + low_rank
        forward["loss"] = self.loss() + low_rank + self.kept("end") + fixed
        # given back before a forward, which is in one thread (models/step_hook.py); graphs have one all the time
        unused = 0 if self.graphs else WORKSPACE
        return found | {name: size - unused for name, size in forward.items()}

    @property
    def mlp_grads(self) -> int:
        return self.gate_up.grads + self.down.grads

    def _mlp_backward(self) -> dict[str, float]:
        """mlp.py: _backward_tile of the first tile, dy [T, C] among them; slots of gate and up are free once read.

        Adapters with dropout have g A, and then their dropped input, beside what is there without (lora.py).
        """
        T, t, x, f = self.T, self.t, self.x, self.f
        above, below = t * E * self.down.dropped, t * E * self.gate_up.dropped
        whole = T * x if T > t else 0  # dx of all tiles
        dgate_up = t * E * (self.gate_up.width + self.gate_up.beside)
        freed = 0 if self.again else t * (self.unit.mlp - self.sent.mlp)
        stacks = self.down.stack + self.gate_up.stack
        found = {
            "down": T * x + t * f + max(above, self.down.piece(t, by_rows=False, below=False)) + self.down.stack,
            "activation": T * x + whole + t * f + dgate_up + stacks,
            "dropped hidden": T * x + whole + t * f + above + dgate_up + stacks - freed,
            "low-rank gradients": T * x + whole + dgate_up + self.gate_up.low_rank_parts(t) + self.gate_up.stack
            + self.mlp_grads - freed,
            "gate, up": T * x + whole + dgate_up + self.gate_up.piece(t, by_rows=False, below=True) + t * x
            + self.gate_up.stack + self.down.grads + self.gate_up.early_grads - freed,
            "adapters": T * x + whole + dgate_up + 2 * t * x + below + self.gate_up.stack + self.mlp_grads - freed,
        }  # fmt: skip
        if self.again:  # _down_late, of a later tile if there is one; activation is as if fused
            before = T * x + whole + dgate_up + stacks + (self.mlp_grads if T > t else 0)
            found["gate, up again"] = before + t * x + max(below, self.gate_up.piece(t, by_rows=True, below=True))
            found["down"] = before + t * f + max(above, self.down.piece(t, by_rows=False, below=False))
        elif not self.savers.fuses_mlp(self.top):
            # MlpFunction: 6 F elements a token of a tile, 8 with a kept act and hidden, but for slots that are exact
            savers = self.savers.halves[self.top]["mlp"]
            extra = 8 if savers["hidden"].stored else 6
            extra -= sum(isinstance(savers.get(slot), Exact) for slot in ("gate", "up", "act", "hidden"))
            found["activation"] = T * x + whole + t * extra * f + stacks
        return found

    @property
    def pieces(self) -> int:
        """Of heads, in which attention goes back."""
        n_heads, n_kv_heads = self.shape.q // self.shape.head_dim, self.shape.k // self.shape.head_dim
        return 1 if self.map else head_pieces(self.T, self.runs, n_heads, n_kv_heads)

    def _attention_backward(self) -> dict[str, float]:
        """attention.py: AttentionFunction.backward, dy [T, C] among them; the core is torch's flash attention."""
        T, x, q, kv = self.T, self.x, self.q, self.kv
        qkv, dy = q + 2 * kv, T * x
        numbers = 2 * 4 * self.shape.q // self.shape.head_dim  # lse and sum(do o), in fp32
        # flash's backward adds dq up in fp32, for each run PLACE tokens more (benchmarks/NOTES.md); of grouped queries
        # FlashAttention has dk, dv for all heads before it adds them up, and the one line of such a shape agrees
        n = self.pieces
        gradients, works_in = T * qkv, T * (2 * q if kv < q else 0) + 2 * q * (T + PLACE * self.runs)
        if n > 1:
            # those of a piece before they take the memory of q, k, v (but for an exact v that was kept), and its do,
            # which lies between that of others: torch's flash attention copies it. cuDNN, which torch has for whole
            # rows on Hopper, asks for the strides of o, which it has, so that this is a bound there: 64 MiB of the 70
            # that the line of 32,768 tokens has less, 2.2 %
            gradients = T * kv * self._heads_are_slots * (not self.again)
            works_in = (works_in + T * (qkv + q)) / n
        fused = self.savers.fuses_attention(self.top)
        # its q, k, v are where their gradients and x A^T will be
        room = T * E * self.qkv.beside * fused
        core = T * (qkv + 2 * q + numbers) + gradients + works_in + room
        if self.map:
            # EagerCore.backward: q, k, v, o and do; prob, its gradient and that of the scores, or two of these with dv,
            # dq and copies that a product makes of its factors
            core = T * (qkv + 2 * q) + 2 * self.map + max(self.map, 4 * T * q) + room
        dqkv = T * (qkv + E * self.qkv.beside)
        above, below = T * E * self.out.dropped, T * E * self.qkv.dropped
        norms = T * (q + kv) if self.shape.family.head_norms else 0
        # exact slots have room for x A^T beside them; an exact v that was kept is a part of q, k, v before RoPE
        beside = T * (E * self.qkv.beside + (0 if self.again else q + kv)) if self._heads_are_slots else 0
        return {
            "out": dy + T * (qkv + 2 * q) + beside + room + self.out.stack + self.qkv.stack
            + max(above, self.out.piece(T, by_rows=False, below=False)),
            "core": dy + core + beside + self.qkv.stack,
            "rotation": dy + (0 if fused and n > 1 else T * qkv) + dqkv + norms + self.qkv.stack,
            "q, k, v": dy + dqkv + T * x + max(below, self.qkv.piece(T, by_rows=False, below=True))
            + self.qkv.stack + self.qkv.grads,
        }  # fmt: skip

    def _attention_forward(self) -> float:
        """attention.py: the core's forward of the top layer: o and lse, or EagerCore's scores beside a map in fp32 and
        its softmax; x, residual, q, k, v, and q, k as they are rotated where that is not fused; q, k, v as they are
        kept, but of a layer that is run again its exact slots. A store still has the half layer before on the device.
        """
        T, own = self.T, self.unit.attention_norm
        heads = T * (self.q + 2 * self.kv + E * self.qkv.beside)
        heads += 0 if self.savers.fuses_attention(self.top) else T * (self.q + self.kv)
        if not self.again:
            attn_out = self.savers.halves[self.top]["attention"]["attn_out"]
            own += self.unit.attention - self.map_kept - (attn_out.bits(self.shape.q) / 8 if attn_out.stored else 0)
        if self.offload and not self.again:
            kept = T * (own + self.ahead)
        else:
            kept = self.kept("end") + T * (own if self.again else own - self.unit.layer)
        made = 5 * self.map or T * (self.q + 4 * self.shape.q // self.shape.head_dim)
        return T * (2 * self.x + (self.restored if self.again else 0)) + heads + made + kept

    def _second_forward(self) -> dict[str, float]:
        """layers.py: LayerBlock.run of our second run up to its late MLP: dy, the residual stream (a layer input that
        is kept as it is has memory of its own beside it), and what a norm gives while the block after it runs."""
        T, x, q, kv, unit, savers = self.T, self.x, self.q, self.kv, self.unit, self.savers
        slots, compensates = savers.halves[self.top]["attention"], savers.config.policy.compensate
        aliased = isinstance(savers.inputs[self.top], Exact)
        around = self.kept("mlp") + T * ((4 if aliased else 3) * x - unit.mlp_norm - unit.mlp)
        apart = not savers.fuses_attention(self.top) and (
            compensates and not savers.again[self.top] or self.shape.family.head_norms
        )
        heads = 0 if isinstance(slots["v"], Exact) else T * (q + 2 * kv + E * self.qkv.beside)
        heads += T * (q + kv) if apart else 0
        o = 0 if isinstance(slots["attn_out"], Exact) else T * q
        piece = T * q / self.pieces if slots["lse"].stored and self.pieces > 1 else 0  # before it is at its place in o
        return {
            "core": around + heads + o + piece,
            "out": around + o + T * x + self.out.stack
            + max(T * E * self.out.dropped, self.out.piece(T, by_rows=True, below=False)),
            "norm": around + T * unit.mlp_norm,
        }  # fmt: skip

    def _mlp_forward(self) -> dict[str, float]:
        """mlp.py: _forward_tile of the last layer, with its input, the residual stream, and y of all tiles where that
        is not in the memory of the stream. A layer that is run again has its own input as it was, not as it is kept,
        but in the first run, the only one of a late MLP, the stream has its memory, and there is no dy yet."""
        T, t, x, f = self.T, self.t, self.x, self.f
        stream = T * (2 * x + (x - self.inputs[-1] if self.again else 0))
        if self.again:
            stream = T * (x + self.restored)  # the norm's output; kept() has dy, and so the stream's bytes
        y = t * E * (self.gate_up.width + self.gate_up.beside)
        return {
            "gate, up": stream + y + self.gate_up.stack - (0 if self.again else t * (self.unit.mlp - self.sent.mlp))
            + max(t * E * self.gate_up.dropped, self.gate_up.piece(t, by_rows=True, below=True)),
            "activation": stream + y + t * f + self.gate_up.stack,
            "down": stream + t * (f + x) + self.down.stack
            + max(t * E * self.down.dropped, self.down.piece(t, by_rows=True, below=False)),
        }  # fmt: skip

    def loss(self) -> float:
        """cross_entropy.py: the last norm's output and slot, dh, a chunk of logits, its hidden states and gradients."""
        rows = max(1, CHUNK_BYTES // (E * self.shape.vocab))
        rows = min(rows if rows < TILE_ROWS else rows - rows % TILE_ROWS, self.T)
        last = self.savers.last.bits(self.shape.hidden) / 8
        chunk = rows * (E * self.shape.vocab + self.x)
        return self.T * (2 * self.x + last + 16) + max(chunk, self.T * self.x)
