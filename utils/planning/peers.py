"""What other ways of LoRA fine-tuning need, counted for comparison: no budget and no plan ever chooses one.

Read off the code of transformers 5.17, peft 0.21, bitsandbytes 0.50 and unsloth 2026.10.9, with which
benchmarks/results has lines: NF4 weights, adapters on all linear layers, autocast to bfloat16, full rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hyclora.utils.planning.fitting import LONGEST
from hyclora.utils.planning.live import WORKSPACE
from hyclora.utils.planning.modes import how_near
from hyclora.utils.planning.need import Need
from hyclora.utils.planning.recorded import is_shape
from hyclora.utils.planning.shape import HALF, TRAINED, Shape
from hyclora.utils.planning.units import BASES

E, FP32 = HALF.itemsize, 4
# Unsloth: logits of a chunk are in fp32, of so many rows at most, and at least of so many logits in all; more columns
# than two tiles are instead taken a tile at a time where there are as many rows
ROWS, FEWEST_ROWS, FEWEST_LOGITS, TILE = 4096, 512, 512 * 151936, 16384
# and its host buffers before the first step, of which a layer's input takes one, in a power of two
HOST_BUFFERS = 200 * 2**18


@dataclass(frozen=True)
class Peer:
    """A way to train by the name that benchmarks/peers.py calls it; count: its moments and host memory.

    lines: of each shape that was measured, how many lines, and by how many percent of the measured dyn the count is off
    at most. staging: static copies of a layer's input. whole_logits: the loss has those of all tokens in fp32.
    """

    name: str
    count: Callable[[Shape, int, int], tuple[dict[str, float], int]]
    lines: dict[str, tuple[int, float]]
    staging: int = 0
    whole_logits: bool = False

    def need(self, shape: Shape, batch: int, length: int, steps: bool = True) -> Need:
        """The Need of batch rows of length tokens; steps: with a step of torch's AdamW (live.py: count)."""
        moments, host = self.count(shape, batch, length)
        moments |= {"the optimizer's step": shape.trained // TRAINED} if steps else {}
        static = {
            "weights": shape.weights,
            "adapters, gradients, Adam": shape.trained,
            "GEMM workspaces": 2 * WORKSPACE,
            "staging buffers": self.staging * batch * length * E * shape.hidden,
        }
        largest = batch * length * FP32 * shape.vocab if self.whole_logits else 0
        return Need(static, {name: int(size) for name, size in moments.items()}, 0, host, slab=1, largest=largest)

    def accuracy(self, shape: Shape) -> str:
        """How near the count of dyn is, in words, and whether this shape was measured."""
        own = [of for name, of in self.lines.items() if is_shape(shape, name)]
        lines, offs = zip(*(own or self.lines.values()), strict=True)
        said = how_near(sum(lines), max(offs))
        return said if own else f"no line of this shape here; of others {said}"


def most_tokens(shape: Shape) -> int:
    """The longest row that peers are counted for: that of a window, past which Hugging Face makes a square mask.

    0 where they are not counted at all: for weights that are not NF4, and unless all linear layers have adapters,
    without dropout.
    """
    if shape.base != BASES[0] or shape.adapted != shape.linears or any(g.dropped for g in shape.groups.values()):
        return 0
    return min([LONGEST, *(window for window in shape.windows if window is not None)])


def peer_of(setting) -> Peer | None:
    """The peer that a result line's setting is, None if none."""
    return next((peer for peer in PEERS if peer.name == setting), None)


def _adapters(shape: Shape, *groups: str) -> int:
    """Bytes of A and B of a layer's groups as autocast casts them."""
    linears = [linear for name in groups for linear in shape.groups[name].linears]
    return E * shape.rank * sum(linear.in_features + linear.out_features for linear in linears)


def _of_heads(shape: Shape, size: int) -> int:
    """Bytes a token of what norms of heads keep of q and k, of so many bytes an element, with a scale a head."""
    width = shape.q + shape.k
    return (size * width + FP32 * width // shape.head_dim) if shape.family.head_norms else 0


def _peft(shape: Shape, batch: int, length: int, checkpointing: bool) -> tuple[dict[str, float], int]:
    """PEFT in Hugging Face's model: each operator keeps its own.

    A norm has its input in fp32, and a scale a token. Of a layer are kept: two of them, their outputs as inputs of
    adapters, q and k as RoPE left them, v, what attention gives with its lse, gate, its activation, up, their product,
    x A^T of each adapter, and A, B cast. Without checkpointing the embeddings need no gradient, so that the first norm
    and what it is for keep nothing. With it, all layers' inputs, and one layer's tensors for a time.

    The loss: logits of all tokens in fp32 three times, as their log-softmax and two gradients, beside the last norm.
    """
    T, n, heads = batch * length, len(shape.layers), shape.q // shape.head_dim
    x, f, q, kv = E * shape.hidden, E * shape.ffn, E * shape.q, E * shape.k
    norm = FP32 * shape.hidden + FP32
    low_rank = E * shape.rank * sum(len(group.linears) for group in shape.groups.values())
    attention = _of_heads(shape, FP32) + 2 * q + 2 * kv + FP32 * heads
    layer = T * (2 * (norm + x) + attention + 4 * f + low_rank) + _adapters(shape, *shape.groups)
    first = T * norm + E * shape.rank * shape.hidden * len(shape.groups["qkv"].linears)
    others = n * T * x if checkpointing else (n - 1) * layer - first
    angles = 2 * E * shape.head_dim * length
    down = shape.groups["down"].linears[0].weight.numel() * E
    # gate, act, up and dy; the product is free once its adapter's gradients are there, which are added to those of W
    backward = others + layer - T * f + T * x + angles
    return {
        "loss": others + (0 if checkpointing else layer) + T * (3 * FP32 * shape.vocab + norm) + angles,
        "backward of an MLP: down": backward + 2 * T * f + down,
        "backward of an MLP: gate times up": backward + 3 * T * f,
    }, 0


def _unsloth(shape: Shape, batch: int, length: int) -> tuple[dict[str, float], int]:
    """Unsloth with use_gradient_checkpointing="unsloth": layer inputs wait in host memory, but for the last one's.

    The layer that is run again keeps its input, the norms' outputs, the residual stream between them, q, k, v, what
    attention gives, twice as rows are made of its heads, gate and up, and q, k before norms of heads. Beside it are its
    output, dy and the embeddings, a leaf. From torch 2.11 on its layers are compiled, so that the MLP's gradients do
    not take the memory of gate and up, and one W is there for a time; which of them are there at once was concluded
    from the lines. The loss makes its gradient in forward, a chunk of rows at a time.
    """
    T, heads = batch * length, shape.q // shape.head_dim
    x, f = E * shape.hidden, E * shape.ffn
    kept = 4 * x + 3 * E * shape.q + 2 * E * shape.k + 2 * f + FP32 * (heads + 2) + _of_heads(shape, E)
    layer = T * (kept + 3 * x) + _adapters(shape, "gate_up", "down")
    rows, columns = min(T, _rows(shape, T)), shape.vocab
    if T >= ROWS and shape.vocab > 2 * TILE:
        rows, columns = ROWS, TILE
    chunk = rows * (FP32 * columns + x + FP32 * shape.hidden + x)
    slot = 1 << (T * x - 1).bit_length()
    return {
        "loss": 5 * T * x + chunk,
        "backward of an MLP: activation": layer + 4 * T * f,
        "backward of an MLP: gate, up": layer + 2 * T * f + T * x + E * shape.ffn * shape.hidden,
    }, len(shape.layers) * slot + HOST_BUFFERS


def _rows(shape: Shape, T: int) -> int:
    """Rows of a chunk of logits: hidden / vocab of all, but enough for a GEMM; a power of two."""
    fewest = min(max(_power(FEWEST_LOGITS // shape.vocab), FEWEST_ROWS), ROWS)
    return min(max(_power(T * shape.hidden // shape.vocab), fewest), ROWS)


def _power(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)


# lines: `python -m benchmarks.report_plan` prints them too, and a test holds them to the files
PEERS = [
    Peer(
        "PEFT LoRA",
        partial(_peft, checkpointing=False),
        {"llama-2-7b": (1, 0.0), "llama-3-8b": (1, 0.0), "mistral-7b": (1, 0.0)},
        whole_logits=True,
    ),
    Peer(
        "PEFT LoRA, checkpointing",
        partial(_peft, checkpointing=True),
        {"llama-2-7b": (3, 0.0), "llama-3-8b": (1, 0.0), "mistral-7b": (1, 0.0), "qwen3-8b": (1, 0.0)},
        whole_logits=True,
    ),
    Peer("Unsloth, offloaded checkpointing", _unsloth, {"llama-2-7b": (3, 0.2)}, staging=2),
]
