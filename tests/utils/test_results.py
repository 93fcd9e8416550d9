"""What a run writes and prints: settings that have an effect, steps, and a log that one process alone has."""

import math

import pytest
from torch import nn
from transformers import Trainer

from hyclora.utils import results
from hyclora.utils.errors import UserError
from hyclora.utils.training_arguments import TrainingArguments
from run_gsm8k import DRIVER

SAMPLING = ("temperature", "top_k", "top_p", "generation_seed")
METHOD = ("layer_type", "q_bit", "average_bits", "softmax_outlier_ratio", "attention", "offload", "slot_savers")


@pytest.mark.parametrize(
    "options, shown, hidden",
    [
        ([], ["q_bit", "attention", "temperature"], ["average_bits", "softmax_outlier_ratio", "data_dir"]),
        (["--q_bit", "auto", "--attention", "eager"], ["average_bits", "softmax_outlier_ratio"], []),
        (["--use_hyclora", "False", "--q_bit", "auto"], ["use_hyclora", "lora_rank"], METHOD),
        (["--greedy", "True"], ["greedy", "max_new_tokens"], SAMPLING),
        (["--max_eval_samples", "0"], ["max_eval_samples"], [*SAMPLING, "greedy", "evaluate_before"]),
        (["--layer_type", "baseline"], ["layer_type"], ["q_bit"]),
    ],
    ids=str,
)
def test_only_settings_that_have_an_effect_are_printed(capsys, options, shown, hidden):
    groups = DRIVER.parse([*options, "--use_cpu", "True"])
    results.print_settings(groups[:-1])
    printed = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert set(shown) <= printed and not printed & set(hidden)


DROPPING = {"dataloader_drop_last": True, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    "settings", [{}, {"max_steps": 5}, {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2}, DROPPING]
)
def test_the_number_of_steps_is_the_trainers(tmp_path, settings):
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 23
    trainer = Trainer(model=nn.Linear(1, 1), args=training, train_dataset=rows)
    *_, steps = trainer.set_initial_training_values(training, trainer.get_train_dataloader())
    assert results.steps_of(training, len(rows)) == results.core_of(training, len(rows))["steps"] == steps


def test_a_run_is_of_one_process(tmp_path):
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with results.logged(tmp_path / "run.log", training), pytest.raises(UserError, match="run.log is in use"):
        with results.logged(tmp_path / "run.log", training):
            pass
    with results.logged(tmp_path / "run.log", training):
        print("alone")


def test_what_is_kept_is_not_computed_again(tmp_path):
    file, values = tmp_path / "kept.json", iter(range(9))
    seen = [results.once(file, {"rows": rows}, lambda: next(values)) for rows in (5, 5, math.pi, math.pi)]
    assert seen == [0, 0, 1, 1]
