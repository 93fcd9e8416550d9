"""benchmarks.packed_rows on a small model on the CPU: what it trains on through TRL's trainer, what it refuses."""

import json

import pytest
import torch

from benchmarks import packed_rows, peers, real_rows
from benchmarks.jobs import Job
from hyclora.utils.data.tokens import IGNORED
from hyclora.utils.data.word_problems import word_problems

LENGTH = 256


@pytest.fixture
def files(tmp_path):
    """Instructions in two files, one of them in a folder."""
    rows = [{"instruction": row["question"], "output": row["answer"]} for row in word_problems(80, 3, split="train")]
    (tmp_path / "folder").mkdir()
    files = [tmp_path / "some.json", tmp_path / "folder" / "train.json"]
    for file, part in zip(files, (rows[:50], rows[50:]), strict=True):
        file.write_text(json.dumps(part))
    return [str(files[0]), str(files[1].parent)]


@pytest.fixture
def job(files, tiny_llama_folder):
    rows = {"packing": True, "data": files, "tokenizer": str(tiny_llama_folder), "warm_up": 1}
    return Job("PEFT LoRA", str(tiny_llama_folder), "bf16", 4, 2, LENGTH, 2, None, "cpu", "ckpt", rows=rows)


@pytest.fixture
def run(files, tiny_llama_folder, tmp_path):
    """Lines that a command appends."""
    fixed = ["--tokenizer", str(tiny_llama_folder), "--shape", str(tiny_llama_folder), "--cells", f"2x{LENGTH}"]
    fixed += ["--device", "cpu", "--base", "bf16", "--output_dir", str(tmp_path / "results")]

    def run(*options) -> list[dict]:
        packed_rows.main(["--data", *files, *fixed, "--steps", "2", "--warm_up", "1", *options])
        return [json.loads(line) for line in (tmp_path / "results/packed_rows.jsonl").read_text().splitlines()]

    return run


def test_documents_are_the_same_for_all_settings(job):
    documents, tokenizer = packed_rows.documents_of(job)
    assert len(documents) == 80 and documents == packed_rows.documents_of(job)[0]
    for document in documents:
        assert document["labels"][0] == IGNORED and document["labels"][-1] == tokenizer.eos_token_id
        assert {a for a, b in zip(document["labels"], document["input_ids"], strict=True) if a != b} == {IGNORED}
    assert packed_rows.optimizer_steps(job) == 1
    assert job.arguments["rows"]["data"] == ["some.json", "folder"]


def test_trained_through_trl_each_document_alone(run, job, monkeypatch):
    """All settings see the same tokens with one loss; what a layer makes of a packed document, it makes of it alone."""
    pytest.importorskip("trl")
    seen = []

    def patch(job, model):
        peers.patch(job, model)
        model.register_forward_pre_hook(lambda _, args, given: seen.append((model, given)), with_kwargs=True)

    def measure(job, timeout):
        return packed_rows.measure_packed(job, peers.stock(job), patch)

    settings = ["PEFT LoRA", {"layer_type": "baseline"}, {"layer_type": "baseline", "stream": True}]
    monkeypatch.setattr(real_rows, "FIRST", 3)
    monkeypatch.setattr("benchmarks.memory_throughput.run", measure)
    lines = run("--settings", json.dumps(settings))
    assert len(seen) == len(settings) * 4, "one optimizer step"
    assert [line["loss"] for line in lines[1:]] == pytest.approx([lines[0]["loss"]] * 2, abs=1e-3)
    for line in lines:
        assert line["ms"] > 0 and line["real_tokens_per_second"] > 0 and line["first_100_s"] > 0
        assert 1.5 * LENGTH < line["real_tokens"] <= 2 * LENGTH and line["documents"] > 2
    assert len({(line["real_tokens"], line["documents"]) for line in lines}) == 1

    for model, given in seen[::4]:
        assert not {"attention_mask"} & given.keys() and len(given["input_ids"]) == 1
        decoder = model.get_base_model().model.train()
        (starts,) = (given["position_ids"][0] == 0).nonzero(as_tuple=True)
        together = decoder(given["input_ids"], position_ids=given["position_ids"], use_cache=False)[0]
        documents = given["input_ids"].tensor_split(starts[1:], 1)
        alone = [decoder(document, use_cache=False)[0] for document in documents]
        assert len(documents) > 2 and torch.allclose(together, torch.cat(alone, 1), atol=1e-4)


def test_rows_that_were_not_packed_are_no_measurement(job, monkeypatch):
    """Unsloth drops packing where it thinks that it does not work."""
    trl = pytest.importorskip("trl")
    config = trl.SFTConfig
    monkeypatch.setattr(trl, "SFTConfig", lambda *args, packing, **options: config(*args, **options))
    with pytest.raises(ValueError, match="were not packed, DataCollatorForLanguageModeling gave input_ids"):
        peers.measure(job)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--steps", "400"], "tokens, and this takes 206848: lower --steps or name more files"),
        (["--data", "nowhere.json"], "data_dir nowhere.json does not exist"),
        (["--tokenizer", "nowhere"], "nowhere does not exist: --tokenizer is the folder"),
        (["--device", "cuda"], "it needs a GPU"),
    ],
)
def test_refused_before_anything_is_spent(run, options, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(packed_rows, "NEEDS", ())
    with pytest.raises(SystemExit) as exit:
        run("--settings", '["PEFT LoRA"]', *options)
    assert exit.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_without_trl_it_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setattr(packed_rows, "NEEDS", ("no_such_module", "json"))
    with pytest.raises(SystemExit) as exit:
        run("--settings", '["PEFT LoRA"]')
    said = "error: this trains with TRL, and no_such_module cannot be found: pip install trl datasets\n"
    assert exit.value.code == 2 and capsys.readouterr().err == said
