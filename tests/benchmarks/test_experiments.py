"""The paper's experiments on a small model: what is run, in which order, what is recorded and what is not run again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import experiments, workers
from benchmarks.workers import require_gpus, run_all, visible_gpus
from hyclora.utils.args import ROOT
from hyclora.utils.errors import RunStopped, UserError
from hyclora.utils.runs.script import again
from run_gsm8k import DRIVER

FAKE = """
import multiprocessing.util, os, pathlib, time
from types import SimpleNamespace
from hyclora.utils.errors import UserError

def run(groups, argv):
    what = argv[0]
    if what == "die":
        os._exit(3)
    if what == "mistake":
        raise UserError("wrong option")
    if what == "fail":
        raise RuntimeError("broken")
    if what.startswith("/"):
        multiprocessing.util.Finalize(None, pathlib.Path(what).touch, exitpriority=1)
    if what == "sleep":
        time.sleep(3600)
    names = {"gpu": "CUDA_VISIBLE_DEVICES", "threads": "OMP_NUM_THREADS"}
    return {"process": os.getpid()} | {name: os.environ.get(variable) for name, variable in names.items()}

DRIVER = SimpleNamespace(parse=list, run=run)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """What a driver that imports next to nothing finds with each of some words, by word."""
    (tmp_path / "fake_driver.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (*workers.ENVIRONMENT, *workers.THREADS):  # which it sets, and are to be as before afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def jobs(*words, n_workers=1, gpus=(None,), seconds=60, **more):
        asked = [(word, "fake_driver", [word]) for word in words]
        return list(run_all(asked, n_workers, list(gpus), tmp_path / "logs", time.monotonic() + seconds, **more))

    return jobs


def test_a_worker_does_one_run_after_the_other(jobs, tmp_path):
    found = jobs("a", "b", "c")
    assert [job[0] for job, _ in found] == ["a", "b", "c"]
    assert len({result["process"] for _, result in found}) == 1 and found[0][1]["process"] != os.getpid()
    assert found[0][1]["threads"] == "1"
    assert "fake_driver b" in (tmp_path / "logs" / "worker0.txt").read_text()


def test_what_fails_is_told_and_the_others_are_run(jobs):
    found = {job[0]: result for job, result in jobs("a", "die", "b", "fail", "c", "mistake", "d")}
    assert found["die"]["error"] == "the process died (exit code 3), its output is in worker0.txt"
    assert found["fail"]["error"] == "RuntimeError: broken"
    assert found["mistake"]["error"] == "UserError: wrong option"
    a, b, c, d = (found[name]["process"] for name in "abcd")
    assert len({a, b, c}) == 3 and c == d, "a process that failed must not be used again, after a mistake it may"


def test_runs_are_spread_over_gpus(jobs):
    found = jobs("a", "b", n_workers=2, gpus=("0", "1"))
    assert sorted(result["gpu"] for _, result in found) == ["0", "1"]


def test_what_is_at_work_is_ended_in_time(jobs):
    """Which sleeps for an hour."""
    assert [job[0] for job, _ in jobs("a", "sleep", "b", seconds=6)] == ["a"]


def test_a_job_that_has_just_begun_is_ended_at_once(jobs, monkeypatch):
    begin, end, ended = workers.Worker.begin, workers.Worker.end, []

    def interrupted(worker, *job):
        begin(worker, *job)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers.Worker, "begin", interrupted)
    monkeypatch.setattr(workers.Worker, "end", lambda worker, at_once: ended.append(at_once) or end(worker, True))
    with pytest.raises(KeyboardInterrupt):
        jobs("sleep")
    assert ended == [True]


@pytest.mark.parametrize("seconds", [1e9, float("inf")])
def test_there_may_be_more_time_than_the_system_can_wait(jobs, seconds):
    assert [job[0] for job, _ in jobs("a", seconds=seconds)] == ["a"]


def test_each_in_a_process_of_its_own_on_its_gpu(jobs):
    found = [result for _, result in jobs("a", "b", "c", "d", n_workers=2, gpus=("0", "1"), alone=True)]
    assert len({result["process"] for result in found}) == 4 and {result["gpu"] for result in found} == {"0", "1"}
    assert {result["threads"] for result in found} == {None}, "they have all cores"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize("alone", [False, True])
def test_a_process_that_is_done_ends_by_itself(jobs, alone, tmp_path):
    """What it has of the system, such as tqdm's semaphore, is given back, and nothing warns of it."""
    places = [tmp_path / name for name in ("a", "b")]
    jobs(*map(str, places), alone=alone)
    assert all(place.exists() for place in places)


