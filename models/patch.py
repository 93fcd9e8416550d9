"""apply_hyclora and remove_hyclora: bind blocks to the modules of a PEFT model, and take them off again."""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn

from hyclora.models.bits import allocate_bits
from hyclora.models.blocks import AttentionBlock, Block, MlpBlock, NormBlock
from hyclora.models.calibration import Calibration
from hyclora.models.config import SLOTS, HycloraConfig
from hyclora.models.families import FAMILIES
from hyclora.models.families.family import Family
from hyclora.models.graphs.layer_graphs import LayerGraphs
from hyclora.models.graphs.recording import CudaRecorder
from hyclora.models.head import HeadBlock
from hyclora.models.layers import CheckpointBlock, LayerBlock
from hyclora.models.report import PatchReport, make_report
from hyclora.models.step_hook import StepHook
from hyclora.operators.savers import ChannelQuant, Saver, Step, make_saver
from hyclora.operators.store import CudaCopies, Store

PATCH = "_hyclora_patch"


@dataclass
class Patch:
    """All that apply_hyclora put on a model."""

    config: HycloraConfig
    step: Step
    calibration: Calibration
    blocks: list[Block] = field(default_factory=list)
    checkpoints: list[CheckpointBlock] = field(default_factory=list)
    hook: torch.utils.hooks.RemovableHandle | None = None
    store: Store | None = None
    graphs: LayerGraphs | None = None

    def use(self, store: Store | None) -> None:
        """Send the packed slots of all blocks to a store; None: they stay put."""
        self.store = store
        for block in [*self.blocks, *self.checkpoints]:
            block.store = store

    def add_graphs(self, recorder) -> None:
        """Have the layers replayed by a recorder where that can be done."""
        layers = [block for block in self.blocks if isinstance(block, LayerBlock)]
        self.graphs = LayerGraphs(recorder, self, layers, self.blocks)
        for layer in layers:
            layer.graphs = self.graphs


def apply_hyclora(model: PeftModel, config: HycloraConfig | None = None) -> PatchReport:
    """Patch a PEFT model's decoder layers, last norm and LM head in place, this instance only; says what was patched.

    Allocates nothing on the GPU. Training keeps the sum of the report's slot_bits, / 8, in bytes a token, x A^T and
    4 bytes a norm beside it; once, from calibration on, 24 bytes a channel of a quantized slot (32 with exact ones).

    Raises ValueError for a model that is no PEFT LoRA model, an unsupported family, module or setting, and for a model
    that is patched already.
    """
    config = config or HycloraConfig()
    if getattr(model, PATCH, None) is not None:
        raise ValueError("this model is patched already; call remove_hyclora first")
    decoder, family = _decoder(model)
    if not any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has no LoRA layers; wrap it with peft.get_peft_model(model, LoraConfig(...)) first")
    step = Step(config.iteration_threshold)
    names = {id(module): name for name, module in model.named_modules()}
    layers = list(getattr(decoder, family.layers))
    bits = _bits(config, family, layers)
    blocks = [b for i, layer in enumerate(layers) for b in _blocks(config, family, i, layer, names, bits, step)]
    head, stock_head = _head(model, family, names, step, blocks)
    inside = blocks if head is None else [*blocks, head]
    not_patched = _others(model, family, decoder, layers) + stock_head
    head_name = None if head is None else f"{head.name}.{family.head}"
    report = make_report(config, layers, _slot_widths(family, layers[0]), inside, head_name, not_patched)
    blocks.append(_final_norm(config, getattr(decoder, family.final_norm), names, step, blocks))
    blocks += [] if head is None else [head]
    savers = [_savers(config, "layer", dict.fromkeys(SLOTS, 8)) for _ in layers]
    checkpoints = [CheckpointBlock(m, names[id(m)], s, step) for m, s in zip(layers, savers, strict=True)]
    calibration = Calibration(step, [s for block in [*blocks, *checkpoints] for s in block.savers.values()])
    patch = Patch(config, step, calibration, blocks, checkpoints)
    if config.offload:
        patch.use(Store(CudaCopies(_gpu(layers, "offload"))))
    recorder = CudaRecorder(_gpu(layers, "cuda_graphs")) if config.cuda_graphs else None
    for block in blocks:
        block.bind()
    if recorder is not None:
        patch.add_graphs(recorder)
    attention = [block for block in blocks if isinstance(block, AttentionBlock)]
    hook = StepHook(patch, attention, _adapted(blocks))
    patch.hook = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    object.__setattr__(model, PATCH, patch)
    return report


def remove_hyclora(model: PeftModel) -> None:
    """Take every block off again: the model is stock, bit for bit, and the statistics' memory is free.

    ValueError if it was not patched, or if something else has replaced a patched forward since.
    """
    patch = find_patch(model)
    if wrapped := [block.name for block in patch.blocks if block.wrapped]:
        raise ValueError(f"{wrapped[0]}: its forward was replaced after apply_hyclora; undo that first")
    for block in [*patch.blocks, *patch.checkpoints]:
        block.unbind()
    patch.hook.remove()
    if patch.graphs is not None:
        patch.graphs.clear()
    object.__setattr__(model, PATCH, None)


def find_patch(model: PeftModel) -> Patch:
    """The patch on a model; ValueError if there is none."""
    patch = getattr(model, PATCH, None)
    if patch is None:
        raise ValueError("this model is not patched; call apply_hyclora first")
    return patch


