"""Which blocks the layers of a model get, and which savers these."""

from dataclasses import dataclass

from torch import nn

from hyclora.models import trust
from hyclora.models.bits import WIDER, allocate_bits, widened
from hyclora.models.blocks import AttentionBlock, Block, MlpBlock, NormBlock, PostNormBlock
from hyclora.models.config import AGAIN, CHAINED, KEPT, SLOTS, HycloraConfig
from hyclora.models.encoder_layer import EncoderLayerBlock
from hyclora.models.families.family import Family
from hyclora.models.layers import LayerBlock
from hyclora.operators.linear.lora import Projection
from hyclora.operators.packing.codebook import GROUP
from hyclora.operators.savers import ChannelQuant, Derived, Saver, Step, make_saver

# Halves of a layer, by block kind: the attributes of Family that name a norm and what it feeds, or follows
HALVES = {"attention": ("attention_norm", "attention"), "mlp": ("mlp_norm", "mlp")}
# Blocks whose slots are the residual stream: a few of its channels are hundreds of times as large as all others, and
# without these exact a 4-bit layer input of SmolLM2 is off by .61 in the middle of the model, with them by .08
RESIDUAL = ("norm", "layer")
# Layers in a chain of inputs that are kept as differences but for the first (savers/difference.py): backward adds up
# half a chain for each layer. It begins at the second layer of a model, as the first one changes most of its input
CHAIN = 8


def parts_of(family: Family, layer: nn.Module, half: str) -> tuple[nn.Module, nn.Module]:
    """A norm of a layer, and what it feeds or follows."""
    return tuple(trust.acting(layer.get_submodule(getattr(family, name))) for name in HALVES[half])


def slot_widths(family: Family, layer: nn.Module, half: str) -> dict[str, int]:
    """Elements a token of each slot of half a layer."""
    _, module = parts_of(family, layer, half)
    if half == "mlp":
        linears = [module.get_submodule(name) for name in family.gate_up]
        n_in, widths = linears[0].in_features, [linear.out_features for linear in linears]
        slots = dict(zip(family.activation.slots, widths, strict=True)) | {"hidden": widths[0]}
        return {"norm_in": n_in, "mlp_in": n_in} | slots | ({"act": widths[0]} if family.activation.gated else {})
    projections = [module.get_submodule(name) for name in family.qkv]
    n_in, (q, k, v) = projections[0].in_features, (p.out_features for p in projections)
    lse = 2 * q // getattr(module.get_submodule(family.core), family.head_dim)  # in fp32
    return {"norm_in": n_in, "attn_in": n_in, "q": q, "k": k, "v": v, "attn_out": q, "lse": lse}


