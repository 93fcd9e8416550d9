"""Settings that cannot work, refused while the command line is read: before data and model are loaded."""

import importlib.util
import math

from hyclora.models.config import PRESETS
from hyclora.utils.errors import UserError
from hyclora.utils.runs.identity import in_effect

_POSITIVE = (lambda x: 0 < x < math.inf, "a positive number")
_COUNT = (lambda x: x >= 1, "at least 1")
_NOT_NEGATIVE = (lambda x: 0 <= x < math.inf, "0 or a positive number")
_SEED = (lambda x: x is None or 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1")
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
    **dict.fromkeys(("seed", "data_seed", "generation_seed"), _SEED),
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
# What the GPU alone can do: which values ask for it, and what to do. fp16 is there for tensor cores: on a CPU autocast
# computes in it slowest of all, and the Trainer computes in float32 and says nothing.
NEED_GPU = {
    **{
        name: (lambda value: value not in (None, False, "auto"), f"drop {name}")
        for name in ("offload", "cuda_graphs", "memory_budget")
    },
    "fp16": (bool, "drop fp16, or set bf16=True in its place"),
    "mixed_precision": (lambda value: value == "fp16", "set mixed_precision=bf16, or off"),
}
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
            value = getattr(active[name], "value", active[name])  # of an enumeration as users write it
            raise UserError(f"{name} must be {meaning}, not {value}")
    for together, sentence in CONFLICTS:
        if all(active.get(name) in refused for name, refused in together.items()):
            raise UserError(sentence.format(**active))
    import torch  # which takes seconds: what is wrong without it is told by now

    present = torch.cuda.is_available()
    if active.get("device") == "cuda" and not present:
        raise UserError("device cuda: torch sees no GPU here; install a torch with CUDA, or set device=cpu")
    on_gpu = present and not active.get("use_cpu") and active.get("device") != "cpu"
    preset = active.get("preset")
    for name, (asks, hint) in NEED_GPU.items():
        if not on_gpu and asks(active.get(name)):
            if preset in PRESETS and name in PRESETS[preset].settings:
                hint = f"preset={preset} asks for it, preset=default does not"
            raise UserError(f"{name}={active[name]} needs a GPU, and this would run on the CPU: {hint}")
    for name, package in NEED_PACKAGE.items():
        if active.get(name) and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{name} needs the package {package}: pip install {package}, or drop {name}")
    for group in groups:
        if check := getattr(group, "check", None):
            check()
    if active.get("push_to_hub"):
        _check_hub(active["hub_model_id"], active["hub_token"])


def _check_hub(name: str | None, token: str | None) -> None:
    """UserError unless the hub answers, and knows whose token it is; the Trainer asks it once the model is loaded."""
    from huggingface_hub import HfApi  # its modules are many, and few runs push
    from huggingface_hub.utils import HFValidationError, validate_repo_id

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
