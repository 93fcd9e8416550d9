"""run_alpaca.py from end to end on a small model: what it leaves behind, how it goes on, the grid, what it refuses."""

import itertools
import json
import math
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import run_alpaca
from benchmarks import technique_grid
from benchmarks.workers import _run
from hyclora.utils import checks, driver
from tests.helpers.drivers import run_script

ROWS = [
    {"instruction": f"Say {n}.", "input": "", "output": f"It is {n}, and no more{' at all' * (n % 3)}."}
    for n in range(30)
]
RESUME = "--resume_from_checkpoint"
EVALUATED = ["--max_eval_samples", "4", "--max_new_tokens", "3", "--save_steps", "2"]  # which a sweep is not


@pytest.fixture
def options(tiny_llama_folder, tmp_path):
    """Options of a run that works: 12 rows, accumulated over 2, so 6 steps."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    return (
        ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name, "--use_cpu", "True"]
        + ["--data_name", "alpaca", "--data_dir", str(file), "--output_dir", str(tmp_path / "runs")]
        + ["--max_train_samples", "12", "--lora_rank", "4", "--learning_rate", "1e-2"]
        + ["--gradient_accumulation", "2", "--logging_steps", "2"]
        + ["--iteration_threshold", "2"]
    )


@pytest.fixture
def run(options, tmp_path, capsys):
    """Run it; the folder of the newest run, its results (None if it did not end well), what it said, its exit code."""

    def run(*more):
        before = set((tmp_path / "runs").glob("*/"))
        given = [*options, *([] if "--sweep" in more else EVALUATED), *more]
        code, said = run_script(run_alpaca.main, given, capsys)
        new = set((tmp_path / "runs").glob("*/")) - before
        folder = new.pop() if new else None
        results = folder.with_name(f"{folder.name}.json") if folder else tmp_path / "none"
        found = json.loads(results.read_text()) if results.is_file() else None
        return folder, found, said, code

    return run


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """In place of the GPU that it needs."""
    monkeypatch.delitem(checks.NEED_GPU, "mixed_precision")


@pytest.mark.usefixtures("fp16_on_cpu")
def test_a_run_tells_and_keeps_everything(run):
    folder, found, said, code = run("--evaluate_before", "True", "--mixed_precision", "fp16")
    assert code == 0, said
    parameters = found["parameters"]
    assert parameters["trained"] == 2 * 4 * (64 + 64 + 64 + 32) and parameters["share"] < 0.05
    assert f"trainable parameters: {parameters['trained']:,} of {parameters['total']:,} (" in said
    assert [entry["step"] for entry in found["log_history"]] == [2, 4, 6] and "step 4 of 6: loss " in said
    loss = found["metrics"]["held-out_loss"]
    assert loss["after"] < loss["before"] - 0.05
    seconds, late = found["train"]["seconds"], found["train"]["row_ms"] / 1e3 * 6
    assert 0 < late < seconds, "six of twelve rows are in the second half"
    assert "\n4 held-out rows, 0 cut at seq_len, 0 dropped" in said
    assert f"average loss {found['train']['average_loss']:.4f}, " in said and " s of training" in said
    assert set(found["texts"]) == {"before", "after"}
    for time in ("before", "after"):
        assert len(found["texts"][time]["texts"]) == 4 and found["texts"][time]["cache"]["alike"] == 3
        assert f"{time} training: I believe the meaning of life is\n> " in said
        assert f"{time} training, greedy: 3 of 3 tokens alike with and without a cache of " in said
    taken = found["breakdown"]
    assert taken["optimizer_state"] // taken["gradients"] == 2, "AdamW's moments, and a number of steps each"
    assert taken["weight_copies"] == 0 < taken["activations"] and found["buffered_bytes"].keys() == {"hyclora"}
    counted = sum(size for name, size in taken.items() if name not in ("host", "flops"))
    assert re.search(rf"\nall of these on the device +{counted / 2**20:.2f} MiB\n", said)
    assert (folder / "adapter_model.safetensors").is_file() and "| mixed_precision | fp16 |" in (
        folder / "README.md"
    ).read_text()


@pytest.mark.parametrize(
    "more",
    [
        ["--use_lora", "False", "--use_hyclora", "False"],
        ["--use_hyclora", "False", "--gradient_checkpointing", "1 of 2", "--mixed_precision", "bf16"],
        ["--gradient_checkpointing", "all", "--q_bit", "2"],
    ],
    ids=" ".join,
)
def test_techniques_in_other_combinations_train(run, more, monkeypatch):
    left_out, stock = [], run_alpaca.checkpoint_layers
    monkeypatch.setattr(run_alpaca, "checkpoint_layers", lambda model, k: left_out.append(k) or stock(model, k))
    folder, found, said, code = run("--test_prompts", "False", *more)
    assert code == 0, said
    assert found["log_history"][-1]["loss"] < found["log_history"][0]["loss"] and "texts" not in found
    assert left_out == ([2] if "1 of 2" in more else [None] if "all" in more else [])
    full = "--use_lora" in more
    assert (folder / ("model.safetensors" if full else "adapter_model.safetensors")).is_file()
    taken = found["breakdown"]
    assert (taken["gradients"] == taken["parameters"]) == full
    # with float32 weights autocast keeps copies of those of the layer that is not run again, unless they are packed
    assert (taken["weight_copies"] > 0) == ("bf16" in more)


@pytest.mark.usefixtures("fp16_on_cpu")
@pytest.mark.parametrize(
    "more",
    [
        ["--mixed_precision", "fp16", "--lora_dropout", "0.2"],
        ["--use_lora", "False", "--use_hyclora", "False", "--num_train_epochs", "2"],
    ],
    ids=["hyclora fp16", "all weights"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(run, more, monkeypatch):
    whole, found, said, _ = run("--test_prompts", "False", *more)
    stock, steps = run_alpaca.train_step, []

    def stopping(*args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(*args)

    monkeypatch.setattr(run_alpaca, "train_step", stopping)
    folder, nothing, said, code = run("--test_prompts", "False", *more)
    assert (nothing, code) == (None, 130) and f"{RESUME} {folder / 'checkpoint-3'}" in said
    monkeypatch.setattr(run_alpaca, "train_step", stock)
    _, _, said, code = run("--test_prompts", "False", *more, RESUME, "True")
    assert code == 0 and "resuming" in said, said
    again = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    assert again["metrics"] == found["metrics"] and again["log_history"][1:] == found["log_history"][1:]
    assert (
        again["train"]["tokens"] == found["train"]["tokens"] and again["train"]["targets"] == found["train"]["targets"]
    )
    assert again["train"]["average_loss"] == pytest.approx(found["train"]["average_loss"])
    name = "model.safetensors" if "--use_lora" in more else "adapter_model.safetensors"
    ours, theirs = load_file(whole / name), load_file(folder / name)
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())
    _, _, said, code = run("--test_prompts", "False", *more, RESUME, folder)
    assert code == 0 and "is finished" in said


@pytest.mark.usefixtures("fp16_on_cpu")
@pytest.mark.parametrize(
    "more, told",
    [
        ([], "step 2 has a loss or gradients that are not finite: "),
        (["--non_finite", "skip"], None),
        (["--mixed_precision", "fp16"], "step 2 has a loss or gradients that are not finite: "),
        (["--mixed_precision", "fp16", "--non_finite", "skip"], None),
    ],
    ids=["stop", "skip", "fp16, stop", "fp16, skip"],
)
def test_a_loss_that_is_not_finite_ends_the_run_or_is_skipped(run, monkeypatch, more, told):
    """With fp16 too: the scaler looks at gradients alone."""
    stock, calls = LlamaForCausalLM.forward, itertools.count()

    def forward(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        if self.training and next(calls) == 2:
            out["loss"] = out["loss"] * float("nan")
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    _, found, said, code = run("--test_prompts", "False", "--use_hyclora", "False", *more)
    if told is None:
        assert code == 0 and found["train"]["skipped_steps"] == 1
        assert [math.isfinite(entry["loss"]) for entry in found["log_history"]] == [True] * 3
    else:
        assert (found, code) == (None, 1) and told in said


@pytest.mark.usefixtures("fp16_on_cpu")
def test_steps_that_overflow_are_counted_from_the_first_one(run, monkeypatch):
    """Six of six, as the scale is still too large at the end."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    _, found, said, code = run("--test_prompts", "False", "--use_hyclora", "False", "--mixed_precision", "fp16")
    assert code == 0 and found["train"]["skipped_steps"] == 6 and "steps that were not finite, skipped" in said


