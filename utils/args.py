"""Command line of every driver: one dataclass a topic, parsed together.

HyC-LoRA's options are read off the fields of `HycloraConfig`: a setting is named, documented and checked once. Nothing
here imports torch, which takes seconds that whoever mistypes an option need not wait; the Trainer's own arguments,
which cannot be without it, are in training_arguments.py.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hyclora.models.config import ATTENTION_CORES, BITS, OPEN, POLICIES, PRESETS, SCALE_RULES, SWITCH, HycloraConfig
from hyclora.models.verification import THRESHOLD
from hyclora.utils.checks import check_settings
from hyclora.utils.errors import UserError
from hyclora.utils.runs.identity import NEEDS, in_effect
from hyclora.utils.runs.script import SCRIPT, check_environment, nearest_options

ROOT = Path(__file__).resolve().parent.parent
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = "all-linear"


def option(default, help: str, choices=()):
    """A dataclass field with its help text, which lists the choices; to refuse others is left to their user."""
    listed = ",".join(map(str, choices))
    metadata = {"help": help} | ({"metavar": f"{{{listed}}}"} if choices else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def non_finite_option():
    """What a training loop asks about steps with NaN or infinity."""
    return option(
        "stop",
        "At a loss or gradients that are not finite: stop, or skip the step. With fp16 the GradScaler skips.",
    )


def require(condition: bool, sentence: str):
    if not condition:
        raise UserError(sentence)


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name: str = option("tiny-llama", "Checkpoint folder inside model_dir, or a hub id if model_dir is ''.")
    model_dir: str = option(str(ROOT / "ckpt"), "Folder of the checkpoints; '' takes model_name from the hub.")
    load_in_4bit: bool = option(False, "Keep the frozen linear weights in NF4 with double quantization (QLoRA).")
    random_weights: bool = option(False, "Benchmark a shape: random weights, only config and tokenizer are read.")
    tokenizer_dir: str = option("", "Folder of the tokenizer, for a shape that has none; '': the model's.")
    ignore_remote_code: bool = option(False, "Load a folder that asks for Python code of its own, without that code.")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "Of the base weights; auto: bfloat16 on a GPU.")


@dataclass
class DataArguments:
    """What every driver asks; its own class says which data_name there are, and what data_dir has to hold."""

    _argument_group_name = "data"

    data_name: str = option("demo", "Which data to train on and to evaluate.")
    data_dir: str = option("", "Folder or file of the data; '' downloads it.")
    seq_len: int = option(512, "Longest training row in tokens; a longer answer is cut.")
    max_train_samples: int | None = option(None, "Train on the first N rows only.")
    max_eval_samples: int | None = option(None, "Evaluate on the first N rows only; 0 skips the evaluation.")

    def __post_init__(self):
        require(
            not (self.data_name == "demo" and self.data_dir),
            f"data_dir {self.data_dir!r} would be ignored with data_name demo: "
            "say with --data_name what it is (--help lists the names), or drop data_dir",
        )
        require(self.seq_len >= 2, f"seq_len must be at least 2, not {self.seq_len}")
        require(
            self.max_train_samples is None or self.max_train_samples > 0,
            f"max_train_samples must be positive, not {self.max_train_samples}",
        )
        require(
            self.max_eval_samples is None or self.max_eval_samples >= 0,
            f"max_eval_samples must not be negative, not {self.max_eval_samples}",
        )


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"
    use_lora: ClassVar[bool] = True  # a driver that also trains all weights makes it an option

    lora_rank: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(16, "Adapters are scaled by lora_alpha / lora_rank.")
    lora_dropout: float = option(0.0, "Dropout on the input of the adapters.")
    lora_init_type: Literal["qlora", "gaussian", "pissa", "loftq"] = option("qlora", "How the adapters start.")
    target_modules: list[str] = option(
        LINEARS,
        "Names of the linear layers that get an adapter, with spaces or commas in between; all-linear: each one but "
        "those of the head.",
    )
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_rank) instead.")

    def __post_init__(self):
        require(0 < self.lora_rank < 10**9, f"lora_rank must be positive, of at most 9 digits, not {self.lora_rank}")
        require(self.lora_alpha > 0, f"lora_alpha must be positive, not {self.lora_alpha}")
        require(0 <= self.lora_dropout < 1, f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        self.target_modules = [name for words in self.target_modules for name in re.split(r"[,\s]+", words) if name]
        require(bool(self.target_modules), f"target_modules names no layer: name some, or {ALL_LINEAR}")
        require(
            ALL_LINEAR not in self.target_modules or len(self.target_modules) == 1,
            f"target_modules: {ALL_LINEAR} stands for all names: drop the others, or {ALL_LINEAR}",
        )


@dataclass
class EvalArguments:
    _argument_group_name = "evaluation"

    eval_batch_size: int = option(32, "Test rows evaluated at once.")
    evaluate_before: bool = option(False, "Also evaluate before training.")

    def __post_init__(self):
        require(self.eval_batch_size > 0, f"eval_batch_size must be positive, not {self.eval_batch_size}")


@dataclass
class GenerationArguments(EvalArguments):
    """Evaluation by answers that are generated."""

    greedy: bool = option(False, "Greedy decoding instead of the paper's sampling.")
    temperature: float = option(0.1, "Sampling temperature.")
    top_k: int = option(40, "Sample among the k most likely tokens.")
    top_p: float = option(0.95, "Sample among the most likely tokens that hold this probability together.")
    max_new_tokens: int = option(256, "Longest generated answer in tokens; 0: none, where losses tell too.")
    generation_seed: int = option(42, "Seed of the sampling.")

    def __post_init__(self):
        super().__post_init__()
        require(
            0 < self.temperature < math.inf,
            f"temperature must be a positive number, not {self.temperature}: use --greedy for argmax",
        )
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        require(self.top_k > 0, f"top_k must be positive, not {self.top_k}")
        require(self.max_new_tokens >= 0, f"max_new_tokens must not be negative, as {self.max_new_tokens} is")


@dataclass
class ProfileArguments:
    _argument_group_name = "measurement"

    seq_len: int = option(512, "Tokens of a sequence.")
    per_device_train_batch_size: int = option(4, "Sequences of a micro-step (a forward and a backward).")
    evaluate_memory: bool = option(True, "Measure what a micro-step allocates.")
    evaluate_throughput: bool = option(True, "Measure how fast micro-steps are.")
    compare: bool = option(True, "Measure plain LoRA too, without and with checkpointing.")
    gradient_checkpointing: bool = option(False, "Keep the layers' inputs alone, and run each layer again in backward.")
    steps: int = option(10, "Timed micro-steps.")
    warm_up_seq_len: int | None = option(None, "Warm up and calibrate on sequences this short; default: seq_len.")
    seed: int = option(11, "Of the random weights, adapters and tokens.")
    device: Literal["auto", "cuda", "cpu"] = option("auto", "Where to measure; auto: on a GPU if there is one.")
    output_dir: str = option(str(ROOT / "exp_results_memory_throughput"), "Folder of run_memory_throughput.jsonl.")

    def __post_init__(self):
        require(self.evaluate_memory or self.evaluate_throughput, "set evaluate_memory or evaluate_throughput to True")
        least = {"seq_len": 2, "warm_up_seq_len": 2, "per_device_train_batch_size": 1, "steps": 1}
        for name, n in least.items():
            given = getattr(self, name)
            enough = given is None or n <= given < 10**9
            require(enough, f"{name} must be at least {n}, and of at most 9 digits, not {given}")


def _option_of(config_field, kind) -> tuple[str, type, dataclasses.Field]:
    """A field of HycloraConfig as a command-line option without a value of its own: the preset has it.

    What is not a plain number or word is written as JSON.
    """
    kind = kind if kind in (bool, int, float, str) else bool if bool in typing.get_args(kind) else str
    name, default = config_field.name, getattr(HycloraConfig(), config_field.name)
    help = f"{config_field.metadata['help']} (without a preset: {default})"
    return name, kind, option(None, help, CHOICES.get(name, ()))


def _value_of(name: str, text):
    """What an option written as JSON means; a bare word is a string."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):  # no JSON, or numbers and nesting without end
        value = text
    value = text if value is None else value  # null is no value
    require(
        _KINDS[name] is not dict or isinstance(value, dict),
        f'{name} must be a JSON object such as {{"gate": "exact"}}, not {text}',
    )
    return value


