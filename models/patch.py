"""apply_hyclora and remove_hyclora: bind blocks to the modules of a PEFT model, and take them off again."""

import logging
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hyclora.models import host_embedding, trust
from hyclora.models.blocks import AttentionBlock, Block
from hyclora.models.building import HALVES, Builder, parts_of
from hyclora.models.calibration import Calibration
from hyclora.models.config import HycloraConfig
from hyclora.models.families import FAMILIES
from hyclora.models.families.family import Family
from hyclora.models.foreign_head import ForeignHead, is_known, reads_labelled_positions
from hyclora.models.graphs.layer_graphs import LayerGraphs
from hyclora.models.graphs.recording import CudaRecorder
from hyclora.models.head import HeadBlock
from hyclora.models.layers import CheckpointBlock, WholeLayer
from hyclora.models.report import SHARDED, PatchReport, make_report
from hyclora.models.sharding import is_sharded
from hyclora.models.shifted import is_shifted_sparse
from hyclora.models.step_hook import StepHook
from hyclora.models.watch import Watch
from hyclora.operators.savers import Step
from hyclora.operators.store import CudaCopies, Store

logger = logging.getLogger("hyclora")
PATCH = "_hyclora_patch"
ZERO_INITS = (True, "gaussian", "eva")  # PEFT's names


@dataclass
class Patch:
    """All that apply_hyclora put on a model."""

    config: HycloraConfig
    step: Step
    decoder: nn.Module = field(repr=False)  # has it as an attribute
    calibration: Calibration
    starts_at_zero: bool = True  # whether an adapter's B is 0 until it is trained
    blocks: list[Block] = field(default_factory=list)
    checkpoints: list[CheckpointBlock] = field(default_factory=list)
    embedding: host_embedding.HostEmbedding | None = None  # stays while the patch is put aside
    hooks: tuple[torch.utils.hooks.RemovableHandle, ...] = ()
    store: Store | None = None
    graphs: LayerGraphs | None = None
    watch: Watch | None = None

    def __setstate__(self, state: dict) -> None:
        """A copy of the whole model: its blocks go to work, of which the copied modules do not know by themselves."""
        self.__dict__.update(state)
        for block in [*self.blocks, *self.checkpoints, self.embedding]:
            if block is not None and block.bound is not None:
                block.bound.block = block
        if self.embedding is not None:
            self.embedding.hold()

    def use(self, store: Store | None) -> None:
        """Send the packed slots of all blocks to a store; None: they stay put."""
        self.store = store
        for block in [*self.blocks, *self.checkpoints]:
            block.store = store

    def calibrate_again(self) -> None:
        """Have the forwards behind the last one calibrate, in the place of all before."""
        self.calibration.begin_again(self.step.index)
        if self.graphs is not None:
            self.graphs.clear()

    def add_graphs(self, recorder) -> None:
        """Have the layers replayed by a recorder where that can be done."""
        layers = [block for block in self.blocks if isinstance(block, WholeLayer)]
        self.graphs = LayerGraphs(recorder, self, layers)
        for layer in layers:
            layer.graphs = self.graphs


