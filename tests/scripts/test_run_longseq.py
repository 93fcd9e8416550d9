"""Long rows: what is trained on and judged, stretched positions, shifted groups, and the mistakes that can be made."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import run_longseq
from hyclora.utils import driver
from hyclora.utils.args import ROOT
from tests.helpers.drivers import run_script

TEXT = "The river runs to the sea , and the sea is wide .\n" * 30


@pytest.fixture
def drive(tiny_llama_folder, tmp_path, capsys):
    """Run the driver: its exit code, what it said, and the results if there are any."""

    def drive(*options):
        given = (
            ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
            + ["--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--iteration_threshold", "2"]
            + ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--seq_len", "64"]
            + ["--eval_lengths", "32 64", "--stride", "16", "--learning_rate", "1e-2", "--use_cpu", "True"]
            + ["--disable_tqdm", "True", *options]
        )
        found = run_script(run_longseq.main, given, capsys)
        results = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
        return *found, *results

    return drive


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "letters").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT.replace("sea", "lake"))
    (folder / "letters/c.txt").write_text(TEXT.replace("river", "road"))
    return folder


def per_token_loop(model, ids, length, stride):
    """Each token after those of the first window that holds it, by itself."""
    losses = []
    for place in range(1, len(ids)):
        start = max(0, math.ceil((place + 1 - length) / stride)) * stride
        logits = model(torch.tensor([ids[start:place]])).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[place]].item())
    return math.exp(sum(losses) / len(losses))


def test_perplexity_at_each_length_is_that_of_a_loop_over_tokens_and_falls(drive, folder, tiny_llama_folder):
    options = ["--data_name", "text", "--data_dir", folder, "--eval_files", "b.txt, letters", "--max_eval_samples", 2]
    code, said, results = drive(*options, "--evaluate_before", True)
    assert code == 0 and "letters: 128 tokens" in said
    names = [f"perplexity_of_{text}_at_{length}_per_token" for text in ("b.txt", "letters") for length in (32, 64)]
    assert list(results["metrics"]) == names
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    ids = tokenizer((folder / "b.txt").read_text()).input_ids[:128]
    for length in (32, 64):
        found = results["metrics"][f"perplexity_of_b.txt_at_{length}_per_token"]
        assert found["before"] == pytest.approx(per_token_loop(model, ids, length, 16), rel=1e-4)
        assert found["after"] < 0.8 * found["before"]
    only_a = len(tokenizer(TEXT).input_ids) + 1
    assert f"data: {only_a} tokens; {only_a // 64} rows of 64" in said


def test_layers_are_checkpointed_and_their_inputs_compressed(drive, folder):
    options = ["--data_name", "text", "--data_dir", folder, "--slot_savers", '{"layer_in": "quant8"}']
    code, said, results = drive(*options)
    assert code == 0 and "no text to evaluate on" in said and results["metrics"] == {}
    kept = results["buffered_bytes"]
    assert list(kept) == ["hyclora", "lora_checkpointing"] and kept["hyclora"] < 0.7 * kept["lora_checkpointing"]
    assert "gradient checkpointing is on. Each layer keeps its input alone" not in said


@pytest.mark.parametrize("compressed", [True, False])
def test_shifted_groups_train_another_model_and_are_judged_by_full_attention(drive, folder, compressed):
    options = ["--data_name", "text", "--data_dir", folder, "--eval_files", "b.txt", "--max_eval_samples", 2]
    options += ["--use_hyclora", compressed, "--evaluate_before", True, "--eval_lengths", 60]
    _, _, full = drive(*options)
    code, _, *both = drive(*options, "--group_size", 16)
    assert code == 0 and len(both) == 2
    shifted = next(found for found in both if found != full)
    (name,) = full["metrics"]
    assert shifted["metrics"][name]["before"] == full["metrics"][name]["before"]
    assert shifted["final_loss"] != full["final_loss"]


def test_rows_need_no_padding_whatever_their_length(drive, folder):
    """Groups cannot be padded, and batches are padded to a multiple of 8 elsewhere."""
    options = ["--data_name", "text", "--data_dir", folder, "--seq_len", 60, "--group_size", 15]
    assert drive(*options)[0] == 0


def test_stretched_positions_are_saved_with_the_adapters_as_a_recipe(drive, folder, tiny_llama_folder, tmp_path):
    options = ["--data_name", "text", "--data_dir", folder, "--rope_scaling", 4, "--eval_files", "b.txt"]
    code, _, results = drive(*options, "--max_eval_samples", 2, "--eval_lengths", 64)
    assert code == 0
    (adapters,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    card = (adapters / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith("base = "))
    line = line.partition("  #")[0].replace(f'"{tiny_llama_folder.name}"', "source")
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "source": tiny_llama_folder}
    exec(line, names)
    positions = AutoConfig.from_pretrained(tiny_llama_folder).max_position_embeddings
    assert names["base"].config.max_position_embeddings == 4 * positions
    assert names["base"].config.rope_parameters["rope_type"] == "linear"
    model = PeftModel.from_pretrained(names["base"], adapters).eval()
    ids = AutoTokenizer.from_pretrained(tiny_llama_folder)((folder / "b.txt").read_text()).input_ids[:128]
    (found,) = results["metrics"].values()
    assert found["after"] == pytest.approx(per_token_loop(model, ids, 64, 16), rel=1e-3)


def test_norms_and_embeddings_are_trained_saved_and_loaded_with_the_adapters(
    drive, folder, tiny_llama_folder, tmp_path
):
    options = ["--data_name", "text", "--data_dir", folder, "--eval_files", "b.txt", "--trainable_params", "norm,embed"]
    code, said, results = drive(*options, "--max_eval_samples", 2, "--eval_lengths", 64)
    assert code == 0 and "patched 2 layers" in said
    (adapters,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    stock = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = PeftModel.from_pretrained(base, adapters).eval()
    whole = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(whole) == 2 * 2 + 1 + 1
    for name, parameter in whole.items():
        original = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert not torch.equal(parameter, stock[original])
    ids = AutoTokenizer.from_pretrained(tiny_llama_folder)((folder / "b.txt").read_text()).input_ids[:128]
    (found,) = results["metrics"].values()
    assert found["after"] == pytest.approx(per_token_loop(model, ids, 64, 16), rel=1e-3)


def test_token_files_and_data_sets_on_disk_are_trained_on_and_judged(drive, tmp_path):
    Dataset.from_dict({"input_ids": [list(range(2, 130))] * 3}).save_to_disk(tmp_path / "rows")
    np.arange(2, 302, dtype="<u2").tofile(tmp_path / "test.bin")
    options = ["--data_name", "text", "--data_dir", tmp_path / "rows", "--eval_files", tmp_path / "test.bin"]
    code, said, results = drive(*options)
    assert code == 0 and "rows: 384 tokens; 6 rows of 64" in said and "test.bin: 300 tokens" in said
    assert len(results["metrics"]) == 2


TEXTS = ["--data_name", "text", "--data_dir", "{folder}"]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--data_name", "text"], "data_name text needs --data_dir"),
        (["--data_name", "text", "--data_dir", "nowhere"], "data_dir nowhere does not exist"),
        (["--data_name", "text", "--data_dir", "{empty}"], "empty has no text: put files there that end in .txt"),
        (["--data_name", "text", "--data_dir", "{folder}/odd.bin"], "odd.bin has 3 bytes, an odd number: it is cut"),
        (["--data_name", "text", "--data_dir", "{folder}/far.bin"], "far.bin: token 1 has the id 500, the tokenizer "),
        ([*TEXTS, "--eval_files", "none.txt"], "eval_files: there is no none.txt, in "),
        ([*TEXTS, "--eval_files", "."], "eval_files: . holds all that is trained on: name other files"),
        (["--eval_files", "b.txt"], "eval_files 'b.txt' would be ignored with data_name demo"),
        ([*TEXTS, "--eval_files", "short.txt"], "eval_lengths: short.txt has only "),
        ([*TEXTS, "--seq_len", "100000"], "tokens, too few for a block of 100000: give more text or lower --seq_len"),
        (["--seq_len", "4096"], "a row has 4096 tokens, "),
        (["--seq_len", "4096"], "lower --seq_len, or stretch them: --rope_scaling 2"),
        (["--eval_lengths", "32 3000"], "a row has 3000 tokens, "),
        (["--eval_lengths", "32 3000"], "lower --eval_lengths, or stretch them: --rope_scaling 2"),
        (
            ["--seq_len", "6000", "--rope_scaling", "2"],
            "only 4096 positions: lower --seq_len, or stretch them: --rope_s",
        ),
        (["--eval_lengths", "long"], "eval_lengths 'long' are no numbers: write for example"),
        (["--stride", "32"], "stride must be from 1 to below the shortest of eval_lengths, 32, not 32"),
        (["--stride", "0"], "stride must be from 1 to below the shortest of eval_lengths, 32, not 0"),
        (["--eval_lengths", "32 1", "--stride", "1"], "eval_lengths '32 1': a window of fewer than 2 tokens"),
        (
            [*TEXTS, "--eval_files", "a.txt", "--max_eval_samples", "1", "--eval_lengths", "80"],
            "has only 64 tokens within",
        ),
        (["--group_size", "48"], "group_size 48 does not divide seq_len 64: take a quarter of it"),
        (["--group_size", "16", "--attention", "eager"], "group_size needs attention=flash: attention=eager keeps"),
        (["--group_size", "1"], "group_size must be 2 or more, or 0 for full attention, not 1"),
        (["--rope_scaling", "0.5"], "rope_scaling must be a number of at least 1, not 0.5"),
        (["--rope_scaling", "inf"], "rope_scaling must be a number of at least 1, not inf"),
        (["--trainable_params", "norm,bias"], "trainable_params has no bias: choose among norm, embed"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(drive, folder, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(driver, "load_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "folder": folder}
    options = [option.format(**places) for option in options]
    if any(name in option for option in options for name in ("odd.bin", "far.bin")):
        (folder / "odd.bin").write_bytes(b"\x01\x00\x02")
        np.array([1, 500], dtype="<u2").tofile(folder / "far.bin")
    (folder / "short.txt").write_text("ab cd")
    code, told = drive(*options)
    assert code == 2 and said in told and not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("seq_len, code", [(64, 2), (32, 2), (16, 0)])
def test_groups_have_no_sliding_windows(drive, tiny_llama_folder, tmp_path, seq_len, code):
    """Told before the model is loaded; evaluation may have them, where attention is full."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "windows")
    config = json.loads((folder / "config.json").read_text())
    settings = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32}
    (folder / "config.json").write_text(json.dumps(config | settings))
    options = ["--model_dir", tmp_path, "--model_name", "windows", "--seq_len", seq_len, "--group_size", 16]
    found, said, *_ = drive(*options, "--eval_lengths", 64, "--max_eval_samples", 4)
    assert found == code and ("has a sliding window of 32 tokens, no longer than rows" in said) == (code == 2)
    assert any((tmp_path / "out").glob("*")) == (code == 0)


@pytest.mark.parametrize("file", ["README.md", "run_longseq.py", "run_longseq.sh"])
def test_the_examples_with_llama_2_have_positions_enough(file):
    lines = [
        line for line in (ROOT / file).read_text().splitlines() if "llama-2-7b-hf" in line and "longseq.sh" in line
    ]
    assert lines
    for line in lines:
        given = dict(word.split("=") for word in line.split() if "=" in word)
        assert int(given.get("seq_len", 8192)) <= 4096 * float(given.get("rope_scaling", 1)), line