CHOICES = {
    "layer_type": POLICIES,
    "q_bit": (*BITS, "auto"),
    "attention": ATTENTION_CORES,
    "scale_rule": SCALE_RULES,
}
DIGITS = 18  # torch and itertools count in 64 bits
FROM_ROWS = "largest_batch"  # is no option: what the scripts look up in their rows
_HYCLORA_FIELDS = [f for f in dataclasses.fields(HycloraConfig) if f.name != FROM_ROWS]
_KINDS = typing.get_type_hints(HycloraConfig)


def _switch(text: str) -> bool | str:
    """What a setting of config.SWITCH means."""
    try:
        return text if text in SWITCH else string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is not True, False or auto") from None


def _whole(text: str) -> int:
    """A whole number that torch has room for."""
    with contextlib.suppress(ValueError):
        if abs(int(text)) < 10**DIGITS:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is no whole number of at most {DIGITS} digits")


class _Configures:
    """Options named like HycloraConfig's fields: those that are not given get the value that the preset has."""

    def __post_init__(self):
        names = [f.name for f in _HYCLORA_FIELDS]
        given = {name: _value_of(name, getattr(self, name)) for name in names if getattr(self, name) is not None}
        config = HycloraConfig.preset(self.preset, **given)
        for name in names:
            setattr(self, name, getattr(config, name))
        asked = [name for name in ("verify", "memory_budget") if getattr(self, name)]
        asked += ["verify_threshold"] if self.verify_threshold is not None else []
        for name in [*(given if self.use_hyclora else ()), *asked]:
            if not in_effect(name, vars(self)):
                other = NEEDS[name][0]
                raise UserError(f"{name} has no effect with {other}={getattr(self, other)}: drop it or change {other}")
        if self.verify_threshold is None:
            self.verify_threshold = THRESHOLD
        require(
            -1 <= self.verify_threshold <= 1,
            f"verify_threshold must be a cosine, from -1 to 1, not {self.verify_threshold}",
        )

    def config(self) -> HycloraConfig:
        """With memory_budget what it leaves open is None, until `take` has said what it is."""
        planned = {"memory_budget": None} if self.plan else {}
        return HycloraConfig(**{f.name: getattr(self, f.name) for f in _HYCLORA_FIELDS} | planned)

    @property
    def has_budget(self) -> bool:
        """Whether a plan chooses settings."""
        return self.use_hyclora and self.memory_budget is not None

    def take(self, choice) -> None:
        """Have all settings as a plan chose them (utils/planning/budget.py)."""
        for name in OPEN | {"cuda_graphs": None}:
            setattr(self, name, getattr(choice.config, name))
        self.plan = str(choice)


