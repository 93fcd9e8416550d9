"""Hugging Face's Trainer with gradient checkpointing that is recorded: evaluation, switches and stops in between."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hyclora import CalibrationCallback
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import CALIBRATION, Rerun, graphed
from tests.helpers.small_models import llama
from tests.models.test_stream import half

LENGTHS = torch.randint(5, 40, (48,), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = [{"input_ids": list(range(i, i + n)), "labels": list(range(i, i + n))} for i, n in enumerate(LENGTHS)]
STOP, OFF, ON, LAST = 3, 5, 7, 10


def pad(rows: list[dict]) -> dict:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {n: torch.tensor([row[n] + [fill[n]] * (longest - len(row[n])) for row in rows]) for n in fill}
    return batch | {"attention_mask": (batch["labels"] != -100).long()}


class Switch(TrainerCallback):
    """Checkpointing is off from one step on, and on again from another; the run may stop early."""

    def __init__(self, last: int):
        self.last = last

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == OFF:
            model.gradient_checkpointing_disable()
        if state.global_step == ON:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        control.should_training_stop = state.global_step == self.last


def train(folder, savers: dict, replays: bool, last: int = LAST, resume: bool = False) -> tuple:
    """Losses by step, of training and evaluation, adapters, and the graphs."""
    model = half(llama({"lora_dropout": 0.1}))
    for p in model.parameters():  # adapters as PEFT makes them, and loads them in any case
        p.data = p.data.float() if p.requires_grad else p.data
    arguments = TrainingArguments(
        str(folder), max_steps=LAST, save_steps=STOP, logging_steps=1, eval_strategy="steps", eval_steps=2,
        report_to=[], per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=1e-2,
        use_cpu=DEVICE == "cpu", gradient_checkpointing=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    callbacks = [CalibrationCallback(), Switch(last)]
    trainer = Trainer(model, arguments, pad, train_dataset=ROWS, eval_dataset=ROWS[:6], callbacks=callbacks)
    graphs = graphed(model, {"stream": True} | savers, recorder=Rerun())
    if not replays:
        graphs._possible = lambda: False
    trainer.train(resume_from_checkpoint=resume)
    told = trainer.state.log_history
    found = {(entry["step"], name): entry[name] for entry in told for name in ("loss", "eval_loss") if name in entry}
    return found, {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}, graphs


@pytest.mark.parametrize("savers", [{}, {"slot_savers": {"layer_in": "quant8"}}], ids=["exact", "8 bit"])
def test_a_run_is_that_of_layers_by_themselves_and_goes_on_after_a_stop(tmp_path, savers):
    near = 5e-2 if DEVICE == "cuda" else 0.0  # a row that is filled up otherwise
    losses, adapters, _ = train(tmp_path / "by layers", savers, replays=False)
    train(tmp_path / "stopped", savers, replays=True, last=STOP)
    for folder, resume in (("whole", False), ("stopped", True)):
        found, ours, graphs = train(tmp_path / folder, savers, replays=True, resume=resume)
        assert found == pytest.approx(losses, rel=0, abs=near)
        assert all(torch.allclose(ours[name], p, rtol=0, atol=near) for name, p in adapters.items())
        assert len({kind[1] for kind in graphs.recordings}) > 1
    assert graphs.step.index == 2 * LAST and 2 * STOP > CALIBRATION
