"""The command line: names, defaults and types of the options, and what is refused."""

import dataclasses
import importlib
import json

import pytest
from transformers.trainer_utils import SchedulerType

from hyclora.models.config import HycloraConfig
from hyclora.utils.args import HycloraArguments, Parser
from hyclora.utils.errors import UserError
from hyclora.utils.training_arguments import TrainingArguments
from run_gsm8k import DRIVER

SHARED = ("--parallel", "fsdp2", "--num_gpus", "2", "--use_cpu", "True")


def parse(*argv):
    return dict(zip([group.__name__ for group in DRIVER.groups], DRIVER.parse(list(argv)), strict=True))


def test_every_field_of_the_core_is_an_option_with_its_default_and_help():
    assert parse()["HycloraArguments"].config() == HycloraConfig()
    options = {f.name: f for f in dataclasses.fields(HycloraArguments)}
    for f in dataclasses.fields(HycloraConfig):
        if f.name == "largest_batch":  # looked up in the rows
            continue
        assert options[f.name].metadata["help"].startswith(f.metadata["help"])


def test_every_own_option_has_help():
    for group in DRIVER.groups:
        for f in dataclasses.fields(group):
            assert f.metadata.get("help") or group is TrainingArguments, f"{group.__name__}.{f.name}"


@pytest.mark.parametrize("text, value", [("2", 2), ("3", 3), ("4", 4), ("8", 8), ("auto", "auto")])
def test_q_bit_is_a_number_or_auto(text, value):
    assert parse("--q_bit", text)["HycloraArguments"].config().q_bit == value


def test_a_preset_sets_what_is_not_given():
    given = HycloraArguments(preset="least_memory", q_bit="2", offload=False)
    assert given.config() == HycloraConfig.preset("least_memory", q_bit=2, offload=False)
    assert (given.q_bit, given.offload, given.cuda_graphs) == (2, False, True)


@pytest.mark.parametrize("text, value", [("True", True), ("false", False), ("1", True), ("auto", "auto")])
@pytest.mark.parametrize("name", ["cuda_graphs", "stream"])
def test_a_switch_can_be_auto(name, text, value):
    assert repr(getattr(parse(f"--{name}", text, "--use_hyclora", "False")["HycloraArguments"], name)) == repr(value)
    with pytest.raises(UserError, match=f"argument --{name}.*perhaps is not True, False or auto"):
        parse(f"--{name}", "perhaps")


def test_slot_savers_are_written_as_json():
    arguments = parse("--slot_savers", '{"gate": "exact"}')["HycloraArguments"]
    assert arguments.config().slot_savers == {"gate": "exact"}


def test_what_layers_keep_is_a_text():
    arguments = parse("--layers", "8*slots,input4")["HycloraArguments"]
    assert arguments.config().layers == "8*slots,input4" and parse()["HycloraArguments"].layers == "slots"


def test_training_defaults_are_the_papers():
    training = parse()["TrainingArguments"]
    assert training.learning_rate == 3e-4
    assert training.num_train_epochs == 6
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert training.seed == 11
    # 6 epochs of 467 steps warm up for 85, as in the paper's logs.
    assert training.get_warmup_steps(2802) == 85
    assert training.report_to == []
    assert training.ddp_find_unused_parameters is False


