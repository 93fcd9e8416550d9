"""The driver of GLUE from end to end on small models: what it prints, keeps, resumes and refuses."""

import json
import os
import re
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

import run_glue
from hyclora.models.families import FAMILIES
from hyclora.utils import driver, loading
from hyclora.utils.args import ROOT
from hyclora.utils.data.glue import GLUE
from hyclora.utils.trainer import HycloraTrainer
from tests.helpers.drivers import run_script
from tests.helpers.small_roberta import POSITIONS, write_roberta

WORDS = {0: "dull", 1: "fine"}


@pytest.fixture
def llama(tiny_llama_folder):
    return tiny_llama_folder


@pytest.fixture
def roberta(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FAMILIES", {"roberta": None, **FAMILIES})
    return write_roberta(tmp_path / "models" / "roberta")


@pytest.fixture(params=["llama", "roberta"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def run(tmp_path, capsys):
    """Run the driver; its exit code, and what it printed."""

    def run(folder, *options):
        given = (
            ["--model_dir", str(folder.parent), "--model_name", folder.name, "--output_dir", str(tmp_path / "runs")]
            + ["--max_steps", "4", "--iteration_threshold", "2", "--logging_steps", "1", "--save_steps", "2"]
            + ["--per_device_train_batch_size", "4", "--lora_rank", "4", "--evaluate_before", "True"]
            + ["--gradient_accumulation_steps", "1", "--use_cpu", "True", "--disable_tqdm", "True"]
            + list(options)
        )
        return run_script(run_glue.main, given, capsys)

    return run


def stock(folder):
    """What a model of no family takes, which is trained as it is."""
    return ["--use_hyclora", "False"] if folder.name == "roberta" and "roberta" not in FAMILIES else []


def results_of(tmp_path):
    (file,) = (tmp_path / "runs").glob("*.json")
    return file, json.loads(file.read_text())


def write_sst2(tmp_path, n=200):
    lines = [f"a {WORDS[i % 2]} film number {i}\t{i % 2}" for i in range(n)]
    place = tmp_path / "data/SST-2"
    place.mkdir(parents=True)
    for split, chosen in (("train", lines[: n - 40]), ("dev", lines[n - 40 :])):
        (place / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *chosen]) + "\n")
    return ["--data_name", "sst2", "--data_dir", place.parent]


def test_a_run_learns_reports_and_keeps_its_head(run, folder, tmp_path):
    options = ["--max_steps", 60, "--learning_rate", "1e-2", "--logging_steps", 20, "--save_steps", 60, *stock(folder)]
    code, said = run(folder, *write_sst2(tmp_path), *options)
    assert code == 0
    file, results = results_of(tmp_path)
    accuracy = results["metrics"]["accuracy"]
    assert accuracy["before"] < 0.8 < 0.95 <= accuracy["after"]
    assert "train: 160 rows (of 67349), 50.0% of them 0, 0 cut at " in said
    assert "dev: 40 rows (of 872), 50.0% of them 0, 0 cut at " in said
    assert re.search(rf"accuracy after training +{accuracy['after']:.2%}\n", said)
    assert ("hyclora" in results["buffered_bytes"]) == (not stock(folder))

    run_folder = file.with_suffix("")
    predictions = json.loads((run_folder / "predictions.json").read_text())
    right = [row["label"] == row["prediction"] for row in predictions]
    assert sum(right) / 40 == accuracy["after"] and predictions[0]["split"] == "dev"
    assert predictions[0]["texts"][0].endswith("film number 160")
    # the card's own words load what was trained
    card = (run_folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "| accuracy after training |" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    names = {}
    snippet = snippet.replace(f'"{folder.name}"', f'"{folder}"').replace("the folder of this file", str(run_folder))
    exec(compile(snippet, "README.md", "exec"), names)
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    assert isinstance(model, PeftModel)
    for row in predictions[:4]:
        logits = model(**tokenizer(row["texts"][0], return_tensors="pt")).logits
        assert str(logits.argmax().item()) == row["prediction"]
    head = {name for name in load_file(run_folder / "adapter_model.safetensors") if "lora_" not in name}
    assert len(head) == (4 if folder.name == "roberta" else 1)


def test_the_demo_runs(run, llama, tmp_path):
    options = ["--max_train_samples", 40, "--max_eval_samples", 8, "--per_device_train_batch_size", 1]
    code, said = run(llama, *options, "--q_bit", 2)
    assert code == 0 and "dev: 8 rows (of 400), " in said
    results = results_of(tmp_path)[1]
    assert results["train"]["masked_batches"] == 0  # the label of the only row is one
    assert set(results["metrics"]["accuracy"]) == {"before", "after"}
    assert results["buffered_bytes"]["hyclora"] < 0.6 * results["buffered_bytes"]["lora"]
    assert results["settings"]["LoraArguments"]["target_modules"] == ["all-linear"]
    assert "HyC-LoRA (intra_inter_full_fuse) patched 2 layers" in said


def write_task(tmp_path, name, header, lines, splits):
    place = tmp_path / "data" / GLUE[name].folder
    place.mkdir(parents=True)
    for split in splits:
        (place / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return ["--data_name", name, "--data_dir", place.parent]


def test_a_score_is_told_by_its_correlations(run, folder, tmp_path):
    lines = [f"a {i % 6}\ta {i % 5}\t{i % 6:.{i % 4}f}" for i in range(24)]
    data = write_task(tmp_path, "stsb", "sentence1\tsentence2\tscore", lines, ("train", "dev"))
    code, said = run(folder, *data, *stock(folder))
    assert code == 0 and "Spearman correlation" in said
    file, results = results_of(tmp_path)
    assert set(results["metrics"]) == {"Pearson_correlation", "Spearman_correlation"}
    assert all(-1 <= value <= 1 for found in results["metrics"].values() for value in found.values())
    predictions = json.loads((file.with_suffix("") / "predictions.json").read_text())
    assert predictions[5]["label"] == 5.0 and isinstance(predictions[5]["prediction"], float)


def test_both_test_sets_of_mnli_are_told_apart(run, llama, tmp_path):
    labels = ("entailment", "neutral", "contradiction")
    lines = [f"a {i}\tb {i}\t{labels[i % 3]}" for i in range(12)]
    header, splits = "sentence1\tsentence2\tgold_label", ("train", "dev_matched", "dev_mismatched")
    code, said = run(llama, *write_task(tmp_path, "mnli", header, lines, splits))
    assert code == 0 and "accuracy mismatched" in said
    file, results = results_of(tmp_path)
    assert set(results["metrics"]) == {"accuracy_matched", "accuracy_mismatched"}
    predictions = json.loads((file.with_suffix("") / "predictions.json").read_text())
    assert len(predictions) == 24 and {row["prediction"] for row in predictions} <= set(labels)


def test_rows_beyond_the_positions_of_the_model_are_cut_and_counted(run, roberta, tmp_path):
    lines = [f"a\t{'long ' * 100 * (i % 2)}b\tentailment" for i in range(8)]
    data = write_task(tmp_path, "rte", "sentence1\tsentence2\tlabel", lines, ("train", "dev"))
    code, said = run(roberta, *data, "--max_steps", 1, *stock(roberta))
    assert code == 0 and said.count(f"4 cut at {POSITIONS} tokens") == 2
    saved = AutoTokenizer.from_pretrained(results_of(tmp_path)[0].with_suffix(""))
    assert saved.model_max_length == POSITIONS


def test_a_resumed_run_ends_as_one_that_was_not_stopped(run, folder, tmp_path, monkeypatch):
    options = [*write_sst2(tmp_path), "--learning_rate", "1e-2", "--save_steps", 1, *stock(folder)]
    assert run(folder, *options)[0] == 0
    (whole,) = (tmp_path / "runs").glob("*.json")
    train = HycloraTrainer.training_step

    def stopping(self, *args):
        if self.state.global_step + 1 == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, *args)

    monkeypatch.setattr(HycloraTrainer, "training_step", stopping)
    assert run(folder, *options)[0] == 130
    monkeypatch.setattr(HycloraTrainer, "training_step", train)
    code, said = run(folder, *options, "--resume_from_checkpoint", "True")
    assert code == 0 and "at step 2" in said
    (resumed,) = set((tmp_path / "runs").glob("*.json")) - {whole}
    ours, theirs = (load_file(f.with_suffix("") / "adapter_model.safetensors") for f in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [json.loads(f.read_text())["metrics"] for f in (resumed, whole)].count(
        json.loads(whole.read_text())["metrics"]
    ) == 2


def test_mistakes_end_it_before_anything_is_loaded_or_written(run, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    data = write_task(tmp_path, "rte", "index\tsentence1\tlabel", ["0\ta\tentailment"], ("train", "dev"))
    scores = write_task(tmp_path, "stsb", "sentence1\tsentence2\tscore", ["a\tb\t1.0"], ("train", "dev"))
    for options, named in (
        ([*scores, "--label_smoothing_factor", 0.1], "label_smoothing_factor smooths classes"),
        (data, 'RTE/train.tsv: the column "sentence2" is missing, found index, sentence1, label'),
        (["--data_name", "wnli", "--data_dir", tmp_path / "data"], "WNLI/train.tsv does not exist"),
        (["--data_name", "sst"], "invalid choice: 'sst'"),
        (["--data_dir", tmp_path], "would be ignored with data_name demo"),
    ):
        code, said = run(llama, *options)
        assert code == 2 and named in said and not (tmp_path / "runs").exists()


def test_the_shell_script_names_every_task():
    text = (ROOT / "run_glue.sh").read_text()
    listed = re.search(r"or a task: ([\w, ]+) \(", text)[1].split(", ")
    assert sorted(listed) == sorted(set(GLUE) - {"demo"})
