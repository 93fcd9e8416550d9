"""What a run is known by: the settings that have an effect, less those that leave its numbers as they are.

Settings are the JSON of `results.settings`: by the name of their group, then by their own, which is of one group only.
"""

import hashlib
import json
from pathlib import Path

from hyclora.models.config import LAUNCH

# A setting has an effect only with a value of another one that fits; that one has to have an effect itself.
NEEDS = {
    **dict.fromkeys(("data_dir", "train_file"), ("data_name", lambda name: name != "demo")),
    **dict.fromkeys(
        ("layer_type", "layers", "iteration_threshold", "layernorm_outlier_ratio", "attention", "scale_rule", *LAUNCH),
        ("use_hyclora", bool),
    ),
    **dict.fromkeys(("slot_savers", "verify", "memory_budget"), ("use_hyclora", bool)),
    "plan": ("memory_budget", bool),
    "verify_threshold": ("verify", bool),
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_init_type", "target_modules", "use_rslora"),
        ("use_lora", bool),
    ),
    "q_bit": ("layer_type", lambda name: name != "baseline"),
    "average_bits": ("q_bit", lambda bits: bits == "auto"),
    "softmax_outlier_ratio": ("attention", lambda core: core == "eager"),
    **dict.fromkeys(
        (
            "greedy",
            "max_new_tokens",
            "eval_batch_size",
            "evaluate_before",
            "stride",
            "eval_file",
            "eval_files",
            "eval_lengths",
        ),
        ("max_eval_samples", lambda limit: limit != 0),
    ),
    **dict.fromkeys(("temperature", "top_k", "top_p", "generation_seed"), ("greedy", lambda greedy: not greedy)),
    "num_train_epochs": ("max_steps", lambda steps: steps <= 0),
    "steps": ("evaluate_throughput", bool),
}

# What leaves the numbers of a training as they are: where the model, the data and the results lie (`content_of` knows
# what is in them), the name of settings that count one by one, what is reported and saved and when, how the result is
# evaluated, on which machine and in how many helping processes it runs, where packed bytes wait, how kernels are
# launched, whether padding is computed, whether gradients are verified first, and what happens
# where they are not finite.
FREE = {
    *(
        "model_dir",
        "tokenizer_dir",
        "data_dir",
        "train_file",
        "tests",
        "output_dir",
        "preset",
        "run_name",
        "resume_from_checkpoint",
    ),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "project", "include_num_input_tokens_seen"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "debug"),
    *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model"),
    *("enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "push_to_hub", "hub_token", "hub_model_id"),
    *("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    *("max_eval_samples", "greedy", "temperature", "top_k", "top_p", "max_new_tokens", "eval_batch_size"),
    *(
        "stride",
        "eval_file",
        "eval_files",
        "eval_lengths",
        "generation_seed",
        "evaluate_before",
        "test_prompts",
        "use_cache",
        "sweep",
        "sweep_gpus",
        "sweep_timeout",
        "sweep_minutes",
        "sweep_peers",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
    ),
    *("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("do_train", "do_eval", "do_predict", "use_cpu", "local_rank", "torch_empty_cache_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "num_gpus"),
    "parallel",  # of which the Trainer's fsdp tells
    *("verify", "verify_threshold", "non_finite"),
    *("memory_budget", "plan"),
    *LAUNCH,
}
_SAMPLES, _SAMPLE = 64, 2**16  # of a file: how many, all over it, and their bytes


def in_effect(name: str, values: dict) -> bool:
    """Whether the setting changes anything, given the values of all settings of the run."""
    other, fits = NEEDS.get(name, (None, bool))
    return other not in values or in_effect(other, values) and fits(values[other])


def identity(settings: dict[str, dict]) -> dict:
    """What tells a run from others: two runs with equal ones have the same numbers."""
    values = {name: value for group in settings.values() for name, value in group.items()}
    return {name: value for name, value in values.items() if name not in FREE and in_effect(name, values)}


def differences(theirs: dict, ours: dict) -> str:
    """The settings of two identities that differ, as `name: theirs / ours`."""
    names = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
    return ", ".join(f"{name}: {theirs.get(name, '(none)')} / {ours.get(name, '(none)')}" for name in names)


def content_of(source: str, rows: list[dict]) -> dict[str, str]:
    """Digests of what the settings name: the base weights in the folder `source` (of samples of them) and the rows.

    A hub id says by itself what it names.
    """
    weights = hashlib.sha256()
    for file in sorted(path for pattern in ("config.json", "*.safetensors") for path in Path(source).glob(pattern)):
        weights.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as content:
            for part in range(_SAMPLES):
                content.seek(file.stat().st_size * part // _SAMPLES)
                weights.update(content.read(_SAMPLE))
    return {
        "content of the base model": weights.hexdigest()[:12],
        "content of the training rows": digest_of(rows),
    }


def digest_of(rows: list[dict]) -> str:
    """What tells rows apart from others, in a few characters."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:12]
