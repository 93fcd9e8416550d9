"""verify=True in a driver, and `python -m hyclora.fidelity`."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import run_gsm8k
import run_memory_throughput
from hyclora import fidelity
from hyclora.utils import fidelity as work
from hyclora.utils.trainer import HycloraTrainer
from tests.helpers.drivers import run_script


@pytest.fixture
def drive(tiny_llama_folder, tmp_path, capsys):
    """Run the driver; its exit code and what it printed."""

    def drive(*options, folder="out"):
        given = (
            ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
            + ["--output_dir", str(tmp_path / folder), "--max_train_samples", "40", "--max_eval_samples", "0"]
            + ["--max_steps", "4", "--iteration_threshold", "2", "--logging_steps", "1", "--lora_rank", "4"]
            + ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--lora_dropout", "0.1"]
            + ["--use_cpu", "True", "--disable_tqdm", "True", *options]
        )
        return run_script(run_gsm8k.main, given, capsys)

    return drive


def left_by(folder):
    """Losses and adapters of the one run in a folder."""
    (file,) = folder.glob("*.json")
    results = json.loads(file.read_text())
    losses = [entry["loss"] for entry in results["log_history"] if "loss" in entry]
    return losses, load_file(folder / file.stem / "adapter_model.safetensors")


@pytest.mark.parametrize("options", [[], ["--gradient_checkpointing", "True"]], ids=["plain", "checkpointing"])
def test_a_verified_run_is_the_same_run(drive, tmp_path, options):
    code, said = drive("--verify", True, *options, folder="verified")
    assert code == 0 and "verify: gradients of 28 trained weights" in said and "hurts most" in said
    assert "14 weights, as model.layers.0.self_attn.q_proj.lora_A: the gradient is 0, as lora_B is 0" in said
    code, said = drive(*options, folder="plain")
    assert code == 0 and "verify: gradients" not in said
    (losses, ours), (expected, theirs) = left_by(tmp_path / "verified"), left_by(tmp_path / "plain")
    assert losses == expected and len(losses) == 4
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_a_run_below_the_threshold_is_not_begun(drive, monkeypatch, tmp_path):
    monkeypatch.setattr(HycloraTrainer, "train", lambda *_: pytest.fail("it trained"))
    code, said = drive("--verify", True, "--verify_threshold", 0.99999, "--q_bit", 2)
    assert code == 2 and "less than the threshold 0.99999" in said and "slot_savers=" in said
    assert "slot alone" in said and not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    "options, said",
    [
        (["--verify", True, "--use_hyclora", False], "verify has no effect with use_hyclora=False"),
        (["--verify_threshold", 0.5], "verify_threshold has no effect with verify=False"),
        (["--verify", True, "--verify_threshold", 2], "verify_threshold must be a cosine, from -1 to 1, not 2"),
    ],
)
def test_mistakes(drive, tmp_path, options, said):
    code, told = drive(*options)
    assert code == 2 and said in told and not list((tmp_path / "out").glob("*"))


def test_random_tokens_are_not_verified(capsys):
    with pytest.raises(SystemExit) as exit:
        run_memory_throughput.main(["--verify", "True"])
    assert exit.value.code == 2 and "verify needs real rows" in capsys.readouterr().err


@pytest.fixture
def ask(tiny_llama_folder, capsys):
    """What `python -m hyclora.fidelity` finds, or its exit code; and what it printed."""

    def ask(*options):
        found = None
        try:
            given = ["--model", tiny_llama_folder, "--device", "cpu", "--iteration_threshold", 2, "--batch_size", 2]
            few = [] if "--adapters" in options else ["--exact_steps", "2"]
            found = fidelity.main([*map(str, given), *few, *map(str, options)])
        except SystemExit as exit:
            found = exit.code
        captured = capsys.readouterr()
        return found, captured.out + captured.err

    return ask


def test_a_checkpoint_is_verified_on_rows_of_each_kind(ask, tmp_path):
    found, said = ask("--q_bit", 2)
    assert 0.7 < found.summary.cosine < 0.99 and not any(g.note for g in found.gradients) and str(found) in said
    assert re.search(r"\nverify: [\d.]+ s: rows and model [\d.]+, 2 exact steps [\d.]+, gradients [\d.]+\n", said)
    rows = [{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("a sea of words and of fish " * 200)
    closer, _ = ask("--data", tmp_path / "rows.jsonl", "--batches", 2)
    assert closer.n_batches == 2 and closer.summary.error < found.summary.error
    on_text, _ = ask("--data", tmp_path / "text.txt", "--seq_len", 32, "--exact_steps", 0, "--bf16", True)
    assert any(g.note for g in on_text.gradients) and on_text.rounding


def test_exact_steps_under_autocast_train_both_matrices(ask, monkeypatch):
    """Of a lora_B that stays 0 in the forward, lora_A learns nothing."""
    measured = work.verify
    models = []
    monkeypatch.setattr(work, "verify", lambda model, batches: models.append(model) or measured(model, batches))
    for steps in (0, 3):
        found, _ = ask("--bf16", True, "--exact_steps", steps)
    assert found.summary.cosine > 0.95 and not any(g.note for g in found.gradients)
    new, trained = (dict(model.named_parameters()) for model in models)
    moved = [(p - trained[name]).abs().max().item() for name, p in new.items() if "lora_A" in name]
    assert min(moved) > 1e-3  # AdamW's steps are 1e-3, its decay 1e-5 of a weight


def test_trained_adapters_are_verified(ask, drive, tmp_path):
    drive()
    (file,) = (tmp_path / "out").glob("*.json")
    found, _ = ask("--adapters", file.with_suffix(""))
    assert not any(g.note for g in found.gradients) and found.exact == "LoRA with exact slots"


@pytest.mark.parametrize("broken", ["adapter_config.json", "adapter_model.safetensors", "other shapes", "no weights"])
def test_adapters_that_are_none_of_this_model_are_told_in_a_sentence(ask, drive, tmp_path, broken):
    drive("--max_steps", "1")
    (file,) = (tmp_path / "out").glob("*.json")
    folder = file.with_suffix("")
    if broken == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif broken == "other shapes":
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: t[..., :-1].clone() for name, t in weights.items()}, folder / "adapter_model.safetensors")
    else:
        (folder / broken).write_text("{}")
    code, said = ask("--adapters", folder)
    (told,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"adapters {folder} cannot be loaded for" in told and "save_pretrained has written" in told


def test_exact_steps_that_have_no_room(ask, monkeypatch):
    """Exact LoRA takes more than the training that is to be looked at, so it may be the only one without."""
    monkeypatch.setattr(work, "train_exactly", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of")))
    code, told = ask()
    assert code == 1 and "error: out of memory: exact LoRA" in told and "lower --batch_size or --seq_len" in told


@pytest.mark.parametrize(
    "options, said",
    [
        (["--offload_embeddings", True, "--target_modules", "embed_tokens"], "embed_tokens is trained: drop it"),
        (["--layers", "1*slots,9*input"], "is of 10 layers, and the model has"),
    ],
    ids=["embeddings", "layers"],
)
def test_what_the_model_cannot_do_is_told_before_it_is_loaded(ask, monkeypatch, options, said):
    monkeypatch.setattr(work, "load_model", None)
    code, told = ask(*options)
    assert code == 2 and said in told


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", ""], "say with --model which checkpoint folder"),
        (["--model", "nowhere"], "nowhere does not exist: put the model there, or set --model\n"),
        (["--data", "nowhere.txt"], "data nowhere.txt does not exist"),
        (["--data", "nowhere"], "error: data nowhere does not exist"),
        (["--data", "{folder}"], "{folder} has no train.jsonl: put it there, or name a file with --data\n"),
        (["--adapters", "nowhere"], "adapters nowhere has no adapter_config.json"),
        (["--batches", 0], "batches must be at least 1, not 0"),
        (["--data", "{few}"], "has rows for 2 batches of 2, 5 are needed: give more, or lower"),
        (["--use_hyclora", False], "error: use_hyclora=False leaves nothing to verify: drop it\n"),
        (["--use_hyclora", False, "--q_bit", 2], "error: use_hyclora=False leaves nothing to verify: drop it\n"),
        (["--verify", False], "there is nothing else to do with verify=False: drop it"),
        (["--adapters", "{adapters}", "--lora_rank", 4], "lora_rank: of no effect on adapters that are trained: drop"),
        (["--adapters", "{adapters}", "--exact_steps", 4], "exact_steps: of no effect on adapters that are trained"),
        (["--verify_threshold", 0.99999, "--q_bit", 2], "less than the threshold 0.99999"),
    ],
)
def test_mistakes_of_the_command(ask, tmp_path, options, said):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "1 + 1 =", "response": " 2"}\n' * 4)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    places = {"few": few, "adapters": tmp_path, "folder": tmp_path / "folder"}
    code, told = ask(*(str(option).format(**places) for option in options))
    assert code == 2 and said.format(**places) in told
