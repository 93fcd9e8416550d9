"""Gradients that are not finite are found before the optimizer takes them, and traced to where they come from.

What NaN or infinity an optimizer has taken is in the adapters for good. So all gradients are looked at once before each
of its steps: one norm of them, and one wait for the device. Layers, slots and recordings run as ever; only once
something is not finite is the batch run again, and looked at layer by layer (models/origin.py).
"""

import logging
import math
from collections import deque
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from hyclora.models.blocks import autocast_dtype
from hyclora.models.origin import Batch, lasting, origin, peft_models
from hyclora.models.patch import Patch, patches_in

logger = logging.getLogger("hyclora")
ACTIONS = ("stop", "skip")
PATIENCE = 10  # steps in a row that may be skipped
SCALES = 32  # steps in a row that a GradScaler may skip: from its usual 2^16 on it has gone down to 2^-16
REMEMBERED = 64  # micro-batches of a step


class BrokenWeight(FloatingPointError):
    """A frozen weight is not finite: it was loaded so, and no setting of the training mends it."""


class FiniteGradients:
    """Says before each step of an optimizer whether that may take the gradients.

        finite = FiniteGradients(model, "skip")
        with finite.listening():
            for step, batch in enumerate(batches, 1):
                model(**batch).loss.backward()
                if finite.allows(step):
                    optimizer.step()
                optimizer.zero_grad()

    model: a PEFT model, patched or not, without wrappers, or a module that holds some, as an actor and a critic.
    action: "stop" raises FloatingPointError; "skip" warns, and leaves all .grad None. Both name the step, and layer and
    slot in which the first number was that is not finite.

    Keeps references to the batches of a step, and for each step takes the norms of the gradients and waits for the
    device once. To trace takes a forward and a backward in stock PEFT, and one more a slot and layer if HyC-LoRA is the
    cause; statistics, recordings, random state and gradients stay as they are. But where forwards of such a step have
    calibrated, that is forgotten, and those behind it do so in their place. Processes of a distributed run decide
    together. skipped: how many steps were.

    Raises FloatingPointError whatever the action where a weight (BrokenWeight if it is frozen) or what was calibrated
    is not finite already, and after PATIENCE steps in a row, or SCALES that a GradScaler skips; ValueError for another
    action.
    """

    def __init__(self, model: nn.Module, action: Literal["stop", "skip"] = "stop"):
        check_action(action)
        self.model, self.action = model, action
        self.skipped = self._in_a_row = self._scaled = 0
        self._batches: deque[Batch] = deque(maxlen=REMEMBERED)
        self._losses: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        self._begun: list[tuple[Patch, int]] = []  # the forwards that there were before the step
        self.end()

    def listen(self) -> None:
        """Remember the batches of each step from now on."""
        self.end()
        # a hook on a module that has a block of ours would change how that runs
        for model in peft_models(self.model).values():
            self._hooks.append(model.register_forward_pre_hook(self._remember, with_kwargs=True))

    def end(self) -> None:
        """The model has no hook of this any more."""
        while self._hooks:
            self._hooks.pop().remove()
        self._forget(patches_in(self.model))

    @contextmanager
    def listening(self):
        """listen() inside."""
        self.listen()
        try:
            yield
        finally:
            self.end()

    @torch.compiler.disable
    def _remember(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model.training and torch.is_grad_enabled():
            device_type = next(model.parameters()).device.type
            self._batches.append(Batch(model, args, dict(kwargs), autocast_dtype(device_type)))

    def _forget(self, patches: list[Patch] | None = None) -> None:
        """Whatever comes from now on is of another step; patches: those that there are, if that is known."""
        self._batches.clear()
        self._losses.clear()
        if patches is None:
            patches = [patch for patch, _ in self._begun]
            if not all(patch.step.patched for patch in patches):
                patches = patches_in(self.model)  # others, if there are: that walks through all modules
        self._begun = [(patch, patch.step.index) for patch in patches]

    def _calibrates_again(self) -> bool:
        """Whether forwards of this step have calibrated, so that it begins again behind them.

        Numbers that are large, and no more than that, come before those that are not finite, and statistics kept them.
        """
        again = [
            patch
            for patch, begun in self._begun
            if patch.step.patched and patch.calibration.quantizers and patch.step.index > begun < patch.step.threshold
        ]
        for patch in again:
            patch.calibrate_again()
        return bool(again)

    def note(self, loss: Tensor | float) -> None:
        """Have a micro-batch's loss looked at with the gradients: it may be infinite by itself."""
        self._losses.append(torch.as_tensor(loss).detach())

    @property
    def has_skipped(self) -> bool:
        """Whether the last step was."""
        return self._in_a_row > 0

    def allows(self, step: int, *losses: Tensor | float, look_at_gradients: bool = True) -> bool:
        """Whether the optimizer may take its step of that number; losses: more to be looked at, as by note().

        look_at_gradients: not where a GradScaler does, which skips such steps to find its scale: they are left to it,
        but for those that no scale mends.
        """
        for loss in losses:
            self.note(loss)
        try:
            of_grads, of_losses = self._are_finite()
            self._scaled = 0 if of_grads else self._scaled + 1
            in_vain = self._scaled > SCALES and not look_at_gradients
            is_left = not (look_at_gradients or in_vain)
            if of_losses and (of_grads or is_left and lasting(self.model) is None):
                self._in_a_row = 0
                return True
            self._act(step, in_vain)
            return False
        finally:
            self._forget()

    def _are_finite(self) -> list[bool]:
        """Whether all gradients are, and all losses."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        grads = [getattr(g, "to_local", lambda g=g: g)() for g in grads]  # fully_shard's have a part in each process
        largest = torch.nn.utils.get_total_norm([g for g in grads if g.numel()], math.inf)
        device = next(self.model.parameters()).device
        losses = [loss.to(device).isfinite().all() for loss in (torch.zeros((), device=device), *self._losses)]
        finite = torch.stack((largest.to(device).isfinite(), torch.stack(losses).all()))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            finite = finite.float()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return finite.bool().tolist()

    def _act(self, step: int, in_vain: bool) -> None:
        again = ", and calibration begins again" if self._calibrates_again() else ""
        found = origin(self.model, list(self._batches))
        sentence = f"step {step} has a loss or gradients that are not finite: {found}"
        self._in_a_row += 1
        if self._in_a_row > PATIENCE:
            sentence = f"{sentence}; {PATIENCE} steps before it were skipped for that, too"
        if in_vain:
            sentence = f"{sentence}; {SCALES} steps before it were skipped by the GradScaler, to no avail"
        if self.action == "stop" or found.is_lasting or in_vain or self._in_a_row > PATIENCE:
            self.end()
            raise (BrokenWeight if found.is_given else FloatingPointError)(sentence)
        self.skipped += 1
        for p in self.model.parameters():
            p.grad = None
        logger.warning(f"HyC-LoRA: {sentence}; the step is skipped{again}")


class NonFiniteCallback(TrainerCallback):
    """FiniteGradients in Hugging Face's Trainer, and in trainers that are made of it, as TRL's.

        trainer.add_callback(NonFiniteCallback("skip"))

    With fp16 its GradScaler skips steps, and those that it can mend are left to it. The learning rate's schedule counts
    skipped steps. With max_grad_norm the Trainer's own norm of such a step is logged as it was, not finite.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop"):
        check_action(action)
        self.action, self.finite = action, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.finite is not None:  # of a training that was broken off
            self.finite.end()
        self.finite = FiniteGradients(model, self.action)
        self.finite.listen()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.finite.allows(state.global_step + 1, look_at_gradients=not args.fp16)

    def on_train_end(self, args, state, control, **kwargs):
        self.finite.end()


def check_action(action: str) -> None:
    """ValueError for what is no action."""
    if action not in ACTIONS:
        raise ValueError(f"non_finite={action!r} is not one of {', '.join(ACTIONS)}")
