"""Calibration in the checkpoints of a user's own Trainer."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainingArguments

from hyclora import CalibrationCallback, HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch
from hyclora.models.state import FILE_NAME
from tests.helpers.small_models import gradients, llama, padded_batch

TOLD = "calibration begins anew"
ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(0, 128, (32, 16), generator=torch.Generator()).tolist()
]
THRESHOLD = 8  # forwards, two a step: step 3 calibrates


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Momentum(torch.optim.Optimizer):
    """In float32 whatever the weights are in, as some optimizers keep theirs for weights of 16 bit."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p, dtype=torch.float32))
                p.sub_(mean.mul_(0.7).add_(p.grad.float()), alpha=group["lr"])


@pytest.fixture
def train(tmp_path):
    def train(*callbacks, resume=None, output=tmp_path / "run", lora=None, dtype=torch.float32, **options):
        """Losses of the run from the step on that it went on with, its adapters and what it calibrated."""
        model = llama({"lora_dropout": 0.1} | (lora or {})).to(dtype)
        arguments = TrainingArguments(
            str(output), max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=2, use_cpu=True,
            gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=list(callbacks), **options)
        apply_hyclora(model, HycloraConfig(q_bit=2, iteration_threshold=THRESHOLD))
        trainer.train(resume_from_checkpoint=resume)
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        return losses, {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}, find_patch(model)

    return train


@pytest.fixture
def stopped(train, tmp_path):
    """The folder of a run of 6 steps that ended after 3."""
    train(CalibrationCallback(), StopAt(3))
    return tmp_path / "run"


MOMENTUM = {"optimizer_cls_and_kwargs": (Momentum, {"lr": 1e-2})}


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16} | MOMENTUM],
    ids=["float32", "bfloat16", "bfloat16, an optimizer in float32"],
)
def test_a_resumed_run_is_bit_equal_to_one_without_a_stop(train, tmp_path, caplog, options):
    """Where the checkpoint has calibration under way. PEFT makes adapters float32 as it loads them."""
    losses, adapters, _ = train(CalibrationCallback(), output=tmp_path / "whole", **options)
    train(CalibrationCallback(), StopAt(3), **options)
    caplog.clear()
    found, ours, patch = train(CalibrationCallback(), resume=True, **options)
    assert found == losses and patch.step.index == 12
    assert all(torch.equal(ours[name], p) for name, p in adapters.items())
    assert TOLD not in caplog.text and ("they are as saved again" in caplog.text) is ("dtype" in options)
    with safe_open(tmp_path / "run/checkpoint-3" / FILE_NAME, "pt") as file:
        assert '"index": 6' in file.metadata()["calibration"]


def test_of_several_processes_adapters_stay_as_they_were_loaded(train, tmp_path, caplog, monkeypatch):
    """DDP would not take gradients of another dtype."""
    train(CalibrationCallback(), StopAt(3), dtype=torch.bfloat16)
    begin = CalibrationCallback.on_train_begin
    of_two = SimpleNamespace(world_size=2, output_dir=str(tmp_path / "run"), resume_from_checkpoint=None)
    monkeypatch.setattr(
        CalibrationCallback, "on_train_begin", lambda self, _, *args, **has: begin(self, of_two, *args, **has)
    )
    _, adapters, _ = train(CalibrationCallback(), resume=True, dtype=torch.bfloat16)
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert "they stay float32, as DDP has begun: this is another run" in caplog.text


@pytest.mark.parametrize("lora", [{}, {"init_lora_weights": "olora"}], ids=["B = 0", "B not 0"])
def test_a_checkpoint_without_calibration_is_told_once(train, tmp_path, caplog, lora):
    train(StopAt(3), lora=lora)
    caplog.clear()
    _, _, patch = train(CalibrationCallback(), resume=True, lora=lora)
    folder = tmp_path / "run/checkpoint-3"
    assert caplog.text.count(TOLD) == 1 and f"{folder} has no {FILE_NAME}" in caplog.text
    assert patch.step.index == 6
    assert (tmp_path / "run/checkpoint-6" / FILE_NAME).is_file()


def test_a_checkpoint_that_was_moved_has_to_be_named(train, stopped, tmp_path):
    moved = shutil.move(stopped / "checkpoint-3", tmp_path / "elsewhere")
    other = tmp_path / "other"
    with pytest.raises(ValueError, match=r"of step 3 that is resumed is not .*other/checkpoint-3: say where"):
        train(CalibrationCallback(), resume=str(moved), output=other)
    _, _, patch = train(CalibrationCallback(moved), resume=str(moved), output=other)
    assert patch.step.index == 12


def test_another_runs_checkpoint_of_the_same_step_is_not_taken(train, stopped, tmp_path):
    state = stopped / "checkpoint-3/trainer_state.json"
    shutil.copytree(stopped / "checkpoint-3", tmp_path / "elsewhere")
    state.write_text(state.read_text().replace('"loss": ', '"loss": 1'))
    with pytest.raises(ValueError, match="say where it is"):
        train(CalibrationCallback(), resume=str(tmp_path / "elsewhere"))


def test_a_torn_calibration_is_refused(train, stopped):
    file = stopped / "checkpoint-3" / FILE_NAME
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{FILE_NAME} is torn, or no calibration"):
        train(CalibrationCallback(), resume=True)


def test_a_stock_model_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(llama(), arguments, train_dataset=ROWS, callbacks=[CalibrationCallback()])
    with pytest.raises(ValueError, match="call apply_hyclora first"):
        trainer.train()


def zero(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    return model


@pytest.mark.parametrize(
    "model, config, told",
    [
        (llama, {}, 1),
        (lambda: zero(llama()), {}, 0),
        (lambda: llama({"init_lora_weights": "olora"}), {}, 0),
        (llama, {"layer_type": "baseline"}, 0),
    ],
    ids=["trained", "new", "new, B not 0", "nothing to calibrate"],
)
def test_any_loop_says_that_trained_adapters_are_calibrated_anew(model, config, told, caplog):
    """Once, and not as calibration goes on."""
    model = model()
    apply_hyclora(model, HycloraConfig(**config))
    for _ in range(2):
        gradients(model, padded_batch())
    assert caplog.text.count(TOLD) == told
    remove_hyclora(model)
