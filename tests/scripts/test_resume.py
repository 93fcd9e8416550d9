"""Runs that end early: what is said about them, and which of them a resume goes on with, from which files."""

import errno
import json
import os
import re
import shutil
import signal
from collections import Counter

import pytest
import torch

import run_gsm8k
from hyclora.utils import driver, trainer
from hyclora.utils.errors import Finished
from hyclora.utils.loading import load_model
from hyclora.utils.metrics import evaluate_generation
from hyclora.utils.runs import checkpoints, run
from hyclora.utils.trainer import HycloraTrainer
from tests.helpers.drivers import run_script

RESUME = "--resume_from_checkpoint"


@pytest.fixture
def drive(tiny_llama_folder, tmp_path, capsys):
    """Run the driver; its exit code, and what it printed."""

    def drive(*options):
        given = (
            ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
            + ["--output_dir", str(tmp_path), "--max_train_samples", "40", "--max_eval_samples", "2"]
            + ["--max_steps", "4", "--iteration_threshold", "2", "--logging_steps", "1", "--save_steps", "1"]
            + ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_new_tokens", "4"]
            + ["--use_cpu", "True", "--disable_tqdm", "True", "--lora_rank", "4", *options]
        )
        return run_script(run_gsm8k.main, given, capsys)

    return drive


@pytest.fixture
def in_step(monkeypatch):
    """Do something in a training step; in_step(None) does nothing any more."""
    stock = HycloraTrainer.training_step

    def plan(step, action=None):
        def training_step(self, *args):
            if self.state.global_step + 1 == step:
                action()
            return stock(self, *args)

        monkeypatch.setattr(HycloraTrainer, "training_step", training_step)

    return plan


def ctrl_c(times=1):
    return lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(times)]


def runs(tmp_path):
    return sorted((f.parent for f in tmp_path.glob("*/settings.json")), key=lambda f: f.stat().st_mtime)


@pytest.fixture
def stopped(drive, in_step, tmp_path):
    """The folder of a run that was stopped at step 2 of 4."""

    def stopped(*options):
        before = set(runs(tmp_path))
        in_step(2, ctrl_c())
        code, said = drive(*options)
        (folder,) = set(runs(tmp_path)) - before
        assert code == 130 and f"{RESUME} {folder / 'checkpoint-2'}" in said
        assert "step 2 of 4" in said
        in_step(None)
        return folder

    return stopped


def content(folder):
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.parent.rglob("*") if file.is_file()}


@pytest.fixture
def trained(monkeypatch):
    """Tokens that are no padding, by the folder of the run that computed them."""
    stock, found = HycloraTrainer.compute_loss, Counter()

    def compute_loss(self, model, inputs, *args, **kwargs):
        found[self.args.output_dir] += int(inputs["attention_mask"].sum())
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(HycloraTrainer, "compute_loss", compute_loss)
    return found


