"""Measured times in a file: whose they are, what else is in it, and what is refused."""

import importlib.metadata
import json
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config

from hyclora.utils.args import LoraArguments
from hyclora.utils.errors import UserError
from hyclora.utils.planning import Shape, times_file
from hyclora.utils.planning.times import Batch, Time
from hyclora.utils.planning.times_file import KeptTimes, check_place

TIMES = {"resident": Time(114.25), "offloaded": Time(why="out of memory")}


@pytest.fixture(scope="module")
def shape():
    return Shape("llama-3.2-1b")


@pytest.fixture
def kept(shape, tmp_path):
    return KeptTimes(shape, LoraArguments(), Batch(4, 512), torch.device("cpu"), tmp_path / "times.json")


def small(**config) -> Shape:
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Shape(Qwen2Config(**sizes | {"use_sliding_window": True, "sliding_window": 8} | config))


def test_what_was_written_is_read(kept):
    kept.write(TIMES)
    assert kept.read() == TIMES


def test_nothing_is_kept_without_a_file(kept, tmp_path):
    nowhere = replace(kept, file=None)
    nowhere.write(TIMES)
    assert nowhere.read() == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"batch": Batch(2, 512)},
        {"batch": Batch(4, 512, 8)},
        {"lora": LoraArguments(lora_rank=8)},
        {"lora": LoraArguments(target_modules=["q_proj"])},
        {"lora": LoraArguments(lora_dropout=0.1)},
    ],
    ids=str,
)
def test_rows_and_adapters_have_times_of_their_own(kept, change):
    kept.write(TIMES)
    other = replace(kept, **change)
    assert other.read() == {}
    other.write({"resident": Time(1.0)})
    assert other.read() == {"resident": Time(1.0)} and kept.read() == TIMES


def test_weights_have_times_of_their_own(kept):
    kept.write(TIMES)
    assert replace(kept, shape=Shape("llama-3.2-1b", "bf16")).read() == {}
    assert replace(kept, shape=Shape("llama-2-7b")).read() == {}


def test_attention_has_times_of_its_own(kept):
    """Dropout of it is in the way of graphs, and more layers with a window have less to do."""
    shapes = [small(max_window_layers=n, attention_dropout=p) for n, p in ((2, 0.0), (3, 0.0), (2, 0.1))]
    replace(kept, shape=shapes[0]).write(TIMES)
    assert [bool(replace(kept, shape=shape).read()) for shape in shapes] == [True, False, False]


def test_modes_that_were_not_measured_again_stay(kept):
    kept.write(TIMES)
    kept.write({"resident": Time(100.0), "exact": Time(90.0)})
    assert kept.read() == TIMES | {"resident": Time(100.0), "exact": Time(90.0)}
    assert len(json.loads(kept.file.read_text())) == 1


def test_times_of_another_device_are_refused_and_stay(kept, monkeypatch):
    kept.write(TIMES)
    with monkeypatch.context() as there:
        there.setattr(times_file, "device_name", lambda device: "NVIDIA H200")
        with pytest.raises(UserError, match=r"times of CPU \S+, and this machine has NVIDIA H200: measure here"):
            kept.read()
        kept.write({"resident": Time(1.0)})
        assert kept.read() == {"resident": Time(1.0)}
    assert kept.read() == TIMES


def test_times_of_other_versions_are_refused(kept, monkeypatch):
    monkeypatch.setattr(times_file, "versions", lambda: {"torch": "1.0", "peft": "1"})
    kept.write(TIMES)
    monkeypatch.setattr(times_file, "versions", lambda: {"torch": "2.0", "peft": "1"})
    with pytest.raises(UserError, match=r"times of torch 1.0, and here is 2.0: measure again"):
        kept.read()
    monkeypatch.setattr(times_file, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(UserError, match=r"times of peft 1, and here is none: measure again"):
        kept.read()


def entry(**changes):
    return {"device": "CPU", "versions": {}, "of": {}, "ms": {"resident": 1.0}} | changes


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[{"device": "CPU"',
        "{}",
        "[1]",
        '["device"]',
        json.dumps([{"device": "CPU"}]),
        *(json.dumps([entry(ms={"resident": ms})]) for ms in (-1.0, 0, float("nan"), None, True, [1.0])),
        json.dumps([entry(versions=[])]),
        json.dumps([entry(more=1)]),
        "\x00\xff",
        "[" * 100_000,
    ],
)
def test_what_measure_did_not_write_is_refused(kept, text):
    """Before anything is measured, too."""
    kept.file.write_text(text, encoding="latin-1")
    for refuses in (kept.read, lambda: check_place(kept.file), lambda: kept.write(TIMES)):
        with pytest.raises(UserError, match="times.json cannot be read as times that --measure wrote"):
            refuses()
    assert kept.file.read_text(encoding="latin-1") == text


def test_a_file_that_is_not_there(kept, tmp_path):
    with pytest.raises(UserError, match="times.json has no times: --measure writes them"):
        kept.read()
    check_place(kept.file)
    for place, said in ((tmp_path / "no" / "times.json", "cannot be written"), (tmp_path, "is no file: name one")):
        with pytest.raises(UserError, match=said):
            check_place(place)


def test_a_package_that_takes_over_attention_makes_other_times(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1")
    assert times_file.versions()["flash-attn-4"] == "1"


def test_versions_that_are_null_are_others(kept):
    """As a file that was edited has them."""
    there = json.dumps([entry(device=kept.device, versions={"torch": None})])
    kept.file.write_text(there)
    with pytest.raises(UserError, match="times of torch None, and here is"):
        kept.read()
    kept.file.write_text(there.replace("torch", "nothing"))
    with pytest.raises(UserError, match="measure again"):
        kept.read()


def test_half_a_file_is_never_there(kept, monkeypatch):
    kept.write(TIMES)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    why = kept.write({"resident": Time(1.0)})
    assert why.startswith(f"times could not be written to {kept.file} (No space left on device): make room")
    assert kept.read() == TIMES
