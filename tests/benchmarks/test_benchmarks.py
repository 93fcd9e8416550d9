"""The benchmarks run end to end on a small model and write one whole line a setting."""

import json
import re
from importlib import import_module

import pytest
import torch

from benchmarks import buffered, cross_entropy, fidelity, finetune, profile_step, record, report
from benchmarks.rows import name_of, whole
from hyclora import plan
from hyclora.operators.reference import IGNORED
from hyclora.utils.args import ROOT

COPY = "Memcpy HtoD (Pinned -> Device)"
TAKE_FOLDERS = [
    f"{file.parent.name}.{file.stem}"
    for file in sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "ckpt").glob("*.py")])
    if re.search(r"--output|add_arguments\(parser, ", file.read_text()) and file.stem != "jobs"
]
# but for peers.py, which another program starts and which tells that one
PROGRAMS = [
    f"{file.parent.name}.{file.stem}"
    for file in sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "ckpt").glob("*.py")])
    if "\n    main()\n" in file.read_text() and file.stem != "peers"
]
KEYS = {"benchmark", "time", "commit", "device", "versions", "setting", "arguments"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder that results go to."""
    write = record.record
    for module in (fidelity, finetune):
        monkeypatch.setattr(module, "record", lambda name, result: write(name, result, tmp_path))
    return tmp_path


@pytest.mark.parametrize("module", TAKE_FOLDERS)
def test_no_folder_is_not_the_current_one(module, capsys):
    option = "--output" if module.startswith("ckpt.") else "--output_dir"
    with pytest.raises(SystemExit) as exit:
        import_module(module).main([option, " "])
    assert exit.value.code == 2 and f"argument {option}: ' ' is no path (. is the cur" in capsys.readouterr().err


def test_no_file_of_times_is_not_the_current_folder(capsys):
    with pytest.raises(SystemExit) as exit:
        plan.main(["llama-2-7b", "--gpu", "24GiB", "--host", "64GiB", "--times", ""])
    assert exit.value.code == 2 and "error: argument --times: '' is no path" in capsys.readouterr().err


def test_every_path_of_a_command_is_looked_at():
    commands = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "ckpt").glob("*.py"), *(ROOT / "hyclora").glob("*.py")]
    assert not [file.name for file in commands if "type=Path" in file.read_text()]


def test_every_whole_number_has_a_least_one():
    """number is what makes the parser, not the parser."""
    commands = (ROOT / "benchmarks").glob("*.py")
    assert not [file.name for file in commands if re.search(r"type=number\b(?!\()", file.read_text())]


def lines(results, name):
    found = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
    assert all(line.keys() >= KEYS for line in found)
    return found


def test_fidelity(results, tiny_llama_folder):
    settings = [{"layer_type": "baseline"}, {"q_bit": 8}, {"q_bit": 2}]
    common = ["--model", str(tiny_llama_folder), "--device", "cpu", "--exact_steps", "2", "--batches", "1"]
    fidelity.main([*common, "--settings", json.dumps(settings)])
    exact, eight, two = lines(results, "fidelity")
    assert exact["cosine"] > 0.99999 and exact["bits"] == 16
    assert 1 > eight["cosine"] > two["cosine"] > 0.5 and two["bits"] < 3
    fidelity.main([*common, "--slots", "4"])
    assert {line["label"] for line in lines(results, "fidelity")[3:]} == {f"{n} at 4 bit" for n in fidelity.SLOT_GROUPS}


def test_fidelity_after_other_rows_first(results, tiny_llama_folder):
    """At once and later; told apart in the report's table, and not mixed with what usual rows give."""
    common = ["--model", str(tiny_llama_folder), "--device", "cpu", "--exact_steps", "2", "--batches", "1"]
    common += ["--batch_size", "2", "--settings", '[{"q_bit": 8}]']
    kinds = ["usual", *fidelity.FIRST]
    fidelity.main([*common, "--first", *kinds])
    found = lines(results, "fidelity")
    expected = [(kind, later) for kind in kinds for later in (0, fidelity.LATER)]
    assert [(line["first"], line["later"]) for line in found] == expected
    assert all(line["cosine"] > 0.99 for line in found) and len({line["label"] for line in found}) == len(found)
    for line in found:
        line["setting"] = whole(line["setting"])
    table, _ = report.poor_rows_first(found)
    assert all(f"| `{kind}` | 1.0" in table or f"| `{kind}` | 0.99" in table for kind in kinds)
    assert report.poor_rows_first([]) == []


def test_finetune(results, tiny_llama_folder):
    common = ["--model", str(tiny_llama_folder), "--device", "cpu", "--steps", "3", "--batch_size", "4"]
    finetune.main([*common, "--test_rows", "8", "--settings", '[null, {"layer_type": "baseline"}, {"q_bit": 4}]'])
    exact, baseline, four = lines(results, "finetune")
    assert len(exact["train_losses"]) == 3 and exact["gap"] == 0
    assert abs(baseline["gap"]) < 1e-4 and abs(four["gap"]) < 0.05


def test_buffered(results):
    shape = [
        "--hidden",
        "256",
        "--ffn",
        "384",
        "--heads",
        "4",
        "--kv_heads",
        "2",
        "--batch_size",
        "2",
        "--seq_len",
        "64",
    ]
    buffered.main([*shape, "--vocab", "100", "--base", "bf16", "--device", "cpu", "--output_dir", str(results)])
    found = lines(results, "buffered")
    sizes = {name_of(line["setting"]): line["layer_bytes"] for line in found}
    two, four, eight = (sizes[f"intra_inter, {bits} bit"] for bits in (2, 4, 8))
    assert two < four < eight < sizes[buffered.PLAIN]
    assert sizes[buffered.CHECKPOINTING] == 2 * 64 * 256 * 2, "the layer's input, bfloat16"
    for line in found[2:]:
        assert sum(line["slots"].values()) <= line["layer_bytes"] and line["setting"] == whole(line["setting"])


TORCH_CHUNKED = pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch 2.13 brought it")


@pytest.mark.parametrize("name", ["ours", pytest.param("torch chunked", marks=TORCH_CHUNKED)])
def test_cross_entropy(name):
    """All versions compute one gradient."""
    hidden, head = torch.randn(64, 32, requires_grad=True), torch.nn.Linear(32, 500, bias=False).requires_grad_(False)
    labels = torch.randint(0, 500, (64,))
    labels[:20] = IGNORED
    expected = cross_entropy.gradient(cross_entropy.stock, hidden, head, labels)
    loss_of = cross_entropy.IMPLEMENTATIONS[name]()
    assert torch.allclose(cross_entropy.gradient(loss_of, hidden, head, labels), expected, atol=1e-6)


def test_cross_entropy_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cross_entropy.main([])
    assert "needs a GPU" in capsys.readouterr().err


def test_profile_step_on_a_cpu(tmp_path, tiny_llama_folder, capsys):
    common = ["--shape", str(tiny_llama_folder), "--cell", "2x16", "--base", "bf16", "--device", "cpu", "--steps", "2"]
    profile_step.main([*common, "--output_dir", str(tmp_path), "--setting", '{"q_bit": 2}', "--host"])
    (line,) = lines(tmp_path, "profile_step")
    assert line["setting"] == whole({"q_bit": 2}) and line["arguments"]["seq_len"] == 16 and "gpu_ms" not in line
    assert 0 < line["forward_ms"] < 2 * line["ms"] and 0 < line["backward_ms"] < 2 * line["ms"]
    printed = capsys.readouterr().out
    assert "backward_ms" in printed and "run_backward" in printed and "tottime" in printed
    with pytest.raises(SystemExit):
        profile_step.main(["--setting", "Nobody"])
    assert "Nobody is neither" in capsys.readouterr().err


def test_profile_step_counts_overlapping_kernels_once():
    add = "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float> >(int, float)"
    spans = [(add, 0, 1000), ("gemm", 500, 2000), (add, 1200, 1400), (COPY, 0, 4000), (add, 5000, 6000)]
    found = profile_step.device_times(spans, steps=2, layers=2)
    assert found["gpu_ms"] == 1.5 and found["copy_ms"] == 2
    assert found["kernels"] == 2 and found["kernels_a_layer"] == 1
    copy, adds, gemm = found["top_kernels"]
    assert copy["name"] == COPY and gemm["us"] == 750
    assert adds["name"] == "vectorized_elementwise_kernel<4, AddFunctor<float> >"
    assert (adds["count"], adds["us"], adds["mean_us"]) == (1.5, 1100, 733.33)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistake_is_told_in_one_sentence(program):
    """No traceback: each main() wears entry_point."""
    assert import_module(program).main.__code__.co_filename.endswith("utils/errors.py")