def test_the_smallest_grid_has_two_rows(run, tmp_path, monkeypatch):
    """LoRA on and off, by the runs that would be processes of their own; the second time nothing is measured."""
    monkeypatch.setattr(technique_grid, "run_all", lambda jobs, *_, **__: ((job, _run(*job[1:])[0]) for job in jobs))
    more = ["--sweep", "True", "--use_hyclora", "False", "--gradient_accumulation", "1", "--max_steps", "2"]
    more += ["--max_train_samples", "100"]
    _, _, said, code = run(*more)
    assert code == 0, said
    folder = tmp_path / "runs"
    lines = [json.loads(line) for line in (folder / "technique_grid.jsonl").read_text().splitlines()]
    assert [line["setting"]["use_lora"] for line in lines] == [True, False]
    lora, full = (line["mib"] for line in lines)
    assert full["gradients"] == full["parameters"] > 10 * lora["gradients"] > 0
    text = (folder / "technique_grid.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| gradients"))
    assert f"↓ {lora['gradients'] / full['gradients']:.2f}x" in row
    assert "| off | off | off | " in text and text in said
    assert text.index("not of this run") < text.index("first report (7B), mixed precision")
    assert (folder / "technique_grid.png").stat().st_size > 1000
    assert not list(folder.glob("grid/*/*.safetensors")), "a combination saves nothing"
    rows = {
        json.loads(file.read_text())["content"]["content of the training rows"] for file in folder.glob("grid/*.json")
    }
    assert rows == {line["conditions"]["content of the training rows"] for line in lines} and len(rows) == 1
    _, _, said, code = run(*more)
    assert code == 0 and "2 combinations, 2 measured already" in said
    monkeypatch.setattr(technique_grid, "run_all", lambda *_, **__: iter(()))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[::-1]))
    _, _, said, code = run(*more)
    assert code == 1 and "2 combinations, 0 measured already" in said, "they were measured on other rows"


