"""The grid of techniques: which combinations there are, what a line is, arrows and tables, and the reports' own."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import technique_grid, technique_tables
from benchmarks.seed_reports import REPORTS
from benchmarks.technique_grid import Combination, answer, arguments_of, combinations
from run_alpaca import DRIVER

ALL_ON = ["--gradient_checkpointing", "2 of 3", "--mixed_precision", "bf16"]
NOW = {"commit": "abc", "device": "a GPU"}
VERSIONS = {"versions": dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")}


def line(accumulation=1, checkpointing="off", precision="off", lora=True, hyclora=False, **values) -> dict:
    setting = vars(Combination(accumulation, checkpointing, precision, lora, hyclora))
    mib = {"parameters": 10, "activations": 8, "weight_copies": 0, "gradients": 1, "optimizer_state": 2}
    found = {"peak_mib": 20, "seconds": 5.0, "flops": 100, "mib": mib | values.pop("mib", {})} | values
    return {"setting": dict(setting), "arguments": {"model_name": "m"}, **NOW, **VERSIONS, **found}


def test_every_technique_that_is_on_is_measured_off_and_on():
    found = combinations(DRIVER.parse(ALL_ON))
    assert len(found) == 24 == len({one.name for one in found})
    assert {one.gradient_accumulation for one in found} == {1, 8}
    assert {(one.use_lora, one.use_hyclora) for one in found} == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize(
    "options, count",
    [
        ([], 6),
        (["--gradient_accumulation", "1"], 3),
        (["--gradient_accumulation", "1", "--use_hyclora", "False"], 2),
        ([*ALL_ON, "--dtype", "bfloat16"], 8),
        (["--gradient_accumulation", "1", "--use_hyclora", "False", "--use_lora", "False"], 1),
    ],
)
def test_what_is_off_stays_off(options, count):
    assert len(combinations(DRIVER.parse(options))) == count


def test_nf4_weights_are_not_trained():
    groups = DRIVER.parse(ALL_ON)
    groups[0].load_in_4bit = True
    assert {one.use_lora for one in combinations(groups)} == {True} and len(combinations(groups)) == 16


def test_a_line_answers_for_its_settings_commit_and_device():
    one, common = Combination(1, "off", "off", True, False), {"model_name": "m"}
    assert answer([line()], one, common, NOW)
    assert answer([{**line(), "error": "out of memory"}], one, common, NOW), "it would run out of memory again"
    for other in ({**line(), "error": "ValueError"}, {**line(), "commit": "def"}, line(accumulation=8)):
        assert not answer([other], one, common, NOW)
    assert not answer([line()], one, {"model_name": "n"}, NOW)
    techniques = {"gradient_accumulation", "gradient_checkpointing", "mixed_precision", "use_lora", "use_hyclora"}
    shared = [arguments_of(DRIVER.parse(options)) for options in ([], ALL_ON, ["--learning_rate", "1"])]
    assert shared[0] == shared[1] != shared[2] and not techniques & shared[0].keys()


@pytest.mark.parametrize(
    "code, said, error",
    [
        (1, "loading\nerror: out of memory; no checkpoint was written; start again: x\n", "out of memory"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried\n", "out of memory"),
        (-9, "", "out of memory: the process was killed"),
        (2, "warning\nerror: learning_rate must be a positive number, not -1\n", "learning_rate must be"),
    ],
)
def test_a_failure_is_its_cause(code, said, error, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=code, stderr=said))
    found = technique_grid.run(Combination(1, "off", "off", True, False), [], tmp_path / "grid")
    assert found.keys() == {"error"} and found["error"].startswith(error)


def test_arrows_have_the_factor_of_all_pairs():
    lines = [
        line(peak_mib=100, seconds=10.0, mib={"gradients": 4}, lora=False),
        line(peak_mib=50, seconds=10.2, mib={"gradients": 1}),
        line(peak_mib=100, seconds=20.0, mib={"gradients": 4, "weight_copies": 3}, lora=False, precision="bf16"),
        line(peak_mib=25, seconds=20.0, mib={"gradients": 2, "weight_copies": 5}, precision="bf16"),
        {**line(lora=True, hyclora=True), "error": "out of memory"},
    ]
    rows = {row.split(" | ")[0]: row for row in technique_tables.arrows_table(lines).splitlines()}
    assert "mixed precision (2 pairs) | LoRA (2 pairs) |" in rows["| "] and "HyC" not in rows["| "]
    assert rows["| peak memory"] == "| peak memory | ↓ 0.71x (0.50 to 1.00) | ↓ 0.35x (0.25 to 0.50) |"
    assert rows["| gradients"] == "| gradients | ↑ 1.41x (1.00 to 2.00) | ↓ 0.35x (0.25 to 0.50) |"
    assert rows["| 16-bit copies of weights kept"].startswith("| 16-bit copies of weights kept | ↑ 0.0 to 4.0 MiB |")
    assert rows["| parameters"] == "| parameters | – 1.00x | – 1.00x |"
    assert rows["| run time"].endswith("| – 1.01x (1.00 to 1.02) |"), "a time that hardly moves is none"


def test_memory_that_ran_out_is_an_x(tmp_path):
    lines = [line(lora=False, error="out of memory"), line(), line(hyclora=True, peak_mib=7)]
    text = technique_tables.report(lines, tmp_path / "grid.png")
    assert "| off | off | off | x |  | 20 | 5.0 | 7 | 5.0 |" in text and (tmp_path / "grid.png").stat().st_size > 1000
    assert technique_tables.measured_table([*lines, line(peak_mib=21)]).count("| 21 |") == 1, "the last line counts"


def test_recorded_grids_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(technique_tables, "RESULTS", tmp_path)
    assert technique_tables.technique_grid().startswith("Where the reports contradict themselves")
    more = {"load_in_4bit": False, "dtype": "float32", "max_train_samples": 200}
    lines = [found | {"arguments": found["arguments"] | more} for found in (line(), line(lora=False))]
    (tmp_path / "technique_grid.jsonl").write_text("".join(json.dumps(found) + "\n" for found in lines))
    assert technique_tables.technique_grid().startswith("a GPU, m, float32, 200 rows:\n\n| accumulation |")


def test_the_reports_are_measured_against_their_arrows():
    """Cells that contradict an arrow of theirs, and each other's."""
    found = technique_tables.contradictions()
    assert len(found) == len(set(found))
    for text in (
        "first report (7B), mixed precision: run time is ↑, measured ↓: 283.11 to 109.11 s (-61%)",
        "second report (1.5B), LoRA: run time is –, measured ↓: 38.02 to 22.64 s (-40%)",
        "parameters with LoRA: ↑ in the first report (7B), ↓ in the second report (1.5B)",
    ):
        assert any(one.startswith(text) for one in found), text
    peak = next(one for one in found if one.startswith("second report (1.5B), mixed precision: parameters"))
    assert "are –/↓/↓/↓, the peak went 7523.20 to 9630.22 MB (+28%)" in peak
    assert not any("gradient checkpointing: run time" in one for one in found), "there arrow and seconds agree"
    assert all(len(row) == 4 for one in REPORTS for row in one.arrows.values())
