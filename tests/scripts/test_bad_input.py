"""A user's mistake ends the driver with exit code 2 and one sentence on stderr that names the offending thing."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

import run_gsm8k
from hyclora.utils import driver
from hyclora.utils.args import ROOT
from hyclora.utils.data.gsm8k import INSTRUCTION
from tests.helpers.commands import IN_PROCESS

GOOD = json.dumps({"question": "1 + 1?", "answer": "#### 2"})


@pytest.fixture
def base(tiny_llama_folder, tmp_path):
    """Options of a run that would work."""
    checkpoint = ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
    return [*checkpoint, "--output_dir", str(tmp_path / "results")]


@pytest.fixture
def refused(base, tmp_path, capsys, monkeypatch):
    """Run the driver with mistaken options; its sentence, after checking that nothing was loaded."""
    monkeypatch.setattr(driver, "load_model", lambda *args: pytest.fail("the model was loaded"))

    def run(*options):
        with pytest.raises(SystemExit) as exit:
            run_gsm8k.main([*base, *map(str, options)])
        captured = capsys.readouterr()
        assert exit.value.code == 2
        assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
        assert not list((tmp_path / "results").glob("*"))
        return captured.err

    return run


@pytest.mark.parametrize(
    "options, named",
    [
        (["--q_bit", "5"], "q_bit=5 is not one of"),
        (["--q_bit", "four"], "q_bit='four' is not one of"),
        (["--layers", "inputs"], "layers='inputs': 'inputs' is not one of slots, input, input2"),
        (["--layers", "3*slots,40*input4"], "layers='3*slots,40*input4' is of 43 layers, and the model has"),
        (["--offload_embeddings", "True", "--target_modules", "embed_tokens"], "and embed_tokens is trained: drop it"),
        (["--layer_type", "inter"], "layer_type='inter' is not one of baseline, intra, "),
        (["--memory_budget", "20Gib"], "memory_budget: '20Gib' is no size of memory: write a number with MB, GB"),
        (["--memory_budget", "RTX4090"], "memory_budget: 'RTX4090' is no size of memory"),
        (["--memory_budget", "20"], "memory_budget=20 are bytes: write a unit"),
        (
            ["--memory_budget", "20GiB", "--use_cpu", "True"],
            "memory_budget=20GiB needs a GPU, and this would run on the CPU",
        ),
        (["--memory_budget", "null"], "memory_budget: 'null' is no size of memory"),
        (["--layers", "9" * 5000], "is not one of slots, input, input2"),
        (["--largest_batch", "4x512"], "the scripts look up the largest batch of their rows; drop it"),
        (["--softmax_outlier_ratio", "1.5"], "softmax_outlier_ratio=1.5 is outside [0, 1]"),
        (["--layernorm_outlier_ratio", "-0.1"], "layernorm_outlier_ratio=-0.1 is outside [0, 1]"),
        (["--no_such_option", "1"], "unknown option --no_such_option"),
        (["--seq_len", "8"], "no training row has room for an answer within seq_len 8"),
        (["--resume_from_checkpoint", "True"], "no unfinished run"),
        (["--resume_from_checkpoint", "nowhere"], "folder nowhere does not exist"),
        (
            ["--dataloader_drop_last", "True", "--max_train_samples", "3", "--per_device_train_batch_size", "4"],
            "dataloader_drop_last=True leaves none of the 3 rows, which fill no batch of 4: drop it, or lower",
        ),
        (["--learning_rate", "-1"], "learning_rate must be a positive number"),
        (["--lora_init_type", "loftq"], "load_in_4bit"),
    ],
)
def test_settings(refused, options, named):
    assert named in refused(*options)


def test_a_budget_where_there_is_no_gpu(refused, monkeypatch):
    """Though nobody asked for the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "memory_budget=20GiB needs a GPU, and this would run on the CPU" in refused("--memory_budget", "20GiB")


def test_embeddings_that_are_the_heads_too(refused, tiny_llama_folder, tmp_path):
    copy = shutil.copytree(tiny_llama_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(config))
    said = refused("--model_dir", tmp_path, "--model_name", "copy", "--offload_embeddings", "True")
    assert f"{copy} has one weight for them and the head, which needs it on the GPU: drop it" in said


