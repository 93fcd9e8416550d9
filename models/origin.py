"""Where a loss or gradients that are not finite come from: the first weight, scale, activation or gradient that is not.

Weights and scales are looked at first: what is broken there stays so. Then the batches are run again in stock PEFT, by
torch's own code and with a look at each module. If all is finite there, a compressed slot is the cause, and the slots
are tried one by one, all others being exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hyclora.models.families.family import Family
from hyclora.models.patch import Patch, apply_hyclora, find_patch, patch_of, patches_in, put_aside, remove_hyclora
from hyclora.models.sharding import is_sharded
from hyclora.models.verify import blocks_of, keep_exactly, restored
from hyclora.operators.linear.nf4 import is_4bit
from hyclora.operators.savers import ChannelQuant, Derived, Exact
from hyclora.operators.savers.base import StoringSaver

ALIKE = "; stock PEFT has it too, so it is the model, the rows, the learning rate or the dtype"


@dataclass(frozen=True)
class Batch:
    """What a model was called with, and what autocast around the call computed in, None without one."""

    model: nn.Module
    args: tuple
    kwargs: dict
    autocast: torch.dtype | None

    def backward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradients of all trained weights that get one; .grad is empty afterwards."""
        model = self.model
        model.zero_grad()
        device_type = next(model.parameters()).device.type
        with torch.autocast(device_type, self.autocast) if self.autocast else nullcontext():
            loss = model(*self.args, **self.kwargs)["loss"]
        if loss.requires_grad:
            loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        model.zero_grad()
        return loss.detach(), found


@dataclass(frozen=True)
class Origin:
    """A sentence; is_lasting: whether every later step has the same fault.

    is_given: whether it is in a frozen weight, which training has not made.
    """

    sentence: str
    is_lasting: bool = False
    is_given: bool = False

    def __str__(self) -> str:
        return self.sentence


def peft_models(model: nn.Module) -> dict[str, PeftModel]:
    """The PEFT models in a module, itself included, by what the names of their modules begin with in it."""
    return {f"{name}." if name else "": m for name, m in model.named_modules() if isinstance(m, PeftModel)}


def lasting(model: nn.Module) -> Origin | None:
    """The weight, or the slot's scales, that is not finite, and so is not in any later step; waits once for each."""
    if found := _weight(model):
        frozen = not model.get_parameter(found).requires_grad
        sentence = f"the {'frozen ' if frozen else ''}weight {found} is not finite before the step"
        return Origin(sentence, is_lasting=True, is_given=frozen)
    for prefix, part in (peft_models(model) or {"": model}).items():
        for patch in patches_in(part):
            # those of a calibration are replaced
            if not patch.step.calibrating and (found := _scale(patch)):
                return Origin(f"the calibrated scales of slot {found[0]} of {prefix}{found[1]} are not finite", True)
    return None


