"""benchmarks.scaling with two processes on the CPU: losses as those of one, whichever way they share the work."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import peers, rows, scaling
from benchmarks.report_scaling import scaling as report
from hyclora.utils.data.word_problems import word_problems
from tests.helpers.ranks import run_ranks


@pytest.fixture
def run(tiny_llama_folder, tmp_path):
    """Lines that a command appends."""
    (tmp_path / "problems").mkdir()
    rows = word_problems(90, 3, split="train")
    (tmp_path / "problems/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = ["--data_dir", str(tmp_path / "problems"), "--tokenizer", str(tiny_llama_folder)]
    fixed += ["--shape", str(tiny_llama_folder), "--device", "cpu", "--output_dir", str(tmp_path / "results")]

    def run(*options) -> list[dict]:
        scaling.main([*fixed, *options])
        return [json.loads(line) for line in (tmp_path / "results/scaling.jsonl").read_text().splitlines()]

    return run


def measure(rank: int, jobs: list, file: str) -> None:
    os.environ["RANK"] = str(rank)
    found = [peers.measure(job) for job in jobs]
    if rank == 0:
        Path(file).write_text(json.dumps(found))


def test_two_processes_have_the_losses_of_one(run, tmp_path, monkeypatch):
    """Whichever way they share the work."""
    jobs = []
    monkeypatch.setattr(scaling, "COMPARED", 2)
    monkeypatch.setattr("benchmarks.memory_throughput.run", lambda job, timeout: jobs.append(job) or {"ms": 1.0})
    exact = ["--settings", '[{"layer_type": "baseline"}]']
    lines = run("--cells", "1x400", "--gpus", "2", "--steps", "4", "--warm_up", "4", *exact, "--base", "nf4")
    assert [line["arguments"].get("parallel") for line in lines] == [None, "fsdp2", None]
    *several, alone = jobs
    run_ranks(measure, tmp_path, several, str(tmp_path / "found.json"))
    one, ddp, fsdp2 = peers.measure(alone), *json.loads((tmp_path / "found.json").read_text())
    assert alone.rows["accumulate"] == 8 and len(one["losses"]) == 2 and one["losses"][0] != one["losses"][1]
    for found in (ddp, fsdp2):
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert found["real_tokens"] == pytest.approx(2 * one["real_tokens"], abs=2) and found["host_mib"] > 100


def test_packed_rows_are_of_whole_documents(run, monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.memory_throughput.run", lambda job, timeout: seen.append(job) or {"ms": 1.0})
    run("--packed", "--cells", "1x300", "--gpus", "1", "--steps", "4", "--warm_up", "1")
    for batch in scaling.batches_of(seen[0]):
        n_tokens = batch["input_ids"].shape[1]
        starts = (batch["position_ids"] == 0).sum()
        assert 150 < n_tokens <= 300 and starts > 1 and batch["labels"].shape == (1, n_tokens)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--packed", "--cells", "4x512"], "--packed makes one row of many: --cells 1xLENGTH"),
        (["--gpus", "8", "--cells", "1x400", "--steps", "2", "--warm_up", "4"], "fills 90 micro-batches, and this"),
    ],
)
def test_refused_before_anything_is_spent(run, options, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*options)
    assert exit.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_table(tmp_path, monkeypatch):
    """Several GPUs beside one; the losses of one process on all rows are no row of their own."""
    versions = dict.fromkeys(("torch", "triton", "transformers", "peft"), "1")
    common = {"time": "", "commit": "c", "device": "NVIDIA X1", "versions": versions, "setting": {"offload": True}}
    cell = {"shape": "s", "base": "nf4", "lora_rank": 16, "batch_size": 4, "seq_len": 512, "device": "cuda"}
    found = {"ms": 70.0, "held_mib": 600.0, "host_mib": 4000.0}

    def line(tokens: int, losses: list, rows: dict, **arguments) -> str:
        values = found | {
            "real_tokens_per_second": tokens,
            "losses": losses,
            "arguments": cell | {"rows": rows} | arguments,
        }
        return json.dumps(common | values)

    alone = line(1, [5.0, 4.0], {"accumulate": 8})
    lines = [line(1000, [5.5, 4.5], {}), line(1940, [5.0, 4.002], {}, gpus=2), alone]
    lines += [line(1500, [5.001, 4.0], {}, gpus=2, parallel="fsdp2")]
    (tmp_path / "scaling.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    _, _, one, ddp, fsdp2, *_ = report().splitlines()
    assert "| 1 GPU, " in one and "| 1000 | 1.000x | 70.0 |" in one
    assert "| 2 GPUs, DDP, " in ddp and "| 970 | 0.970x |" in ddp and "within 0.0020 of" in ddp
    assert "| 2 GPUs, FSDP2, " in fsdp2 and "| 750 | 0.750x |" in fsdp2 and "within 0.0010 of" in fsdp2
