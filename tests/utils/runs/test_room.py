"""Which settings are told where a batch had no room: they fit by the plan, and the command line knows them."""

import pytest
import torch

from hyclora.models.config import HycloraConfig
from hyclora.plan import plan
from hyclora.utils.runs import room
from hyclora.utils.runs.room import NoRoom, available, telling, what_fits

GIB = 2**30
SHAPE = "llama-2-7b"
VALUES = {"use_hyclora": True, "load_in_4bit": True, "dtype": "auto", "lora_rank": 16, "gradient_checkpointing": False}
VALUES |= {"target_modules": ["all-linear"], "lora_dropout": 0.0}


def told(config, gpu=12, batch=(16, 2048), host=64, **values):
    return what_fits(SHAPE, VALUES | config.to_dict() | values, batch, int(gpu * GIB), host * GIB)


def test_what_leaves_the_numbers_of_a_run_is_told_first():
    found = told(HycloraConfig(cuda_graphs=True))
    assert len(found) == 3 and found[0].options == ("--offload", "True", "--cuda_graphs", "False")
    assert [setting.keeps_numbers for setting in found] == [True, True, False]
    assert found == told(HycloraConfig())  # auto is on where there is a GPU
    assert str(found[0]).startswith("--offload True --cuda_graphs False (") and "GiB)" in str(found[0])


@pytest.mark.parametrize("gpu", [11, 16, 24])
def test_all_fit_by_the_plan_and_take_less_than_now(gpu):
    found = told(HycloraConfig(cuda_graphs=True), gpu)
    rows = {row.need.gpu: row for row in plan(SHAPE, gpu * GIB, 64 * GIB, (16, 2048)).rows}
    now = next(row.need.gpu for row in rows.values() if row.mode.name == "resident, CUDA graphs, 4 bit")
    assert found and all(rows[setting.gpu].fits and setting.gpu < now for setting in found)


def test_settings_of_the_run_are_replaced():
    """What a run has of its own, as layers or stock LoRA, is given back where the mode has other values."""
    for setting in told(HycloraConfig(layers="input", attention="eager"), use_hyclora=False):
        given = dict(zip(setting.options[::2], setting.options[1::2], strict=True))
        assert given["--use_hyclora"] == "True" and given["--attention"] == "flash" and given["--layers"] != "input"
        assert not setting.keeps_numbers


def test_checkpointing_has_the_plain_loops_word(monkeypatch):
    monkeypatch.setattr(room, "TOLD", 4)
    last = told(HycloraConfig(), gradient_checkpointing="off")[-1]
    assert last.options[-2:] == ("--gradient_checkpointing", "all")


def test_what_cannot_be_planned_has_no_settings(tmp_path):
    assert not told(HycloraConfig(), gpu=5) and not told(HycloraConfig(), use_lora=False)
    assert not told(HycloraConfig(), load_in_4bit=False, dtype="float32")
    assert told(HycloraConfig(), trainable_params="") and not told(HycloraConfig(), trainable_params="norm,embed")
    assert not what_fits(str(tmp_path), VALUES | HycloraConfig().to_dict(), (1, 8), GIB, GIB)
    assert available(torch.device("cpu")) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDA out of memory"), MemoryError()])
def test_a_batch_is_named(error):
    with (
        pytest.raises(NoRoom, match="out of memory at a batch of 3 x 7 tokens"),
        telling({"input_ids": torch.ones(3, 7)}),
    ):
        raise error


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), telling({"input_ids": torch.ones(3, 7)}):
        raise RuntimeError("shapes differ")


def test_embeddings_wait_on_the_host_where_nothing_else_fits():
    """Or where the run has them there."""
    tight = {"gpu": 5.7, "batch": (1, 4096)}
    found = told(HycloraConfig(), **tight)
    assert found and all("--offload_embeddings" in setting.options for setting in found) and found[0].keeps_numbers
    assert not any("--offload_embeddings" in setting.options for setting in told(HycloraConfig()))
    found = told(HycloraConfig(offload_embeddings=True))
    assert found and not any("--offload_embeddings" in setting.options for setting in found)
