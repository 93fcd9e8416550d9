"""memory_budget of the scripts: chosen for the rows that were read, before anything is loaded."""

from dataclasses import fields

import pytest

import run_alpaca
import run_gsm8k
import run_longseq
import run_memory_throughput
from hyclora.models.config import HycloraConfig
from hyclora.utils import within_budget
from hyclora.utils.args import ROOT, HycloraArguments
from hyclora.utils.errors import UserError
from hyclora.utils.results import print_settings, settings
from hyclora.utils.runs.identity import identity
from hyclora.utils.runs.script import SCRIPT


@pytest.fixture
def given(tiny_llama_folder, monkeypatch):
    """A driver's groups with a budget, as on a GPU, and those of HyC-LoRA."""
    monkeypatch.setattr(within_budget, "available_host", lambda: 2**34)

    def make(driver, *options, **settings):
        checkpoint = ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
        groups = list(driver.parse([*checkpoint, "--max_train_samples", "20", "--max_eval_samples", "0", *options]))
        place = next(i for i, group in enumerate(groups) if isinstance(group, HycloraArguments))
        groups[place] = HycloraArguments(**{"memory_budget": "20GiB", **settings})
        return tuple(groups), groups[place]

    return make


@pytest.fixture
def read(given):
    """The same after the driver has read its rows."""

    def run(driver, *options, **settings):
        groups, hyclora = given(driver, *options, **settings)
        driver.read(groups, lambda line: None)
        return groups, hyclora

    return run


def test_a_driver_chooses_for_its_longest_rows(read):
    groups, hyclora = read(run_gsm8k.DRIVER, "--per_device_train_batch_size", "4")
    assert (hyclora.offload, hyclora.cuda_graphs, hyclora.layers, hyclora.q_bit) == (False, "auto", "slots", 4)
    assert hyclora.plan.startswith("resident, CUDA graphs, 4 bit, for 4 x ") and hyclora.config() == HycloraConfig()


def test_what_was_chosen_is_printed_and_kept_and_no_budget_makes_another_run(read, capsys):
    groups, hyclora = read(run_gsm8k.DRIVER)
    print_settings(groups[:-1])
    printed = capsys.readouterr().out
    assert f"plan: {hyclora.plan}" in printed and "memory_budget: 20GiB" in printed and "offload: False" in printed
    kept = settings(*groups)
    assert kept["HycloraArguments"]["plan"] == hyclora.plan
    assert not {"plan", "memory_budget"} & identity(kept).keys()


def test_a_run_trains_as_chosen(given, tmp_path, capsys):
    """And measures no plain LoRA, which may have no room."""
    options = ["--max_steps", "2", "--save_steps", "0", "--output_dir", str(tmp_path), "--seq_len", "128"]
    groups, hyclora = given(run_gsm8k.DRIVER, *options)
    found = run_gsm8k.DRIVER.run(groups)
    printed = capsys.readouterr().out
    assert f"plan: {hyclora.plan}" in printed and f"\n  memory_budget: {hyclora.plan}" in printed
    assert found["settings"]["HycloraArguments"]["plan"] == hyclora.plan
    assert found["buffered_bytes"].keys() == {"hyclora"}


def test_what_is_given_stays(read):
    _, hyclora = read(run_gsm8k.DRIVER, q_bit="8", offload=True)
    assert (hyclora.q_bit, hyclora.offload) == (8, True)
    _, preset = read(run_gsm8k.DRIVER, preset="longest")
    assert (preset.offload, preset.cuda_graphs) == (True, False)


@pytest.mark.parametrize("more", [["--group_size", "64"], ["--trainable_params", "norm"]], ids=" ".join)
def test_more_than_adapters_is_refused(read, more):
    options = ["--seq_len", "128", "--eval_lengths", "64", "--stride", "32"]
    with pytest.raises(UserError, match="memory_budget counts adapters on models that predict the next token"):
        read(run_longseq.DRIVER, *options, *more)


def test_verifying_takes_more_than_is_counted(read):
    with pytest.raises(UserError, match="verify takes the memory of plain LoRA"):
        read(run_gsm8k.DRIVER, verify=True)


def test_a_budget_that_is_too_small_ends_the_reading(read):
    with pytest.raises(UserError, match="is below the .* that weights"):
        read(run_gsm8k.DRIVER, memory_budget="900MiB")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--dtype", "float32"], "memory_budget counts weights of 16 bit or NF4, and dtype=float32 is set"),
        (
            ["--dtype", "bfloat16", "--mixed_precision", "bf16", "--gradient_checkpointing", "1 of 2"],
            "cannot count gradient_checkpointing='1 of 2'",
        ),
    ],
)
def test_what_is_not_counted_is_refused(read, options, said):
    with pytest.raises(UserError, match=said):
        read(run_alpaca.DRIVER, *options)


def test_a_budget_needs_a_gpu_and_hyclora(capsys):
    for options, said in (
        (
            ["--memory_budget", "20GiB"],
            "memory_budget=20GiB needs a GPU, and this would run on the CPU: drop memory_budget",
        ),
        (["--memory_budget", "20Gib"], "memory_budget: '20Gib' is no size of memory"),
        (
            ["--memory_budget", "20GiB", "--use_hyclora", "False"],
            "memory_budget has no effect with use_hyclora=False: drop it or change use_hyclora",
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            run_memory_throughput.main([*options, "--device", "cpu"])
        captured = capsys.readouterr()
        assert exit.value.code == 2 and captured.out == "" and said in captured.err


def test_options_are_those_that_a_script_can_answer():
    names = {f.name for f in fields(HycloraArguments)}
    assert "largest_batch" not in names and "memory_budget" in names


def test_the_largest_batch_is_no_setting_of_a_script(monkeypatch):
    monkeypatch.setenv(SCRIPT, str(ROOT / "run_gsm8k.sh"))
    monkeypatch.setenv("largest_batch", "4x512")
    with pytest.raises(UserError, match="the scripts look up the largest batch of their rows; drop it"):
        run_gsm8k.DRIVER.parse([])
