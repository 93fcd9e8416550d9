"""The savers of a model's layers as a plan has them, and what they keep, in bytes a token."""

from dataclasses import dataclass
from functools import cached_property

from hyclora.models.building import HALVES, Builder
from hyclora.models.config import HycloraConfig
from hyclora.operators.attention import fused_qkv
from hyclora.operators.mlp import fused_mlp
from hyclora.operators.savers import ChannelQuant, Exact, Step, base
from hyclora.utils.errors import UserError
from hyclora.utils.planning.shape import HALF, Shape

E = HALF.itemsize


@dataclass(frozen=True)
class Units:
    """Bytes a token of what each block of a layer keeps through its savers, in the order in which the blocks run."""

    attention_norm: float
    attention: float
    mlp_norm: float
    mlp: float

    @property
    def layer(self) -> float:
        return self.attention_norm + self.attention + self.mlp_norm + self.mlp


class Savers:
    """The savers that apply_hyclora would give a model's layers, and what they keep.

    UserError for embeddings in host memory that are the head's weight too.
    """

    def __init__(self, shape: Shape, config: HycloraConfig):
        if config.offload_embeddings and shape.tied:
            raise UserError(
                "offload_embeddings=True: the head shares its weight with the embeddings (tie_word_embeddings), and "
                "needs it on the device: drop offload_embeddings"
            )
        self.shape, self.config, self.n = shape, config, len(shape.layers)
        builder = Builder(config, shape.family, shape.layers, {}, {}, Step(1))
        self.halves = [{half: builder.savers(i, half) for half in HALVES} for i in range(self.n)]
        self.norms = [{half: builder.savers(i, half, "norm") for half in HALVES} for i in range(self.n)]
        self.inputs = [builder.savers(i, "layer")["layer_in"] for i in range(self.n)]
        self.again = [builder.is_again(i) for i in range(self.n)]
        self.last = builder.savers(self.n, "norm")["norm_in"]
        self.units = [self._units(i) for i in range(self.n)]

    def fuses_attention(self, i: int) -> bool:
        """Whether q, k, v of a layer are packed by fused kernels."""
        fused, norms = self.config.policy.fused and not self.again[i], bool(self.shape.family.head_norms)
        return fused and fused_qkv.fits(self.shape.head_dim, self.halves[i]["attention"], norms)

    def fuses_mlp(self, i: int) -> bool:
        """Whether gate and up of a layer are."""
        fused = self.config.policy.fused and not self.again[i]
        return fused and fused_mlp.fits(self.halves[i]["mlp"], self.shape.family.activation)

    def map_kept(self, i: int, length: int) -> float:
        """Bytes a token that a layer keeps of the attention map, in rows of so many tokens; 0 with attention=flash."""
        if self.config.attention != "eager" or not self.halves[i]["attention"]["prob"].stored:
            return 0.0
        return self.shape.q // self.shape.head_dim * self.halves[i]["attention"]["prob"].bits(length) / 8

    def low_rank(self, T: int) -> tuple[Units, Units]:
        """Bytes a token of a layer's x A^T: what of T tokens stays on the device, and what a store has (keep_rows)."""
        groups = self.shape.groups
        attention, mlp = (E * (groups[one].R + groups[two].R) for one, two in (("qkv", "out"), ("gate_up", "down")))
        sent = [size if self.config.offload and T * size > base.LARGE else 0 for size in (attention, mlp)]
        return Units(0, attention - sent[0], 0, mlp - sent[1]), Units(0, sent[0], 0, sent[1])

    def _units(self, i: int) -> Units:
        widths = self.shape.widths(i)

        def kept(savers: dict) -> float:
            found = {slot: saver for slot, saver in savers.items() if saver.stored and slot != "prob"}
            return sum(saver.bits(widths[slot]) / 8 for slot, saver in found.items())

        attention, mlp = (kept(self.halves[i][half]) for half in HALVES)
        # exact slots are parts of what a group of projections gives, x A^T beside it, and keep it whole (lora.buffer);
        # q and k are so only before RoPE, or where a layer that is run again has an exact v (attention.py: _rotate_fwd)
        before_rope = self.config.policy.compensate and not self.again[i] or self.shape.family.head_norms
        put_back = self.again[i] and isinstance(self.halves[i]["attention"]["v"], Exact)
        slots = ("q", "k", "v") if before_rope or put_back else ("v",)
        attention += self._side_by_side(i, "attention", slots, "qkv")
        mlp += self._side_by_side(i, "mlp", ("gate", "up"), "gate_up")
        before, between = (kept(self.norms[i][half]) for half in HALVES)
        return Units(before, attention, between, mlp)

    def _side_by_side(self, i: int, half: str, slots: tuple[str, ...], group: str) -> int:
        """Bytes a token that exact ones of slots keep beside themselves: the rest of what their group gives."""
        savers, widths, group = self.halves[i][half], self.shape.widths(i), self.shape.groups[group]
        exact = [widths[slot] for slot in slots if isinstance(savers.get(slot), Exact)]
        return E * (group.width + group.beside - sum(exact)) if exact else 0

    @cached_property
    def statistics(self) -> int:
        """Bytes of calibration: 24 a channel of a quantizer while it lasts, 8 more with exact ones."""
        total = 0
        for i in range(self.n):
            widths = self.shape.widths(i)
            for savers in (*self.halves[i].values(), *self.norms[i].values(), {"layer_in": self.inputs[i]}):
                total += sum(_statistics(saver, widths.get(slot, 0)) for slot, saver in savers.items())
        return total + _statistics(self.last, self.shape.hidden)

    @cached_property
    def inputs_kept(self) -> list[float]:
        """Bytes a token of each layer's input, as its saver keeps it."""
        return [saver.bits(self.shape.hidden) / 8 for saver in self.inputs]


def _statistics(saver, width: int) -> int:
    if not isinstance(saver, ChannelQuant):
        return 0
    return width * (32 if saver.outlier_ratio else 24)