@pytest.mark.parametrize(
    "visible, n, seen", [(None, 2, "0 1"), ("3,1,2", 2, "3 1"), ("", 2, "0 1"), ("GPU-5", 1, "GPU-5")]
)
def test_gpus_are_of_those_that_the_command_sees(visible, n, seen, monkeypatch):
    """Others belong to somebody else."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    assert visible_gpus(n) == seen.split()
    require_gpus("--gpus", n)
    with pytest.raises(UserError, match=f"--gpus {n + 1}, and there are {n}: lower it"):
        require_gpus("--gpus", n + 1)


def test_too_few_gpus_for_experiments_are_refused(data, tiny_llama_folder, tmp_path, monkeypatch):
    """Runs that see no GPU would be on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = ["--model", tiny_llama_folder, "--data", data, "--tasks", "gsm8k", "--gpus", "2"]
    with pytest.raises(UserError, match="--gpus 2, and there are 1: lower it"):
        experiments.parse([*map(str, options), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_that_takes_too_long_is_ended_and_the_others_are_run(jobs, alone):
    found = {job[0]: result for job, result in jobs("a", "sleep", "b", limit=4, alone=alone)}
    assert found["sleep"] == {"error": "not done after 4 s"} and found["b"]["process"] != found["a"]["process"]


SWEEP = """
import os, pathlib, sys, time
from benchmarks.workers import run_all
if __name__ == "__main__":
    jobs = [(word, "fake_driver", [word]) for word in ("a", "sleep")]
    for job, found in run_all(jobs, 1, [None], pathlib.Path("logs"), 1e9):
        print(found["process"], flush=True)
else:
    pathlib.Path(f"{os.getpid()}.importing").touch()
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def sweep(jobs, tmp_path):
    """Start a process with a worker that sleeps: seconds while it imports, and for an hour in its second job."""
    (tmp_path / "sweep.py").write_text(SWEEP)

    def sweep(seconds: float) -> subprocess.Popen:
        path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "sweep.py", str(seconds)]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | path, start_new_session=True, **streams)

    return sweep


def test_a_process_at_work_ends_with_the_sweep(sweep, tmp_path):
    """However that ends: it would go on using the GPU."""
    with sweep(0) as started:
        worker, log = int(started.stdout.readline()), tmp_path / "logs" / "worker0.txt"
        assert becomes_true(lambda: "fake_driver sleep" in log.read_text())
        started.kill()
        assert becomes_true(lambda: not is_alive(worker))


def test_an_interrupt_of_all_is_the_sweeps_alone(sweep, tmp_path):
    """A terminal sends Ctrl-C to all processes: one that still imports would tell where it was."""
    with sweep(0.5) as started:
        assert becomes_true(lambda: list(tmp_path.glob("*.importing")))
        worker = int(next(tmp_path.glob("*.importing")).stem)
        os.kill(worker, signal.SIGINT)
        assert int(started.stdout.readline()) == worker
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=10)
    assert said == "error: interrupted; start again with: python sweep.py 0.5\n" and not is_alive(worker)


def becomes_true(holds: Callable) -> bool:
    until = time.monotonic() + 10
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(holds())


def is_alive(process: int) -> bool:
    """Whether it is there, and not one that has ended and that nobody has asked for."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture
def data(tmp_path):
    """A data folder of GSM8K alone."""
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    row = json.dumps({"question": "How much is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}) + "\n"
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(row * 4)
    return folder.parent


def command(data, *more):
    common = ["--model", str(ROOT / "ckpt/tiny-llama"), "--data", str(data), "--output_dir", str(data.parent / "out")]
    return [*common, "--tasks", "gsm8k", "--seeds", "5", *more]


def test_the_first_runs_tell_most(data):
    args = experiments.parse(command(data, "--seeds", "0", "1"))
    order = [(trial.variant, trial.seed) for trial in experiments.trials(args)]
    first = [(variant, seed) for variant in experiments.FIRST for seed in (0, 1)]
    assert order[: len(first)] == first
    assert len(order) == len(set(order)) == 2 * len(experiments.TASKS["gsm8k"].variants)


def test_options_of_a_run(data):
    args = experiments.parse(command(data, "--", "--learning_rate", "2e-3"))
    exact, four = experiments.trials(args)[:2]
    options = four.argv(args)
    assert options[-2:] == ["--learning_rate", "2e-3"] and options[options.index("--q_bit") + 1] == "4"
    assert options[options.index("--data_dir") + 1] == str(data / "gsm8k")
    assert options[options.index("--evaluate_before") + 1] == "False"
    inputs = next(trial for trial in experiments.trials(args) if trial.variant == "layer inputs, 4 bit").argv(args)
    assert DRIVER.parse(inputs)[3].config().layers == "input4"
    assert [words[words.index("--max_new_tokens") + 1] for words in (options, inputs)] == ["256", "0"]
    options = exact.argv(args)
    assert options[options.index("--use_hyclora") + 1] == "False" and "--q_bit" not in options
    assert options[options.index("--evaluate_before") + 1] == "True"


def test_alpaca_in_the_plain_loop(data, tmp_path, monkeypatch):
    """By its own settings; the test prompts are written after with the first seed alone."""
    (data / "alpaca").mkdir()
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(6)]
    (data / "alpaca" / "alpaca_small.json").write_text(json.dumps(rows))
    monkeypatch.setattr(experiments, "run_all", lambda jobs, *_: ((job, workers._run(*job[1:])[0]) for job in jobs))
    options = command(data, "--tasks", "alpaca", "--seeds", "0", "1", "--variants", "intra_inter, 2 bit")
    quick = ["--max_steps", "1", "--max_new_tokens", "2", "--use_cpu", "True", "--max_eval_samples", "2"]
    experiments.main([*options, "--", *quick, "--iteration_threshold", "1", "--mixed_precision", "off"])
    lines = [json.loads(line) for line in (data.parent / "out" / "experiments.jsonl").read_text().splitlines()]
    assert [len(line["texts"]["after"]["texts"]) for line in lines if "texts" in line] == [4]
    assert all(line["metrics"]["held-out_loss"]["after"] > 0 for line in lines) and len(lines) == 2
    assert lines[0]["arguments"]["learning_rate"] == 5e-4 and "lr_scheduler_type" not in lines[0]["arguments"]


def test_mistakes(data, capsys):
    for more, sentence in (
        (["--model", "nowhere"], "nowhere has no config.json: --model is a checkpoint folder"),
        (["--tasks", "rte"], "glue/RTE/train.tsv does not exist: --data is a folder with glue/RTE/train.tsv"),
    ):
        with pytest.raises(SystemExit) as ended:
            experiments.main(command(data, *more))
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_a_run_that_stops_in_a_worker_names_its_own_program(monkeypatch):
    def stop(argv):
        raise RunStopped(f"start again: {again(argv)}")

    driver = SimpleNamespace(parse=lambda argv: argv, run=lambda asked, argv: stop(argv))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="benchmarks.experiments"))
    for name, command in (("run_gsm8k", "python run_gsm8k.py"), ("benchmarks.peer", "python -m benchmarks.peer")):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(DRIVER=driver))
        found, usable = workers._run(name, ["--seed", "3"])
        assert found == {"error": f"RunStopped: start again: {command} --seed 3"} and not usable
    assert again(["--seed", "3"]) == "python -m benchmarks.experiments --seed 3"