def _base(model: nn.Module) -> nn.Module:
    """The transformers model inside."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _gpu(layers: list[nn.Module], option: str) -> torch.device:
    """The one GPU that holds the decoder layers; ValueError naming the option that needs it if they are elsewhere."""
    devices = list(dict.fromkeys(str(p.device) for layer in layers for p in layer.parameters()))
    if len(devices) != 1 or not devices[0].startswith("cuda"):
        raise ValueError(f"{option}=True needs all layers on one GPU; this model is on {', '.join(devices)}")
    return torch.device(devices[0])


def _decoder(model: nn.Module) -> tuple[nn.Module, Family]:
    """The module that holds the decoder layers, and the model's family."""
    base = _base(model)
    model_type = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return getattr(base, base.base_model_prefix, base), FAMILIES[model_type]


def _layer_modules(family: Family, layer: nn.Module) -> dict[tuple[str, str], nn.Module]:
    """(block kind, attribute) -> module, in the order of the forward."""
    return {
        ("norm", family.attention_norm): getattr(layer, family.attention_norm),
        ("attention", family.attention): getattr(layer, family.attention),
        ("norm", family.mlp_norm): getattr(layer, family.mlp_norm),
        ("mlp", family.mlp): getattr(layer, family.mlp),
    }


def _bits(config: HycloraConfig, family: Family, layers: list[nn.Module]) -> dict[tuple, int]:
    """Bits of every quantized slot, keyed (layer, attribute, slot)."""
    sizes = {}
    for i, layer in enumerate(layers):
        widths = _slot_widths(family, layer)
        for kind, attribute in _layer_modules(family, layer):
            for slot, spec in SLOTS.items():
                if spec.block == kind and config.saver_name(slot, 2) == "quant2" and slot not in config.slot_savers:
                    sizes[i, attribute, slot] = widths[slot]
    if config.q_bit == "auto":

        def packed_bits(key, width):
            ratio = config.layernorm_outlier_ratio if SLOTS[key[-1]].block == "norm" else 0.0
            return ChannelQuant(width, config.scale_rule, ratio).bits(sizes[key])

        return allocate_bits(sizes, config.average_bits, packed_bits)
    return dict.fromkeys(sizes, config.q_bit)


def _slot_widths(family: Family, layer: nn.Module) -> dict[str, int]:
    """Elements a token of each slot of one layer."""
    attention, mlp = getattr(layer, family.attention), getattr(layer, family.mlp)
    q, k, v = (getattr(attention, name).out_features for name in family.qkv)
    gate, up = (getattr(mlp, name).out_features for name in family.gate_up)
    hidden = getattr(attention, family.qkv[0]).in_features
    return {
        "norm_in": hidden, "attn_in": hidden, "mlp_in": hidden, "q": q, "k": k, "v": v, "attn_out": q,
        "lse": 2 * q // attention.head_dim,  # in fp32
        "gate": gate, "up": up, "act": gate, "hidden": gate,
    }  # fmt: skip


def _blocks(config, family, index, layer, names, bits, step) -> list[Block]:
    """The blocks of one layer and of what is in it, not bound yet."""
    compensate = config.policy.compensate
    extra = {
        "norm": (config.policy.fused,),
        "attention": (family, config.attention, compensate, config.policy.fused),
        "mlp": (family, compensate, config.policy.fused),
    }
    kinds = {"norm": NormBlock, "attention": AttentionBlock, "mlp": MlpBlock}
    blocks = []
    for (kind, attribute), module in _layer_modules(family, layer).items():
        savers = _savers(config, kind, {slot: bits.get((index, attribute, slot), 8) for slot in SLOTS})
        blocks.append(kinds[kind](module, names[id(module)], savers, step, *extra[kind]))
    for norm, fed in zip(blocks[::2], blocks[1::2], strict=True):
        norm.projections = fed.projections
    return [*blocks, LayerBlock(layer, names[id(layer)], step, tuple(blocks), first=index == 0)]


def _final_norm(config, module: nn.Module, names, step, blocks) -> NormBlock:
    """The norm before the head, not bound yet. It is one of many, so 8 bit cost next to nothing.

    All that layers do shows here, and it runs by itself where they are replayed: so calibration is judged by it.
    """
    savers = _savers(config, "norm", dict.fromkeys(SLOTS, 8), gauged=True)
    norm = NormBlock(module, names[id(module)], savers, step, config.policy.fused)
    norm.projections = _adapted(blocks)
    return norm


def _adapted(blocks: list[Block]) -> list:
    """A projection that tells when the model as a whole runs stock code: PEFT disables and merges all together."""
    return [p for block in blocks for p in block.projections if p.has_adapter][:1]


def _head(model, family, names, step, blocks) -> tuple[HeadBlock | None, list[str]]:
    """The causal LM's block, not bound yet; or none, and what to report: a head that stays stock with the reason."""
    base = _base(model)
    if not hasattr(base, family.head):
        return None, []
    try:
        return HeadBlock(base, names[id(base)], step, family.head, _adapted(blocks)), []
    except ValueError as reason:
        return None, [str(reason)]


def _savers(config: HycloraConfig, kind: str, bits: dict[str, int], gauged: bool = False) -> dict[str, Saver]:
    return {
        slot: make_saver(
            config.saver_name(slot, bits[slot]),
            scale_rule=config.scale_rule,
            outlier_ratio=config.layernorm_outlier_ratio if kind == "norm" else 0.0,
            softmax_outlier_ratio=config.softmax_outlier_ratio,
            gauged=gauged,
        )
        for slot, spec in SLOTS.items()
        if spec.block == kind
    }


def _others(model: nn.Module, family: Family, decoder: nn.Module, layers: list[nn.Module]) -> list[str]:
    """Names of the modules without children that no block is for."""
    known = {id(m) for layer in layers for m in layer.modules()}
    known |= {id(m) for m in getattr(_base(model), family.head, nn.Module()).modules()}
    known.add(id(getattr(decoder, family.final_norm)))
    return [n for n, m in model.named_modules() if not list(m.children()) and id(m) not in known]
