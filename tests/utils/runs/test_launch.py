"""num_gpus: a program's processes on this machine, and how they end."""

import json
import os
import signal
import sys
from unittest import mock

import pytest

import run_gsm8k
from hyclora.utils import driver
from hyclora.utils.args import ROOT
from hyclora.utils.errors import UserError
from hyclora.utils.runs import launch as module
from hyclora.utils.runs.launch import launch
from hyclora.utils.runs.script import LAUNCHED, again
from hyclora.utils.training_arguments import TrainingArguments

TELL = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "HYCLORA_LAUNCHED")
with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as file:
    json.dump([[os.environ[name] for name in names], sys.argv[2:]], file)
"""
FAIL = """
import os
import torch, run_gsm8k
from hyclora.utils import metrics

stock, calls = metrics.F.cross_entropy, []

class Functional:
    def cross_entropy(*args, **options):
        calls.append(1)
        if len(calls) > 1 and os.environ["RANK"] == os.environ["FAILING"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(*args, **options)

metrics.F = Functional
run_gsm8k.main()
"""


@pytest.fixture(autouse=True)
def environment():
    """As it was, after the test; so is what signals do, for which torch's launcher leaves functions of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def program(folder, text: str) -> str:
    file = folder / "program.py"
    file.write_text(text)
    return str(file)


def test_each_process_knows_of_the_others(tmp_path):
    launch(2, program(tmp_path, TELL), [str(tmp_path), "--seed", "3"])
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert found == [[[str(rank), str(rank), "2", "2", "1"], ["--seed", "3"]] for rank in range(2)]


def test_the_first_failure_ends_all(tmp_path, capfd):
    """With its exit code, and nothing said but what the processes say."""
    text = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('told: 1')\ntime.sleep(60)"
    with pytest.raises(SystemExit) as exit:
        launch(2, program(tmp_path, text), [])
    assert exit.value.code == 1 and capfd.readouterr().err == "told: 1\n"


@pytest.mark.parametrize("parallel, failing", [("ddp", 1), ("fsdp2", 0)])
def test_one_sentence_ends_all_that_wait_for_each_other(parallel, failing, tiny_llama_folder, tmp_path, capfd):
    """One of two that evaluate has no memory left; the other one loses it, and has nothing to say."""
    os.environ |= {"FAILING": str(failing), "PYTHONPATH": str(ROOT)}
    options = ["--model_dir", tiny_llama_folder.parent, "--model_name", tiny_llama_folder.name]
    options += ["--output_dir", tmp_path, "--num_gpus", 2, "--use_cpu", True, "--parallel", parallel]
    options += ["--evaluate_before", True, "--max_train_samples", 4, "--max_eval_samples", 8]
    options += ["--eval_batch_size", 1, "--max_new_tokens", 0]
    with pytest.raises(SystemExit) as exit:
        launch(2, program(tmp_path, FAIL), [*map(str, options), "--disable_tqdm", "True"])
    said = capfd.readouterr().err
    assert exit.value.code == 1 and "Traceback" not in said
    assert said.count("error: ") == said.count("error: out of memory; no checkpoint was written; start again") == 1


def test_a_process_that_is_killed_is_told(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_gsm8k.py"])
    monkeypatch.setattr(module, "again", lambda argv, *options: f"again with {options}")
    text = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    with pytest.raises(SystemExit) as exit:
        launch(2, program(tmp_path, text), [])
    said = "error: process 1 was ended by SIGKILL; go on with: again with ('--resume_from_checkpoint', True)\n"
    assert exit.value.code == 137 and capfd.readouterr().err == said


def test_such_processes_know_the_users_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_gsm8k.py", "--num_gpus", "2"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    os.environ |= {"WORLD_SIZE": "2", LAUNCHED: "1"}
    assert again(None) == "python run_gsm8k.py --num_gpus 2"
    del os.environ[LAUNCHED]
    assert again(None) == "your command"


@pytest.mark.parametrize(
    "options, told, named",
    [
        ({"num_gpus": 0}, {}, "num_gpus must be 1 or more, not 0"),
        ({"num_gpus": 2}, {}, "num_gpus=2, and there are none: lower num_gpus, or add --use_cpu True"),
        ({"num_gpus": 2, "use_cpu": True}, {"RANK": "0", "LOCAL_WORLD_SIZE": "3"}, "has started 3 processes here"),
    ],
)
def test_what_cannot_be_is_refused(options, told, named, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    os.environ.update(told)
    with pytest.raises(UserError, match=named):
        TrainingArguments(str(tmp_path), **options)


def test_only_the_first_process_starts_others(monkeypatch, tmp_path):
    started, run = [], []
    monkeypatch.setattr(driver, "launch", lambda *args: started.append(args))
    monkeypatch.setattr(driver, "_run", lambda *args: run.append(args))
    argv = ["--num_gpus", "2", "--use_cpu", "True", "--output_dir", str(tmp_path)]
    run_gsm8k.main(argv)
    assert started == [(2, str(ROOT / "run_gsm8k.py"), argv)] and not run
    os.environ |= {"RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    run_gsm8k.main(argv)
    assert len(started) == len(run) == 1
