"""The shell scripts: they parse, pass only options that exist, and work from any folder."""

import os
import re
import runpy
import subprocess
import sys

import pytest

from hyclora.utils.args import ROOT, Parser
from hyclora.utils.runs.script import settings_of
from tests.helpers import drivers
from tests.helpers.drivers import GROUPS

SCRIPTS = [ROOT / "utils/env.sh", ROOT / "utils/settings.sh", ROOT / ".ci/run", *sorted(ROOT.glob("*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_hides_no_failure(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text or script.parent.name == "utils"
    assert "| tee" not in text


@pytest.mark.parametrize("driver", GROUPS)
def test_every_option_that_is_passed_is_known_and_set(driver):
    script = ROOT / f"{driver}.sh"
    text = (ROOT / "utils/settings.sh").read_text() + script.read_text()
    passed = dict(re.findall(r'--(\w+) "\$(\w+)"', text))
    passed |= {name: name for names in re.findall(r"^add_options (.*)$", text, re.MULTILINE) for name in names.split()}
    known = {name for action in Parser(GROUPS[driver])._actions for name in action.option_strings}
    assert passed and {f"--{name}" for name in passed} <= known
    assert set(passed.values()) <= set(settings_of(script))


# what keeps a driver's own run to seconds
TRAINING = "--max_steps 1 --max_train_samples 4 --max_eval_samples 1 --per_device_train_batch_size 2"
SHORTEST = {
    "run_alpaca": f"{TRAINING} --max_new_tokens 2",
    "run_glue": TRAINING,
    "run_gsm8k": f"{TRAINING} --max_new_tokens 4",
    "run_longseq": f"{TRAINING} --seq_len 64 --eval_lengths 32,64 --stride 16 --group_size 16",
    "run_multitask": f"{TRAINING} --max_new_tokens 4",
    "run_memory_throughput": "--steps 1 --seq_len 16 --compare False",  # compared in tests/benchmarks
    "run_wikitext2": f"{TRAINING} --seq_len 64 --stride 32",
}


def test_a_script_ends_well_in_its_shortest_form(tmp_path):
    command = ["bash", ROOT / "run_gsm8k.sh", *SHORTEST["run_gsm8k"].split(), "--output_dir", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)  # kernels are for other tests
    environment.pop("PYTHONUNBUFFERED", None)
    one_file = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd="/", env=environment, text=True, **one_file)
    assert done.returncode == 0, done.stdout
    assert "gemm_4bit" not in done.stdout, "bitsandbytes misses a package that nothing here needs"
    assert "MiB" in done.stdout and list(tmp_path.glob("*.json*"))
    from_loss, *_ = done.stdout.partition("{'loss'")[2].partition("evaluating: ")
    assert "| 1/1 [" in from_loss, "a file has a loss before the bar of its training ends, as a terminal has it"


@pytest.mark.parametrize("driver", sorted(GROUPS.keys() - {"run_gsm8k"}))
def test_every_driver_ends_well_with_what_its_script_passes(driver, tmp_path, monkeypatch, capsys):
    """In this process, which has loaded torch already."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # for the processes that it may start
    monkeypatch.chdir("/")
    stub_interpreter(tmp_path, qualifies=True)
    _, program, *argv = run_script(tmp_path, *SHORTEST[driver].split(), script=f"{driver}.sh")
    assert program == str(ROOT / f"{driver}.py")

    def main(argv):
        monkeypatch.setattr(sys, "argv", [program, *argv])
        runpy.run_path(program, run_name="__main__")

    code, said = drivers.run_script(main, [*argv, "--output_dir", tmp_path / "results"], capsys)
    assert code == 0, said
    assert "MiB" in said and list((tmp_path / "results").glob("*.json*"))


@pytest.mark.parametrize("needed", ["", "scipy pytest"])
def test_a_user_needs_no_test_runner(needed, tmp_path):
    """What env.sh asks an interpreter: here one whose packages are those of the requirements but for pytest."""
    question = re.search(r"<<'PY'\n(.*?)\nPY\n", (ROOT / "utils/env.sh").read_text(), re.DOTALL)[1]
    program = (
        "import importlib.metadata as metadata\n"
        "def version(name):\n"
        "    if name.startswith('pytest'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return '99.0'\n"
        "metadata.version = version\n" + question
    )
    command = [sys.executable, "-c", program, ROOT / "pyproject.toml", needed]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr.strip()) == ((1, "lacks pytest") if needed else (0, ""))


def stub_interpreter(folder, qualifies, gpu=False):
    """A `python` that answers env.sh's questions, the first as told, and otherwise prints its arguments.

    gpu: there is one, whatever the machine has.
    """
    python = folder / "python"
    answer = "exit 0" if qualifies else "echo lacks torch; exit 1"
    seen = "exit 0" if gpu else f'exec {sys.executable} "$@"'
    sees = f'[[ "$1" == -c ]] && {seen}'
    python.write_text(f'#!/bin/bash\n[[ "$1" == - ]] && {{ {answer}; }}\n{sees}\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    if gpu:
        (folder / "nvidia-smi").symlink_to("/bin/true")
    return python


def run_script(folder, *options, script="run_gsm8k.sh", **variables):
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    environment.pop("PYTHON", None)
    return subprocess.run(
        ["bash", ROOT / script, *options], cwd="/", env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_settings_come_from_outside_and_options_are_forwarded_last(tmp_path):
    stub_interpreter(tmp_path, qualifies=True)
    first, script, *argv = run_script(tmp_path, "--max_steps", "3", q_bit="2", data_name="gsm8k")
    assert first == f"env: using {tmp_path / 'python'}" and script == str(ROOT / "run_gsm8k.py")
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    assert argv[-2:] == ["--max_steps", "3"]
    assert (given["--q_bit"], given["--data_name"], "--layer_type" in given) == ("2", "gsm8k", False)
    assert (given["--num_train_epochs"], given["--gradient_accumulation_steps"]) == ("6", "4")


@pytest.mark.parametrize(
    "script, given", [("run_alpaca.sh", {"num_gpus": "2"}), ("run_gsm8k.sh", {"target_modules": "q_proj"})]
)
def test_a_setting_of_other_scripts_is_refused_not_ignored(script, given, tmp_path):
    stub_interpreter(tmp_path, qualifies=True)
    with pytest.raises(subprocess.CalledProcessError) as ended:
        run_script(tmp_path, script=script, **given)
    ((name, value),) = given.items()
    assert ended.value.returncode == 2
    assert f"error: {name}={value} is a setting of other scripts, not of {ROOT / script}: " in ended.value.stderr


@pytest.mark.parametrize("script", ["run_gsm8k.sh", "run_longseq.sh"])
def test_a_budget_leaves_open_what_the_script_would_set_on_a_gpu(script, tmp_path):
    stub_interpreter(tmp_path, qualifies=True, gpu=True)
    presets = []
    for variables in ({}, {"memory_budget": "20GiB"}):
        _, _, *argv = run_script(tmp_path, script=script, **variables)
        presets.append(argv[argv.index("--preset") + 1])
    assert presets[0] in ("least_memory", "longest") and presets[1] == "default"


def test_the_demo_is_small(tmp_path):
    stub_interpreter(tmp_path, qualifies=True)
    _, _, *argv = run_script(tmp_path)
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    assert (given["--model_name"], given["--data_name"], given["--evaluate_before"]) == ("tiny-llama", "demo", "True")
    assert (given["--num_train_epochs"], given["--per_device_train_batch_size"]) == ("1", "16")


def test_environment_is_made_once_and_a_half_made_one_again(tmp_path):
    """env.sh in a copy of the repository, with a stub for the interpreter that makes environments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils/env.sh").write_text((ROOT / "utils/env.sh").read_text())
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements.txt").write_text("torch==1\n")
    python = tmp_path / "bin/python"
    python.write_text(
        "#!/bin/bash\n"
        '[[ "$1" == - ]] && { echo lacks torch >&2; exit 1; }\n'
        '[[ "$1 $2" == "-m venv" ]] && { echo made >> made; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }\n'
        '[[ "$1 $2" == "-m pip" && -e no-network ]] && exit 1\n'
        "exit 0\n"
    )
    python.chmod(0o755)
    (tmp_path / "bin/python3").symlink_to(python)

    def source():
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        command = ["bash", "-c", "set -euo pipefail; source utils/env.sh; echo $PYTHON"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return result, (tmp_path / "made").read_text().count("made")

    (tmp_path / "no-network").touch()
    result, made = source()
    assert result.returncode != 0 and made == 1
    (tmp_path / "no-network").unlink()
    result, made = source()
    assert result.stdout.splitlines()[-1] == str(tmp_path / ".venv/bin/python") and made == 2
    assert source()[1] == 2
    (tmp_path / "requirements.txt").write_text("torch==2\n")
    assert source()[1] == 3
