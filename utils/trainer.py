"""HF's Trainer with what a run of days needs: safe stops, checkpoints that resume exactly, no NaN taken for a loss.

A checkpoint holds, beside the Trainer's own files, the state of the activation compression; `trainer_state.json` is
written after it and marks a checkpoint as whole.
"""

import contextlib
import signal
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hyclora.models.state import load_calibration, save_calibration
from hyclora.utils.errors import Interrupted, RunStopped, UserError

_WHOLE = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")


def find_checkpoint(resume: str | None, folders: list[Path]) -> Path | None:
    """The checkpoint to resume from: None, a folder, or for "True" the newest whole one in `folders`.

    UserError if there is none.
    """
    if resume is None or resume.lower() in ("false", ""):
        return None
    if resume.lower() != "true":
        folders = [Path(resume)]
        if not folders[0].is_dir():
            raise UserError(f"resume_from_checkpoint: folder {resume} does not exist")
    candidates = [c for f in folders for c in (f, *f.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))]
    whole = [c for c in candidates if all((c / name).is_file() for name in _WHOLE)]
    if not whole:
        places = ", ".join(str(f) for f in folders) or "the output folder"
        raise UserError(f"resume_from_checkpoint: no whole checkpoint in {places}: start without it")
    return max(whole, key=lambda c: (c / _WHOLE[-1]).stat().st_mtime)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM ends the training after a checkpoint at the next step; the second one ends it at once."""

    def __init__(self):
        self.received: int | None = None

    @contextlib.contextmanager
    def listening(self):
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("stopping: a checkpoint is written after this step (again to stop at once, without one)", flush=True)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if self.received is not None:
            control.should_save = control.should_training_stop = True


class StopOnNonFinite(TrainerCallback):
    """Ends the run at a NaN or infinite loss, before it is logged or saved.

    The trainer notes the loss of every micro-batch on its device; the note is read only when the Trainer logs, saves
    or ends anyway, so that the steps between need not wait for the device.
    """

    def __init__(self, device: torch.device):
        self.first_step = torch.tensor(float("inf"), device=device)

    def note(self, loss: torch.Tensor, step: int):
        self.first_step.copy_(torch.where(loss.isfinite(), self.first_step, self.first_step.clamp(max=step)))

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if (control.should_log or control.should_save or control.should_training_stop) and self.first_step.isfinite():
            raise RunStopped(
                f"the loss is not finite at step {int(self.first_step)}: lower --learning_rate or raise --q_bit; "
                f"checkpoints in {args.output_dir} are from before"
            )


class HycloraTrainer(Trainer):
    """`compressed`: the model keeps its activations compressed, and the state of that belongs to a checkpoint."""

    def __init__(self, *args, compressed: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.compressed = compressed
        self.masked_batches = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.stop_on_signal = StopOnSignal()
        self.stop_on_non_finite = StopOnNonFinite(self.args.device)
        self.add_callback(self.stop_on_signal)
        self.add_callback(self.stop_on_non_finite)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss, with a divisor of at least one token: without targets it is 0 instead of 0 / 0."""
        targets = (inputs["labels"][..., 1:] != -100).sum()
        if model.training:
            self.masked_batches += targets == 0
        divisor = targets if num_items_in_batch is None else num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs, divisor.clamp(min=1))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.stop_on_non_finite.note(loss, self.state.global_step + 1)
        return loss

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.compressed and self.args.should_save:
            save_calibration(self.model, output_dir or self.args.output_dir)

    def train(self, resume_from_checkpoint: Path | None = None, **kwargs):
        """Train; on Ctrl-C raise `Interrupted` with the checkpoint to resume from."""
        if resume_from_checkpoint and self.compressed:
            load_calibration(self.model, resume_from_checkpoint)
        with self.stop_on_signal.listening():
            result = super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, **kwargs)
        if self.stop_on_signal.received is not None:
            checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            raise Interrupted(
                f"stopped at step {self.state.global_step} of {self.state.max_steps}: "
                f"repeat the command with --resume_from_checkpoint {checkpoint} to go on"
            )
        return result
