"""run_memory_throughput.py on a small model on the CPU: what it prints, what it appends, what it refuses."""

import json

import pytest
import torch

import run_memory_throughput
from benchmarks import peers
from hyclora.operators.savers.sparse import Sparse
from hyclora.utils import results
from hyclora.utils.args import ROOT
from tests.helpers.commands import IN_PROCESS

SMALL = ["--seq_len", "16", "--per_device_train_batch_size", "2", "--steps", "2", "--random_weights", "True"]
SMALL += ["--compare", "False"]


@pytest.fixture
def run(tiny_llama_folder, tmp_path, capsys, monkeypatch):
    """Run with options; the line that was appended and what was printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(results, "_green", "<green>{}".format)

    def run(*options):
        folder = ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
        run_memory_throughput.main([*folder, *SMALL, "--output_dir", str(tmp_path), *options])
        lines = (tmp_path / "run_memory_throughput.jsonl").read_text().splitlines()
        return json.loads(lines[-1]), capsys.readouterr().out

    return run


def test_memory_and_throughput_in_one_run(run):
    line, printed = run("--q_bit", "2", "--warm_up_seq_len", "8")
    assert line["setting"]["q_bit"] == 2 and line["arguments"]["warm_up_seq_len"] == 8
    assert line["settings"]["LoraArguments"]["lora_rank"] == 16
    low, high = line["ms_range"]
    assert 0 < low <= line["ms"] <= high and line["tokens_per_second"] > line["sequences_per_second"] > 0
    assert "<green>q_bit: 2" in printed and "need a GPU" in printed and "tokens a second" in printed
    assert 0 < sum(line["slot_mib"].values()) < line["buffered_mib"]
    assert all(f"slot {slot}, a layer" in printed for slot in line["slot_mib"])

    stock, printed = run("--use_hyclora", "False", "--evaluate_throughput", "False")
    assert stock["setting"] is None and stock["buffered_mib"] > line["buffered_mib"]
    assert "ms" not in stock and "a second" not in printed


@pytest.fixture
def compare(run, monkeypatch):
    """Run it beside plain LoRA."""
    monkeypatch.setattr(peers, "subprocess", IN_PROCESS)
    return lambda *options: run("--compare", "True", "--evaluate_throughput", "False", *options)


def test_plain_lora_stands_beside_it(compare):
    """Measured in the same run; without checkpointing it keeps most, and on a CPU that is all that can be told."""
    line, printed = compare()
    kept = [line["plain"][name]["buffered_mib"] for name in run_memory_throughput.PLAIN]
    assert kept[0] > line["buffered_mib"] and kept[0] > kept[1] > 0
    assert all(f"{size:.2f} MiB" in printed for size in (*kept, line["buffered_mib"]))


def test_plain_lora_is_not_compared_with_other_options(compare):
    line, printed = compare("--target_modules", "q_proj")
    assert set(line["plain"]) == set(run_memory_throughput.PLAIN) and "for defaults only" in printed


def test_bytes_of_slots(run, tiny_llama_folder):
    """Exact slots have 4 bytes an element where nothing is autocast; the sparse map has values and int16 columns."""
    config = json.loads((tiny_llama_folder / "config.json").read_text())
    memory = ["--evaluate_throughput", "False"]
    line, _ = run("--layer_type", "baseline", *memory)
    assert abs(line["slot_mib"]["gate"] - 2 * 16 * config["intermediate_size"] * 4 / 2**20) < 1e-3
    line, _ = run("--attention", "eager", "--softmax_outlier_ratio", "0.25", *memory)
    prob = torch.rand(2, config["num_attention_heads"], 16, 16)
    kept = sum(t.nbytes for t in Sparse(0.25).pack(prob, None))
    assert abs(line["slot_mib"]["prob"] - kept / 2**20) < 1e-3
    line, _ = run("--gradient_checkpointing", "True", *memory)
    (size,) = line["slot_mib"].values()
    assert abs(size - 2 * 16 * config["hidden_size"] * 4 / 2**20) < 1e-3
    assert size * config["num_hidden_layers"] < line["buffered_mib"]
    compressed, _ = run("--gradient_checkpointing", "True", "--slot_savers", '{"layer_in": "quant8"}', *memory)
    assert compressed["buffered_mib"] < line["buffered_mib"] and compressed["slot_mib"]["layer_in"] < 0.3 * size


def test_a_shape_needs_neither_weights_nor_tokenizer(run, tmp_path, tiny_llama_folder):
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text((tiny_llama_folder / "config.json").read_text())
    line, _ = run("--model_dir", str(tmp_path), "--model_name", "shape", "--evaluate_memory", "False")
    assert line["arguments"]["shape"] == "shape" and "buffered_mib" not in line


@pytest.mark.parametrize("stage", ["load_model", "measure"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_a_line_and_a_sentence(run, tmp_path, capsys, monkeypatch, stage, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(run_memory_throughput, stage, fail)
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code == 1 and "lower per_device_train_batch_size" in capsys.readouterr().err
    assert json.loads((tmp_path / "run_memory_throughput.jsonl").read_text())["error"] == "out of memory"


@pytest.mark.parametrize(
    "options, named",
    [
        (["--evaluate_memory", "False", "--evaluate_throughput", "False"], "evaluate_memory or evaluate_throughput"),
        (["--seq_len", "1"], "seq_len must be at least 2, and of at most 9 digits, not 1"),
        (["--seq_len", "1" + "0" * 9], "seq_len must be at least 2, and of at most 9 digits, not 1000000000"),
        (["--warm_up_seq_len", "0"], "warm_up_seq_len must be at least 2, and of at most 9 digits, not 0"),
        (["--steps", "0"], "steps must be at least 1, and of at most 9 digits, not 0"),
        (["--per_device_train_batch_size", "9" * 30], f"{'9' * 30} is no whole number of at most 18 digits"),
        (["--q_bit", "5"], "q_bit=5 is not one of"),
        (["--q_bit", "auto", "--average_bits", "nan"], "average_bits=nan is not a number of bits"),
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--offload", "True"], "offload=True needs a GPU"),
        (["--cuda_graphs", "True"], "cuda_graphs=True needs a GPU"),
        (["--preset", "longest"], "preset=longest asks for it, preset=default does not"),
        (["--average_bits", "2.5"], "average_bits=2.5 has no effect with q_bit=4: set auto"),
        (["--model_dir", str(ROOT / "benchmarks/shapes"), "--model_name", "llama-2-7b"], "shape of a model for a GPU"),
        (["--data_name", "gsm8k"], "unknown option --data_name"),
        (["--model_dir", str(ROOT / "ckpt"), "--model_name", "nowhere"], "nowhere does not exist"),
        (["--model_dir", str(ROOT / "benchmarks/shapes"), "--model_name", "llama-2-7b", "--random_weights", "False"],
         "--random_weights True"),
    ],
)  # fmt: skip
def test_mistakes(run, capsys, monkeypatch, options, named):
    monkeypatch.setattr(run_memory_throughput, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as exit:
        run(*options)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and named in error