def test_lines_of_runs_and_what_is_not_run_again(data, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "run_all", lambda jobs, *_: ((job, workers._run(*job[1:])[0]) for job in jobs))
    common = command(data, "--variants", "exact LoRA", "intra_inter, 2 bit", "--jobs", "1")
    quick = ["--max_steps", "1", "--max_new_tokens", "2", "--use_cpu", "True"]
    with pytest.raises(SystemExit) as ended:
        experiments.main([*common, "--", *quick, "--softmax_outlier_ratio", "0.1"])
    assert ended.value.code == 1 and "1 runs failed and 0 were left undone" in capsys.readouterr().err
    experiments.main([*common, "--variants", "exact LoRA", "--", *quick])
    experiments.main([*common, "--variants", "exact LoRA", "--", *quick])
    assert "1 runs, 1 done already" in capsys.readouterr().out
    lines = [json.loads(line) for line in (data.parent / "out" / "experiments.jsonl").read_text().splitlines()]
    assert [line.get("error", "")[:9] for line in lines] == ["", "UserError", ""]
    with (data.parent / "out" / "experiments.jsonl").open("a") as file:  # the same run fails, later than it ended well
        file.write(json.dumps(lines[2] | {"error": "RunStopped: out of memory"}) + "\n")
    experiments.main([*common, "--variants", "exact LoRA", "--", *quick])
    assert "1 runs, 0 done already" in capsys.readouterr().out
    line = lines[2]
    assert line["metrics"]["test_loss"].keys() == {"before", "after"} and line["metrics"]["accuracy"]["after"] <= 1
    assert line["setting"] is None and line["kept_bits"] is None and line["losses"][0][0] == 1
    assert (line["task"], line["variant"], line["seed"], line["more"]) == ("gsm8k", "exact LoRA", 5, quick)