def apply_hyclora(model: PeftModel, config: HycloraConfig | None = None) -> PatchReport:
    """Patch a PEFT model's decoder layers, last norm and LM head in place, this instance only; says what was patched.

    Allocates nothing on the GPU. Training keeps the sum of the report's slot_bits, / 8, in bytes a token, x A^T and
    4 bytes a norm beside it, but for layers that keep their input alone; once, from calibration on, 12 bytes a channel
    of a quantized slot (20 with exact ones), and 12 more while it calibrates. offload_embeddings frees the embeddings'
    bytes.

    With config.memory_budget the settings that it leaves open are chosen first.

    Raises ValueError for a config that is none, a model that is no PEFT LoRA model, an unsupported family, module or
    setting, for a budget that nothing fits into, for config.layers of another number of layers or of one of which parts
    run stock code, for embeddings that cannot wait in host memory, and for a model that is patched already.
    """
    config = HycloraConfig() if config is None else config
    if not isinstance(config, HycloraConfig):
        raise ValueError(f"{config!r} is no HycloraConfig: give one, such as HycloraConfig.preset('default', q_bit=4)")
    decoder, family = _decoder(model)
    if patch_of(model) is not None:
        raise ValueError("this model is patched already; call remove_hyclora first")
    if not any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has no LoRA layers; wrap it with peft.get_peft_model(model, LoraConfig(...)) first")
    names = {id(module): name for name, module in model.named_modules()}
    on_device = config.offload_embeddings is not False and host_embedding.why_not(model, decoder, names)
    if on_device and config.offload_embeddings:
        raise ValueError(f"{host_embedding.SETTING}: {on_device}; or drop that setting")
    config = replace(config, offload_embeddings=False) if on_device else config
    plan = _plan(model, config, list(attrgetter(family.layers)(decoder)))
    config = config if plan is None else plan.config
    step = Step(config.iteration_threshold)
    _check(config, family, decoder.config._attn_implementation)
    layers = list(attrgetter(family.layers)(decoder))
    stock = _why_not(family, layers, names)
    if len(stock) == len(HALVES) * len(layers):
        raise ValueError(f"{stock[0, 'attention']}; so no layer of this model can be patched")
    builder = Builder(config, family, layers, stock, names, step)
    blocks = builder.blocks()
    checkpoints = [
        CheckpointBlock(
            m, names[id(m)], builder.savers(i, "layer"), step, builder.is_again(i), leads=builder.is_difference(i + 1)
        )
        for i, m in enumerate(layers)
    ]
    _keep_inputs(config, family, blocks, checkpoints, stock)
    head, stock_head = _head(model, family, names, step, blocks)
    inside = blocks if head is None else [*blocks, head]
    norm = trust.acting(getattr(decoder, family.final_norm)) if family.final_norm else None
    stock_norm = None if norm is None else trust.why_not_norm(family, norm, names[id(norm)])
    # a layer that runs as a whole has one reason
    halves = {half: reason for half, reason in stock.items() if not family.post_norm or half[1] == "mlp"}
    reasons = [*halves.values(), *([stock_norm] if stock_norm else []), *stock_head]
    head_name = None if head is None else f"{head.name}.{family.head}"
    lookup, embedding = decoder.get_input_embeddings(), None
    if config.offload_embeddings:
        embedding = host_embedding.HostEmbedding(lookup, names[id(lookup)], step, _base(model))
    not_patched = _others(model, family, decoder, [*layers, *([lookup] if embedding else [])]) + reasons
    no_graphs = _why_no_graphs(config, layers, blocks) if config.cuda_graphs == "auto" else None
    known = is_known(family, _base(model), decoder)
    no_stream = f"it is not known what {type(_base(model)).__name__} reads" if not (known or family.causal) else None
    # none where all of them run stock code
    attention = [block for block in blocks if isinstance(block, AttentionBlock)]
    drops = 0.0 if _elsewhere(layers) else max((block.dropout(block.module) for block in attention), default=0.0)
    widths, last_norm = builder.widths(), norm is not None
    report = make_report(
        config, layers, widths, inside, checkpoints, head_name, not_patched, no_graphs, no_stream, last_norm, drops
    )  # fmt: skip
    report.plan = plan
    blocks += [] if stock_norm or norm is None else [builder.final_norm(norm, adapted(blocks)[:1])]
    blocks += [] if head is None else [head, head.linear]
    if known:
        blocks.append(ForeignHead(_base(model), names[id(_base(model))], step, family, decoder))
    savers = {f"slot {slot} of {b.name}": saver for b in [*blocks, *checkpoints] for slot, saver in b.savers.items()}
    calibration = Calibration(step, savers)
    patch = Patch(config, step, decoder, calibration, _starts_at_zero(model), blocks, checkpoints, embedding)
    if config.offload:
        patch.use(Store(CudaCopies(_gpu(layers, "offload=True"))))
    graphs = config.cuda_graphs and not no_graphs
    recorder = CudaRecorder(_gpu(layers, "cuda_graphs=True")) if graphs else None
    if embedding is not None:  # first, as the host may have no room
        embedding.bind()
        report.embeddings = f"{embedding.name}, {embedding.nbytes / 2**20:.1f} MiB"
    for block in blocks:
        block.bind()
    patch.watch = Watch(family, decoder, blocks, checkpoints, report.not_patched)
    if recorder is not None:
        patch.add_graphs(recorder)
    report.kernel = attention[0].kernel() if attention else None
    hook = StepHook(patch, attention, adapted(blocks)[:1])
    hook.load = None if plan is None else plan.load
    patch.hooks = hook.register(decoder)
    setattr(decoder, PATCH, patch)
    if stock:
        parts = f"{len(stock)} of {len(HALVES) * len(layers)} halves of layers (a norm and what it feeds)"
        logger.warning(f"HyC-LoRA: {parts} run stock code. The first is {reasons[0]}")
    return report