def origin(model: nn.Module, batches: list[Batch]) -> Origin:
    """What is not finite, first of all, in the batches of a step; the model, its random state and .grad stay the same.

    batches: of the PEFT models in it. Takes the memory of plain LoRA for one batch and says so where there is no room.
    """
    if found := lasting(model):
        return found
    of_grads = [name for name, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    known = f"the gradient of {of_grads[0]}, one of {len(of_grads)}" if of_grads else "the loss"
    if any(map(is_sharded, model.modules())):
        return Origin(f"{known} (layers are sharded, so the batch is not run again to look further)")
    batches = [batch for batch in batches if batch.kwargs.get("labels") is not None]
    if not batches:
        return Origin(f"{known} (no batch with labels was seen, so none is run again to look further)")
    try:
        for prefix, part in peft_models(model).items():
            own = [batch for batch in batches if batch.model is part]
            if own and (found := _again(part, own, prefix)):
                return Origin(found)
    except torch.OutOfMemoryError:
        return Origin(f"{known} (plain LoRA has no room for the batch, so it is not run again to look further)")
    return Origin(f"{known}; it is finite when the batch is run again")


def _again(model: PeftModel, batches: list[Batch], prefix: str) -> str | None:
    """What is not finite when the batches of a model are run again, in stock PEFT and then with slots, if anything."""
    patch = patch_of(model)
    names = {} if patch is None else _slot_names(patch.watch.family)
    with restored(model) as rewind, put_aside(patch) if patch is not None else nullcontext():
        for batch in batches:
            rewind()
            if found := _first(batch, names, prefix):
                return found + ALIKE
        slots = (_slot(model, patch, batch, prefix) for batch in batches if patch is not None)
        return next(filter(None, slots), None)


def _is_finite(t: Tensor) -> bool:
    # detached: isfinite keeps its input for backward, and a layer that checkpointing runs again has to keep as much
    return not t.is_floating_point() or bool(t.detach().isfinite().all())


def _weight(model: nn.Module) -> str | None:
    """The first weight that is not finite; bytes of NF4 are no numbers."""
    for name, module in model.named_modules():
        if hasattr(module, "weight") and is_4bit(module):
            continue
        for key, p in module.named_parameters(name, recurse=False):
            if not _is_finite(p):
                return key
    return None


def _scale(patch: Patch) -> tuple[str, str] | None:
    """The first slot whose calibrated scales are not finite, and its block's name."""
    for block in blocks_of(patch).values():
        for slot, saver in block.savers.items():
            saver = saver.own if isinstance(saver, Derived) else saver
            if isinstance(saver, ChannelQuant) and saver.mean is not None:
                if not all(map(_is_finite, (saver.mean, saver.std, saver.inv_std, *saver.restoring))):
                    return slot, block.name
    return None


def _slot_names(family: Family) -> dict[tuple[str, bool], str]:
    """Slots, by what the name of a module ends with, and whether it is what comes out of it."""
    attention, mlp = (f"{half}." if half else "" for half in (family.attention, family.mlp))
    found = {(f"{attention}{name}", True): slot for name, slot in zip(family.qkv, "qkv", strict=True)}
    found |= {(f"{mlp}{n}", True): s for n, s in zip(reversed(family.gate_up), ("up", "gate"), strict=False)}
    found |= {(f"{attention}{family.out}", False): "attn_out", (f"{mlp}{family.down}", False): "hidden"}
    for norm, slot in ((family.attention_norm, "attn_in"), (family.mlp_norm, "mlp_in")):
        found |= {(norm, False): "norm_in", (norm, True): slot}
    return found


class _Look:
    """Hooks on all modules: the first number on the way that is not finite, forward and then backward."""

    def __init__(self, slots: dict[tuple[str, bool], str]):
        self.slots, self.found = slots, None

    def look(self, value, name: str, comes_out: bool) -> None:
        for t in tree_leaves(value):
            if not isinstance(t, Tensor):
                continue
            self.tell(t, "", name, comes_out)
            if t.requires_grad and comes_out:
                t.register_hook(lambda g: self.tell(g, "the gradient of ", name, comes_out))

    def tell(self, t: Tensor, kind: str, name: str, comes_out: bool) -> None:
        if self.found is None and not _is_finite(t):
            slots = (s for (end, out), s in self.slots.items() if out == comes_out and name.endswith(f".{end}"))
            slot = next(slots, None)
            said = f" (slot {slot})" if slot else ""
            self.found = f"{kind}what {'comes out of' if comes_out else 'goes into'} {name}{said} is not finite"

    @contextmanager
    def at(self, model: nn.Module, prefix: str) -> Iterator[None]:
        hooks = []
        for name, module in model.named_modules():
            # of LoRA's parts the layer around them is told
            if "lora_" in name or "base_layer" in name or not name:
                continue
            name = prefix + name
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: self.look(args[:1], name, False)))
            hooks.append(module.register_forward_hook(lambda m, args, out, name=name: self.look(out, name, True)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _first(batch: Batch, slots: dict[tuple[str, bool], str], prefix: str) -> str | None:
    """The first number of a batch, in stock PEFT, that is not finite."""
    look = _Look(slots)
    with look.at(batch.model, prefix):
        loss, grads = batch.backward()
    if look.found or _is_finite(loss) and all(map(_is_finite, grads.values())):
        return look.found
    name = next((name for name, g in grads.items() if not _is_finite(g)), None)
    return f"the gradient of {prefix}{name} is not finite" if name else "the loss is not finite, and all before it is"


def _slot(model: PeftModel, patch: Patch, batch: Batch, prefix: str) -> str | None:
    """The slot that, kept as the patch keeps it, gives gradients that are not finite; None if none does."""

    def fails() -> bool:
        loss, grads = batch.backward()
        return not (_is_finite(loss) and all(map(_is_finite, grads.values())))

    apply_hyclora(model, replace(patch.config, offload=False, offload_embeddings=False, cuda_graphs=False))
    try:
        twin = find_patch(model)
        twin.step.threshold = 0  # it calibrates only what the patch has not come to
        for key, block in blocks_of(twin).items():
            for slot, saver in block.savers.items():
                saver.load_state_dict(blocks_of(patch)[key].savers[slot].state_dict())
        packing = {key: dict(block.savers) for key, block in blocks_of(twin).items()}
        if not fails():
            return None
        keep_exactly(twin)
        if fails():
            return "a block of HyC-LoRA, with exact slots too, where stock PEFT is finite: tell us"
        for key, block in blocks_of(twin).items():
            for slot, exact in list(block.savers.items()):
                saver = packing[key][slot]
                if not isinstance(saver, StoringSaver) or isinstance(saver, Exact):
                    continue
                block.savers[slot] = saver
                if fails():
                    remedy = f'slot_savers={{"{slot}": "exact"}}'
                    place = f"{prefix}{block.name}"
                    return f"slot {slot} of {place} in {saver}, while stock PEFT is finite: keep it by {remedy}"
                block.savers[slot] = exact
    finally:
        remove_hyclora(model)
    return "several slots together, while stock PEFT is finite: keep more bits with q_bit=8"