def test_a_grid_in_processes_of_their_own_ends_in_time_and_goes_on(run, tmp_path):
    """Six steps of a combination are not done in a second, nor all in a blink; the report has what there is."""
    more = ["--sweep", "True", "--use_hyclora", "False", "--gradient_accumulation", "1"]
    _, _, said, code = run(*more, "--sweep_minutes", "1e-6")
    assert code == 1 and "2 of 2 combinations are left: the same command goes on" in said
    _, _, said, code = run(*more, "--sweep_timeout", "1")
    assert code == 0 and said.count("not done after 1 s") == 2 and "> 1 |" in said
    lines = [json.loads(line) for line in (tmp_path / "runs" / "technique_grid.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines] == ["not done after 1 s"] * 2


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """What it says to mistaken options, after checking that nothing was loaded or written."""
    monkeypatch.setattr(driver, "load_model", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.setattr(technique_grid, "run_all", lambda *_, **__: pytest.fail("combinations were measured"))

    def refused(*more):
        _, _, said, code = run(*more)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert not list((tmp_path / "runs").glob("*"))
        return said

    return refused


@pytest.mark.parametrize(
    "more, named",
    [
        (["--mixed_precision", "fp8"], "invalid choice: 'fp8' (choose from 'off', 'fp16', 'bf16')"),
        (["--mixed_precision", "fp16"], "needs a GPU, and this would run on the CPU: set mixed_precision=bf16, or off"),
        (["--mixed_precision", "fp16", "--sweep", "True"], "mixed_precision=fp16 needs a GPU"),
        (["--gradient_checkpointing", "some"], "gradient_checkpointing 'some' is not off, all, or"),
        (["--gradient_checkpointing", "1 of 3"], "gradient_checkpointing '1 of 3' is not off, all, or"),
        (["--gradient_checkpointing", "0 of 1"], "checkpoints no layer: write off"),
        (["--gradient_accumulation", "0"], "gradient_accumulation must be at least 1"),
        (["--use_lora", "False"], "set use_hyclora=False, or use_lora=True"),
        (["--use_lora", "False", "--use_hyclora", "False", "--load_in_4bit", "True"], "set load_in_4bit=False"),
        (["--use_lora", "False", "--use_hyclora", "False", "--dtype", "bfloat16"], "dtype=bfloat16 is too coarse"),
        (["--dtype", "bfloat16"], "mixed_precision=off computes in float32, and dtype=bfloat16"),
        (["--temperature", "-1"], "temperature must be 0 or a positive number, not -1.0"),
        (["--temperature", "inf"], "temperature must be 0 or a positive number, not inf"),
        (["--top_p", "0"], "top_p must lie in (0, 1]"),
        (["--max_new_tokens", "0"], "max_new_tokens must be positive"),
        (["--save_steps", "-1"], "save_steps must not be negative"),
        (["--sweep_minutes", "9"], "sweep_minutes has no effect with sweep=False: drop it or set sweep=True"),
        (["--sweep_gpus", "2"], "sweep_gpus has no effect with sweep=False"),
        (["--sweep_timeout", "60", "--sweep", "False"], "sweep_timeout has no effect with sweep=False"),
        (["--sweep_peers", "True"], "sweep_peers has no effect with sweep=False"),
        (["--sweep", "True", "--run_name", "mine"], "run_name has no effect with sweep=True, which measures"),
        (["--sweep", "True", "--verify", "True"], "verify is of HyC-LoRA alone, and a sweep measures LoRA beside it"),
        (["--sweep", "True", "--max_eval_samples", "4"], "max_eval_samples has no effect with sweep=True"),
        (["--sweep", "True", "--temperature", "0.5"], "temperature has no effect with sweep=True"),
        (["--sweep", "True", "--evaluate_before", "True"], "evaluate_before has no effect with sweep=True"),
        (
            ["--sweep", "True", "--save_steps", "5", "--max_eval_samples", "0"],
            "save_steps has no effect with sweep=True",
        ),
        (["--sweep", "True", RESUME, "True"], "sweep goes on where it stopped by itself"),
        (["--max_eval_samples", "30"], "would hold out all of the 30 rows"),
        (["--tokenizer_dir", "nowhere"], "nowhere has no tokenizer"),
        (["--data_dir", "nowhere.json"], "data_dir nowhere.json is no file"),
        (["--target_modules", "query"], "the model has no layer named query: its linear ones are down_proj, "),
        ([RESUME, "True"], "no unfinished run"),
    ],
)
def test_mistaken_options(refused, more, named):
    assert named in refused(*more)


def test_checkpointing_that_leaves_out_the_only_layer(refused, tiny_llama_folder, tmp_path):
    copy = shutil.copytree(tiny_llama_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 1}
    (copy / "config.json").write_text(json.dumps(config))
    said = refused("--model_dir", tmp_path, "--model_name", "copy", "--gradient_checkpointing", "2 of 3")
    assert f"gradient_checkpointing '2 of 3' leaves out the first layer, and {copy} has no other: write all, or" in said


@pytest.mark.parametrize(
    "text, named",
    [
        (json.dumps({"rows": ROWS}, indent=1), "is one JSON object: it needs a JSON list of objects"),
        (json.dumps([ROWS[0], {"input": "", "output": "1"}]), 'item 2: the key "instruction" is missing'),
        (json.dumps([{"instruction": "Say 1."}]), 'item 1: the key "output" is missing'),
        (json.dumps([ROWS[0] | {"output": ""}]), 'item 1: the response under "output" is empty'),
    ],
)
def test_mistaken_rows(refused, tmp_path, text, named):
    (tmp_path / "rows.json").write_text(text)
    assert named in refused() and named in refused("--sweep", "True")


def test_several_processes_are_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "this loop is for one process" in refused()
