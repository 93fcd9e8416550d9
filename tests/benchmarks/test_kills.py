"""Runs that are killed with SIGKILL and resumed are, bit by bit, the run that was not; what differs is found."""

import json
import os

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save

from benchmarks import faults, kills, repeatable, report_kills
from benchmarks.kills import EVALUATION, SAVING, STEP, Event, Point, points
from tests.helpers.forked import forked

VERSIONS = ("torch", "triton", "transformers", "peft")
REPORTED = {"versions", "commit", "device", "setting", "arguments", "after_ms", "torn", "resumed_from", "calibrating"}


@pytest.fixture
def killed(tiny_llama_folder, tmp_path, monkeypatch):
    """The lines of a command."""
    forked()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels are for other tests

    def killed(*options):
        kills.main(["--model", str(tiny_llama_folder), "--output_dir", str(tmp_path / "results"), *options])
        return [json.loads(line) for line in (tmp_path / "results/kills.jsonl").read_text().splitlines()]

    return killed


def test_killed_in_each_phase_and_resumed_it_is_the_run_that_nobody_killed(killed):
    found = sorted(killed("--drivers", "run_gsm8k", "--kills", "3"), key=lambda line: line["kill"])
    assert [line["phase"] for line in found] == [STEP, SAVING, EVALUATION]
    for line in found:
        assert line["differ"] == [] and line["resumed_from"] >= 2 and line.keys() >= REPORTED


