"""What a command imports before it does anything: of a cold disk a large package takes seconds."""

import json
import os
import subprocess
import sys

import pytest

from hyclora.utils.args import ROOT

RUN = """
import json, runpy, sys
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
except SystemExit as exit:
    print(json.dumps([exit.code or 0, *sys.modules]))
"""
IMPORT = """
import json, sys
for module in sys.argv[1:]:
    __import__(module)
print(json.dumps([0, *sys.modules]))
"""
TABLES = {"datasets", "pandas", "pyarrow"}
MODELS = {"torch", "triton", "transformers.modeling_utils", "peft", "accelerate", "bitsandbytes", "scipy"}


def imported(code, module, *options):
    """The exit code of a process, and the packages and modules that it has imported."""
    command = [sys.executable, "-c", code, module, *options]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    exit_code, *names = json.loads(told.stdout.splitlines()[-1])
    return exit_code, set(names)


@pytest.mark.parametrize(
    "module, options",
    [
        ("hyclora.fidelity", ["--help"]),
        ("hyclora.fidelity", ["--modle", "x"]),
        ("hyclora.fidelity", ["--model", "no such folder", "--q_bit", "5"]),
        ("hyclora.plan", ["--help"]),
        ("hyclora.plan", ["llama-2-7b", "--gpus", "24GiB"]),
    ],
)
def test_a_mistyped_option_waits_for_no_torch(module, options):
    code, names = imported(RUN, module, *options)
    assert code == (0 if options == ["--help"] else 2) and not names & (MODELS | TABLES)


def test_a_setting_needs_no_torch():
    names = imported(IMPORT, "hyclora", "hyclora.models.config", "hyclora.utils.planning.units")[1]
    assert "hyclora.utils.planning.units" in names and not names & (MODELS | TABLES)


def test_what_trains_nothing_does_without_the_trainer():
    names = imported(IMPORT, "hyclora.utils.fidelity", "hyclora.utils.planning.plan")[1]
    assert "peft" in names and not names & (TABLES | {"transformers.trainer", "sklearn", "matplotlib", "trl"})


def test_help_of_a_driver_waits_for_no_tables():
    code, names = imported(RUN, "run_gsm8k", "--help")
    assert code == 0 and not names & (TABLES | {"transformers.trainer"})


PROGRAMS = [[path.name] for path in sorted(ROOT.glob("run_*.py"))]
PROGRAMS += [["-m", f"ckpt.{path.stem}"] for path in sorted(ROOT.glob("ckpt/*.py"))]
PROGRAMS += [["-m", "benchmarks.kernels"], ["-m", "benchmarks.peak_memory"], ["-m", "benchmarks.figures"]]
PROGRAMS += [["-m", "hyclora.plan", "llama-2-7b", "--gpu", "24GiB", "--host", "64GiB"]]
PROGRAMS += [["-m", "hyclora.fidelity", "--model", "ckpt/tiny-llama"]]
LARGE = ("torch", "transformers", "numpy", "tqdm", "matplotlib")


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_ctrl_c_while_it_imports_is_one_line(program, tmp_path):
    for name in LARGE:
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True)
    again = f"error: interrupted; start again with: python {' '.join(program)}\n"
    assert (ended.stderr, ended.returncode) == (again, 130)


def test_another_error_while_a_program_imports_has_its_traceback(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('no such file')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "run_gsm8k.py"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "Traceback" in ended.stderr and "ImportError: no such file" in ended.stderr and ended.returncode == 1
