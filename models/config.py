"""HycloraConfig, and what it means: which saver keeps which slot.

layer_type, q_bit and the ratios choose savers, and layer_type whether LoRA compensates and kernels are fused (Policy).
layers says which layers keep slots, and which their input alone. Nothing outside of this file decides by either.
PRESETS names the settings that most users should begin with.

Settings of OPEN that nobody gave have the values there, or with memory_budget are None until the plan has chosen them
(utils/planning/budget.py), so that what was given is told from what was not.
"""

import math
import re
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

BITS = (2, 3, 4, 8)
ATTENTION_CORES = ("flash", "eager")
SCALE_RULES = ("channel_group", "paper")
SWITCH = (True, False, "auto")
# Where packed bytes and embeddings wait, how kernels are launched, whether padding is computed: none of it changes the
# statistics, which are of real tokens.
LAUNCH = ("offload", "offload_embeddings", "cuda_graphs", "stream")
RATIOS = ("softmax_outlier_ratio", "layernorm_outlier_ratio")
NUMBERS = {"average_bits": Real, "iteration_threshold": Integral, **dict.fromkeys(RATIOS, Real)}
SAVERS = ("exact", "derived", "recompute", "sparse", *(f"quant{bits}" for bits in BITS))


@dataclass(frozen=True)
class Policy:
    """What a layer type does: compress the slots, compensate quantized frozen paths by exact LoRA, fuse the kernels."""

    compress: bool
    compensate: bool
    fused: bool


POLICIES = {
    "baseline": Policy(False, False, False),
    "intra": Policy(True, False, False),
    "intra_inter": Policy(True, True, False),
    "intra_inter_full_fuse": Policy(True, True, True),
}
# of a layer that is run again: its slots are kept, exactly, until its own backward is over
AGAIN = Policy(False, False, False)


@dataclass(frozen=True)
class Slot:
    """One buffered activation: its block, its saver when compressed alone (intra) and with compensation (inter).

    again: in a layer that keeps its input, while it is run again.
    """

    block: str
    intra: str
    inter: str
    again: str


SLOTS = {
    "norm_in": Slot("norm", "quant", "quant", "exact"),
    "attn_in": Slot("attention", "quant", "derived", "derived"),
    "q": Slot("attention", "quant", "quant", "exact"),
    "k": Slot("attention", "quant", "quant", "exact"),
    "v": Slot("attention", "quant", "quant", "exact"),
    "prob": Slot("attention", "sparse", "sparse", "exact"),
    "lse": Slot("attention", "recompute", "recompute", "exact"),
    "attn_out": Slot("attention", "quant", "recompute", "exact"),
    "mlp_in": Slot("mlp", "quant", "derived", "derived"),
    "gate": Slot("mlp", "quant", "quant", "exact"),
    "up": Slot("mlp", "quant", "quant", "exact"),
    "act": Slot("mlp", "quant", "recompute", "recompute"),
    "hidden": Slot("mlp", "quant", "recompute", "recompute"),
    "layer_in": Slot("layer", "exact", "exact", "exact"),
}
# What a layer keeps from its forward to its backward: slots (None), or its input, by this saver
KEPT = {"slots": None, "input": "exact", **{f"input{bits}": f"quant{bits}" for bits in BITS}}
# of which most are differences to the input of the layer before, and the first of a chain is in 8 bit
CHAINED = [f"input{bits}" for bits in BITS if bits < 8]
DERIVABLE = ("attn_in", "mlp_in")
RECOMPUTABLE = ("lse", "attn_out", "act", "hidden")
# what has to be near its exact value for a kept lse to fit: with q, k, v, attn_out at 4 bit probabilities do not add up
WITH_LSE = ("q", "k", "v", "attn_out")


# what a plan may choose; what cuda_graphs="auto" leaves open it chooses too
OPEN = {"q_bit": 4, "offload": False, "layers": "slots", "offload_embeddings": False}


@dataclass(frozen=True)
class Preset:
    """Settings that belong together: what they are for, in a sentence, and where they differ from the defaults."""

    meaning: str
    settings: dict[str, Any]


PRESETS = {
    "fastest": Preset(
        "Kept activations stay on the GPU, all layers replay as CUDA graphs.",
        {"cuda_graphs": True},
    ),
    "least_memory": Preset(
        "Kept activations wait in host memory; CUDA graphs, so nearly as fast.",
        {"offload": True, "cuda_graphs": True},
    ),
    "longest": Preset(
        "Host memory without CUDA graphs: least GPU memory a token, slower where rows are short.",
        {"offload": True, "cuda_graphs": False},
    ),
    "paper": Preset(
        "The published method: its quantizer, and a sparse attention map.",
        {"layer_type": "intra_inter", "scale_rule": "paper", "attention": "eager"},
    ),
    "default": Preset("4 bit on the device of the model: on one GPU as `fastest`, on a CPU without CUDA graphs.", {}),
}


