"""verify: how near the gradients of a patched model are to exact LoRA's, on the user's own model and batches.

    g   the gradient of a trained weight as the patch computes it        cosine  <g, g*> / (|g| |g*|)
    g*  that of stock PEFT, or with dropout of exact slots               error   |g - g*| / |g*|

The model's own patch is put aside meanwhile. A twin of it, of the same settings and calibrated alike, gives g; another
one keeps all slots exactly, and takes over the twin's saver of one slot at a time, which tells what each slot costs.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from statistics import fmean

import torch
from peft import PeftModel
from torch import Tensor, nn

from hyclora.models.blocks import autocast_dtype
from hyclora.models.config import POLICIES, SLOTS, HycloraConfig
from hyclora.models.layers import CheckpointBlock
from hyclora.models.patch import Patch, apply_hyclora, find_patch, put_aside, remove_hyclora
from hyclora.models.verification import (
    ALWAYS_ZERO,
    AT_START,
    EXTRA,
    MISSING,
    NOT_FINITE,
    ROUNDING,
    UNUSED,
    WRONG,
    ZERO,
    Gradient,
    SlotFidelity,
    Verification,
)
from hyclora.operators.random_state import get_rng_state, set_rng_state
from hyclora.operators.savers import ChannelQuant, Derived, Exact, Saver
from hyclora.operators.savers.base import StoringSaver

logger = logging.getLogger("hyclora")
NOISE = 0.5  # error from which on a gradient that is tiny beside others is nothing but rounding
BETTER = (4, 8)  # bits of which the price is told


def verify(model: PeftModel, batches: list[dict[str, Tensor]], threshold: float | None = None) -> Verification:
    """Compare the gradients of a patched model's trained weights with exact LoRA's; print() what it returns.

    batches: keyword arguments of the model, with labels, on its device. If the patch is calibrated already, all of them
    are measured; else the first iteration_threshold calibrate, and those after them are measured, or the last one if
    there are none. Call it in the autocast that you train in, before a trainer wraps the model.
    threshold: the smallest cosine that is accepted, of every weight.

    The model trains afterwards as if nothing had happened: statistics, recordings, random state, .grad and modes are as
    they were. Dropout draws what the next step will; the gradients are compared with those of exact slots then, else
    with stock PEFT's. Takes 3 forwards and backwards a measured batch and one more a slot, the memory of plain LoRA for
    a batch, that of two sets of gradients a measured batch, and of one more.

    Raises ValueError, one sentence, for a model that is not patched or trains nothing, for no batches, a batch without
    labels or whose loss is not finite, where plain LoRA has no room, and for a cosine below the threshold.
    """
    patch = find_patch(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("verify: no weight of this model is trained; load adapters with is_trainable=True")
    if hooked := [name for name, p in trained if getattr(p, "_post_accumulate_grad_hooks", None)]:
        raise ValueError(f"verify: a hook acts on the gradient of {hooked[0]}; verify before it is registered")
    if not isinstance(batches, Sequence):
        raise ValueError(
            f"verify: batches is a {type(batches).__name__}: give a list of batches, for instance [batch] or "
            "list(itertools.islice(loader, 6))"
        )
    if not batches:
        raise ValueError("verify: there are no batches; give at least one")
    for i, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or batch.get("labels") is None:
            raise ValueError(f"verify: batch {i + 1} of {len(batches)} has no labels, so no loss; add labels to it")
    # an autocast around several steps still has weights as they were at its first one
    torch.clear_autocast_cache()
    with restored(model) as rewind, put_aside(patch):
        try:
            found = _Measurement(model, patch, batches, rewind).run()
        except torch.OutOfMemoryError:
            shape = list(next(iter(batches[0].values())).shape)
            raise ValueError(
                f"verify: a batch of {shape} tokens has no room in plain LoRA, with which gradients are compared; "
                "give it fewer or shorter rows"
            ) from None
    if found.summary is None:
        raise ValueError("verify: the loss depends on no trained weight; are the adapters disabled or merged?")
    if threshold is not None:
        found.check(threshold)
    return found


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss of one batch and the gradients of all trained weights that get one; .grad is empty afterwards."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def compare(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Cosine and relative error of the gradients that both have, by name; the cosine is 0 where one of them is."""
    names = [name for name in exact if name in found]
    pairs = ((found[name].double().flatten(), exact[name].double().flatten()) for name in names)
    numbers = [torch.stack((g @ e, g.norm() * e.norm(), (g - e).norm() / e.norm())) for g, e in pairs]
    told = torch.stack(numbers).tolist() if numbers else []
    return {
        name: (dot / lengths if lengths else 0.0, error)
        for name, (dot, lengths, error) in zip(names, told, strict=True)
    }


