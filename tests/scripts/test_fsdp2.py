"""parallel=fsdp2: two processes that share the weights train as one does, as DDP does, and as if never stopped."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_gsm8k
from hyclora.models.sharding import is_unit, local
from hyclora.utils.errors import Interrupted
from hyclora.utils.trainer import HycloraTrainer
from tests.helpers.ranks import run_ranks
from tests.helpers.small_models import largest_error

STEPS = 4
TRAIN_STEP = HycloraTrainer.training_step


def drive(folder: Path, model: Path, *options: str) -> dict | None:
    """A run with its results in folder, and what they are on the first process."""
    argv = ["--model_dir", str(model.parent), "--model_name", model.name, "--output_dir", str(folder)]
    argv += ["--max_train_samples", "40", "--max_eval_samples", "3", "--eval_batch_size", "1", "--save_steps", "2"]
    argv += ["--max_steps", str(STEPS), "--iteration_threshold", "2", "--logging_steps", "1", "--learning_rate", "1e-3"]
    argv += ["--per_device_train_batch_size", "2", "--max_new_tokens", "3", "--use_cpu", "True"]
    argv += ["--disable_tqdm", "True", "--evaluate_before", "True", "--target_modules", "q_proj", "down_proj", *options]
    return run_gsm8k.DRIVER.run(run_gsm8k.DRIVER.parse(argv), argv)


def losses(found: dict) -> list[float]:
    return [entry["loss"] for entry in found["log_history"] if "loss" in entry]


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*/adapter_model.safetensors")
    return load_file(file)


def watch(trainer: HycloraTrainer, *args):
    """A training step, of a model whose layers are sharded one by one."""
    layers = trainer.model.get_base_model().model.layers
    assert is_unit(trainer.model) and all(map(is_unit, layers))
    weights = list(trainer.model.parameters())
    assert 0.4 < sum(local(p).numel() for p in weights) / sum(p.numel() for p in weights) < 0.6
    return TRAIN_STEP(trainer, *args)


def stopping_at(step: int):
    """Ctrl-C reaches the second process alone."""

    def training_step(trainer: HycloraTrainer, *args):
        if trainer.state.global_step + 1 == step and trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return watch(trainer, *args)

    return training_step


def train(rank: int, folder: str, model: str, stop: int, options: tuple[str, ...]) -> None:
    """By DDP, by fsdp2, and by fsdp2 with a stop: on the CPU, where torch sees a GPU too."""
    if not torch.cuda.is_available():
        torch._C._get_accelerator = lambda *_: torch.device("cuda")
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root, model = Path(folder), Path(model)
    options += ("--gradient_accumulation_steps", "1")
    found = [drive(root / "ddp", model, *options)]
    options += ("--parallel", "fsdp2")
    HycloraTrainer.training_step = watch
    found.append(drive(root / "fsdp2", model, *options))
    HycloraTrainer.training_step = stopping_at(stop)
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of {STEPS}"):
        drive(root / "stopped", model, *options)
    HycloraTrainer.training_step = watch
    found.append(drive(root / "stopped", model, *options, "--resume_from_checkpoint", "True"))
    if rank == 0:
        (root / "found.json").write_text(json.dumps(found))
    else:
        assert found == [None] * 3


@pytest.mark.parametrize(
    "stop, options", [(2, ("--load_in_4bit", "True")), (STEPS, ("--layer_type", "baseline", "--lora_rank", "1"))]
)
def test_two_processes(stop, options, tiny_llama_folder, tmp_path):
    """In 4 bit on NF4, and in all digits with adapters of which the second process has no row."""
    for name in ("ddp", "fsdp2", "stopped", "one"):
        (tmp_path / name).mkdir()
    run_ranks(train, tmp_path, str(tmp_path), str(tiny_llama_folder), stop, options)
    ddp, fsdp2, resumed = json.loads((tmp_path / "found.json").read_text())
    assert fsdp2["settings"]["TrainingArguments"]["parallel"] == "fsdp2"
    assert losses(resumed) == losses(fsdp2) == pytest.approx(losses(ddp), abs=1e-5)
    assert resumed["metrics"] == fsdp2["metrics"]
    assert fsdp2["buffered_bytes"] == ddp["buffered_bytes"]
    judged = [{name: both["before"] for name, both in found["metrics"].items()} for found in (ddp, fsdp2)]
    assert judged[0] == judged[1]
    expected = adapters(tmp_path / "fsdp2")
    assert largest_error(adapters(tmp_path / "stopped"), expected) == 0
    assert largest_error(expected, adapters(tmp_path / "ddp")) < 1e-4
    if "baseline" in options:
        one = drive(tmp_path / "one", tiny_llama_folder, *options, "--gradient_accumulation_steps", "2")
        assert losses(fsdp2) == pytest.approx(losses(one), abs=1e-4)
        assert {name: both["before"] for name, both in one["metrics"].items()} == judged[0]
        assert largest_error(expected, adapters(tmp_path / "one")) < 1e-3