def _option(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class HycloraConfig:
    """How the activations buffered for backward are kept.

    What is "auto" is on where it can be and off elsewhere, where True may be refused. None is not given: see OPEN.

    Raises ValueError, one sentence, for a value that cannot work.
    """

    layer_type: str = _option("intra_inter_full_fuse", f"Compression strategy: {', '.join(POLICIES)}.")
    q_bit: int | str | None = _option(
        None,
        "Bits of a quantized slot: 2 (k has 4 where larger groups of gate and up pay for it), 3, 4, 8, or auto (chosen "
        "a slot within average_bits).",
    )
    average_bits: float = _option(3.0, "With q_bit=auto: average bits per kept element, scales included.")
    iteration_threshold: int = _option(
        5, "Training forwards that calibrate the channel statistics before they freeze; more while rows are poor."
    )
    softmax_outlier_ratio: float = _option(0.05, "With attention=eager: share of each attention row that is kept.")
    layernorm_outlier_ratio: float = _option(
        0.005, "Share of the channels of norms and of layer inputs that is kept exactly."
    )
    attention: str = _option("flash", "flash (no attention map) or eager (keeps a sparse map, as the paper does).")
    scale_rule: str = _option("channel_group", "Quantizer: channel_group, or paper (the published rule).")
    offload: bool | None = _option(None, "Keep packed slots in pinned host memory; backward fetches them just in time.")
    offload_embeddings: bool | None = _option(
        None, "Keep frozen, untied input embeddings in host memory: rows are looked up there, and sent to the GPU."
    )
    cuda_graphs: bool | str = _option(
        "auto",
        "Replay the layers as CUDA graphs for batches of a kind (shape, document bounds) that comes again; auto: if "
        "all layers are on one GPU.",
    )
    stream: bool | str = _option(
        "auto",
        "Compute no padding: a padded batch goes through the layers as one row of its real tokens; auto: not with "
        "attention=eager.",
    )
    layers: str | None = _option(
        None,
        "What each layer keeps: slots, or its input alone (input: exact; input8: in 8 bit; input4: its difference to "
        "the one before in 4), from which backward runs it again; e.g. input4, or 8*slots,input4 (the first 8, and all "
        "others).",
    )
    slot_savers: dict = _option({}, 'Override single slots, e.g. {"gate": "exact", "up": "quant8"}.')

    memory_budget: int | str | None = _option(
        None,
        "GPU memory to stay within, all that the process takes of the card, e.g. 20GiB: q_bit, offload, cuda_graphs, "
        "layers and offload_embeddings are chosen so, where they are not given.",
    )
    largest_batch: str | None = _option(
        None,
        "With memory_budget: the largest micro-step, as rows x tokens, e.g. 4x2048; default: one row of all positions "
        "that the model has. The scripts look it up in their rows.",
    )

    @classmethod
    def preset(cls, name: str, **changes) -> "HycloraConfig":
        """The settings of PRESETS[name], with some changed: HycloraConfig.preset("fastest", q_bit=2)."""
        _one_of("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name].settings | changes)

    def __post_init__(self):
        if self.memory_budget is None:
            for name, default in OPEN.items():
                setattr(self, name, default if getattr(self, name) is None else getattr(self, name))
        if isinstance(self.q_bit, str) and self.q_bit.isdecimal():
            self.q_bit = int(self.q_bit)
        if isinstance(self.q_bit, float) and self.q_bit.is_integer():
            self.q_bit = int(self.q_bit)
        _one_of("layer_type", self.layer_type, tuple(POLICIES))
        _one_of("q_bit", self.q_bit, (*BITS, "auto", *self._not_given))
        _one_of("attention", self.attention, ATTENTION_CORES)
        _one_of("scale_rule", self.scale_rule, SCALE_RULES)
        _one_of("cuda_graphs", self.cuda_graphs, SWITCH)
        _one_of("stream", self.stream, SWITCH)
        for name in ("offload", "offload_embeddings"):
            _one_of(name, getattr(self, name), (True, False, *self._not_given))
        for name, kind in NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{name}={value!r} is not a {'whole ' if kind is Integral else ''}number")
        if not isinstance(self.slot_savers, dict):
            raise ValueError(f'slot_savers={self.slot_savers!r} is not a dict such as {{"gate": "exact"}}')
        for name in RATIOS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        self._check_budget()
        if self.iteration_threshold < 1:
            raise ValueError(f"iteration_threshold={self.iteration_threshold} calibrates nothing; use at least 1")
        if self.stream is True and self.attention == "eager":
            raise ValueError("stream=True needs attention=flash: a sparse map is kept of rows")
        if self.q_bit == "auto" and self.scale_rule == "paper":
            raise ValueError("q_bit=auto is not defined for scale_rule=paper; choose q_bit 2, 3, 4 or 8")
        if not 0 < self.average_bits < math.inf:
            raise ValueError(f"average_bits={self.average_bits} is not a number of bits")
        if self.q_bit != "auto" and self.average_bits != type(self).average_bits:
            raise ValueError(f"average_bits={self.average_bits} has no effect with q_bit={self.q_bit}: set auto")
        kinds = [kind for _, kind in self._runs()]
        if "layer_in" in self.slot_savers and any(KEPT[kind] for kind in kinds):
            raise ValueError(f"slot_savers['layer_in']: layers={self.layers!r} says already how inputs are kept")
        for slot, saver in self.slot_savers.items():
            _one_of("slot_savers slot", slot, tuple(SLOTS))
            _one_of(f"slot_savers[{slot!r}]", saver, SAVERS)
            self._check_override(slot, saver)

    @property
    def _not_given(self) -> tuple:
        """What an open setting may be as long as a plan has not chosen it."""
        return () if self.memory_budget is None else (None,)

    def _check_budget(self) -> None:
        from hyclora.utils.planning.units import parse_size, parse_tokens  # which is for what reads this file

        if self.memory_budget is None and self.largest_batch is not None:
            raise ValueError(f"largest_batch={self.largest_batch!r} has no effect without memory_budget: drop it")
        if self.memory_budget is not None:
            parse_size(self.memory_budget, "memory_budget")
        if self.largest_batch is not None:
            parse_tokens(self.largest_batch, "largest_batch")

    def _check_override(self, slot: str, saver: str) -> None:
        allowed = {"derived": DERIVABLE, "recompute": RECOMPUTABLE, "sparse": ("prob",)}.get(saver)
        if allowed is not None and slot not in allowed:
            raise ValueError(f"slot_savers[{slot!r}]={saver!r}: only {', '.join(allowed)} can be {saver}")
        if slot == "prob" and saver.startswith("quant"):
            raise ValueError(f"slot_savers['prob']={saver!r}: the attention map is kept sparse or exact")
        if slot == "lse" and (saver.startswith("quant") or saver == "exact" and self.attention == "eager"):
            raise ValueError(f"slot_savers['lse']={saver!r}: attention=flash keeps it exact, or recomputes it")
        if slot == "attn_out" and saver == "recompute" and self.saver_name("lse", 8) == "exact":
            raise ValueError("slot_savers['attn_out']='recompute': with a kept lse the attention is not run again")

    @property
    def policy(self) -> Policy:
        return POLICIES[self.layer_type]

    def _runs(self) -> list[tuple[int | None, str]]:
        """layers, read: how many layers, None for all that are left, keep what."""
        runs = []
        for part in str(OPEN["layers"] if self.layers is None else self.layers).split(","):
            found = re.fullmatch(r"\s*(?:(\d{1,9})\s*\*\s*)?(\w+)\s*", part)
            if not found or found[2] not in KEPT or found[1] and not int(found[1]):
                raise ValueError(
                    f"layers={self.layers!r}: {part.strip()!r} is not one of {', '.join(KEPT)}, with a number of "
                    "layers in front or without, as in 8*slots,input4"
                )
            runs.append((int(found[1]) if found[1] else None, found[2]))
        if sum(n is None for n, _ in runs) > 1:
            raise ValueError(f"layers={self.layers!r}: only one part can be without a number of layers")
        return runs

    def kept(self, n_layers: int) -> list[str]:
        """What each of n_layers layers keeps, a name of KEPT; ValueError if layers is of another number."""
        runs = self._runs()
        left = n_layers - sum(n or 0 for n, _ in runs)
        if left < 0 or left and all(n is not None for n, _ in runs):
            raise ValueError(
                f"layers={self.layers!r} is of {n_layers - left} layers, and the model has {n_layers}: give one part "
                "no number"
            )
        return [kind for n, kind in runs for _ in range(left if n is None else n)]

    def saver_name(self, slot: str, bits: int, again: bool = False) -> str:
        """The saver of a slot whose quantizer, if it has one, uses `bits`; again: of a layer that is run again."""
        return self.slot_savers[slot] if slot in self.slot_savers else self.not_named(slot, bits, again)

    def not_named(self, slot: str, bits: int, again: bool = False) -> str:
        """The saver of a slot that slot_savers does not name."""
        policy = self.policy
        if slot == "lse" and self.attention == "eager":
            return "recompute"
        if again:
            return SLOTS[slot].again
        if not policy.compress:
            return "exact"
        if slot in WITH_LSE and self.saver_name("lse", bits) == "exact":
            return "quant8"
        if slot == "attn_out" and self.attention == "eager":
            # prob v of a sparse map has lost mass; the flash core recomputes attn_out from normalised probabilities
            return f"quant{bits}"
        name = SLOTS[slot].inter if policy.compensate else SLOTS[slot].intra
        return f"quant{bits}" if name == "quant" else name

    def to_dict(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _one_of(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")
