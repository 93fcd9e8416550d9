"""Perplexity before and after fine-tuning on a text, and the mistakes that a text can have."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import run_wikitext2
from hyclora.utils import driver
from tests.helpers.drivers import run_script

TEXT = " \n = The river = \n \n The river runs to the sea , and the sea is wide . \n" * 12


@pytest.fixture
def drive(tiny_llama_folder, tmp_path, capsys):
    """Run the driver: its exit code, what it said, and the results if there are any."""

    def drive(*options):
        given = (
            ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
            + ["--output_dir", str(tmp_path / "out"), "--max_steps", "6", "--iteration_threshold", "2"]
            + ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--seq_len", "64"]
            + ["--stride", "16", "--learning_rate", "1e-2", "--use_cpu", "True", "--disable_tqdm", "True"]
            + list(options)
        )
        found = run_script(run_wikitext2.main, given, capsys)
        results = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
        return *found, *results

    return drive


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT)
    (folder / "wiki.test.raw").write_text(TEXT.replace("sea", "lake"))
    return folder


def test_perplexity_falls_and_is_told_per_token_and_per_word(drive, folder):
    code, said, results = drive("--data_name", "wikitext2", "--data_dir", folder, "--evaluate_before", True)
    assert code == 0 and "train.txt: " in said and "wiki.test.raw: " in said
    metrics = results["metrics"]
    assert list(metrics) == [
        f"{kind}_per_{unit}" for kind in ("perplexity", "sliding_perplexity") for unit in ("token", "word")
    ]
    for kind in ("perplexity", "sliding_perplexity"):
        token, word = metrics[f"{kind}_per_token"], metrics[f"{kind}_per_word"]
        assert token["after"] < 0.8 * token["before"]
        ratios = {round(math.log(word[when]) / math.log(token[when]), 6) for when in token}
        assert len(ratios) == 1 and ratios.pop() > 1.5
    assert f"perplexity per token before training: {metrics['perplexity_per_token']['before']:.3f}\n" in said
    assert not (folder.parent / "out" / "predictions.json").exists()


def test_it_is_transformers_perplexity(drive, folder, tiny_llama_folder):
    *_, results = drive("--data_name", "text", "--data_dir", folder, "--evaluate_before", True, "--max_eval_samples", 2)
    data = run_wikitext2.DRIVER.parse(["--data_name", "text", "--data_dir", str(folder), "--seq_len", "64"])[1]
    tokenizer = driver.load_tokenizer(str(tiny_llama_folder), lambda line: None)
    evaluation = run_wikitext2.WindowArguments(stride=0)
    rows = run_wikitext2.language_modelling(data, evaluation, tokenizer).test[:2]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    ids = torch.tensor([row["input_ids"] for row in rows])
    expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert results["metrics"]["perplexity_per_token"]["before"] == pytest.approx(expected, rel=1e-4)


def test_text_without_a_test_file_is_trained_on(drive, folder):
    code, said, results = drive("--data_name", "text", "--data_dir", folder / "train.txt", "--max_train_samples", 3)
    assert code == 0 and "3 blocks of 64" in said and "no test text" in said and results["metrics"] == {}


def test_another_file_can_be_evaluated_on(drive, folder):
    (folder / "valid.txt").write_text("A <unk> word . " * 40)
    options = ["--data_name", "wikitext2", "--data_dir", folder, "--eval_file", "valid.txt", "--stride", 0]
    code, said, results = drive(*options)
    assert code == 0 and "valid.txt: " in said and "rare words are <unk> in valid.txt alone" in said
    assert list(results["metrics"]) == ["perplexity_per_token", "perplexity_per_word"]


def test_token_files_are_judged_per_token(drive, tmp_path):
    for split in ("train", "test"):
        np.arange(2, 302, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    code, said, results = drive("--data_name", "text", "--data_dir", tmp_path)
    assert code == 0 and "train.bin: 300 tokens; 4 blocks of 64" in said
    assert list(results["metrics"]) == ["perplexity_per_token", "sliding_perplexity_per_token"]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--data_name", "text"], "data_name text needs --data_dir"),
        (["--data_name", "text", "--data_dir", "nowhere"], "data_dir nowhere does not exist"),
        (["--data_name", "text", "--data_dir", "{empty}"], "has no text for train: put wiki.train.raw or train.txt"),
        (["--data_name", "text", "--data_dir", "{blank}"], "train.txt has no text in it"),
        (["--data_name", "wikitext2", "--data_dir", "{short}"], "has no text for test: put wiki.test.raw or test.txt"),
        (["--data_name", "text", "--data_dir", "{short}"], "train.txt has 5 tokens, too few for a block of 64"),
        (["--data_name", "text", "--data_dir", "{short}", "--eval_file", "no.txt"], "eval_file no.txt is no file in"),
        (["--eval_file", "no.txt"], "eval_file no.txt is looked for in data_dir, which is not given: set it"),
        (["--stride", "65"], "stride 65 is more than seq_len 64"),
        (["--stride", "-1"], "stride must not be negative"),
        (["--seq_len", "4096"], "a row has 4096 tokens, "),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(drive, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(driver, "load_model", lambda *args: pytest.fail("the model was loaded"))
    for name, text in (("empty", None), ("blank", " \n"), ("short", "ab cd")):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "train.txt").write_text(text)
    places = {name: tmp_path / name for name in ("empty", "blank", "short")}
    code, told = drive(*(option.format(**places) for option in options))
    assert code == 2 and said in told and not list((tmp_path / "out").glob("*"))


def test_an_unreachable_hub_is_told(drive, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, told = drive("--data_name", "wikitext2")
    assert code == 2 and "pip install datasets, or put wiki.train.raw and wiki.test.raw into a folder" in told