HycloraArguments = dataclasses.make_dataclass(
    "HycloraArguments",
    [
        ("use_hyclora", bool, option(True, "Keep the activations compressed; False trains stock PEFT LoRA.")),
        ("preset", str, option("default", "Settings to begin with; the options below change them.", PRESETS)),
        *(_option_of(f, _KINDS[f.name]) for f in _HYCLORA_FIELDS),
        ("verify", bool, option(False, "Before training, compare the gradients of a few batches with exact LoRA's.")),
        (
            "verify_threshold",
            float | None,
            option(
                None, f"With verify: the smallest cosine of a weight's gradient to train with. Default: {THRESHOLD}."
            ),
        ),
        ("plan", str, field(init=False, default="", metadata={"help": "What memory_budget chose, and why."})),
    ],
    bases=(_Configures,),
    namespace={"_argument_group_name": "HyC-LoRA"},
)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(shown)


class Parser(HfArgumentParser):
    """Our options first, a group a topic, then the Trainer's; a mistake is one sentence, not a page of usage.

    defaults: values, by option, in place of those of the groups.
    """

    def __init__(self, groups, defaults=None, **kwargs):
        usage = "%(prog)s [--option value ...]"
        super().__init__(groups, usage=usage, allow_abbrev=False, formatter_class=_Help, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool:
                can_be_auto = {bool, str} <= {*typing.get_args(_KINDS.get(action.dest))}
                action.metavar = "{True,False,auto}" if can_be_auto else "{True,False}"
                action.type = _switch if can_be_auto else string_to_bool
            elif action.type is int:
                action.type = _whole
            elif action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS
        self.set_defaults(**(defaults or {}))

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parse_arguments(argv: list[str] | None, groups, defaults: dict | None = None) -> tuple:
    """One filled instance of each group; a `UserError` names what cannot be understood, or cannot work."""
    parser = Parser(groups, defaults)
    known = [name for action in parser._actions for name in action.option_strings]
    check_environment(known)
    *filled, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    require(
        f"--{FROM_ROWS}" not in [word.partition("=")[0] for word in unknown]
        and not (SCRIPT in os.environ and os.environ.get(FROM_ROWS)),
        f"{FROM_ROWS} is of HycloraConfig alone: the scripts look up the largest batch of their rows; drop it",
    )
    if unknown:
        near = ", ".join(nearest_options(unknown[0], known))
        raise UserError(f"unknown option {unknown[0]}" + (f": did you mean {near}?" if near else " (see --help)"))
    check_settings(filled)
    return tuple(filled)