def remove_hyclora(model: PeftModel) -> None:
    """Take every block off again: the model is stock, bit for bit, and the statistics' memory is free.

    Embeddings that waited in host memory are where the model is. What has wrapped a patched forward since stays, around
    the stock one. The base model that merge_and_unload or unload leaves is as good. ValueError if it was not patched.
    """
    patch = find_patch(model)
    _take_off(patch)
    if patch.embedding is not None:
        patch.embedding.unbind()
    if patch.graphs is not None:
        patch.graphs.clear()


@contextmanager
def put_aside(patch: Patch):
    """The model is stock inside, and may get other patches for a while; afterwards it has this one as it was.

    Recordings and statistics stay, and so does the memory that they take; embeddings stay in host memory.
    """
    decoder = patch.decoder
    # where ours are among others' hooks decides what these may change
    hooks = {name: dict(value) for name, value in vars(decoder).items() if "_hooks" in name and value}
    _take_off(patch)
    try:
        yield
    finally:
        for block in patch.blocks:
            block.bind()  # a checkpoint's is bound by the next forward
        for name, value in hooks.items():
            getattr(decoder, name).clear()
            getattr(decoder, name).update(value)
        setattr(decoder, PATCH, patch)
        patch.step.patched = True


def _take_off(patch: Patch) -> None:
    """Have the modules run stock code."""
    for block in [*patch.blocks, *patch.checkpoints]:
        block.unbind()
    for hook in patch.hooks:
        hook.remove()
    delattr(patch.decoder, PATCH)
    patch.step.patched = False


def find_patch(model: nn.Module) -> Patch:
    """The patch on a model; ValueError if there is none."""
    patch = patch_of(model)
    if patch is None:
        raise ValueError("this model is not patched; call apply_hyclora first")
    return patch


def patch_of(model: nn.Module) -> Patch | None:
    """The patch on a model or on one inside it, None without any; ValueError if there are several."""
    patches = patches_in(model)
    if len(patches) > 1:
        raise ValueError(f"there are {len(patches)} patched models in this one; give one of them")
    return patches[0] if patches else None


def patches_in(model: nn.Module) -> list[Patch]:
    """The patches on a model and on all inside it."""
    return [module.__dict__[PATCH] for module in model.modules() if PATCH in module.__dict__]


def _plan(model: PeftModel, config: HycloraConfig, layers: list[nn.Module]):
    """What config.memory_budget chooses, None without one."""
    if config.memory_budget is None:
        return None
    from hyclora.utils.planning.budget import choose_for  # which counts by what is in this folder

    _gpu(layers, "memory_budget")
    return choose_for(model, config)


def _keep_inputs(
    config: HycloraConfig, family: Family, blocks: list[Block], checkpoints: list[CheckpointBlock], stock: dict
) -> None:
    """Have the layers that config.layers names keep their inputs; ValueError where one runs in no block as a whole."""
    whole = {block.module: block for block in blocks if isinstance(block, WholeLayer)}
    for i, checkpoint in enumerate(checkpoints):
        checkpoint.layer = whole.get(checkpoint.module)
        if checkpoint.layer is not None:
            checkpoint.layer.checkpoint = checkpoint
        elif checkpoint.own:
            reasons = [why for (index, _), why in stock.items() if index == i]
            reason = reasons[0] if reasons else trust.why_not_layer(family, checkpoint.module, checkpoint.name)
            raise ValueError(
                f"layers={config.layers!r}: {checkpoint.name} cannot keep its input alone, as it is not patched as a "
                f"whole ({reason}); have it keep slots"
            )


def _starts_at_zero(model: nn.Module) -> bool:
    """Whether all adapters began with B = 0: PiSSA, LoftQ and others do not."""
    configs = getattr(model, "peft_config", {}).values()
    return all(getattr(adapter, "init_lora_weights", None) in ZERO_INITS for adapter in configs)


