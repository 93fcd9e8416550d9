"""Settings that cannot work, refused while the command line is read: before data and model are loaded."""

import importlib.util
import inspect
import math

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from hyclora.utils.errors import UserError
from hyclora.utils.runs.identity import in_effect

_POSITIVE = (lambda x: 0 < x < math.inf, "a positive number")
_COUNT = (lambda x: x >= 1, "at least 1")
_NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or a positive number")
_SHARE = (lambda x: 0 <= x < 1, "0 or more, and less than 1")

# What the Trainer would take, and then train nothing or fail late.
RANGES = {
    "learning_rate": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda x: x == -1 or x >= 1, "at least 1, or -1 for num_train_epochs"),
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_accumulation": _COUNT,
    "logging_steps": (lambda x: x > 0, "positive"),
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _POSITIVE,
    "label_smoothing_factor": _SHARE,
    "save_total_limit": (lambda x: x is None or x >= 1, "at least 1"),
    "seed": _NOT_NEGATIVE,
    "eval_strategy": (lambda x: x == "no", "no: the evaluation is before and after the training"),
}
# Settings that do not go together: values of each, and why not, which may name any setting.
CONFLICTS = (
    (
        {"use_lora": (False,), "use_hyclora": (True,)},
        "use_hyclora=True packs what LoRA keeps for backward, and use_lora=False trains all weights: "
        "set use_hyclora=False, or use_lora=True",
    ),
    (
        {"use_lora": (False,), "load_in_4bit": (True,)},
        "load_in_4bit=True freezes the weights in NF4, and use_lora=False trains them: "
        "set load_in_4bit=False, or use_lora=True",
    ),
    (
        {"use_lora": (False,), "dtype": ("auto", "bfloat16")},
        "dtype={dtype} is too coarse for weights that are trained, as with use_lora=False: "
        "set dtype=float32, and mixed_precision=bf16 to compute in it",
    ),
    (
        {"mixed_precision": ("off",), "dtype": ("auto", "bfloat16")},
        "mixed_precision=off computes in float32, and dtype={dtype} has the weights in 16 bit: "
        "set dtype=float32, or mixed_precision=bf16",
    ),
    *(
        (
            {"parallel": ("fsdp2",), name: refused},
            f"parallel=fsdp2 leaves each process a part of the weights, and {why}",
        )
        for name, refused, why in (
            ("offload_embeddings", (True,), "offload_embeddings=True needs the whole table: drop one of both"),
            (
                "lora_init_type",
                ("pissa",),
                "lora_init_type=pissa is saved by whole ones: choose another, or parallel=ddp",
            ),
            ("verify", (True,), "verify compares whole gradients: verify in a run with parallel=ddp"),
            ("save_only_model", (True,), "save_only_model=True leaves out what resumes them: drop one of both"),
        )
    ),
)
# What an empty text says nothing of, and what to do.
EMPTY = {
    "output_dir": "name a folder for the results (. is the current one), or drop output_dir",
    "model_name": "name a folder in model_dir, or a hub id with --model_dir ''",
    "run_name": "drop it, and the run is named after model, data and method",
    "resume_from_checkpoint": "write True, or a checkpoint, or drop it",
}
# What the GPU alone can do.
NEED_GPU = ("offload", "cuda_graphs", "memory_budget")
NEED_PACKAGE = {"load_in_4bit": "bitsandbytes", "use_liger_kernel": "liger-kernel"}


def check_settings(groups) -> None:
    """UserError for a setting that cannot work, or not on this machine; groups: all arguments of a driver."""
    values = {name: value for group in groups for name, value in vars(group).items()}
    active = {name: value for name, value in values.items() if in_effect(name, values)}
    for name, hint in EMPTY.items():
        if isinstance(values.get(name), str) and not values[name].strip():
            raise UserError(f"{name} is empty: {hint}")
    for name, (fits, meaning) in RANGES.items():
        if name in active and not fits(active[name]):
            raise UserError(f"{name} must be {meaning}, not {active[name]}")
    for together, sentence in CONFLICTS:
        if all(active.get(name) in refused for name, refused in together.items()):
            raise UserError(sentence.format(**active))
    present = torch.cuda.is_available()
    if active.get("device") == "cuda" and not present:
        raise UserError("device cuda: torch sees no GPU here; install a torch with CUDA, or set device=cpu")
    on_gpu = present and not active.get("use_cpu") and active.get("device") != "cpu"
    for name in NEED_GPU:
        value, preset = active.get(name), active.get("preset")
        if value not in (None, False, "auto") and not on_gpu:
            asks = preset != "default" and value is True
            hint = f"preset={preset} asks for it, preset=default does not" if asks else f"drop {name}"
            raise UserError(f"{name}={value} needs a GPU, and this would run on the CPU: {hint}")
    for name, package in NEED_PACKAGE.items():
        if active.get(name) and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{name} needs the package {package}: pip install {package}, or drop {name}")
    for training in groups:
        if isinstance(training, TrainingArguments):
            _check_what_trainer_makes(training)
    if active.get("push_to_hub"):
        _check_hub(active["hub_model_id"], active["hub_token"])


def _check_hub(name: str | None, token: str | None) -> None:
    """UserError unless the hub answers, and knows whose token it is; the Trainer asks it once the model is loaded."""
    try:
        if name is not None:
            validate_repo_id(name)
        HfApi().whoami(token)
    except HFValidationError as error:
        raise UserError(f"push_to_hub: hub_model_id {name!r} is no name of a repository ({error})") from error
    except Exception as error:  # no token, offline, no such host, refused, ...: of the hub's client, httpx or requests
        raise UserError(
            f"push_to_hub: the hub cannot be written to ({error}): log in by hf auth login on a machine with a "
            "network, or drop push_to_hub"
        ) from error


def _check_what_trainer_makes(training: TrainingArguments) -> None:
    """UserError for options of which the Trainer could make nothing, once the model is loaded and evaluated."""
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


def check_what_trainer_imports(training: TrainingArguments) -> None:
    """UserError for packages that the Trainer would miss once the model is loaded and evaluated."""
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
