"""What a run is known by."""

import json

import pytest

from hyclora.utils import results
from hyclora.utils.args import EvalArguments
from hyclora.utils.runs.identity import FREE, NEEDS, content_of, differences, identity
from run_gsm8k import DRIVER
from tests.helpers.drivers import GROUPS

ALL_GROUPS = {group for groups in GROUPS.values() for group in groups}


def known_by(*options):
    groups = DRIVER.parse(["--use_cpu", "True", *options])
    return identity(json.loads(json.dumps(results.settings(*groups), default=str)))


def test_the_tables_name_settings_that_exist():
    names = {name for group in ALL_GROUPS for name in group.__dataclass_fields__}
    assert FREE | NEEDS.keys() | {other for other, _ in NEEDS.values()} <= names


def test_how_a_model_is_evaluated_is_not_part_of_it():
    evaluation = [group for group in ALL_GROUPS if issubclass(group, EvalArguments)]
    assert evaluation and all(group.__dataclass_fields__.keys() <= FREE for group in evaluation)


@pytest.mark.parametrize(
    "options",
    [
        ["--output_dir", "elsewhere", "--save_steps", "7", "--logging_steps", "3", "--run_name", "mine"],
        ["--max_eval_samples", "3", "--greedy", "True", "--eval_batch_size", "2"],
        ["--preset", "default"],
    ],
    ids=str,
)
def test_what_leaves_the_numbers_as_they_are_is_not_part_of_it(options):
    assert known_by(*options) == known_by()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--seed", "12"], "seed: 11 / 12"),
        (["--q_bit", "auto"], "average_bits: (none) / 3.0, q_bit: 4 / auto"),
        (["--weight_decay", "0.1"], "weight_decay: 0.0 / 0.1"),
        (["--max_steps", "7"], "max_steps: -1 / 7, num_train_epochs: 6 / (none)"),
    ],
    ids=str,
)
def test_differences_are_named(options, said):
    assert differences(known_by(), known_by(*options)) == said


def test_the_base_model_is_known_by_what_is_in_its_folder(tmp_path):
    body = bytes(2**21)  # checkpoints of one shape begin alike: header and embeddings
    for folder, weights in (("a", body + b"1" * 100), ("b", body + b"1" * 100), ("c", body + b"2" * 100)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
    a, b, c = (content_of(str(tmp_path / folder), [{"labels": [1]}]) for folder in "abc")
    assert a == b and differences(a, c).startswith("content of the base model: ")
    assert differences(a, content_of(str(tmp_path / "a"), [{"labels": [2]}])).startswith("content of the training rows")