@dataclass
class Builder:
    """Makes the blocks of a model's layers, not bound yet. stock: halves (layer, half) that get none, with reasons.

    kept: what each layer keeps, as config.layers says. ValueError if that is of another number of layers.
    """

    config: HycloraConfig
    family: Family
    layers: list[nn.Module]
    stock: dict[tuple[int, str], str]
    names: dict[int, str]
    step: Step

    def __post_init__(self):
        self.halves = [(i, half) for i in range(len(self.layers)) for half in HALVES if (i, half) not in self.stock]
        self.kept = self.config.kept(len(self.layers))
        chained = [kind in CHAINED for kind in self.kept]
        pairs = zip([False, *chained], chained, strict=False)
        self.differences = [all(pair) and i % CHAIN != 1 for i, pair in enumerate(pairs)]
        self.bits = self._bits()
        self.groups = self._widen()

    def is_again(self, index: int) -> bool:
        """Whether a layer keeps its input alone, and is run again in backward."""
        return index < len(self.layers) and KEPT[self.kept[index]] is not None

    def is_difference(self, index: int) -> bool:
        """Whether a layer keeps its input as the difference to that of the layer before."""
        return index < len(self.layers) and self.differences[index]

    def _is_exact(self, index: int) -> bool:
        """Whether a slot is kept as it is, being of a layer that is run again, or of the norm after an exact one."""
        return self.is_again(index) or index == len(self.layers) and KEPT[self.kept[-1]] == "exact"

    def blocks(self) -> list[Block]:
        """Those of each layer and of what is in it, in order."""
        return [block for i in range(len(self.layers)) for block in self._layer(i)]

    def widths(self) -> dict[str, int]:
        """Elements a token of each slot of a layer."""
        halves = (slot_widths(self.family, self.layers[i], half) for i, half in self.halves)
        widths = {slot: n for half in halves for slot, n in half.items()}
        return widths | {"layer_in": widths["norm_in"]}

    def final_norm(self, module: nn.Module, projections: list[Projection]) -> NormBlock:
        """The norm before the head. It is one of many, so 8 bit cost next to nothing, and so does exactness after a
        layer with an exact input.

        All that layers do shows here, and it runs by itself where they are replayed: so calibration is judged by it.
        """
        savers = self.savers(len(self.layers), "norm", gauged=True)
        norm = NormBlock(module, self.names[id(module)], savers, self.step, self.config.policy.fused)
        norm.projections = projections
        return norm

    def savers(self, index: int, half: str, kind: str | None = None, gauged: bool = False) -> dict[str, Saver]:
        """Savers of the slots of a block in half a layer. kind: norm, or what half says; gauged: judges calibration."""
        return {
            slot: self._saver(index, half, slot, gauged)
            for slot, spec in SLOTS.items()
            if spec.block == (kind or half) and (spec.block != "mlp" or slot in self._mlp_slots)
        }

    @property
    def _mlp_slots(self) -> set[str]:
        activation = self.family.activation
        return {"mlp_in", "hidden", *activation.slots} | ({"act"} if activation.gated else set())

    def _layer(self, index: int) -> list[Block]:
        family, layer, step = self.family, self.layers[index], self.step
        policy = AGAIN if self.is_again(index) else self.config.policy
        kinds = {
            "attention": (AttentionBlock, (family, self.config.attention, policy.compensate, policy.fused)),
            "mlp": (MlpBlock, (family, policy.compensate, policy.fused)),
        }
        blocks = []
        for half, (block, extra) in kinds.items():
            if (index, half) in self.stock:
                continue
            norm, module = parts_of(family, layer, half)
            fed = block(module, self.names[id(module)], self.savers(index, half), step, *extra)
            # that of the last layer is the last one
            savers = self.savers(index, half, "norm", gauged=family.post_norm and (index, half) == self.halves[-1])
            if family.post_norm:
                drop = module.get_submodule(family.dropout)
                blocks += [fed, PostNormBlock(norm, self.names[id(norm)], savers, step, policy.fused, drop)]
            else:
                blocks += [NormBlock(norm, self.names[id(norm)], savers, step, policy.fused), fed]
                blocks[-2].projections, fed.fed_by = fed.projections, norm
        if len(blocks) < 2 * len(kinds) or trust.why_not_layer(family, layer, ""):
            return blocks
        if family.post_norm:
            return [*blocks, EncoderLayerBlock(layer, self.names[id(layer)], step, tuple(blocks), family)]
        return [*blocks, LayerBlock(layer, self.names[id(layer)], step, tuple(blocks), first=index == 0)]

    def _saver(self, index: int, half: str, slot: str, gauged: bool = False) -> Saver:
        config, key = self.config, (index, half, slot)
        name = self._saver_name(index, slot, self.bits.get(key, 8))
        options = {
            "scale_rule": config.scale_rule,
            "outlier_ratio": config.layernorm_outlier_ratio if SLOTS[slot].block in RESIDUAL else 0.0,
            "softmax_outlier_ratio": config.softmax_outlier_ratio,
            "group": self.groups.get(key, GROUP),
        }
        if name == "derived" and self._crosses_layers(slot):
            return Derived(own=make_saver("quant8", **options))  # of one layer at a time, when it is run again
        return make_saver(name, **options, gauged=gauged, difference=slot == "layer_in" and self.is_difference(index))

    def _saver_name(self, index: int, slot: str, bits: int) -> str:
        again = self._is_exact(index)
        if slot == "layer_in" and again:
            first = self.kept[index] in CHAINED and not self.differences[index]
            return "quant8" if first else KEPT[self.kept[index]]
        name = self.config.saver_name(slot, bits, again)
        if name == "derived" and self._crosses_layers(slot):
            if again:
                return "exact"
            # before the first layer is no norm that keeps anything
            return f"quant{bits}" if index == 0 or self.is_again(index - 1) else name
        return name

    def _crosses_layers(self, slot: str) -> bool:
        """Whether a slot is derived, if it is, from a norm of the layer before."""
        return self.family.post_norm and slot == "attn_in"

    def _bits(self) -> dict[tuple, int]:
        """Bits of every quantized slot, keyed (layer, half, slot)."""
        config, sizes = self.config, {}
        for i, half in self.halves:
            if self.is_again(i):
                continue
            for slot, width in slot_widths(self.family, self.layers[i], half).items():
                fixed = config.slot_savers.get(slot, "derived") != "derived"
                if self._saver_name(i, slot, 2) == "quant2" and not fixed:
                    sizes[i, half, slot] = width
        if config.q_bit == "auto":

            def packed_bits(key, width):
                ratio = config.layernorm_outlier_ratio if SLOTS[key[-1]].block == "norm" else 0.0
                return ChannelQuant(width, config.scale_rule, ratio).bits(sizes[key])

            return allocate_bits(sizes, config.average_bits, packed_bits)
        return dict.fromkeys(sizes, config.q_bit)

    def _widen(self) -> dict[tuple, int]:
        """Channels of a group of those slots that pay for wider ones, keyed like self.bits, where the latter change.

        It is the same whatever slot_savers says, which changes the slots alone that it names.
        """
        config, groups = self.config, {}
        wider = {slot: b for slot, b in WIDER.get(config.q_bit, {}).items() if config.not_named(slot, 2) == "quant2"}

        def packed_bits(width: int, bits: int, group: int) -> float:
            return ChannelQuant(bits, config.scale_rule, 0.0, group).bits(width)

        for i in dict.fromkeys(i for i, _ in self.halves if not self.is_again(i)):
            halves = (slot_widths(self.family, self.layers[i], half) for j, half in self.halves if j == i)
            widths = {slot: n for found in halves for slot, n in found.items()}
            more, paying = widened(widths, wider, config.q_bit, packed_bits)
            self.bits |= {(i, SLOTS[slot].block, slot): bits for slot, bits in more.items()}
            groups |= {(i, SLOTS[slot].block, slot): group for slot, group in paying.items()}
        return groups