def _at_once(numbers: dict[str, Tensor]) -> dict[str, float | bool]:
    """Numbers of a GPU by name, which are waited for once instead of one after the other."""
    told = torch.stack(list(numbers.values())).tolist() if numbers else []
    return dict(zip(numbers, told, strict=True))


class _Measurement:
    """One verify() of a model that is stock when it begins and when it ends.

    patch: what was on it; rewind: puts the random state to where it is for each forward.
    """

    def __init__(self, model: PeftModel, patch: Patch, batches: list[dict[str, Tensor]], rewind: Callable[[], None]):
        self.model, self.patch, self.rewind = model, patch, rewind
        self.config = replace(patch.config, offload=False, offload_embeddings=False, cuda_graphs=False)
        self.calibrated = patch.step.index >= patch.step.threshold
        count = 0 if self.calibrated else patch.config.iteration_threshold
        self.apart = len(batches) > count
        self.calibrating, self.measured = batches[:count], batches[count:] or batches[-1:]
        weights = dict(model.named_parameters())
        self.trained = [name for name, p in weights.items() if p.requires_grad]
        layer = re.compile(rf"\.{re.escape(patch.watch.family.layers)}\.(\d+)\.")
        self.layers = {name: int(at[1]) if (at := layer.search(name)) else None for name in self.trained}
        # A's gradient is (dy B)^T x
        beside = {name: weights.get(name.replace("lora_A", "lora_B")) for name in self.trained if "lora_A" in name}
        self.at_start = {name for name, B in beside.items() if B is not None and not B.any()}
        # of sums that cancel, as over a softmax's scores, rounding is left
        dtypes = {autocast_dtype(p.device.type) or p.dtype for p in weights.values() if p.is_floating_point()}
        self.tiny = max(torch.finfo(dtype).eps for dtype in dtypes)
        self.drops = patch.watch.drops or any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))

    def run(self) -> Verification:
        exact = [] if self.drops else self._measure()
        with self._patched(self.config) as twin:
            self._calibrate(twin)
            ours = self._measure()
        slots = _slots(twin)
        unfused = replace(POLICIES[self.config.layer_type], fused=False)
        unfused = next(name for name, policy in POLICIES.items() if policy == unfused)
        with self._patched(replace(self.config, layer_type=unfused)) as other:
            other.step.threshold = 0  # savers of the twin are calibrated
            keep_exactly(other)
            same = self._measure()
            exact = exact or same
            self._check(exact)
            rounding = None
            if exact is not same:
                rounding = [compare(found, truth) for (_, found), (_, truth) in zip(same, exact, strict=True)]
            found = {slot: self._tell(self._with(slot, twin, other), exact, rounding) for slot in slots}
        told = self._tell(ours, exact, rounding)
        by_slot = [_fidelity(slot, savers, found[slot]) for slot, savers in slots.items()]
        by_slot.sort(key=lambda slot: -(slot.summary.error if slot.summary else 0.0))
        return Verification(
            told,
            by_slot,
            "LoRA with exact slots" if self.drops else "stock PEFT",
            None if rounding is None else self._tell(same, exact, rounding),
            *(fmean(loss for loss, _ in measured) for measured in (ours, exact)),
            len(self.measured),
            0 if self.calibrated else len(self.calibrating),
            self.apart,
        )

    @contextmanager
    def _patched(self, config: HycloraConfig):
        """Another patch on the model."""
        apply_hyclora(self.model, config)
        try:
            yield find_patch(self.model)
        finally:
            remove_hyclora(self.model)

    def _calibrate(self, twin: Patch) -> None:
        """Have its statistics from the model's own patch, or from the first batches."""
        if self.calibrated:
            for name, block in blocks_of(twin).items():
                for slot, saver in block.savers.items():
                    saver.load_state_dict(blocks_of(self.patch)[name].savers[slot].state_dict())
        for batch in self.calibrating:
            self.model(**batch)
        twin.step.threshold = twin.step.index

    def _measure(self) -> list[tuple[float, dict[str, Tensor]]]:
        """Loss and gradients of each batch, all dropping the same."""
        found = []
        for batch in self.measured:
            self.rewind()
            found.append(gradients(self.model, batch))
        return found

    def _with(self, slot: str, twin: Patch, other: Patch) -> list[tuple[float, dict[str, Tensor]]]:
        """What is measured with the twin's savers of one slot in a patch that keeps all others exactly."""
        theirs = blocks_of(twin)
        places = [
            (block.savers, theirs[key].savers[slot]) for key, block in blocks_of(other).items() if slot in block.savers
        ]
        exact = [savers[slot] for savers, _ in places]
        for savers, saver in places:
            savers[slot] = saver
        try:
            return self._measure()
        finally:
            for (savers, _), saver in zip(places, exact, strict=True):
                savers[slot] = saver

    def _check(self, exact: list[tuple[float, dict[str, Tensor]]]) -> None:
        """ValueError if there is nothing to compare with."""
        for i, (loss, found) in enumerate(exact, 1):
            if not math.isfinite(loss):
                raise ValueError(
                    f"verify: the loss of measured batch {i} is {loss} with exact LoRA too; are all its labels -100?"
                )
            finite = _at_once({name: g.isfinite().all() for name, g in found.items()})
            if bad := [name for name in found if not finite[name]]:
                raise ValueError(
                    f"verify: the gradient of {bad[0]} is not finite with exact LoRA either; it is the model, the data "
                    "or the dtype"
                )

    def _tell(self, ours: list, exact: list, rounding: list | None) -> list[Gradient]:
        """What is said of each trained weight, over all measured batches."""
        told = []
        for i, ((_, found), (_, truth)) in enumerate(zip(ours, exact, strict=True)):
            numbers = compare(found, truth)
            noise = {} if rounding is None else rounding[i]
            norms = _at_once({name: e.norm() for name, e in truth.items()})
            tiny = self.tiny * max(norms.values(), default=0.0)
            here = [_at_once({name: g.any() for name, g in grads.items()}) for grads in (found, truth)]
            told.append([self._one(name, *here, numbers, noise, norms.get(name, 0.0) < tiny) for name in self.trained])
        return [_merged(of_batches) for of_batches in zip(*told, strict=True)]

    def _one(self, name: str, found: dict, exact: dict, numbers: dict, noise: dict, is_tiny: bool) -> Gradient:
        """found, exact: whether a gradient is other than 0, by the names of those that there are."""
        g, e = found.get(name), exact.get(name)
        cosine, error = numbers.get(name, (math.nan, math.nan))
        note = ""
        if e is None:
            note = EXTRA if g else UNUSED
        elif not e:
            note = EXTRA if g else AT_START if name in self.at_start else ALWAYS_ZERO
        elif error > NOISE and noise.get(name, (0.0, 1.0))[1] > NOISE and is_tiny:
            note = ROUNDING
        elif g is None:
            note = MISSING
        elif not g:
            note = ZERO
        elif not math.isfinite(error):
            note = NOT_FINITE
        if note:
            cosine, error = (0.0, 1.0) if note in WRONG else (None, None)
        return Gradient(name, self.layers[name], cosine, error, note)