def test_checkpoints(refused, tiny_llama_folder, tmp_path):
    assert f"{tmp_path / 'nowhere'} does not exist" in refused("--model_dir", tmp_path, "--model_name", "nowhere")
    copy = shutil.copytree(tiny_llama_folder, tmp_path / "copy")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert f"{copy} has no tokenizer" in refused("--model_dir", tmp_path, "--model_name", "copy")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    assert f"{copy} is a bert model: supported are " in refused("--model_dir", tmp_path, "--model_name", "copy")


@pytest.mark.parametrize(
    "text, named",
    [
        (None, "test.jsonl does not exist"),
        ("\n", "test.jsonl is empty"),
        (f"{GOOD}\n\n{{'question'\n", "test.jsonl:3: not a JSON object"),
        (f'{GOOD}\n{{"question": "1?"}}', 'test.jsonl:2: the key "answer" is missing, found the keys question'),
        (f"{GOOD}\n[1]", "test.jsonl:2: not a JSON object"),
    ],
)
def test_data_files(refused, tmp_path, text, named):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(GOOD)
    if text is not None:
        (folder / "test.jsonl").write_text(text)
    assert str(folder / named) in refused("--data_name", "gsm8k", "--data_dir", folder)


def test_data_folder(refused, tmp_path):
    for name in ("gsm8k", "json"):
        assert f"{tmp_path / 'none'} does not exist" in refused("--data_name", name, "--data_dir", tmp_path / "none")


def test_own_rows(refused, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1?", "response": "2"}')
    (tmp_path / "test.jsonl").write_text('{"prompt": "1 + 1?"}')
    sentence = refused("--data_name", "json", "--data_dir", tmp_path)
    assert f'{tmp_path / "test.jsonl"}:1: the key "response" is missing, found the keys prompt' in sentence


def test_no_row_with_a_target(refused, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": INSTRUCTION * 50, "answer": "#### 1"}))
    assert "raise --seq_len" in refused("--data_name", "gsm8k", "--data_dir", tmp_path, "--seq_len", "64")


def test_answers_of_gsm8k(refused, tmp_path):
    """What is blank cannot be learned, and what has no number not be judged."""
    (tmp_path / "train.jsonl").write_text(f'{GOOD}\n{{"question": "1 + 1?", "answer": " "}}')
    (tmp_path / "test.jsonl").write_text(f'{GOOD}\n{{"question": "1 + 1?", "answer": "two"}}')
    given = ("--data_name", "gsm8k", "--data_dir", tmp_path)
    assert 'train.jsonl:2: the response under "answer" is empty' in refused(*given)
    (tmp_path / "train.jsonl").write_text(GOOD)
    assert "the answer of test row 2 has no number, by which accuracy is judged" in refused(*given)


def test_unreachable_hub(refused, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    sentence = refused("--data_name", "gsm8k")
    assert all(word in sentence for word in ("openai/gsm8k", "train.jsonl and test.jsonl", "--data_dir"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused("--data_name", "gsm8k")


@pytest.mark.parametrize("why", ["offline mode is enabled", "no token found", "Name or service not known"])
def test_a_hub_that_takes_nothing_is_told_before_the_model_is_loaded(refused, monkeypatch, why):
    def whoami(self, token=None):
        assert token == "hf_mine"
        raise OSError(f"{why}\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
    sentence = refused("--push_to_hub", "True", "--hub_token", "hf_mine")
    assert f"push_to_hub: the hub cannot be written to ({why} more)" in sentence and "or drop push_to_hub" in sentence


def test_no_name_of_a_repository(refused):
    assert "push_to_hub: hub_model_id" in refused("--push_to_hub", "True", "--hub_model_id", "a/b/c")


def test_output_folder_that_cannot_be_written(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "load_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run_gsm8k.main([*base, "--output_dir", str(tmp_path / "file" / "results")])
    assert f"output folder {tmp_path / 'file' / 'results'} cannot be written" in capsys.readouterr().err


def test_the_script_itself_exits_with_2_and_without_a_traceback():
    """Run as a script here; as a process in tests/utils/runs/test_script.py."""
    said = io.StringIO()
    result = IN_PROCESS.run([sys.executable, str(ROOT / "run_gsm8k.py"), "--q_bit", "5"], stdout=said)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: q_bit=5 is not one of 2, 3, 4, 8, auto"
    assert "Traceback" not in result.stderr and said.getvalue() == ""
