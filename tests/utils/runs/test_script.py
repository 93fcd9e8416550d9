"""The command that started a driver: near misses in the environment, and the command that is given to go on."""

import os
import shlex
import subprocess
import sys

import pytest

from hyclora.utils.args import ROOT, Parser
from hyclora.utils.runs.script import PASSED, SCRIPT, again, check_environment
from run_gsm8k import DRIVER

OPTIONS = [name for action in Parser(DRIVER.groups)._actions for name in action.option_strings]


@pytest.fixture(autouse=True)
def started_by_the_script(monkeypatch):
    for name in [name for name in os.environ if name == name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(SCRIPT, str(ROOT / "run_gsm8k.sh"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("qbit", "qbit in the environment is not a setting of run_gsm8k.sh: did you mean q_bit?"),
        ("lora_ranks", "did you mean lora_rank?"),
        ("learning_rte", "did you mean learning_rate?"),
        ("lora_dropout", "--lora_dropout VALUE"),
        ("output_dir", "--output_dir VALUE"),
    ],
)
def test_near_misses_are_named(monkeypatch, name, said):
    monkeypatch.setenv(name, "")
    check_environment(OPTIONS)
    monkeypatch.setenv(name, "secret")
    with pytest.raises(ValueError) as caught:
        check_environment(OPTIONS)
    assert said in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["q_bit", "http_proxy", "no_proxy", "debug", "project", "Q_BITS", "shell", "model"])
def test_other_variables_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    check_environment(OPTIONS)
    monkeypatch.setenv("qbit", "2")
    monkeypatch.delenv(SCRIPT)
    check_environment(OPTIONS)


def argv_of_the_script(folder, *options, **variables):
    """What the script passes of its own, and all that it gives run_gsm8k.py."""
    python = folder / "python"
    python.write_text('#!/bin/bash\n[[ "$1" == - ]] || printf "%s\\n" "$HYCLORA_PASSED" "${@:2}"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
    command = ["bash", ROOT / "run_gsm8k.sh", *options]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    _, passed, *argv = said.splitlines()
    return passed, argv


def test_the_command_to_go_on_is_the_users_own(monkeypatch, tmp_path):
    options = ("--max_steps", "3", "--resume-from-checkpoint", "True", "--run_name", "my run")
    passed, argv = argv_of_the_script(tmp_path, *options, q_bit="2", data_dir="/my data", data_name="gsm8k")
    assert shlex.split(passed) == argv[: -len(options)] and "/my data" in argv
    monkeypatch.setenv(PASSED, passed)
    monkeypatch.setenv("q_bit", "2")
    command = again(argv, "--resume_from_checkpoint", "folder/checkpoint-3")
    script = ROOT / "run_gsm8k.sh"
    assert command == (
        f"q_bit=2 bash {script} --max_steps 3 --run_name 'my run' --resume_from_checkpoint folder/checkpoint-3"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert again(argv, "--offload", True) == "your command with --offload True"


def test_the_command_of_a_driver_without_a_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_gsm8k.py", "--seed=3", "--resume_from_checkpoint=x", "--greedy"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert again(None, "--seed", 4) == "python run_gsm8k.py --greedy --seed 4"
    assert shlex.split(again(None)) == ["python", "run_gsm8k.py", "--seed=3", "--greedy"]


def test_the_script_refuses_a_near_miss(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "qbit": "2", "output_dir_of_nothing": "1"}
    del environment[SCRIPT]
    command = ["bash", ROOT / "run_gsm8k.sh", "--output_dir", tmp_path]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean q_bit?" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
