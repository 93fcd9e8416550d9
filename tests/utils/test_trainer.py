"""The training loop: batches without targets, resuming, Ctrl-C, and a loss that is not finite."""

import os
import signal
import time

import pytest
import torch
from transformers import TrainerCallback

from hyclora.utils import trainer as trainer_module
from hyclora.utils.args import LoraArguments, ModelArguments
from hyclora.utils.data.tokens import IGNORED, Collator
from hyclora.utils.errors import Interrupted, UserError
from hyclora.utils.loading import load_model
from hyclora.utils.trainer import HycloraTrainer
from hyclora.utils.training_arguments import TrainingArguments

ROWS = [
    {"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]}
    for ids in torch.randint(2, 500, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()
]


@pytest.fixture
def make_trainer(tiny_llama_folder, tmp_path):
    def make(rows=ROWS, callbacks=None, **settings):
        defaults = {"max_steps": 6, "logging_steps": 1, "save_steps": 100}
        settings = defaults | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | settings
        training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **settings)
        lora = LoraArguments(lora_rank=4, lora_alpha=4, lora_dropout=0.1)
        model = load_model(ModelArguments(), lora, str(tiny_llama_folder), torch.device("cpu"), seed=0)
        return HycloraTrainer(
            model=model,
            args=training,
            train_dataset=rows,
            data_collator=Collator(0),
            callbacks=callbacks,
            compressed=False,
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class At(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def masked(rows):
    return [{**row, "labels": [IGNORED] * len(row["labels"])} for row in rows]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_without_targets_count_and_add_nothing(make_trainer, accumulation):
    trainer = make_trainer(masked(ROWS), gradient_accumulation_steps=accumulation, max_steps=2)
    before = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    assert losses(trainer) == [0, 0]
    assert trainer.progress.totals["masked_batches"] == 2 * accumulation
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_masked_batch_does_not_change_the_others_gradient(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batches = [trainer.data_collator(ROWS[:2]), trainer.data_collator(masked(ROWS[2:4]))]
    count = trainer._get_num_items_in_batch(batches, "cpu")
    total = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) for batch in batches)
    alone = trainer.model(**batches[0]).loss
    assert torch.allclose(total, alone)
    assert trainer.compute_loss(trainer.model, batches[1]) == 0


def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path):
    whole = make_trainer()
    whole.train()
    first = make_trainer(callbacks=[At(4, lambda: os.kill(os.getpid(), signal.SIGINT))])
    with pytest.raises(Interrupted, match="step 4 of 6"):
        first.train()
    resumed = make_trainer()
    resumed.train(tmp_path / "checkpoint-4")
    assert losses(resumed) == losses(whole)
    assert losses(resumed)[:4] == losses(first)
    counted = [t.progress.totals["tokens"] for t in (whole, first, resumed)]
    assert counted == [6 * 4 * 12, 4 * 4 * 12, 6 * 4 * 12]
    for (name, p), q in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_second_ctrl_c_stops_at_once_and_handlers_come_back(make_trainer):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[At(1, twice)]).train()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def third_fails(monkeypatch):
    """The loss of the third step is NaN."""
    stock = HycloraTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        loss = stock(self, model, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(HycloraTrainer, "compute_loss", compute_loss)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_learned_from(make_trainer, third_fails):
    trainer = make_trainer()
    with pytest.raises(FloatingPointError, match="step 3 has a loss or gradients that are not finite"):
        trainer.train()
    assert len(losses(trainer)) == 2 and all(p.isfinite().all() for p in trainer.model.parameters())


def test_such_a_step_is_skipped_if_that_is_asked_for(make_trainer, third_fails):
    trainer = make_trainer(non_finite="skip")
    trainer.train()
    told = losses(trainer)
    assert told[2] == pytest.approx(told[1], rel=0.05) and torch.tensor(told).isfinite().all()
    assert trainer.progress.totals["skipped_steps"] == 1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"optim_args": "a"}, "not enough values to unpack"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"a": 1}}, "unexpected keyword argument 'a'"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_told(make_trainer, settings, said):
    with pytest.raises(UserError, match=f"cannot be made .*{said}.*: look at --"):
        make_trainer(**settings).train()


def test_the_last_loss_is_logged_however_seldom_losses_are(make_trainer):
    trainer = make_trainer(logging_steps=100)
    trainer.train()
    assert len(losses(trainer)) == 1 and trainer.state.log_history[0]["step"] == 6


def test_tokens_are_counted_without_padding(make_trainer):
    ragged = [{name: ids[: 5 + i % 8] for name, ids in row.items()} for i, row in enumerate(ROWS)]
    trainer = make_trainer(ragged, num_train_epochs=1, max_steps=-1)
    trainer.train()
    assert trainer.progress.totals["tokens"] == sum(len(row["input_ids"]) for row in ragged)
    assert trainer.progress.totals["tokens_per_second"] > 0


def test_writing_a_checkpoint_is_no_time_of_training(make_trainer, monkeypatch):
    monkeypatch.setattr(
        trainer_module, "seal", lambda folder, stock=trainer_module.seal: (time.sleep(1), stock(folder))
    )
    trainer, start = make_trainer(max_steps=2, save_steps=1, callbacks=[At(1, lambda: time.sleep(0.5))]), time.time()
    trainer.train()
    totals = trainer.progress.totals
    assert 0.5 < totals["seconds"] < time.time() - start - 2
    assert totals["tokens_per_second"] == pytest.approx(2 * 4 * 12 / totals["seconds"], abs=0.1)


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(make_trainer, monkeypatch):
    def unreachable(self):
        raise OSError("Name or service not known")

    monkeypatch.setattr(HycloraTrainer, "init_hf_repo", unreachable)
    with pytest.raises(UserError, match="the Trainer cannot be made .Name or service not known.: look at --push_to"):
        make_trainer(push_to_hub=True)
