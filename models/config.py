"""HycloraConfig, and what it means: which saver keeps which slot.

layer_type, q_bit and the ratios choose savers, and layer_type whether LoRA compensates and kernels are fused (Policy).
Nothing outside of this file decides by layer_type. PRESETS names the settings that most users should begin with.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

BITS = (2, 3, 4, 8)
ATTENTION_CORES = ("flash", "eager")
SCALE_RULES = ("channel_group", "paper")
SWITCH = (True, False, "auto")
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


@dataclass(frozen=True)
class Slot:
    """One buffered activation: its block, its saver when compressed alone (intra) and with compensation (inter)."""

    block: str
    intra: str
    inter: str


SLOTS = {
    "norm_in": Slot("norm", "quant", "quant"),
    "attn_in": Slot("attention", "quant", "derived"),
    "q": Slot("attention", "quant", "quant"),
    "k": Slot("attention", "quant", "quant"),
    "v": Slot("attention", "quant", "quant"),
    "prob": Slot("attention", "sparse", "sparse"),
    "lse": Slot("attention", "recompute", "recompute"),
    "attn_out": Slot("attention", "quant", "recompute"),
    "mlp_in": Slot("mlp", "quant", "derived"),
    "gate": Slot("mlp", "quant", "quant"),
    "up": Slot("mlp", "quant", "quant"),
    "act": Slot("mlp", "quant", "recompute"),
    "hidden": Slot("mlp", "quant", "recompute"),
    "layer_in": Slot("layer", "exact", "exact"),
}
DERIVABLE = ("attn_in", "mlp_in")
RECOMPUTABLE = ("lse", "attn_out", "act", "hidden")
# what has to be near its exact value for a kept lse to fit: with q, k, v, attn_out at 4 bit probabilities do not add up
WITH_LSE = ("q", "k", "v", "attn_out")


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

    What is "auto" is on where it can be and off elsewhere, where True may be refused.

    Raises ValueError, one sentence, for a value that cannot work.
    """

    layer_type: str = _option("intra_inter_full_fuse", f"Compression strategy: {', '.join(POLICIES)}.")
    q_bit: int | str = _option(4, "Bits of a quantized slot: 2, 3, 4, 8, or auto (chosen a slot within average_bits).")
    average_bits: float = _option(3.0, "With q_bit=auto: average bits per kept element, scales included.")
    iteration_threshold: int = _option(
        5, "Training forwards that calibrate the channel statistics before they freeze; more while rows are poor."
    )
    softmax_outlier_ratio: float = _option(0.05, "With attention=eager: share of each attention row that is kept.")
    layernorm_outlier_ratio: float = _option(0.005, "Share of the norm's channels that is kept exactly.")
    attention: str = _option("flash", "flash (no attention map) or eager (keeps a sparse map, as the paper does).")
    scale_rule: str = _option("channel_group", "Quantizer: channel_group, or paper (the published rule).")
    offload: bool = _option(False, "Keep packed slots in pinned host memory; backward fetches them just in time.")
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
    slot_savers: dict = _option({}, 'Override single slots, e.g. {"gate": "exact", "up": "quant8"}.')

    @classmethod
    def preset(cls, name: str, **changes) -> "HycloraConfig":
        """The settings of PRESETS[name], with some changed: HycloraConfig.preset("fastest", q_bit=2)."""
        _one_of("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name].settings | changes)

    def __post_init__(self):
        if isinstance(self.q_bit, str) and self.q_bit.isdecimal():
            self.q_bit = int(self.q_bit)
        if isinstance(self.q_bit, float) and self.q_bit.is_integer():
            self.q_bit = int(self.q_bit)
        _one_of("layer_type", self.layer_type, tuple(POLICIES))
        _one_of("q_bit", self.q_bit, (*BITS, "auto"))
        _one_of("attention", self.attention, ATTENTION_CORES)
        _one_of("scale_rule", self.scale_rule, SCALE_RULES)
        _one_of("cuda_graphs", self.cuda_graphs, SWITCH)
        _one_of("stream", self.stream, SWITCH)
        for name in ("softmax_outlier_ratio", "layernorm_outlier_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        if self.iteration_threshold < 1:
            raise ValueError(f"iteration_threshold={self.iteration_threshold} calibrates nothing; use at least 1")
        if self.stream is True and self.attention == "eager":
            raise ValueError("stream=True needs attention=flash: a sparse map is kept of rows")
        if self.q_bit == "auto" and self.scale_rule == "paper":
            raise ValueError("q_bit=auto is not defined for scale_rule=paper; choose q_bit 2, 3, 4 or 8")
        if not 0 < self.average_bits < math.inf:
            raise ValueError(f"average_bits={self.average_bits} is not a number of bits")
        for slot, saver in self.slot_savers.items():
            _one_of("slot_savers slot", slot, tuple(SLOTS))
            _one_of(f"slot_savers[{slot!r}]", saver, SAVERS)
            self._check_override(slot, saver)

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

    def saver_name(self, slot: str, bits: int) -> str:
        """The saver of a slot whose quantizer, if it has one, uses `bits`."""
        if slot in self.slot_savers:
            return self.slot_savers[slot]
        policy = self.policy
        if slot == "lse" and self.attention == "eager":
            return "recompute"
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
