"""Whatever options, files and model folders there are: a program ends with code 0, or 2 and one sentence.

A run ends where training, or measuring, would begin. FUZZ_SECONDS=600 pytest tests/scripts/test_fuzz.py looks for
longer, FUZZ_SEED elsewhere; what fails is told with its number, for FUZZ_FIRST.
"""

import contextlib
import io
import itertools
import os
import shutil
import sys
import time
import traceback
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from transformers import training_args

import run_memory_throughput
from hyclora.utils import driver, fidelity
from hyclora.utils.errors import Finished
from hyclora.utils.planning import plan
from tests.helpers.fuzzing import Case, Fuzzer

SECONDS = float(os.environ.get("FUZZ_SECONDS", 10))
SEED, FIRST = (int(os.environ.get(name, 0)) for name in ("FUZZ_SEED", "FUZZ_FIRST"))


def no_network(*args, **kwargs):
    raise ConnectionError("no network in tests")


def fault_of(case, monkeypatch) -> str | None:
    """What is wrong with the end of a run, None if nothing is."""
    main, load, said = import_module(case.driver).main, driver.load_model, io.StringIO()
    plans = case.driver == "hyclora.plan"  # it has no other end than its table, and code 1 where nothing fits

    def begin(*args):
        raise Finished("here training, or measuring, would begin")

    def load_model(*args):
        if case.of_model:
            load(*args)
        begin()

    with monkeypatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(driver, "load_model", load_model)
        patch.setattr(run_memory_throughput, "load_model", load_model)
        patch.setattr(run_memory_throughput, "run_alone", lambda *args: {})
        patch.setattr(fidelity, "train_exactly", begin)
        patch.setattr(plan, "measure_modes", begin)
        patch.setattr(os, "environ", os.environ.copy())
        try:
            main(case.options)
        except SystemExit as exit:
            code = exit.code
        except BaseException:
            return traceback.format_exc()
        else:
            code = 0 if plans else "it went on"
    errors = [line for line in said.getvalue().split("\n") if line.startswith("error: ")]
    right = (
        len(errors) == (code != 0)
        and code in ((0, 1, 2) if plans else (0, 2))
        and all(len(line) > len("error: ") + 10 for line in errors)
    )
    return None if right and "Traceback" not in said.getvalue() else f"code {code}: {said.getvalue()}"


@pytest.fixture(scope="module")
def precision():
    """That of fp32, which is to be the same when the tests here are over."""
    before = torch.backends.fp32_precision
    yield before
    assert torch.backends.fp32_precision == before


def test_a_run_switches_nothing_on_for_the_tests_after_it(precision, tiny_llama_folder, tmp_path, monkeypatch):
    """Where there is a GPU the Trainer has products in TF32 for torch_compile, and so in all of the process."""
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    training_args.enable_tf32.cache_clear()
    given = ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name, "--use_cpu", "True"]
    given += ["--output_dir", str(tmp_path), "--torch_compile", "True"]
    assert fault_of(Case("run_gsm8k", given, of_model=False), monkeypatch) is None
    assert torch.backends.fp32_precision == "tf32" != precision


@pytest.mark.timeout(SECONDS + 300)
def test_no_traceback_is_shown(tiny_llama_folder, tmp_path, monkeypatch, record_property):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=no_network, load_from_disk=no_network))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    fuzzer, faults, started = Fuzzer(tiny_llama_folder, SEED), [], time.monotonic()
    for number in itertools.count(FIRST):
        if time.monotonic() - started > SECONDS:
            break
        folder = tmp_path / str(number)
        case = fuzzer.case(number, folder)
        if fault := fault_of(case, monkeypatch):
            faults.append(f"case {number}: {case.driver} {case.options}\n{fault}")
        shutil.rmtree(folder)
    record_property("drawn", number - FIRST)
    print(f"{number - FIRST} cases")
    assert number > FIRST and not faults, f"{len(faults)} faults, first\n" + "\n\n".join(faults)