def keep_exactly(patch: Patch) -> None:
    """Have all slots that a patch keeps kept as they are; what is derived from them or computed again stays so."""
    for block in blocks_of(patch).values():
        for slot, saver in block.savers.items():
            if isinstance(saver, StoringSaver):
                block.savers[slot] = Exact()
            elif isinstance(saver, Derived) and saver.own is not None:
                block.savers[slot] = Derived(own=Exact())


def blocks_of(patch: Patch) -> dict:
    """Blocks that have savers, by kind and name, which are the same in every patch of a model."""
    return {(type(block), block.name): block for block in chain(patch.blocks, patch.checkpoints) if block.savers}


def _slots(patch: Patch) -> dict[str, list[Saver]]:
    """Savers that were used, by slot, of those slots that are not kept exactly."""
    found: dict[str, list[Saver]] = {}
    for block in blocks_of(patch).values():
        idle = {"prob"} if patch.config.attention != "eager" else set()
        if block.reason is not None or isinstance(block, CheckpointBlock) and not block.used:
            continue
        for slot, saver in block.savers.items():
            if isinstance(saver, StoringSaver) and not isinstance(saver, Exact) and slot not in idle:
                found.setdefault(slot, []).append(saver)
    return {slot: found[slot] for slot in SLOTS if slot in found}


