"""How far a plain loop is, and what it has cost: losses, tokens, seconds, memory; kept over the sessions of a run."""

import contextlib
import math
import time

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState

from hyclora.utils.profiling import pinned_bytes

SUMS = ("seconds", "tokens", "targets", "loss_sum", "skipped_steps")
PEAKS = ("peak_bytes", "held_bytes", "host_bytes")


class Progress:
    """state: step, number of steps and the losses told; totals: sums and peaks of all sessions of the run.

    A loss stays on its device until it is told or saved: steps need not wait for the GPU. scale: that of losses before
    the first step.
    """

    def __init__(self, model: nn.Module, device: torch.device, steps: int, logging_steps: int, scale: float):
        self.model, self.on_gpu, self.logging_steps = model, device.type == "cuda", logging_steps
        self.state = TrainerState(global_step=0, max_steps=steps, log_history=[])
        self.totals = dict.fromkeys((*SUMS, *PEAKS), 0)
        self.unread: list[tuple[Tensor | None, int]] = []
        self.untold: list[float] = []
        self.scale = scale
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        self.late_since, self.late_rows = self.start if steps == 1 else None, 0  # a single step is all there is

    def state_dict(self) -> dict:
        """What a checkpoint needs beside `state`."""
        return {"totals": self.totals, "untold": self.untold, "scale": self.scale}

    def resume(self, state: TrainerState, kept: dict) -> None:
        """Go on from what a checkpoint has."""
        self.state, self.totals, self.untold, self.scale = state, kept["totals"], kept["untold"], kept["scale"]
        self.start = time.perf_counter()

    def count(
        self, loss: Tensor, batches: list[dict[str, Tensor]], targets: int, scale: float, skipped: bool = False
    ) -> None:  # fmt: skip
        """A step of the optimizer: its loss, batches, learned tokens, and the scale of losses after it.

        skipped: it was not taken, as something was not finite; its loss does not count.
        """
        self.state.global_step += 1
        self.totals["tokens"] += sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.totals["skipped_steps"] += skipped or scale < self.scale  # a GradScaler lowers it where it takes no step
        self.scale = scale
        self.unread.append((None if skipped else loss, targets))
        if self.state.global_step % self.logging_steps == 0 or self.ended:
            self._read()
            mean = sum(self.untold) / len(self.untold) if self.untold else math.nan
            self.state.log_history.append({"step": self.state.global_step, "loss": mean})
            print(f"step {self.state.global_step} of {self.state.max_steps}: loss {mean:.4f}", flush=True)
            self.untold.clear()
        self._count_late(sum(len(batch["input_ids"]) for batch in batches))

    def _count_late(self, rows: int) -> None:
        """Rows after the middle of the training, when all that is compiled or recorded for the first ones is there."""
        if self.late_since is not None:
            self.late_rows += rows
        elif self.state.global_step == self.state.max_steps // 2:
            self._wait()
            self.late_since = time.perf_counter()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    @property
    def ended(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _read(self) -> None:
        """Wait for the losses."""
        counted = [one for one in self.unread if one[0] is not None]
        values = torch.stack([loss.float() for loss, _ in counted]).tolist() if counted else []
        for value, (_, targets) in zip(values, counted, strict=True):
            self.totals["loss_sum"] += value * targets
            self.totals["targets"] += targets
        self.untold += values
        self.unread.clear()

    def settle(self) -> dict:
        """The totals up to now."""
        self._read()
        self._wait()
        self.totals["seconds"] += time.perf_counter() - self.start
        peaks = {
            "peak_bytes": torch.cuda.max_memory_allocated() if self.on_gpu else 0,
            "held_bytes": torch.cuda.max_memory_reserved() if self.on_gpu else 0,
            "host_bytes": pinned_bytes(self.model),
        }
        self.totals |= {name: max(self.totals[name], value) for name, value in peaks.items()}
        self.start = time.perf_counter()
        return self.totals

    @contextlib.contextmanager
    def paused(self):
        """Time that is not of training."""
        self.settle()
        begun = time.perf_counter()
        yield
        self.start = time.perf_counter()
        if self.late_since is not None:
            self.late_since += self.start - begun

    def is_due(self, save_steps: int) -> bool:
        """Whether a checkpoint is to be written after this step: every so many, and after the last one."""
        return save_steps > 0 and (self.ended or self.state.global_step % save_steps == 0)

    def result(self) -> dict:
        """The totals as results have them; average_loss: of a response token over the whole training, row_ms: of a row
        in its second half, None if that was not of this session.
        """
        totals = self.settle()
        late = self.late_rows and round(1e3 * (self.start - self.late_since) / self.late_rows, 2)
        return totals | {
            "row_ms": late or None,
            "masked_batches": 0,
            "tokens_per_second": round(totals["tokens"] / totals["seconds"], 1),
            "average_loss": totals["loss_sum"] / totals["targets"] if totals["targets"] else math.nan,
        }
