"""benchmarks.steady on a small model: memory that grows is seen, and that of a patched model does not."""

import json

import pytest
import torch

from benchmarks import peers, report_steady, rows, steady
from benchmarks.jobs import Job


@pytest.fixture
def job(tiny_llama_folder):
    def job(kind: str, setting: dict | str, steps: int = 24) -> Job:
        rows = {"steady": kind, "every": 8}
        return Job(setting, str(tiny_llama_folder), "bf16", 4, 2, 24, steps, None, "cpu", "ckpt", rows=rows)

    return job


@pytest.mark.parametrize("kind", steady.KINDS)
def test_memory_is_flat(job, kind):
    """But for what a sample finds of the step itself; what tests before have left may go meanwhile."""
    first, *_, last = peers.measure(job(kind, {"q_bit": 2}))["samples"]
    assert (first["step"], last["step"]) == (8, 24) and last["loss"] > 0
    assert last["tensors"] <= first["tensors"] + 2 and last["tensor_mib"] <= 1.01 * first["tensor_mib"]


def test_memory_that_grows_is_seen(job, monkeypatch):
    held = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: held.append(torch.ones(2**18)) or backward(loss))
    first, *_, last = peers.measure(job("whole", "PEFT LoRA"))["samples"]
    assert last["tensors"] - first["tensors"] >= 16 and last["tensor_mib"] - first["tensor_mib"] > 15.9


def test_rows_are_of_other_lengths_each_time(job):
    padded, packed, whole = (steady.batches_of(job(kind, {}), 100) for kind in steady.KINDS)
    assert len({batch["input_ids"].shape for batch in padded}) > 4 and len(whole) == 1
    assert all(batch["labels"][~batch["attention_mask"].bool()].eq(-100).all() for batch in padded)
    assert all(len(batch["input_ids"]) == 1 and batch["position_ids"].eq(0).sum() == 2 for batch in packed)
    assert whole[0]["input_ids"].shape == (2, 24) and whole[0]["attention_mask"].all()


def test_a_line_a_kind_of_rows(tiny_llama_folder, tmp_path, monkeypatch, capsys):
    """And its row of the table."""
    found = {
        "seconds": 1.0,
        "samples": [{"step": 8 * i, "rss_mib": 500.0 + (i == 2) * 9, "tensors": 7} for i in (1, 2, 3)],
    }
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert report_steady.steady() == ""
    monkeypatch.setattr("benchmarks.memory_throughput.run", lambda job, timeout: found)
    fixed = ["--shape", str(tiny_llama_folder), "--device", "cpu", "--base", "bf16", "--output_dir", str(tmp_path)]
    steady.main([*fixed, "--steps", "24", "--every", "8"])
    assert "seconds 1.0\n" in capsys.readouterr().out, "samples are for the file"
    lines = [json.loads(line) for line in (tmp_path / "steady.jsonl").read_text().splitlines()]
    assert [line["arguments"]["rows"]["steady"] for line in lines] == list(steady.KINDS)
    told = report_steady.steady().splitlines()
    assert "padded rows" in told[2] and told[2].endswith("| 8 to 24 |  |  | 7 to 7 |  | 500 to 500, most 509 |")
    with pytest.raises(SystemExit):
        steady.main([*fixed, "--steps", "24"])
    assert "--steps 24 has fewer than two samples: lower --every 100" in capsys.readouterr().err
