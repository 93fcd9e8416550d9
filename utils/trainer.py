"""HF's Trainer with what a run of days needs: safe stops, checkpoints that resume exactly, no NaN taken for a loss.

A checkpoint holds, beside the Trainer's own files, the state of the activation compression, what the training has cost
so far, and the seal that says that it is whole (utils/runs/checkpoints.py).
"""

import contextlib
import signal
import time
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hyclora.models.finite import NonFiniteCallback
from hyclora.models.sharding import is_unit
from hyclora.models.state import load_calibration, save_calibration
from hyclora.utils.errors import Interrupted, UserError
from hyclora.utils.profiling import pinned_bytes
from hyclora.utils.ranks import wait_on
from hyclora.utils.runs.card import tidy
from hyclora.utils.runs.checkpoints import prune, seal, state_of
from hyclora.utils.runs.room import telling
from hyclora.utils.sharded import take_cpu_too, trained_of


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
        """All processes stop at the same step: a signal reaches one earlier than another."""
        if args.world_size > 1:
            received = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received) or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True


class Progress(TrainerCallback, ExportableState):
    """What the training has cost in all its sessions: checkpoints carry it on, in trainer_state.json.

    Tokens and batches are counted on the device of the batches and read when a checkpoint is written. Steps that no
    checkpoint has when a session is ended are not in it, as the run trains them anew. Time is that of steps: neither
    loading nor writing a checkpoint counts.
    """

    def __init__(self):
        self.counts = torch.zeros(2, dtype=torch.long)
        self.earlier, self.totals = {}, {}
        self.start = time.perf_counter()

    def resume(self, state: TrainerState):
        """Go on from what a checkpoint has."""
        self.earlier = self.totals = state.stateful_callbacks[type(self).__name__]["attributes"]["totals"]

    def count(self, real: torch.Tensor, masked: torch.Tensor):
        """A micro-batch: its tokens that are no padding, and whether it has no target."""
        self.counts = self.counts.to(real.device) + torch.stack([real, masked.long()])

    def settle(self, accelerator, model: nn.Module, skipped: int):
        """Add up this session, over all processes, and the earlier ones; skipped: steps that were not finite."""
        tokens, masked = accelerator.reduce(self.counts.to(accelerator.device)).tolist()
        on_gpu = accelerator.device.type == "cuda"
        added = {"tokens": tokens, "masked_batches": masked, "skipped_steps": skipped}
        added["seconds"] = time.perf_counter() - self.start
        peaks = {
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
            "held_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
            "host_bytes": pinned_bytes(model),
        }
        self.totals = {name: self.earlier.get(name, 0) + value for name, value in added.items()}
        self.totals["tokens_per_second"] = round(self.totals["tokens"] / self.totals["seconds"], 1)
        self.totals |= {name: max(self.earlier.get(name, 0), value) for name, value in peaks.items()}

    @contextlib.contextmanager
    def paused(self):
        """Time that is not of training; settle() has waited for the device."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - begun

    def state(self) -> dict:
        return {"args": {}, "attributes": {"totals": self.totals}}

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        # the last loss is part of the results, however seldom losses are logged
        if state.global_step >= state.max_steps:
            control.should_log = True


@contextlib.contextmanager
def _making(what: str, options: str):
    """UserError if it cannot be made as the options say, which nobody has looked at before."""
    try:
        yield
    except Exception as error:  # of transformers, torch and packages that an optimizer needs
        raise UserError(f"the {what} cannot be made ({error}): look at {options}") from error


class HycloraTrainer(Trainer):
    """`compressed`: the model keeps its activations compressed, and the state of that belongs to a checkpoint."""

    def __init__(self, *args, compressed: bool, **kwargs):
        with _making("Trainer", "--push_to_hub and what else it is told by options"):
            super().__init__(*args, **kwargs)
        self.compressed = compressed
        self.progress = Progress()
        self.stop_on_signal = StopOnSignal()
        self.non_finite = NonFiniteCallback(self.args.non_finite)
        self.last_loss = torch.zeros((), device=self.args.device)
        for callback in (self.progress, self.stop_on_signal, self.non_finite):
            self.add_callback(callback)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        take_cpu_too(self)
        wait_on(self.args.device)

    def create_optimizer(self, *args, **kwargs):
        with _making("optimizer", "--optim and --optim_args"):
            optimizer = super().create_optimizer(*args, **kwargs)
        self._trained = [list(group["params"]) for group in self.optimizer.param_groups]
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        # accelerate knows sharded weights by their address, and parts without an element have none of their own
        for group, params in zip(self.optimizer.param_groups, self._trained, strict=True):
            group["params"] = params
        with _making("schedule", "--lr_scheduler_type and --lr_scheduler_kwargs"):
            return super().create_scheduler(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss, with a divisor of at least one token: without targets it is 0 instead of 0 / 0."""
        labels = inputs["labels"]
        # a label of a row is one of its own, a label of a token is for the one before
        targets = ((labels[..., 1:] if labels.dim() > 1 else labels) != -100).sum()
        if model.training:
            self.progress.count(inputs["attention_mask"].sum(), targets == 0)
        divisor = targets if num_items_in_batch is None else num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs, divisor.clamp(min=1))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The loss; of a batch whose loss is not finite, if such steps are skipped, that of the batch before."""
        with telling(inputs):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.non_finite.finite.note(loss)
        if self.non_finite.action == "skip":
            loss = self.last_loss = torch.where(loss.isfinite(), loss, self.last_loss)
        return loss

    def save_model(self, output_dir=None, _internal_call=False):
        folder = output_dir or self.args.output_dir
        if is_unit(self.model):  # whose frozen weights would be gathered too
            self._save(folder, trained_of(self.model))
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            tidy(Path(folder))
        if self.compressed and self.args.should_save:
            save_calibration(self.model, folder)

    def _save_checkpoint(self, model, trial):
        """HF would delete older checkpoints before the new one is whole; ours go afterwards."""
        self.progress.settle(self.accelerator, self.model, self.non_finite.finite.skipped)
        with self.progress.paused():
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                run = Path(self.args.output_dir)
                seal(run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
                prune(run, limit)

    def train(self, resume_from_checkpoint: Path | None = None):
        """Train, from a whole checkpoint if one is given: not a step more if that is of the last one.

        Raises Interrupted after the checkpoint that Ctrl-C asks for.
        """
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if resume_from_checkpoint:
            state = state_of(resume_from_checkpoint)
            self.progress.resume(state)
            if self.compressed:
                load_calibration(self.model, resume_from_checkpoint)
            if state.global_step >= state.max_steps:
                self._take_over(state, resume_from_checkpoint)
                return
        with self.stop_on_signal.listening():
            super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None)
        if self.stop_on_signal.received is not None:
            raise Interrupted(f"stopped at step {self.state.global_step} of {self.state.max_steps}")
        self.progress.settle(self.accelerator, self.model, self.non_finite.finite.skipped)

    def _take_over(self, state: TrainerState, checkpoint: Path):
        """The model as the training left it, ready to be evaluated as if it had just ended."""
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if not is_unit(self.model):
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
