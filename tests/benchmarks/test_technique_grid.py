"""The grid of techniques: which combinations there are, what a line is, arrows and tables, and the reports' own."""

import importlib
import json
from dataclasses import replace

import pytest

from benchmarks import technique_grid, technique_peers, technique_tables
from benchmarks.peers import build
from benchmarks.real_rows import Training
from benchmarks.seed_reports import REPORTS
from benchmarks.technique_grid import Combination, answer, arguments_of, combinations, conditions_of, kept
from hyclora.utils.errors import UserError
from run_alpaca import DRIVER

ALL_ON = ["--gradient_checkpointing", "2 of 3", "--mixed_precision", "bf16"]
NOW = {"commit": "abc", "device": "a GPU"}
HERE = Combination(1, "off", "off", True, False)
COMMON = {"arguments": {"model_name": "m"}}
VERSIONS = {"versions": dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")}


def line(accumulation=1, checkpointing="off", precision="off", lora=True, hyclora=False, **values) -> dict:
    setting = vars(Combination(accumulation, checkpointing, precision, lora, hyclora))
    mib = {"parameters": 10, "activations": 8, "weight_copies": 0, "gradients": 1, "optimizer_state": 2}
    values.setdefault("row_ms", values.get("seconds", 5.0) * 10)
    found = {"peak_mib": 20, "seconds": 5.0, "flops": 100, "mib": mib | values.pop("mib", {})} | values
    return {"setting": dict(setting), "arguments": {"model_name": "m"}, **NOW, **VERSIONS, **found}


def test_every_technique_that_is_on_is_measured_off_and_on():
    found = combinations(DRIVER.parse(ALL_ON))
    assert len(found) == 24 == len({one.name for one in found})
    assert {one.gradient_accumulation for one in found} == {1, 8}
    assert {(one.use_lora, one.use_hyclora) for one in found} == {(False, False), (True, False), (True, True)}


def test_a_combination_is_run_with_its_own_settings_and_the_sweeps(tmp_path):
    """Each is read as it would be in its process: what comes again in the options is replaced."""
    options = [*ALL_ON, "--gradient_accumulation", "4", "--sweep", "True", "--learning_rate", "3e-4"]
    groups = DRIVER.parse(options)
    for one in combinations(groups):
        module, argv = technique_grid.job(one, groups, options, tmp_path, 8)
        values = {name: value for group in DRIVER.parse(argv) for name, value in vars(group).items()}
        assert module == "run_alpaca" and not values["sweep"] and values["save_steps"] == 0
        assert {name: values[name] for name in vars(one) if name != "peer"} | {"peer": ""} == vars(one)
        assert values["learning_rate"] == 3e-4 and values["output_dir"] == str(tmp_path / "grid")


@pytest.mark.parametrize(
    "options, count",
    [
        ([], 6),
        (["--gradient_accumulation", "1"], 3),
        (["--gradient_accumulation", "1", "--use_hyclora", "False"], 2),
        ([*ALL_ON, "--dtype", "bfloat16"], 8),
        (["--gradient_accumulation", "1", "--use_hyclora", "False", "--use_lora", "False"], 1),
    ],
)
def test_what_is_off_stays_off(options, count):
    assert len(combinations(DRIVER.parse(options))) == count


def test_nf4_weights_are_not_trained():
    groups = DRIVER.parse(ALL_ON)
    groups[0].load_in_4bit = True
    assert {one.use_lora for one in combinations(groups)} == {True} and len(combinations(groups)) == 16


def test_a_line_answers_for_its_settings_commit_and_device():
    one, common = HERE, COMMON
    assert answer([line()], one, common, NOW, 60)
    assert answer([{**line(), "error": "out of memory"}], one, common, NOW, 60), "it would run out of memory again"
    for other in ({**line(), "error": "ValueError"}, {**line(), "commit": "def"}, line(accumulation=8)):
        assert not answer([other], one, common, NOW, 60)
    assert not answer([line()], one, {"arguments": {"model_name": "n"}}, NOW, 60)
    techniques = {"gradient_accumulation", "gradient_checkpointing", "mixed_precision", "use_lora", "use_hyclora"}
    shared = [arguments_of(DRIVER.parse(options)) for options in ([], ALL_ON, ["--learning_rate", "1"])]
    assert shared[0] == shared[1] != shared[2] and not techniques & shared[0].keys()


@pytest.mark.parametrize("option", ["--stream False", "--use_cpu True"])
def test_a_line_is_of_its_rows_and_of_what_changes_memory_or_time_too(option):
    now, other = (conditions_of(DRIVER.parse(options), {"rows": "1"}) for options in ([], option.split()))
    assert now != other and now["rows"] == other["rows"] == "1"
    common = COMMON | {"conditions": now}
    assert answer([line(conditions=now)], HERE, common, NOW, 60)
    assert not answer([line(conditions=other), line()], HERE, common, NOW, 60)


@pytest.mark.parametrize(
    "told, error, answers",
    [
        ("RunStopped: out of memory; no checkpoint was written; start again: x", "out of memory", True),
        ("OutOfMemoryError: CUDA out of memory. Tried\nto allocate", "out of memory", True),
        ("the process died (exit code -9), its output is in w.txt", "out of memory: the process was killed", True),
        ("not done after 60 s", "not done after 60 s", True),
        ("UserError: learning_rate must be\na positive number", "UserError: learning_rate must be a positive", False),
    ],
)
def test_a_failure_is_its_cause(told, error, answers):
    found = kept({"error": told})
    assert found.keys() == {"error"} and found["error"].startswith(error)
    assert bool(answer([line(**found)], HERE, COMMON, NOW, 60)) == answers
    assert not answer([line(**found)], HERE, COMMON, NOW, 61) or "60" not in told, "there is more time now"


def test_what_tells_most_comes_first():
    methods = [(one.use_hyclora, one.use_lora) for one in combinations(DRIVER.parse(ALL_ON))]
    assert methods == [(True, True)] * 8 + [(False, True)] * 8 + [(False, False)] * 8
    first = combinations(DRIVER.parse(ALL_ON))[0]
    assert first == Combination(8, "2 of 3", "bf16", True, True)


@pytest.fixture
def peers(tiny_llama_folder, tmp_path):
    """Options of a sweep with Unsloth, of two rows."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return (
        [*ALL_ON, "--dtype", "bfloat16", "--sweep_peers", "True", "--target_modules", "q_proj", "--max_train_samples"]
        + ["2", "--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
        + ["--data_name", "alpaca", "--data_dir", str(tmp_path / "rows.json"), "--use_cpu", "True"]
    )


def test_unsloth_is_measured_on_the_same_rows(peers, tiny_llama_folder, tmp_path, monkeypatch):
    groups = DRIVER.parse(peers)
    found = [one for one in combinations(groups) if one.peer]
    assert [one.name for one in found] == ["8-2of3-bf16-Unsloth", "8-off-bf16-Unsloth"]
    assert [one.peer for one in combinations(groups)].index("Unsloth") == 8, "after ours, before all weights"
    module, (text, timeout) = technique_grid.job(found[0], groups, [], tmp_path, 2)
    job, seconds = (driver := importlib.import_module(module).DRIVER).parse([text, timeout])
    assert (job.setting, job.base) == ("Unsloth, offloaded checkpointing", "bf16")
    assert (job.target_modules, job.rows["warm_up"], job.steps) == (["q_proj"], 1, 1)
    training = Training(replace(job, setting="PEFT LoRA"), build(replace(job, setting="PEFT LoRA")), FreshMeter())
    asked = DRIVER.read(groups, lambda text: None)[2].train
    theirs = sorted(batch["input_ids"][batch["attention_mask"].bool()].tolist() for batch in training.batches)
    assert theirs == sorted(row["input_ids"] for row in asked)
    told = {"ms": 10.0, "seconds": 3.0, "static_mib": 7, "dyn_mib": 3.5, "held_mib": 4, "loss": 1.0, "width": 8}
    monkeypatch.setattr(technique_peers, "run", lambda job, seconds: told)
    line = driver.run((job, seconds), [])
    assert (line["peak_mib"], line["held_mib"], line["seconds"], line["row_ms"]) == (10.5, 11, 3.0, 10.0)
    monkeypatch.setattr(technique_peers, "run", lambda job, seconds: {"error": "not installed"})
    assert driver.run((job, seconds), []) == {"error": "not installed"}


class FreshMeter:
    def start(self):
        pass


@pytest.mark.parametrize(
    "more, named",
    [
        (["--dtype", "float32"], "its frozen weights are bfloat16 or NF4: set dtype=bfloat16"),
        (["--mixed_precision", "off", "--dtype", "float32"], "it computes in bfloat16"),
        (["--num_train_epochs", "2"], "it takes each row once"),
        (["--data_name", "demo", "--data_dir", ""], "it reads rows of a file"),
        (["--sweep_gpus", "99", "--use_cpu", "False"], "sweep_gpus 99, and there are "),
        (["--sweep_gpus", "2"], "sweep_gpus 2 with use_cpu=True: drop one of them"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused(peers, more, named):
    with pytest.raises(UserError, match=named):
        technique_grid.check(DRIVER, DRIVER.parse([*peers, *more]))


def test_unsloth_has_a_column_and_no_arrows():
    ours = [line(lora=True, precision="bf16", seconds=4.0), line(hyclora=True, precision="bf16", gpus=2)]
    unsloth = line(precision="bf16", peak_mib=15, seconds=6.0, row_ms=30.0)
    unsloth["setting"]["peer"] = "Unsloth"
    text = technique_tables.measured_table([*ours, unsloth])
    assert "LoRA, MiB | s | ms a row | HyC-LoRA, MiB | s | ms a row | Unsloth, MiB | s | ms a row |" in text
    assert "| off | off | bf16 | 20 | 4.0 | 40 | 20 | 5.0 | 50 | 15 | 6.0 | 30 |" in text
    assert "while another GPU of the host" in text and "Unsloth, where checkpointing is on, has its own" in text
    assert technique_tables.arrows_table([*ours, unsloth]) == technique_tables.arrows_table(ours)


def test_a_grid_of_two_precisions_compares_each_with_float32():
    lines = [line(precision=name, seconds=s) for name, s in (("off", 4.0), ("fp16", 2.0), ("bf16", 8.0))]
    rows = technique_tables.arrows_table(lines).splitlines()
    assert "mixed precision (2 pairs)" in rows[0] and rows[-1] == "| run time | – 1.00x (0.50 to 2.00) |"


@pytest.mark.parametrize("device, noted", [("a GPU", True), ("CPU x86_64", False)])
def test_flops_of_kernels_that_torch_does_not_see_are_said_to_be_missing(device, noted):
    """On a CPU there are none."""
    lines = [line(hyclora=on) | {"device": device} for on in (False, True)]
    assert ("kernels of our own, which HyC-LoRA has on a GPU" in technique_tables.arrows_table(lines)) == noted
    assert "kernels of our own" not in technique_tables.arrows_table([line(), line(accumulation=8)])


def test_nothing_to_compare_is_said():
    assert technique_tables.arrows_table([line(), line(hyclora=True, error="x")]).startswith("*No two combinations")


def test_losses_of_trained_weights_and_what_was_not_done_in_time():
    lines = [line(average_loss=1.25), line(hyclora=True, error="not done after 60 s")]
    for one in lines:
        one["arguments"] = {"model_name": "m", "random_weights": False}
    assert "| off | off | off | 20 | 5.0 | 50 | 1.2500 |  | > 60 |  |  |" in technique_tables.measured_table(lines)


def test_arrows_have_the_factor_of_all_pairs():
    lines = [
        line(peak_mib=100, seconds=10.0, mib={"gradients": 4}, lora=False),
        line(peak_mib=50, seconds=10.2, mib={"gradients": 1}),
        line(peak_mib=100, seconds=20.0, mib={"gradients": 4, "weight_copies": 3}, lora=False, precision="bf16"),
        line(peak_mib=25, seconds=20.0, mib={"gradients": 2, "weight_copies": 5}, precision="bf16"),
        {**line(lora=True, hyclora=True), "error": "out of memory"},
    ]
    rows = {row.split(" | ")[0]: row for row in technique_tables.arrows_table(lines).splitlines()}
    assert "mixed precision (2 pairs) | LoRA (2 pairs) |" in rows["| "] and "HyC" not in rows["| "]
    assert rows["| peak memory"] == "| peak memory | ↓ 0.71x (0.50 to 1.00) | ↓ 0.35x (0.25 to 0.50) |"
    assert rows["| gradients"] == "| gradients | ↑ 1.41x (1.00 to 2.00) | ↓ 0.35x (0.25 to 0.50) |"
    assert rows["| 16-bit copies of weights kept"].startswith("| 16-bit copies of weights kept | ↑ 0.0 to 4.0 MiB |")
    assert rows["| parameters"] == "| parameters | – 1.00x | – 1.00x |"
    assert rows["| run time"].endswith("| – 1.01x (1.00 to 1.02) |"), "a time that hardly moves is none"


def test_memory_that_ran_out_is_an_x(tmp_path):
    lines = [line(lora=False, error="out of memory"), line(), line(hyclora=True, peak_mib=7)]
    text = technique_tables.report(lines, tmp_path / "grid.png")
    assert (
        "| off | off | off | x |  |  | 20 | 5.0 | 50 | 7 | 5.0 | 50 |" in text
        and (tmp_path / "grid.png").stat().st_size > 1000
    )
    assert technique_tables.measured_table([*lines, line(peak_mib=21)]).count("| 21 |") == 1, "the last line counts"


def test_recorded_grids_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(technique_tables, "RESULTS", tmp_path)
    assert technique_tables.technique_grid().startswith("Where the reports contradict themselves")
    more = {"load_in_4bit": False, "dtype": "float32", "max_train_samples": 200}
    lines = [found | {"arguments": found["arguments"] | more} for found in (line(), line(lora=False))]
    (tmp_path / "technique_grid.jsonl").write_text("".join(json.dumps(found) + "\n" for found in lines))
    assert technique_tables.technique_grid().startswith("a GPU, m, float32, 200 rows:\n\n| accumulation |")


def test_the_reports_are_measured_against_their_arrows():
    """Cells that contradict an arrow of theirs, and each other's."""
    found = technique_tables.contradictions()
    assert len(found) == len(set(found))
    for text in (
        "first report (7B), mixed precision: run time is ↑, measured ↓: 283.11 to 109.11 s (-61%)",
        "second report (1.5B), LoRA: run time is –, measured ↓: 38.02 to 22.64 s (-40%)",
        "parameters with LoRA: ↑ in the first report (7B), ↓ in the second report (1.5B)",
    ):
        assert any(one.startswith(text) for one in found), text
    peak = next(one for one in found if one.startswith("second report (1.5B), mixed precision: parameters"))
    assert "are –/↓/↓/↓, the peak went 7523.20 to 9630.22 MB (+28%)" in peak
    assert not any("gradient checkpointing: run time" in one for one in found), "there arrow and seconds agree"
    assert all(len(row) == 4 for one in REPORTS for row in one.arrows.values())