def test_the_run_with_equal_settings_is_resumed_not_the_newest(drive, stopped, tmp_path, trained):
    wanted = stopped("--seed", 1)
    other = stopped("--seed", 2)
    before = {file: state for file, state in content(other).items() if other.name in str(file)}
    code, said = drive("--seed", 1, RESUME, True, "--save_steps", 2, "--temperature", 0.5)
    assert code == 0 and f"resuming {wanted / 'checkpoint-2'} at step 2" in said
    assert [file.stem for file in tmp_path.glob("*.json")] == [wanted.name]
    assert before == {file: state for file, state in content(other).items() if other.name in str(file)}
    found = json.loads((tmp_path / f"{wanted.name}.json").read_text())
    assert [entry["step"] for entry in found["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert found["train"]["tokens"] == trained[str(wanted)] > trained[str(other)]
    assert f"{found['train']['tokens_per_second']:.0f}" in said


@pytest.mark.parametrize(
    "options, named",
    [
        (["--seed", 12], "seed: 11 / 12"),
        (["--learning_rate", 0.001, "--lora_dropout", 0.1], "learning_rate: 0.0003 / 0.001, lora_dropout: 0.0 / 0.1"),
        (["--lora_rank", 8], "lora_rank: 4 / 8"),
        (["--use_hyclora", False], "use_hyclora: True / False"),
        (["--max_train_samples", 30], "content of the training rows: "),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(drive, stopped, monkeypatch, options, named):
    folder = stopped()
    before = content(folder)
    monkeypatch.setattr(driver, "load_model", lambda *args: pytest.fail("the model was loaded"))
    for resume in (True, folder, folder / "checkpoint-1"):
        code, said = drive(*options, RESUME, resume)
        assert code == 2 and named in said and folder.name in said
    assert content(folder) == before


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "adapter_model.safetensors"),
        lambda folder: cut(folder / "optimizer.pt"),
        lambda folder: cut(folder / "trainer_state.json"),
        lambda folder: (folder / "hyclora_calibration.safetensors").unlink(),
        lambda folder: shutil.copy(folder / "adapter_model.safetensors", folder / "hyclora_calibration.safetensors"),
        lambda folder: (folder / "checksums.json").unlink(),
        lambda folder: cut(folder / "checksums.json"),
    ],
    ids=["adapter", "optimizer", "state", "no calibration", "foreign calibration", "not ended", "sums"],
)
def test_a_torn_checkpoint_is_passed_over_but_refused_by_name(drive, stopped, monkeypatch, damage):
    folder = stopped()
    damage(folder / "checkpoint-2")
    before = content(folder)
    code, said = drive(RESUME, folder / "checkpoint-2")
    assert code == 2 and "checkpoint-2 cannot be resumed, " in said
    assert content(folder) == before
    for resume in (True, folder):
        with monkeypatch.context() as patch:
            patch.setattr(driver, "load_model", lambda *args: ctrl_c()())
            code, said = drive(RESUME, resume)
        assert "checkpoint-2 is passed over: " in said and f"resuming {folder / 'checkpoint-1'} at step 1" in said
        assert code == 130 and f"{RESUME} {folder / 'checkpoint-1'}" in said


def test_foreign_folders_are_refused(drive, stopped, tmp_path):
    folder = stopped()
    other = stopped("--seed", 2)
    shutil.rmtree(folder / "checkpoint-2")
    shutil.copytree(other / "checkpoint-2", folder / "checkpoint-2")
    assert "written by a run of other settings" in drive(RESUME, folder / "checkpoint-2")[1]
    (folder / "settings.json").unlink()
    code, said = drive(RESUME, folder / "checkpoint-1")
    assert code == 2 and "no readable settings.json" in said


def test_a_finished_run_says_so_and_trains_no_more(drive, in_step, tmp_path):
    assert drive()[0] == 0
    (folder,) = runs(tmp_path)
    before = content(folder)
    in_step(5, lambda: pytest.fail("a step more"))
    for resume in (True, folder, folder / "checkpoint-4"):
        code, said = drive(RESUME, resume)
        assert code == Finished.exit_code and f"{folder} is finished, its results are in {folder}.json" in said
    assert content(folder) == before


def evaluations(n, then):
    """evaluate_generation for n times, and then something else."""
    left = iter(range(n))
    return lambda *args: then() if next(left, None) is None else evaluate_generation(*args)


@pytest.mark.parametrize(
    "options",
    [
        ["--evaluate_before", True],
        ["--use_hyclora", False, "--bf16", True],
        ["--load_in_4bit", True, "--lora_init_type", "pissa", "--lora_dropout", 0.1],
    ],
    ids=str,
)
def test_an_interrupted_last_evaluation_is_made_up_for(drive, monkeypatch, tmp_path, options):
    drive(*options)
    (whole,) = tmp_path.glob("*.json")
    expected, predictions = json.loads(whole.read_text()), whole.with_suffix("") / "predictions.json"
    predicted = predictions.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(run_gsm8k, "evaluate_generation", evaluations(["--evaluate_before"] == options[:1], ctrl_c()))
        code, said = drive(*options)
    folder = runs(tmp_path)[-1]
    assert code == 130 and "the training is done, the evaluation is not" in said
    assert f"{RESUME} {folder / 'checkpoint-4'}" in said
    monkeypatch.setattr(HycloraTrainer, "training_step", lambda *args: pytest.fail("a step more"))
    monkeypatch.setattr(run_gsm8k, "evaluate_generation", evaluations(1, lambda: pytest.fail("evaluated again")))
    code, said = drive(*options, RESUME, True)
    found = json.loads((tmp_path / f"{folder.name}.json").read_text())
    assert code == 0 and (folder / "predictions.json").read_text() == predicted
    for name in ("metrics", "final_loss", "buffered_bytes"):
        assert found[name] == expected[name], name
    assert found["train"]["tokens"] == expected["train"]["tokens"]


def test_the_last_whole_checkpoint_lives_until_the_next_one_is_whole(drive, tmp_path, monkeypatch):
    def seal(folder, stock=checkpoints.seal):
        stock(folder) if folder.name != "checkpoint-3" else fail(FULL)()

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seal", seal)
        code, said = drive("--save_total_limit", "1")
    (folder,) = runs(tmp_path)
    assert code == 1 and "the newest checkpoint is of step 2 of 4" in said
    code, said = drive("--save_total_limit", "1", RESUME, True)
    assert code == 0 and [c.name for c in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_run_is_one_by_whatever_path(stopped, drive, tmp_path):
    folder = stopped()
    link = tmp_path / "link"
    link.symlink_to(folder)
    code, said = drive(RESUME, link / "checkpoint-2")
    assert code == 0 and (tmp_path / f"{folder.name}.json").is_file() and not (tmp_path / "link.json").exists()
    assert "is finished" in drive(RESUME, link)[1]


def test_a_run_name_is_the_name_of_a_folder(drive):
    code, said = drive("--run_name", "a/b")
    assert code == 2 and "run_name a/b is no name of a folder" in said


def fail(error):
    def raising(*args):
        raise error

    return raising


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "stage, action, code, said",
    [
        ("load_model", ctrl_c(), 130, "interrupted; no checkpoint was written; start again: python "),
        ("evaluate_generation", ctrl_c(), 130, "interrupted; no checkpoint was written; start again: python "),
        ("load_model", fail(torch.OutOfMemoryError()), 1, "out of memory; no checkpoint was written; start again with"),
        (3, ctrl_c(2), 130, "interrupted; the newest checkpoint is of step 2 of 4; go on with: python "),
        (3, fail(FULL), 1, "is full; free some space; the newest checkpoint is of step 2 of 4; go on with: python "),
        (3, fail(RuntimeError("CUDA out of memory")), 1, "checkpoint-2 is from before that; start again with smaller"),
        (1, fail(RuntimeError("PytorchStreamWriter failed")), 1, "is full; free some space; no checkpoint"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_endings(drive, in_step, monkeypatch, stage, action, code, said):
    if isinstance(stage, int):
        in_step(stage, action)
    else:
        owner = run_gsm8k if stage == "evaluate_generation" else driver
        monkeypatch.setattr(owner, stage, lambda *args: action())
    ended, printed = drive("--evaluate_before", stage == "evaluate_generation")
    assert (ended, said in printed) == (code, True), printed
    assert ("--per_device_train_batch_size 1 --gradient_accumulation_steps 2" in printed) == (
        "start again with" in said
    )


GIB = 2**30


@pytest.mark.parametrize(
    "room, said",
    [
        (None, "start again with smaller batches: "),
        ((2 * GIB, 64 * GIB), "by the plan there is room for it in 2.00 GiB with --offload True --cuda_graphs False ("),
        ((GIB, 64 * GIB), "go on with: "),
    ],
    ids=["CPU", "fits", "nothing fits"],
)
def test_a_batch_without_room_is_named_and_the_checkpoint_goes_on(drive, monkeypatch, tmp_path, room, said):
    stock = HycloraTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training and self.state.global_step == 2:
            found.append(tuple(inputs["input_ids"].shape))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return stock(self, model, inputs, *args, **kwargs)

    found = []
    with monkeypatch.context() as patch:
        patch.setattr(HycloraTrainer, "compute_loss", compute_loss)
        patch.setattr(run, "available", lambda device: room)
        code, printed = drive("--evaluate_before", False)
    (folder,), (rows, tokens) = runs(tmp_path), found[0]
    assert code == 1 and f"error: out of memory at a batch of {rows} x {tokens} tokens; " in printed and said in printed
    assert f"{folder / 'checkpoint-2'} is from before" in printed or f"{RESUME} {folder / 'checkpoint-2'}" in printed
    code, printed = drive(RESUME, True)
    assert code == 0 and f"resuming {folder / 'checkpoint-2'} at step 2" in printed


def test_a_loss_that_is_not_finite_is_started_again_with_less_or_skipped(drive, monkeypatch, tmp_path):
    stock = HycloraTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = stock(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 2 else loss

    monkeypatch.setattr(HycloraTrainer, "compute_loss", compute_loss)
    code, said = drive()
    assert code == 1 and "step 3 has a loss or gradients that are not finite: " in said
    assert "checkpoint-2 is from before that" in said and "--learning_rate 0.0001" in said
    (folder,) = runs(tmp_path)
    assert "or go on without such steps: python " in said
    assert said.endswith(f"{RESUME} {folder / 'checkpoint-2'} --non_finite skip\n")
    code, said = drive(RESUME, folder / "checkpoint-2", "--non_finite", "skip")
    assert code == 0 and re.search(r"steps that were not finite, skipped +1\n", said)


def test_a_weight_that_was_loaded_broken_asks_for_no_other_learning_rate(drive, monkeypatch):
    def load(*args):
        model = load_model(*args)
        next(p for p in model.parameters() if not p.requires_grad).data[0, 0] = float("nan")
        return model

    monkeypatch.setattr(driver, "load_model", load)
    code, said = drive()
    assert code == 1 and "the frozen weight base_model.model.model.embed_tokens.weight is not finite" in said
    assert "copy its weights again; no checkpoint was written; start again: " in said and "--learning_rate" not in said
