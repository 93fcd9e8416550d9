"""Settings of the plain training loop: four techniques, each off or on, and what the optimizer takes."""

import os
import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch

from hyclora.utils.args import ROOT, LoraArguments, non_finite_option, option, require

OFF, ALL = "off", "all"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SOME = re.compile(r"(\d+) of (\d+)")


@dataclass
class OptionalLoraArguments(LoraArguments):
    use_lora: bool = option(True, "Train LoRA adapters; False trains all weights.")


@dataclass
class SweepArguments:
    """The grid of techniques that is measured instead of a run (benchmarks/technique_grid.py)."""

    sweep: bool = option(
        False, "Measure every combination of the techniques that are on, each off and on, in processes of their own."
    )
    sweep_gpus: int = option(1, "Of a sweep: GPUs that measure at the same time, a combination each.")
    sweep_timeout: float = option(900, "Of a sweep: seconds for one combination, loading included.")
    sweep_minutes: float | None = option(None, "End a sweep after so long; the same command goes on.")
    sweep_peers: bool = option(False, "Beside ours measure Unsloth on the same rows, where LoRA is on 16-bit weights.")

    def __post_init__(self):
        require(self.sweep_gpus >= 1, f"sweep_gpus must be at least 1, not {self.sweep_gpus}")
        for name in ("sweep_timeout", "sweep_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, not {value}")

    def check_no_sweep(self) -> None:
        """UserError for what is asked of a sweep, of who runs none."""
        for f in fields(SweepArguments):
            asked = f.name != "sweep" and getattr(self, f.name) != f.default
            require(not asked, f"{f.name} has no effect with sweep=False: drop it or set sweep=True")


@dataclass
class PlainArguments(SweepArguments):
    _argument_group_name = "training"
    # what results and runs ask of the Trainer's arguments, and what is no choice here
    CORE: ClassVar[tuple[str, ...]] = (
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation",
        "gradient_checkpointing",
        "mixed_precision",
        "learning_rate",
        "seed",
        "output_dir",
    )
    process_index: ClassVar[int] = 0
    world_size: ClassVar[int] = 1
    should_save: ClassVar[bool] = True
    label_smoothing_factor: ClassVar[float] = 0.0

    gradient_accumulation: int = option(8, "Micro-batches whose gradients are added up before a step; 1: off.")
    gradient_checkpointing: str = option(
        OFF,
        "Layers that keep their input alone and run again in backward: off, all, or for instance '2 of 3', which "
        "leaves every third one out.",
    )
    mixed_precision: Literal["off", "fp16", "bf16"] = option(
        OFF, "Compute in 16 bit under autocast (fp16 on a GPU, with a GradScaler); off: in float32."
    )
    learning_rate: float = option(1e-5, "Of AdamW, constant.")
    weight_decay: float = option(0.0, "Of AdamW.")
    num_train_epochs: int = option(1, "How often the rows are trained on.")
    max_steps: int = option(-1, "End after so many steps of the optimizer; -1: after num_train_epochs.")
    per_device_train_batch_size: int = option(1, "Rows of a micro-batch.")
    logging_steps: int = option(10, "Tell the loss every so many steps.")
    non_finite: Literal["stop", "skip"] = non_finite_option()
    save_steps: int = option(100, "Write a checkpoint every so many steps; 0: neither checkpoints nor trained weights.")
    save_total_limit: int | None = option(2, "How many checkpoints are kept.")
    seed: int = option(11, "Of the adapters, the order of the rows and dropout.")
    use_cpu: bool = option(False, "Do not use the GPU.")
    output_dir: str = option(str(ROOT / "exp_results"), "Folder for logs, results and checkpoints of all runs.")
    run_name: str | None = option(None, "Begins the names of the run's files; default: model, data and method.")
    resume_from_checkpoint: str | None = option(None, "True, or the folder of a checkpoint or run to go on with.")

    def __post_init__(self):
        super().__post_init__()
        left_out = self.leave_out  # refuses what it cannot read
        require(left_out != 1, "gradient_checkpointing 0 of 1 checkpoints no layer: write off")
        require(
            int(os.environ.get("WORLD_SIZE", 1)) == 1,
            "this loop is for one process on one GPU: start it without torchrun or accelerate launch",
        )
        require(self.save_steps >= 0, f"save_steps must not be negative, not {self.save_steps}")
        require(
            not (self.sweep and self.resume_from_checkpoint),
            "sweep goes on where it stopped by itself: drop resume_from_checkpoint",
        )

    @property
    def gradient_accumulation_steps(self) -> int:
        """As the Trainer calls it."""
        return self.gradient_accumulation

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in, None where it is off."""
        return DTYPES.get(self.mixed_precision)

    @property
    def leave_out(self) -> int | None:
        """k of "k - 1 of k" checkpointed layers; None where none is left out."""
        if self.gradient_checkpointing in (OFF, ALL):
            return None
        some = _SOME.fullmatch(self.gradient_checkpointing)
        require(
            some is not None and int(some[1]) == int(some[2]) - 1,
            f"gradient_checkpointing {self.gradient_checkpointing!r} is not off, all, or all but one of each few "
            "layers, such as '2 of 3'",
        )
        return int(some[2])