@pytest.mark.parametrize("available", [True, False])
def test_bf16_is_on_exactly_on_a_gpu(available, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 1, raising=False)
    assert TrainingArguments().bf16 is available
    assert TrainingArguments(bf16=False).bf16 is False
    assert TrainingArguments(use_cpu=True).bf16 is False


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--q_bits", "4"], "--q_bits: did you mean --q_bit"),
        (["--learning_rte", "1"], "did you mean --learning_rate"),
        (["surplus"], "surplus"),
        (["--packing", "True"], "unknown option --packing .see --help."),
        (["--warm-up-steps=10"], "unknown option --warm-up-steps=10: did you mean --warmup_steps?"),
        (["--lr", "1"], "unknown option --lr .see --help."),
        (["--lora_r", "8"], "did you mean --lora_rank?"),
        (["--epochs", "3"], "unknown option --epochs: did you mean --num_train_epochs?"),
        (["--batch_size", "4"], "did you mean --eval_batch_size, .*--per_device_train_batch_size"),
        (["--preset", "quick"], "quick"),
        (["--lora_rank", "0"], "lora_rank"),
        (["--lora_rank", "many"], "lora_rank"),
        (["--lora_dropout", "1"], "lora_dropout"),
        (["--lora_init_type", "zeros"], "zeros"),
        (["--temperature", "0"], "--greedy"),
        (["--data_dir", "somewhere"], "would be ignored with data_name demo"),
        (["--data_name", "json"], "needs --data_dir"),
        (["--seq_len", "1"], "seq_len"),
        (["--output_dir", ""], "output_dir is empty: name a folder for the results"),
        (["--output_dir", " "], "output_dir is empty"),
        (["--model_name", ""], "model_name is empty: name a folder in model_dir"),
        (["--run_name", " "], "run_name is empty: drop it"),
        (["--resume_from_checkpoint", ""], "resume_from_checkpoint is empty: write True, or a checkpoint"),
        (["--lr_scheduler_kwargs", " "], "lr_scheduler_kwargs must be a JSON object such as .*, not ' '"),
        (["--gradient_checkpointing_kwargs", "[1]"], "gradient_checkpointing_kwargs must be a JSON object"),
        (["--gradient_checkpointing_kwargs", ""], "gradient_checkpointing_kwargs must be a JSON object"),
        (
            ["--gradient_checkpointing_kwargs", '{"x": 1}'],
            "_kwargs: checkpoint knows no x, only context_fn",
        ),
        (["--lr_scheduler_kwargs", '{"x": 1}'], "lr_scheduler_type=cosine cannot be made .*unexpected keyword.* 'x'"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type=warmup_stable_decay cannot be made"),
        (["--optim_args", " "], "optim_args ' ' is not NAME=VALUE, with commas in between"),
        (["--torch_compile_backend", ""], "torch_compile_backend '' is none of eager, aot_eager, inductor, "),
        (["--torch_compile_mode", ""], "torch_compile_mode '' is none of default, "),
        (["--torch_compile_mode", "quick"], "torch_compile_mode 'quick' is none of default, "),
        (["--slot_savers", "[1]"], "slot_savers must be a JSON object"),
        (["--lr_scheduler_type", "sawtooth"], "sawtooth"),
        (["--learning_rate", "0"], "learning_rate must be a positive number, not 0"),
        (["--learning_rate", "nan"], "learning_rate must be a positive number, not nan"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1"),
        (["--num_train_epochs", "-1"], "num_train_epochs must be a positive number"),
        (["--max_steps", "0"], "max_steps must be at least 1"),
        (["--seed", "4294967296"], r"seed must be a whole number from 0 to 2\*\*32 - 1, not 4294967296"),
        (["--data_seed", "-1"], r"data_seed must be a whole number from 0 to 2\*\*32 - 1, not -1"),
        (["--generation_seed", "9" * 18], "generation_seed must be a whole number from 0 to"),
        (["--per_device_train_batch_size", "9" * 19], f"{'9' * 19} is no whole number of at most 18 digits"),
        (["--max_steps", "2.5"], "2.5 is no whole number of at most 18 digits"),
        (["--lora_rank", "9" * 18], "lora_rank must be positive, of at most 9 digits, not 999"),
        (["--load_best_model_at_end", "True"], "load_best_model_at_end needs evaluations in between"),
        (["--eval_strategy", "steps", "--eval_steps", "5"], "before and after the training, not steps"),
        (["--fsdp", "True"], "fsdp: the scripts share weights by parallel=fsdp2 and in no other way; drop it"),
        (["--deepspeed", "zero3.json"], "deepspeed: the scripts share weights by parallel=fsdp2"),
        (["--parallel", "fsdp2"], "parallel=fsdp2 shares the weights among processes, and this is one: set num_gpus"),
        ([*SHARED, "--verify", "True"], "verify compares whole gradients: verify in a run with parallel=ddp"),
        ([*SHARED, "--offload_embeddings", "True"], "offload_embeddings=True needs the whole table"),
        ([*SHARED, "--lora_init_type", "pissa"], "lora_init_type=pissa is saved by whole ones"),
        ([*SHARED, "--save_only_model", "True"], "save_only_model=True leaves out what resumes them"),
        (
            ["--fp16", "True", "--use_cpu", "True"],
            "fp16=True needs a GPU, and this would run on the CPU: drop fp16, or",
        ),
        (
            ["--preset", "paper", "--fp16", "True", "--use_cpu", "True"],
            "fp16=True needs a GPU, and this would run on the CPU: drop fp16, or set bf16=True in its place",
        ),
        (
            ["--preset", "paper", "--cuda_graphs", "True", "--use_cpu", "True"],
            "cuda_graphs=True needs a GPU, and this would run on the CPU: drop cuda_graphs",
        ),
        (["--offload", "True", "--use_cpu", "True"], "offload=True needs a GPU"),
        (["--cuda_graphs", "True", "--use_cpu", "True"], "cuda_graphs=True needs a GPU"),
    ],
)
def test_mistakes_are_refused_by_name(argv, named):
    with pytest.raises(ValueError, match=named) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_what_accelerate_launch_asks_for_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "false")
    parse()
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UserError, match=f"{name}: .* start one process a GPU with torchrun"):
        parse()


