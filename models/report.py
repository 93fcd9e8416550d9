"""What is said about a patched model: what apply_hyclora did, and what its first training step finds."""

import logging
import os
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from hyclora.models.config import KEPT, HycloraConfig
from hyclora.models.sharding import local

logger = logging.getLogger("hyclora")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
SHARDED = "fully_shard gathers the weights of a layer when that runs, so layers run one by one"


@dataclass
class PatchReport:
    """What apply_hyclora did; str() is the text for a person.

    average_bits: of an element kept; slot_bits: of a token, by slot, summed over layers (the attention map, whose size
    depends on the sequence, is left out of both). head: name of the LM head whose loss is computed by chunks, or None;
    not_patched then says why. single_kernels: blocks that layer_type would fuse and that fused kernels do not take.
    no_graphs, no_stream: why cuda_graphs="auto" and the stream are off, None if they are not. last_norm: whether
    the model has a norm after its layers. drops: of the attention, on a GPU, where that is in the way of both.
    kept: how many layers keep what, by names of config.KEPT; of those that keep their input that alone is counted.
    plan: what memory_budget chose, with predicted memory, None without one. embeddings: name and size of those in host
    memory, None without any. kernel: whose attention kernels long rows run, None for torch's.
    """

    config: HycloraConfig
    n_layers: int
    average_bits: float
    slot_bits: dict[str, float]
    savers: dict[str, list[str]]
    adapters: dict[str, int]
    head: str | None
    single_kernels: list[str]
    not_patched: list[str]
    no_graphs: str | None = None
    no_stream: str | None = None
    last_norm: bool = True
    drops: float = 0.0
    kept: dict[str, int] = field(default_factory=dict)
    plan: object | None = None
    embeddings: str | None = None
    kernel: str | None = None

    def __str__(self) -> str:
        parts = "2 norms, attention, MLP each" + ("; and the last norm" if self.last_norm else "")
        lines = [f"HyC-LoRA ({self.config.layer_type}) patched {self.n_layers} layers: {parts}"]
        if self.plan is not None:
            lines.append(f"  memory_budget: {self.plan}")
        lines.append(f"  {self.average_bits:.2f} bits an element kept, scales and exact channels included")
        if again := sum(n for kind, n in self.kept.items() if KEPT[kind]):
            lines.append(f"  {again} of {self.n_layers} layers keep their input alone, and backward runs them again")
        for slot, names in self.savers.items():
            kinds = ", ".join(f"{name} x{names.count(name)}" for name in dict.fromkeys(names))
            lines.append(f"  {slot:<9}{kinds if len(set(names)) > 1 else names[0]}")
        if self.head is not None:
            lines.append(f"  {self.head}: chunked cross-entropy, logits only for whoever looks at them")
        adapted = ", ".join(f"{name} x{count}" for name, count in self.adapters.items())
        lines.append(f"  LoRA on  {adapted}")
        if self.single_kernels:
            names = ", ".join(self.single_kernels)
            lines.append(f"  fused kernels do not take: {names} (head size, savers or biases)")
        if self.kernel is not None:
            lines.append(f"  attention: {self.kernel}")
        if self.config.offload:
            lines.append("  packed slots wait in pinned host memory")
        if self.embeddings is not None:
            lines.append(f"  embeddings wait in host memory: {self.embeddings}")
        graphs = self.config.cuda_graphs and not self.no_graphs
        if graphs and not self.drops:
            lines.append("  all layers are replayed as CUDA graphs where a kind of batch comes again")
        if self.no_graphs:
            lines.append(f"  cuda_graphs: off, {self.no_graphs}")
        if self.no_stream and self.config.stream:
            lines.append(f"  stream: off, {self.no_stream}")
        if self.drops and self.config.attention == "flash" and (graphs or self.config.stream):
            lines.append(
                f"  attention dropout is {self.drops}, which the kernel for rows of many lengths cannot do: padding is "
                "computed and layers run one by one; at 0 in the model's configuration rows are streamed and replayed"
            )
        told = [os.environ.get(name, "") for name in ALLOCATOR]
        if (graphs or self.plan) and not any("expandable_segments:True" in text for text in told):
            lines.append(f"  less GPU memory is held with {ALLOCATOR[0]}=expandable_segments:True in the environment")
        lines.append(f"  not patched: {', '.join(self.not_patched)}")
        return "\n".join(lines)


def make_report(
    config: HycloraConfig,
    layers: list,
    widths: dict[str, int],
    blocks: list,
    checkpoints: list,
    head: str | None,
    not_patched: list[str],
    no_graphs: str | None,
    no_stream: str | None,
    last_norm: bool,
    drops: float,
) -> PatchReport:
    """The report on blocks of layers, and on what keeps inputs; widths: elements a token of each slot of one layer."""
    savers: dict[str, list[str]] = {}
    slot_bits: dict[str, float] = {}
    elements = 0
    own = [c.layer for c in checkpoints if c.own]
    runs_again = {id(inside) for layer in own for inside in layer.blocks}
    for block in [*(block for block in blocks if id(block) not in runs_again), *(c for c in checkpoints if c.own)]:
        for slot, saver in block.savers.items():
            if slot == "prob" and config.attention != "eager":
                continue
            savers.setdefault(slot, []).append(str(saver))
            if saver.stored and slot != "prob":
                slot_bits[slot] = slot_bits.get(slot, 0.0) + saver.bits(widths[slot])
                elements += widths[slot]
    adapters = Counter(p.name for p in {id(p): p for b in blocks for p in b.projections if p.has_adapter}.values())
    fusing = [block for block in blocks if hasattr(block, "spec") and id(block) not in runs_again]
    specs = [(block.name.rpartition(".")[2], block.spec) for block in fusing]
    single = Counter(name for name, spec in specs if config.policy.fused and not spec.can_fuse)
    return PatchReport(
        config,
        len(layers),
        sum(slot_bits.values()) / elements,
        slot_bits,
        savers,
        dict(adapters),
        head,
        [f"{name} x{count}" for name, count in single.items()],
        not_patched,
        no_graphs,
        no_stream,
        last_norm,
        drops,
        dict(Counter(config.kept(len(layers)))),
    )