@pytest.mark.parametrize("command", [kills, faults])
def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_run(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "Processes", lambda *_, **__: pytest.fail("a run was prepared"))
    (tmp_path / "no_model").mkdir()
    for name, sentence in (
        ("nowhere", "checkpoint folder {} does not exist: put the model there, or set --model"),
        ("no_model", "{} has no config.json"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(["--model", str(tmp_path / name), "--output_dir", str(tmp_path / "results")])
        assert ended.value.code == 2 and sentence.format(tmp_path / name) in capsys.readouterr().err


OLD_TRAINER = Version(transformers.__version__) < Version("5.24")


@pytest.mark.skipif(OLD_TRAINER, reason="Trainer of transformers 5.17 loads no optimizer to the cpu:0 of two processes")
def test_one_of_two_processes_is_killed(killed):
    (line,) = killed("--drivers", "run_gsm8k", "--kills", "1", "--processes", "2", "--seed", "1")
    assert line["differ"] == [] and line["resumed_from"] >= 2 and line["arguments"]["processes"] == 2


@pytest.mark.parametrize("exact", ["True", "False"])
def test_as_on_gpus(killed, monkeypatch, exact):
    """Of which the runs see one each, in turns: deterministic, or beside the spread of runs that nobody killed."""
    monkeypatch.setattr(kills, "UNBROKEN", 2)
    options = ["--drivers", "run_gsm8k", "--kills", "1", "--exact", exact]
    context = _NoGpu(repeatable.prepare(["run_gsm8k"])[0])
    monkeypatch.setattr(kills, "prepare", lambda *_: (context, "cuda", ("4", "7")))
    (line,) = killed(*options)
    assert line["differ"] == [] and line["arguments"]["exact"] is (exact == "True") and line["ms"] > 0
    assert ("default_ms" in line) is (exact == "True") and (line.get("spread") == 0) is (exact == "False")
    environments = [environment for _, environment, *_ in context.given]
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in environments} == {"4", "7"}
    assert any(repeatable.EXACT in environment for environment in environments) is (exact == "True")


class _NoGpu:
    """A context that says what its processes are given."""

    def __init__(self, context):
        self.context, self.given = context, []

    def Pipe(self, **options):
        return self.context.Pipe(**options)

    def Process(self, target, args):
        self.given.append(args)
        return self.context.Process(target=target, args=args)


def test_processes_of_several_gpus():
    """As many as a run has; no two runs have a port."""
    start = repeatable.Processes(None, None, 2, ("0", "1", "2", "3", "4"))
    seen = [start._environments() for _ in range(3)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one, _ in seen] == ["0,1", "2,3", "0,1"]
    assert [(one["LOCAL_RANK"], two["LOCAL_RANK"]) for one, two in seen] == [("0", "1")] * 3
    assert len({one["MASTER_PORT"] for one, _ in seen}) == 3


def test_an_environment_is_given_for_a_while(monkeypatch):
    monkeypatch.setenv("THERE", "before")
    with repeatable.given({"THERE": "now", "NEW": "1"}):
        assert (os.environ["THERE"], os.environ["NEW"]) == ("now", "1")
    assert os.environ["THERE"] == "before" and "NEW" not in os.environ


def test_distance_of_adapters():
    a, b = save({"x": torch.tensor([3.0, 4.0])}), save({"x": torch.tensor([3.0, 4.5])})
    assert repeatable.distance(b, a) == pytest.approx(0.1) and repeatable.distance(a, a) == 0
    assert repeatable.distance(a, save({"y": torch.ones(2)})) == float("inf")
    unbroken = kills.Unbroken([], [], [{"adapters": a}, {"adapters": b}])
    assert unbroken.compare({"adapters": save({"x": torch.tensor([3.0, 4.2])})})["differ"] == []
    far = unbroken.compare({"adapters": save({"x": torch.tensor([3.0, 9.0])})})
    assert far["differ"] == ["adapters"] and far["apart"] > 2 * far["spread"] > 0
    assert unbroken.compare({"adapters": save({"x": torch.tensor([3.0, torch.nan])})})["differ"] == ["adapters"]


def test_a_spread_is_for_gpus(tiny_llama_folder, tmp_path, capsys, monkeypatch):
    """Runs on a CPU would be compared bit by bit all the same."""
    monkeypatch.setattr(kills, "prepare", lambda *_: (None, "cpu", ()))
    monkeypatch.setattr(kills, "leave_alone", lambda *_: pytest.fail("begun"))
    with pytest.raises(SystemExit) as ended:
        kills.main(["--model", str(tiny_llama_folder), "--output_dir", str(tmp_path), "--exact", "False"])
    assert ended.value.code == 2 and "on a CPU all are exact: drop it" in capsys.readouterr().err


def test_points_lie_behind_the_first_whole_checkpoint():
    def events(phase, number, begin, end):
        return [Event(phase, number, True, begin), Event(phase, number, False, end)]

    unbroken = [*events(STEP, 1, 0, 2), *events(SAVING, 1, 2, 3), *events(STEP, 2, 3, 7), *events(SAVING, 2, 7, 8)]
    assert points(unbroken, STEP) == [Point(STEP, 2, 4)]
    assert points(unbroken, SAVING) == [Point(SAVING, 2, 1)]
    assert points(unbroken, EVALUATION) == []


@pytest.fixture
def run_folder(tmp_path):
    """What kills.outcome reads."""
    (tmp_path / "run").mkdir()
    history = [{"step": 1, "loss": 0.5}, {"train_runtime": 3.0}]
    (tmp_path / "run.json").write_text(json.dumps({"log_history": history, "metrics": {"loss": 1.0}}))
    (tmp_path / "run/adapter_model.safetensors").write_bytes(b"adapters")
    return tmp_path


def test_the_outcome_is_all_that_does_not_depend_on_time(run_folder):
    before = kills.outcome(run_folder)
    file = run_folder / "run.json"
    file.write_text(file.read_text().replace("3.0", "4.0"))
    assert kills.outcome(run_folder) == before
    file.write_text(file.read_text().replace("0.5", "0.5000000000000001"))
    (run_folder / "run/adapter_model.safetensors").write_bytes(b"adapterz")
    found = kills.outcome(run_folder)
    assert [name for name in found if found[name] != before[name]] == ["losses", "adapters"]


def test_the_table_counts_what_was_not_equal(monkeypatch):
    common = {"device": "CPU", "driver": "run_gsm8k", "commit": "c", "versions": dict.fromkeys(VERSIONS, "1")}
    kept = {"killed_in": SAVING, "calibrating": True, "torn": 1, "differ": []}
    lines = [
        kept,
        kept | {"differ": ["losses"]},
        kept | {"error": "exit code 1"},
        kept | {"killed_in": STEP, "torn": 0},
    ]
    of_gpu = {"device": "X1", "ms": 20.4, "default_ms": 10.0, "arguments": {"exact": True}}
    lines += [kept | of_gpu, kept | {"device": "X1", "apart": 1e-3, "spread": 2e-3, "arguments": {"exact": False}}]
    monkeypatch.setattr(report_kills, "load", lambda *_: [common | line for line in lines])
    told = report_kills.kills()
    assert "| X1, deterministic, `run_gsm8k.py`, saving | 1 | 1 | 1 | 1 of 1 |" in told
    assert "1 of 1 within twice the spread: adapters 1.0e-03 apart, unbroken ones 2.0e-03 |" in told
    assert "20 ms a micro-batch of these runs side by side where they are deterministic, 10 by default.*" in told
    assert report_kills.kills().splitlines()[2:4] == [
        "| CPU, `run_gsm8k.py`, saving | 3 | 3 | 3 | 1 of 3 |",
        "| CPU, `run_gsm8k.py`, step | 1 | 1 | 0 | 1 of 1 |",
    ]


def test_a_driver_that_fails_by_itself_is_no_kill(killed, capsys):
    with pytest.raises(SystemExit):
        killed("--drivers", "run_gsm8k", "--kills", "1", "--", "--q_bit", "5")
    assert "run_gsm8k fails without being killed, see " in capsys.readouterr().err