def _base(model: nn.Module) -> nn.Module:
    """The transformers model inside."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _gpu(layers: list[nn.Module], option: str) -> torch.device:
    """The one GPU that holds the decoder layers; ValueError naming the option that needs it if they are elsewhere."""
    if elsewhere := _elsewhere(layers):
        raise ValueError(f"{option} needs all layers on one GPU; {elsewhere}: move them there, or drop {option}")
    return next(layers[0].parameters()).device


def _elsewhere(layers: list[nn.Module]) -> str | None:
    """Where the decoder layers are, if that is not one GPU."""
    devices = list(dict.fromkeys(p.device for layer in layers for p in layer.parameters()))
    if len(devices) == 1 and devices[0].type == "cuda":
        return None
    return f"the layers are on {', '.join(map(str, devices))}"


def _check(config: HycloraConfig, family: Family, attention: str) -> None:
    """ValueError for settings that the family, or the attention function of this name, has no use for."""
    if config.attention == "eager" and is_shifted_sparse(ALL_ATTENTION_FUNCTIONS.get(attention)):
        raise ValueError("attention=eager keeps the map of all tokens, not of shifted groups; use attention=flash")
    missing = config.slot_savers.keys() & {"gate", "act"} if not family.activation.gated else ()
    if missing:
        raise ValueError(f"slot_savers[{min(missing)!r}]: an MLP without a gate has no such slot; leave it out")


def _why_no_graphs(config: HycloraConfig, layers: list[nn.Module], blocks: list[Block]) -> str | None:
    """Why the layers are not replayed by themselves, as far as it shows before the first step."""
    if any(map(is_sharded, layers)):
        return SHARDED
    if elsewhere := _elsewhere(layers):
        return elsewhere
    if config.attention == "eager":
        return "attention=eager has not been recorded on a GPU yet; cuda_graphs=True tries it"
    if sum(isinstance(block, WholeLayer) for block in blocks) < len(layers):
        return "parts of layers run stock code"
    return None


def _decoder(model: nn.Module) -> tuple[nn.Module, Family]:
    """The module that holds the decoder layers, and the model's family."""
    base = _base(model)
    model_type = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not supported; give a PeftModel or a model of transformers")
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    decoder, family = getattr(base, base.base_model_prefix, base), FAMILIES[model_type]
    if not _has(decoder, family.layers):
        kind = family.classes("Model")[0].rpartition(".")[2]
        raise ValueError(f"{base.base_model_prefix}: {type(decoder).__name__} is not supported, only {kind}")
    return decoder, family


def _has(module: nn.Module, path: str) -> bool:
    """Whether there is something in a module at a path."""
    try:
        return attrgetter(path)(module) is not None if path else True
    except AttributeError:
        return False


def _why_not(family: Family, layers: list[nn.Module], names) -> dict[tuple[int, str], str]:
    """Why halves of layers stay stock, keyed (layer, half)."""
    parts = [name for half in HALVES.values() for name in map(partial(getattr, family), half)]
    foreign = {i: layer for i, layer in enumerate(layers) if not all(_has(layer, name) for name in parts)}
    reasons = {
        (i, half): trust.why_not_layer(family, layer, names[id(layer)])
        or f"{names[id(layer)]}: a module in it was replaced by another one"
        for i, layer in foreign.items()
        for half in HALVES
    }
    known = ((i, layer) for i, layer in enumerate(layers) if i not in foreign)
    halves = {(i, half): parts_of(family, layer, half) for i, layer in known for half in HALVES}
    places = Counter(id(module) for modules in halves.values() for module in modules)
    for (i, half), (norm, module) in halves.items():
        shared = next((names[id(m)] for m in (norm, module) if places[id(m)] > 1), None)
        reason = f"{shared}: several layers share it" if shared else None
        if reason := reason or trust.why_not_half(family, half, norm, names[id(norm)], module, names[id(module)]):
            reasons[i, half] = reason
    if family.post_norm:  # such a layer runs as a whole
        for i, _ in list(reasons):
            first = next(reasons[i, half] for half in HALVES if (i, half) in reasons)
            reasons |= {(i, half): first for half in HALVES}
    return reasons


def adapted(blocks: list[Block]) -> list:
    """Projections with an adapter. PEFT disables and merges all together: each tells it of the model as a whole."""
    return list({id(p): p for block in blocks for p in block.projections if p.has_adapter}.values())


def _head(model, family, names, step, blocks) -> tuple[HeadBlock | None, list[str]]:
    """The causal LM's block, not bound yet; or none, and what to report: a head that stays stock with the reason."""
    base = _base(model)
    if family.head is None or not hasattr(base, family.head):
        return None, []
    name = names[id(base)]
    if reads_labelled_positions(base):
        return None, [f"{name}.{family.head}: TRL's own forward scores the tokens that have a label, in pieces"]
    if reason := trust.why_not_head(family, base, name):
        return None, [reason]
    return HeadBlock(base, name, step, family, adapted(blocks)), []


def _others(model: nn.Module, family: Family, decoder: nn.Module, layers: list[nn.Module]) -> list[str]:
    """Names of the modules without children that no block is for."""
    known = {id(m) for layer in layers for m in layer.modules()}
    elsewhere = [(_base(model), family.head), (decoder, family.final_norm)]
    known |= {id(m) for owner, name in elsewhere if name for m in getattr(owner, name, nn.Module()).modules()}
    return [n for n, m in model.named_modules() if not list(m.children()) and id(m) not in known]