def tell_of_late_trainer() -> None:
    """Warn if a trainer of TRL's was made after apply_hyclora, which does not hear from it what is read."""
    logger.warning(
        "HyC-LoRA: TRL's trainer was made after apply_hyclora, so padding is computed as in stock: make the trainer "
        "first, then call apply_hyclora(trainer.model, ...)"
    )


def tell_of_frozen_adapters() -> None:
    """Warn if a training forward has nothing to train, as after from_pretrained without is_trainable."""
    logger.warning(
        "HyC-LoRA: no weight of the decoder is trained, so it learns nothing: load adapters with "
        "PeftModel.from_pretrained(..., is_trainable=True), or have torch.no_grad() around what is no training"
    )


def tell_of_sharding() -> None:
    """Warn if a model was sharded after its report had announced graphs."""
    logger.warning(f"HyC-LoRA: cuda_graphs is off: {SHARDED}")


def tell_of_larger_batch(rows: int, tokens: int, load) -> None:
    """Warn of a micro-step that is larger than the one that memory_budget was planned for."""
    logger.warning(
        f"HyC-LoRA: a micro-step of {rows} x {tokens} tokens is larger than the {load} that memory_budget was planned "
        f'for, and may take more memory: set largest_batch="{rows}x{tokens}"'
    )


@torch.compiler.disable
def tell_of_new_calibration(lost: str | None, adapted: list) -> None:
    """Warn if calibration begins although training does not.

    lost: why that is known. adapted: projections with an adapter whose B, untrained, is 0.
    """
    ups = [local(p.parameters()[1].detach()) for p in adapted if p.has_adapter]
    trained = any(bool(up.any()) for up in ups)
    why = lost or ("these adapters are trained already" if trained else None)
    if why:
        logger.warning(
            f"HyC-LoRA: {why}, and calibration begins anew: if this run goes on from a checkpoint, it will not be what "
            "it had been without the stop. To have it so, keep calibration with the checkpoints: CalibrationCallback "
            "in Hugging Face's Trainer, save_calibration and load_calibration in a loop of your own"
        )


def tell_of_dtype(saved: set[torch.dtype], restored: bool) -> None:
    """Warn if PEFT has loaded adapters of 16 bit, saved in these dtypes, as float32 ones."""
    if saved:
        what = "they are as saved again" if restored else "they stay float32, as DDP has begun: this is another run"
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in saved))
        logger.warning(f"HyC-LoRA: adapters of the checkpoint are {names}, and PEFT has loaded them as float32: {what}")


def tell_of_other_savers(path, slots: set[str]) -> None:
    """Warn if a run goes on with slots kept otherwise than in what it goes on from."""
    if slots:
        logger.warning(
            f"HyC-LoRA: {path} is of a version in which {', '.join(sorted(slots))} were kept otherwise with the same "
            "settings: what goes on from it will not be what it had been without the stop"
        )


def tell_of_one_unit() -> None:
    """Warn if fully_shard has all layers in one unit, as by PEFT's wrap policy: then no memory is shared."""
    logger.warning(
        "HyC-LoRA: the layers are sharded as one unit, so the weights of all of them are gathered at once, and each "
        "process has the memory for all. Give fully_shard each decoder layer before the model; accelerate does, by its "
        "transformer_based_wrap, but not by PEFT's fsdp_auto_wrap_policy"
    )


def tell_of_checkpointing(layers: list[nn.Module]) -> None:
    """Warn if gradient checkpointing is on, as in TRL by default: what a block packs then lives for one layer only.

    layers: those whose inputs HyC-LoRA keeps no better.
    """
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        logger.warning(
            "HyC-LoRA: gradient checkpointing is on. Each layer keeps its input alone and is run again in backward, so "
            "packing saves next to nothing and the second run costs a third more time. To train with packed "
            "activations instead set gradient_checkpointing=False in the trainer's arguments (TRL and Unsloth have it "
            "on by default)."
        )


def tell_of_unused_input() -> None:
    """Warn if it was said how layer inputs are to be kept, and no layer is run again."""
    logger.warning(
        "HyC-LoRA: slot_savers has layer_in, which counts under gradient checkpointing alone, and that is off: turn it "
        "on, or set layers=input8 in its place"
    )


def tell_of_hooks_that_run_twice(name: str) -> None:
    """Warn if a hook is inside of a layer of which the input alone is kept otherwise than torch does."""
    logger.warning(
        f"HyC-LoRA: there are hooks inside of {name}, which is run again in backward, and they with it: leave them on "
        "until then. They may look, but what they take has no gradient, and what they add gets none: to train by it "
        "have the layer keep slots (layers=slots), without gradient checkpointing"
    )