@pytest.mark.parametrize(
    "argv",
    [
        ["--optim_args", ""],
        ["--optim", "adamw_torch", "--optim_args", "a=1, b=2"],
        ["--gradient_checkpointing_kwargs", '{"use_reentrant": false, "preserve_rng_state": true}'],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'],
        ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 9999}'],
        ["--torch_compile_backend", "EAGER", "--torch_compile_mode", "reduce-overhead"],
    ],
)
def test_what_the_trainer_can_make_is_taken(argv):
    parse(*argv)


NEED_EVALUATIONS = (SchedulerType.REDUCE_ON_PLATEAU, "greedy")


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType if kind not in NEED_EVALUATIONS])
def test_every_schedule_can_be_had(kind):
    needs = {"cosine_with_min_lr": {"min_lr": 0}, "cosine_warmup_with_min_lr": {"min_lr": 0}}
    needs["warmup_stable_decay"] = {"num_decay_steps": 10}
    more = ["--lr_scheduler_kwargs", json.dumps(needs[kind])] if kind in needs else []
    parse("--lr_scheduler_type", kind, *more)


def test_an_option_is_not_guessed_from_its_beginning():
    with pytest.raises(UserError, match="unknown option --lora_ra"):
        parse("--lora_ra", "4")


def test_what_is_switched_off_is_not_checked():
    parse("--offload", "True", "--use_cpu", "True", "--use_hyclora", "False")
    parse("--num_train_epochs", "0", "--max_steps", "5")


def test_nf4_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        parse("--load_in_4bit", "True")


@pytest.mark.parametrize(
    "argv, missing, named",
    [
        (["--report_to", "wandb"], "is_wandb_available", "report_to: WandbCallback requires wandb to be installed"),
        (["--report_to", "guestbook"], None, "report_to: guestbook is not supported"),
        (["--optim", "lomo"], "is_lomo_available", "optim: You need to install `lomo_optim`"),
    ],
)
def test_what_the_trainer_lacks_is_told_at_once(monkeypatch, argv, missing, named):
    for module in ("transformers.integrations.integration_utils", "transformers.trainer_optimizer"):
        if missing and hasattr(importlib.import_module(module), missing):
            monkeypatch.setattr(f"{module}.{missing}", lambda: False)
    with pytest.raises(UserError, match=named) as caught:
        parse(*argv)
    assert "or drop" in str(caught.value) or "or choose another" in str(caught.value)


def test_liger_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="use_liger_kernel needs the package liger-kernel: pip install liger-kernel"):
        parse("--use_liger_kernel", "True")


@pytest.mark.parametrize("words", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj v_proj"], ["q_proj, v_proj"]])
def test_names_are_separated_as_one_likes(words):
    assert parse("--target_modules", *words)["LoraArguments"].target_modules == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match="target_modules names no layer"):
        parse("--target_modules", " , ")


def test_help_has_our_topics_first_and_lists_choices():
    text = " ".join(Parser(DRIVER.groups).format_help().split())
    topics = ["model:", "data:", "LoRA:", "HyC-LoRA:", "evaluation:", "Trainer:"]
    places = [text.index(f" {topic} --") for topic in topics]
    assert places == sorted(places) and text.index("--learning_rate LEARNING_RATE") > places[-1]
    for listed in (
        "--q_bit {2,3,4,8,auto}",
        "--layer_type {baseline,intra,",
        "--lr_scheduler_type {linear,",
        "{True,",
        "--stream [{True,False,auto}]",
    ):
        assert listed in text
    assert "--learning-rate" not in text
