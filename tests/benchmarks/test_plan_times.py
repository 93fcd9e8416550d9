"""Predicted times beside measured ones: on a CPU, a line a mode, and the table that is made of lines."""

import json

import pytest

from benchmarks import plan_times, rows
from benchmarks.plan_times import USUAL, Case, chosen, main, measure
from benchmarks.report_plan_times import plan_times as reported
from hyclora.utils.planning import MODES, measuring

EXACT = "exact, resident, layer by layer"


def test_usual_modes_are_modes():
    assert chosen("", "cuda") == [mode.name for mode in MODES if mode.name in USUAL] and len(USUAL) == 6
    assert chosen("", "cpu") == ["checkpointing, resident layer inputs, exact"] and chosen("nothing", "cuda") == []
    assert EXACT in chosen("layer by layer", "cpu") and len(chosen("layer by layer", "cuda")) > 10


def test_a_mode_on_a_cpu(tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(measuring, "WINDOW", 0.0)
    found = measure(Case(str(tiny_llama_folder), 1, 40, "bf16", device="cpu"), [EXACT])
    assert found[EXACT].keys() == {"predicted_ms", "measured_ms"} and all(ms > 0 for ms in found[EXACT].values())


def test_full_depth_is_measured_by_the_clock_of_few_layers(monkeypatch):
    """And what has no room is told so, for few layers or for all of them."""
    seen = []

    def seconds(bench, mode, layers, batch):
        seen.append((mode.name, layers))
        no_room = mode.name == USUAL[0] and layers == 32 or mode.name == USUAL[1]
        return None if no_room else 0.01 + 0.002 * layers

    monkeypatch.setattr(measuring.Bench, "seconds", seconds)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (80e9, 80e9))
    found = measure(Case("llama-2-7b", 4, 512), list(USUAL[:3]))
    assert found[USUAL[0]] == {"predicted_ms": 74.0, "error": "out of memory"}
    assert found[USUAL[1]] == {"error": measuring.NO_ROOM}
    assert found[USUAL[2]] == {"predicted_ms": 74.0, "measured_ms": 74.0}
    assert [name for name, layers in seen if layers == 32] == [USUAL[0], USUAL[2]]


@pytest.fixture
def swept(tiny_llama_folder, tmp_path, monkeypatch):
    """The lines of a command: predictions are 5 % above what is measured, and rows of 64 tokens fail."""

    def in_a_process(case, names, timeout):
        found = {"error": "no"} if case.seq_len == 64 else {"predicted_ms": 10.5, "measured_ms": 10.0}
        return dict.fromkeys(names, found)

    monkeypatch.setattr(plan_times, "in_a_process", in_a_process)

    def run(*options):
        main(["--device", "cpu", "--shapes", str(tiny_llama_folder), "--output_dir", str(tmp_path), *options])
        return [json.loads(line) for line in (tmp_path / "plan_times.jsonl").read_text().splitlines()]

    return run


def test_a_line_a_mode_and_none_again(swept):
    found = swept("--cells", "2x32", "1x64", "--match", "exact,")
    assert [(line["mode"], line["arguments"]["seq_len"]) for line in found] == [(EXACT, 32), (EXACT, 64)]
    assert found[0]["measured_ms"] == 10.0 and found[1]["error"] == "no"
    more = swept("--cells", "2x32", "--match", "layer by layer, ")[2:]
    assert EXACT not in {line["mode"] for line in more} and len(more) == 6
    assert len(swept("--cells", "2x32", "--match", "layer by layer, ")) == 8


def test_a_process_that_fails_fails_for_each_mode(monkeypatch):
    monkeypatch.setattr(plan_times, "alone", lambda words, timeout: {"error": "not done after 1 s"})
    found = plan_times.in_a_process(Case("llama-2-7b", 4, 512), ["a", "b"], 1)
    assert found == {name: {"error": "not done after 1 s"} for name in "ab"}
    monkeypatch.setattr(plan_times, "alone", lambda words, timeout: json.loads(words[-1])["modes"] and {"a": {}})
    assert plan_times.in_a_process(Case("llama-2-7b", 4, 512), ["a"], 1) == {"a": {}}


def test_lines_make_a_table_and_none_make_nothing(swept, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert reported() == ""
    swept("--cells", "2x32", "1x64", "--match", "exact,")
    text = reported()
    assert text.count("\n| ") == 3 and " 2x32: exact, resident, layer by layer | 10.5 | 10.0 | +5.0 % |" in text
    assert "*Off in the median of 1 lines by 5.0 % (+5.0 to +5.0).*" in text


@pytest.mark.parametrize(
    "options, said",
    [([], "needs one"), (["--device", "cpu", "--match", "nothing"], "no mode that runs here"),
     (["--device", "cpu", "--shapes", "none"], "a shape is a name")],
)  # fmt: skip
def test_mistakes_end_with_one_sentence(capsys, monkeypatch, options, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