def _fidelity(slot: str, savers: list[Saver], gradients: list[Gradient]) -> SlotFidelity:
    counts = Counter(map(str, savers))
    kept_as = ", ".join(f"{name} x{count}" for name, count in counts.items())
    if not all(isinstance(saver, ChannelQuant) for saver in savers):
        return SlotFidelity(slot, kept_as, None, {}, gradients)
    widths = [saver.mean.numel() for saver in savers]
    now = [saver.bits(width) for saver, width in zip(savers, widths, strict=True)]
    others = {
        f"quant{bits}": [
            ChannelQuant(bits, saver.scale_rule, saver.outlier_ratio, saver.book.group).bits(width)
            for saver, width in zip(savers, widths, strict=True)
        ]
        for bits in BETTER
    } | {"exact": [16.0 * width for width in widths]}
    more = {name: sum(max(0.0, b - a) for a, b in zip(now, bits, strict=True)) / 8 for name, bits in others.items()}
    better = {name: n_bytes for name, n_bytes in more.items() if n_bytes}
    return SlotFidelity(slot, kept_as, sum(now) / 8, better, gradients)


def _merged(of_batches: tuple[Gradient, ...]) -> Gradient:
    """One weight over several batches: means, and what was wrong in any."""
    numbers = [g for g in of_batches if g.cosine is not None]
    if not numbers:
        return of_batches[0]
    wrong = next((g.note for g in of_batches if g.note in WRONG), "")
    means = (fmean(getattr(g, name) for g in numbers) for name in ("cosine", "error"))
    return replace(of_batches[0], **dict(zip(("cosine", "error"), means, strict=True)), note=wrong)


@contextmanager
def restored(model: nn.Module):
    """In training mode, without .grad, and quiet; gives what puts the random state back to where it was at first."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    states = {d: get_rng_state(d) for d in {torch.device("cpu"), *(p.device for p in model.parameters())}}

    def rewind():
        for device, state in states.items():
            set_rng_state(device, state)

    quiet, logger.disabled = logger.disabled, True  # all is said of the model's own patch already
    try:
        model.train()
        yield rewind
    finally:
        logger.disabled = quiet
        for module, mode in modes:
            module.training = mode
        for p, grad in grads:
            p.grad = grad
        rewind()
