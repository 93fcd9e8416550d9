"""benchmarks.real_rows on a small model on the CPU: what it measures, on which rows, what it refuses."""

import json

import pytest

from benchmarks import peers, real_rows
from benchmarks.jobs import Job
from hyclora.utils.data.word_problems import word_problems
from tests.helpers.commands import IN_PROCESS


@pytest.fixture
def data(tmp_path):
    """Problems of many lengths, as a folder of GSM8K."""
    folder = tmp_path / "problems"
    folder.mkdir()
    rows = word_problems(40, 3, split="train")
    for i, row in enumerate(rows):
        row["question"] += " Think." * (7 * i % 23)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tiny_llama_folder, data, tmp_path):
    """Lines that a command appends."""
    fixed = ["--data_dir", str(data), "--tokenizer", str(tiny_llama_folder), "--shape", str(tiny_llama_folder)]
    fixed += ["--device", "cpu", "--base", "bf16", "--output_dir", str(tmp_path / "results"), "--cells", "3x400"]

    def run(*options) -> list[dict]:
        real_rows.main([*fixed, "--steps", "4", "--warm_up", "6", *options])
        return [json.loads(line) for line in (tmp_path / "results/real_rows.jsonl").read_text().splitlines()]

    return run


def test_all_settings_train_on_the_same_rows(run, tmp_path, data, tiny_llama_folder, monkeypatch):
    monkeypatch.setattr(real_rows, "FIRST", 7)
    settings = ["PEFT LoRA", {"layer_type": "baseline"}, {"layer_type": "baseline", "stream": True}]
    monkeypatch.setattr("benchmarks.memory_throughput.run", lambda job, timeout: peers.measure(job))
    lines = run("--settings", json.dumps(settings))
    assert [line["loss"] for line in lines[1:]] == pytest.approx([lines[0]["loss"]] * 2, abs=2e-2)
    for line in lines:
        assert line["widths"] > 1 and line["real_tokens"] < 3 * line["width"]
        assert line["ms"] > 0 and line["real_tokens_per_second"] > 0 and line["first_100_s"] > 0
        assert line["arguments"]["rows"] == {"data_dir": data.name, "tokenizer": tiny_llama_folder.name, "warm_up": 6}
    assert run("--settings", json.dumps(settings)) == lines, "measured already"
    assert len(run("--settings", json.dumps(settings), "--lora_dropout", "0.5")) == 6


def test_rows_of_alpaca_one_by_one(run, tiny_llama_folder, tmp_path, monkeypatch, capsys):
    """In place of GSM8K's; a batch is a row as it comes, padded to a multiple of 8."""
    monkeypatch.setattr("benchmarks.memory_throughput.run", lambda job, timeout: peers.measure(job))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "Say it." * (i % 5 + 1), "output": "It."} for i in range(12)]))
    fixed = ["--alpaca", str(file), "--tokenizer", str(tiny_llama_folder), "--shape", str(tiny_llama_folder)]
    fixed += ["--device", "cpu", "--base", "bf16", "--output_dir", str(tmp_path / "alpaca"), "--cells", "1x400"]
    real_rows.main([*fixed, "--steps", "4", "--warm_up", "6", "--settings", '["PEFT LoRA"]'])
    (line,) = map(json.loads, (tmp_path / "alpaca/real_rows.jsonl").read_text().splitlines())
    assert line["arguments"]["rows"] == {"alpaca": "rows.json", "tokenizer": tiny_llama_folder.name, "warm_up": 6}
    assert line["widths"] > 1 and line["width"] - 8 < line["real_tokens"] <= line["width"] and line["ms"] > 0
    with pytest.raises(SystemExit) as exit:
        real_rows.main([*fixed, "--steps", "40", "--warm_up", "6", "--settings", '["PEFT LoRA"]'])
    assert exit.value.code == 2 and "rows.json fills 12 micro-batches, and this takes 46" in capsys.readouterr().err


def test_by_a_command_of_its_own(run, monkeypatch):
    """Of one process; two are started in the next test."""
    monkeypatch.setattr(peers, "subprocess", IN_PROCESS)
    (line,) = run("--settings", '["PEFT LoRA"]', "--steps", "1", "--warm_up", "1")
    assert line["setting"] == "PEFT LoRA" and line["ms"] > 0 and "first_100_s" not in line


def test_processes_share_the_rows(run, monkeypatch):
    """Twice the rows and tokens of one process, its own rows each, and one more loss in the mean of gradients."""
    (line,) = run("--settings", '["PEFT LoRA"]', "--steps", "4", "--warm_up", "2", "--gpus", "2")
    assert line["arguments"]["gpus"] == 2 and line["widths"] > 1
    monkeypatch.setattr("benchmarks.memory_throughput.run", lambda job, timeout: peers.measure(job))
    alone = run("--settings", '["PEFT LoRA"]', "--steps", "8", "--warm_up", "4")[1]
    assert "gpus" not in alone["arguments"]
    assert line["real_tokens"] == pytest.approx(2 * alone["real_tokens"], abs=2)


def test_a_rank_that_fails_is_the_cause(tiny_llama_folder, data):
    """Rank 0 would wait for it."""
    rows = {"data_dir": str(data), "tokenizer": str(tiny_llama_folder), "warm_up": 1}
    common = {"base": "bf16", "lora_rank": 4, "steps": 1, "warm_up_seq_len": None, "device": "cpu", "checkpoints": ""}
    job = Job({}, str(tiny_llama_folder), batch_size=1, seq_len=400, rows=rows, gpus=2, **common)
    job.setting["q_bit"] = 5
    found = peers.run(job, 120)
    assert "q_bit" in found["error"]


def test_a_peer_that_is_not_there_is_a_line(run, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "Unsloth", peers.Peer(None, "no_such_module"))
    (line,) = run("--settings", '["Unsloth"]')
    assert line["error"] == "not installed"


@pytest.mark.parametrize(
    "options, named",
    [
        (["--steps", "40"], "fills 13 micro-batches, and this takes 46: lower --steps"),
        (["--data_dir", "nowhere"], "data folder nowhere does not exist"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--lora_dropout", "1"], "--lora_dropout 1.0 does not lie in [0, 1)"),
        (["--device", "cuda"], "it needs a GPU"),
        (["--steps", "8", "--gpus", "2"], "fills 13 micro-batches, and this takes 28: lower --steps"),
    ],
)
def test_refused_before_anything_is_spent(run, options, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        run("--settings", '["PEFT LoRA"]', *options)
    assert exit.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_lines_of_before_still_answer():
    """Random tokens and no dropout have the arguments that they had."""
    job = Job("PEFT LoRA", "llama-2-7b", "nf4", 16, 4, 512, 10, None, "cuda", "ckpt")
    assert not {"rows", "lora_dropout"} & job.arguments.keys()
    assert Job(**{**vars(job), "lora_dropout": 0.1}).arguments["lora_dropout"] == 0.1
