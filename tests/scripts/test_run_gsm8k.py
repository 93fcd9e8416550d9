"""The driver from end to end on a tiny model: what it prints and what it leaves behind."""

import json
import warnings

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import run_gsm8k


@pytest.fixture
def run(tiny_llama_folder, tmp_path, capsys):
    def run(*options):
        run_gsm8k.main(
            ["--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name]
            + ["--output_dir", str(tmp_path), "--max_train_samples", "40", "--max_eval_samples", "3"]
            + ["--max_steps", "4", "--iteration_threshold", "2", "--logging_steps", "1", "--save_steps", "2"]
            + ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_new_tokens", "4"]
            + ["--use_cpu", "True", "--disable_tqdm", "True", *options]
        )
        (results,) = tmp_path.glob("*.json")
        return results, json.loads(results.read_text()), capsys.readouterr().out

    return run


def test_a_run_reports_and_keeps_everything(run, tiny_llama_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        file, results, printed = run("--evaluate_before", "True", "--q_bit", "2")
    assert set(results["metrics"]["accuracy"]) == {"before", "after"}
    kept = results["buffered_bytes"]
    assert kept["hyclora"] < 0.6 * kept["lora"] and kept["lora_checkpointing"] < kept["lora"]
    assert [entry["step"] for entry in results["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert results["settings"]["HycloraArguments"]["q_bit"] == 2
    assert results["settings"]["TrainingArguments"]["learning_rate"] == 3e-4
    assert {"torch", "transformers", "peft"} <= set(results["environment"]["versions"])
    train = results["train"]
    assert 0 < train["tokens"] <= 4 * 2 * 512 and f"{train['tokens_per_second']:.0f}" in printed
    assert {"peak_bytes", "held_bytes", "host_bytes"} <= set(train)
    assert "\ntokenizer: bos <s> before a text (as tokenizer.json does)" in printed
    assert "\nbase weights: float32 (dtype auto on a CPU); in the checkpoint float32\n" in printed
    assert "seed: 11" in printed and "steps: 4" in printed and f"output_dir: {file.with_suffix('')}" in printed
    assert "average_bits" not in printed and "softmax_outlier_ratio" not in printed
    assert all(f"({kept[name] / kept['hyclora']:.2f}x)" in printed for name in ("lora", "lora_checkpointing"))
    assert "HyC-LoRA (intra_inter_full_fuse) patched 2 layers" in printed
    log = file.with_suffix(".log").read_text()
    assert set(printed.splitlines()) <= set(log.splitlines()) and "'loss'" in log

    folder = file.with_suffix("")
    card = (folder / "README.md").read_text()
    for said in (
        f"base_model: {tiny_llama_folder.name}\n",
        "| q_bit | 2 |",
        "| accuracy after training |",
        "PeftModel",
    ):
        assert said in card
    for saved in (folder, folder / "checkpoint-4"):
        texts = [file.read_text() for file in (*saved.glob("adapter_config.json"), *saved.glob("*.md"))]
        assert texts and not any(str(tiny_llama_folder.parent) in text for text in texts)
    assert (folder / "checkpoint-4/hyclora_calibration.safetensors").is_file()
    assert len(json.loads((folder / "predictions.json").read_text())) == 3
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), folder)


@pytest.mark.parametrize(
    "options",
    [
        ["--use_hyclora", "False"],
        ["--load_in_4bit", "True", "--dtype", "bfloat16"],
        ["--load_in_4bit", "True", "--lora_init_type", "pissa"],
        ["--load_in_4bit", "True", "--random_weights", "True"],
    ],
    ids=" ".join,
)
def test_other_ways_to_train_run(run, options):
    _, results, _ = run("--max_eval_samples", "0", *options)
    assert results["final_loss"] > 0 and results["metrics"] == {}
    assert ("hyclora" in results["buffered_bytes"]) == ("--use_hyclora" not in options)


def test_no_answers_are_generated(run):
    file, results, printed = run("--max_new_tokens", "0", "--max_steps", "1")
    assert set(results["metrics"]) == {"test_loss"} and "accuracy" not in printed
    assert not (file.with_suffix("") / "predictions.json").exists()


def test_own_rows_are_judged_by_their_loss(run, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(20)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:5])))
    options = ["--learning_rate", "1e-2", "--evaluate_before", "True", "--max_eval_samples", "4"]
    file, results, printed = run("--data_name", "json", "--data_dir", str(folder), *options)
    assert "20 training rows, " in printed and "4 test rows, " in printed
    losses = results["metrics"]["test_loss"]
    assert losses["after"] < losses["before"] - 0.1
    assert all(f"test loss {when} training" in printed and f"{loss:.4f}" in printed for when, loss in losses.items())
    assert not (file.with_suffix("") / "predictions.json").exists()
