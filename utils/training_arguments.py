"""The Trainer's arguments as the drivers have them, and what of them it could make nothing of."""

import inspect
import os
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from accelerate.utils import DynamoBackend
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType

from hyclora.utils.args import ROOT, non_finite_option, option
from hyclora.utils.errors import UserError
from hyclora.utils.runs.launch import check_processes
from hyclora.utils.sharded import ask_for_sharding


def _trainer_default(name: str, value, choices=()):
    return option(value, transformers.TrainingArguments.__dataclass_fields__[name].metadata["help"], choices)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's arguments with the paper's settings for GSM8K as defaults."""

    _argument_group_name = "Trainer"

    output_dir: str = option(str(ROOT / "exp_results"), "Folder for logs, results and checkpoints of all runs.")
    learning_rate: float = _trainer_default("learning_rate", 3e-4)
    num_train_epochs: float = _trainer_default("num_train_epochs", 6)
    per_device_train_batch_size: int = _trainer_default("per_device_train_batch_size", 4)
    gradient_accumulation_steps: int = _trainer_default("gradient_accumulation_steps", 4)
    lr_scheduler_type: str = _trainer_default("lr_scheduler_type", "cosine", [s.value for s in SchedulerType])
    warmup_steps: float = _trainer_default("warmup_steps", 0.03)
    seed: int = _trainer_default("seed", 11)
    logging_steps: float = _trainer_default("logging_steps", 10)
    save_steps: float = _trainer_default("save_steps", 100)
    save_total_limit: int | None = _trainer_default("save_total_limit", 2)
    report_to: str = _trainer_default("report_to", "none")
    bf16: bool | None = option(None, "Compute in bfloat16 under autocast. Default: on a GPU only.")
    remove_unused_columns: bool = _trainer_default("remove_unused_columns", False)
    ddp_find_unused_parameters: bool | None = _trainer_default("ddp_find_unused_parameters", False)
    # The buffers of these models never change, and DDP takes 5 ms of the host to walk through a 7B's modules for them.
    ddp_broadcast_buffers: bool | None = _trainer_default("ddp_broadcast_buffers", False)
    dataloader_pin_memory: bool = _trainer_default("dataloader_pin_memory", False)
    # The Trainer would wait for each micro-batch's loss, and log the average of earlier ones in place of a NaN.
    logging_nan_inf_filter: bool = _trainer_default("logging_nan_inf_filter", False)
    non_finite: Literal["stop", "skip"] = non_finite_option()
    num_gpus: int = option(1, "Processes on this machine, one a GPU (of several machines: torchrun, without this).")
    parallel: Literal["ddp", "fsdp2"] = option("ddp", "Each process has all weights, or they share them (fsdp2).")

    def __post_init__(self):
        ask_for_sharding(self)
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.use_cpu and not self.fp16
        # Without a GPU, and without being told so, the Trainer takes each process of several for the only one.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available():
            self.use_cpu = True
        check_processes(self.num_gpus, self.use_cpu)
        if self.load_best_model_at_end:
            raise UserError(
                "load_best_model_at_end needs evaluations in between, and the scripts evaluate before and after the "
                "training: drop it"
            )
        try:
            super().__post_init__()
        except Exception as error:  # ValueError for most, but whatever comes of files and packages that options name
            raise UserError(f"the Trainer's options cannot work: {error}") from error
        _check_what_trainer_imports(self)
        # With several visible GPUs and no launcher the Trainer would replicate the model by DataParallel.
        if self.n_gpu > 1:
            self._n_gpu = 1

    def check(self) -> None:
        """UserError for options of which the Trainer could make nothing, once the model is loaded and evaluated."""
        _check_what_trainer_makes(self)


def _check_what_trainer_makes(training: TrainingArguments) -> None:
    _check_object("lr_scheduler_kwargs", training.lr_scheduler_kwargs, '{"num_cycles": 2}')
    # activation_checkpointing_kwargs of newer Transformers is in both
    name, options = "gradient_checkpointing_kwargs", training.gradient_checkpointing_kwargs
    _check_object(name, options, '{"use_reentrant": false}')
    known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
    if unknown := [option for option in options or () if option not in known]:
        raise UserError(f"{name}: checkpoint knows no {', '.join(unknown)}, only {', '.join(sorted(known))}")
    parts = training.optim_args.split(",") if training.optim_args else []
    if not all(part.count("=") == 1 for part in parts):
        raise UserError(f"optim_args {training.optim_args!r} is not NAME=VALUE, with commas in between")
    if training.torch_compile:
        backends = [backend.value.lower() for backend in DynamoBackend if backend is not DynamoBackend.NO]
        modes = {"torch_compile_backend": backends, "torch_compile_mode": list(torch._inductor.list_mode_options())}
        for name, known in modes.items():
            asked = getattr(training, name)
            if asked is not None and (asked.lower() if known is backends else asked) not in known:
                raise UserError(f"{name} {asked!r} is none of {', '.join(known)}")
    kind, some = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type), 1000  # steps, whatever it is
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    given = {"scheduler_specific_kwargs": training.lr_scheduler_kwargs, "num_training_steps": some}
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=training.get_warmup_steps(some), **given)
    except Exception as error:  # TypeError, ValueError, ... for options that are missing, wrong or too many
        raise UserError(f"lr_scheduler_type={kind} cannot be made ({error}): look at lr_scheduler_kwargs") from error


def _check_object(name: str, options, example: str) -> None:
    """UserError for options that are no JSON object; None is none."""
    if not isinstance(options, dict | None):
        raise UserError(f"{name} must be a JSON object such as {example}, not {options!r}")


def _check_what_trainer_imports(training: TrainingArguments) -> None:
    """UserError for packages that the Trainer would miss once the model is loaded and evaluated."""
    from transformers import Trainer  # which imports datasets and pandas: --help need not wait for them

    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"report_to: {error} (do that, or drop report_to)") from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except ImportError as error:
        raise UserError(f"optim: {error} (do that, or choose another)") from error
    except Exception:  # what it finds wrong without a model may be right with one: Trainer.create_optimizer tells
        return
