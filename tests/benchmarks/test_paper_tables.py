"""Tables of runs beside the published numbers: what makes a row, a cell and a column."""

import json

import pytest

from benchmarks import paper_tables

SETTINGS = {
    "ModelArguments": {"model_name": "llama-2-7b-hf", "load_in_4bit": True, "dtype": "auto", "random_weights": False},
    "Gsm8kArguments": {"data_name": "gsm8k", "max_eval_samples": None},
    "HycloraArguments": {
        **{"use_hyclora": True, "layer_type": "intra_inter_full_fuse", "q_bit": 4, "average_bits": 3.0},
        **{"scale_rule": "channel_group", "attention": "flash", "softmax_outlier_ratio": 0.05},
    },
    "GenerationArguments": {"greedy": True, "max_new_tokens": 256},
    "TrainingArguments": {"learning_rate": 3e-4, "seed": 11},
}


@pytest.fixture
def written(tmp_path):
    """Write the results file of a run, given its accuracy and what its settings have otherwise."""

    def write(after, driver="gsm8k", before=None, remark="", metric="accuracy", rows="aa", **changed):
        settings = {
            group: {name: changed.get(name, values[name]) for name in values} for group, values in SETTINGS.items()
        }
        texts = {"before": before, "after": after}
        shown = {metric + remark: {when: text for when, text in texts.items() if text is not None}}
        found = {
            "settings": settings,
            "metrics": {metric: {when: 0.0 for when in shown[metric + remark]}},
            "shown": shown,
            "content": {"content of the training rows": rows},
            "log_history": [{"step": 10, "loss": 1.5}, {"step": 20, "loss": 1.25}, {"train_loss": 1.4}],
        }
        folder = tmp_path / f"exp_results_{driver}"
        folder.mkdir(exist_ok=True)
        (folder / f"run{len(list(folder.iterdir()))}.json").write_text(json.dumps(found))
        return folder

    return write


@pytest.fixture
def lines(capsys):
    """The cells of each line that the program prints."""

    def lines(*arguments):
        paper_tables.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().out
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line]

    return lines


def test_runs_stand_beside_the_published_numbers(written, lines):
    written("38.10%", before="1.20%")
    written("38.90%", seed=12, before="1.20%")
    written("39.00%", use_hyclora=False)
    written("37.25%", q_bit=2, scale_rule="paper")
    found = lines(written("36.00%", q_bit="auto"))
    assert found[:2] == [["## gsm8k, llama-2-7b"], ["method", "bit", "accuracy", "published"]]
    assert found[3:5] == [["not trained", "", "1.20", ""], ["LoRA", "16", "39.00", "38.82"]]
    assert ["intra_inter", "4", "38.50 ± 0.57 (2)", "37.91"] in found
    assert ["intra_inter", "auto 3.0", "36.00", ""] in found
    assert ["intra", "2", "", "34.65"] in found
    two_bit = [line for line in found if line[0].startswith("intra_inter") and line[1] == "2"]
    assert two_bit == [["intra_inter, published quantizer", "2", "37.25", "35.86"]]
    bits = [float(line[1].split()[-1]) for line in found[4:]]
    assert bits == sorted(bits, reverse=True)


def test_runs_with_other_settings_or_rows_are_no_repetitions(written, lines):
    written("30.00%")
    written("31.00%", learning_rate=1e-3)
    written("32.00%", rows="bb")
    folder = written("33.00%", use_hyclora=False, max_eval_samples=100)
    found = [line[0] for line in lines(folder) if line[0].startswith(("intra_inter,", "LoRA,"))]
    assert len(found) == 4
    assert any("learning_rate=0.001" in label for label in found)
    assert any("content of the training rows=bb" in label for label in found)
    assert any(label.startswith("LoRA") and "max_eval_samples=100" in label for label in found)


def test_an_exact_run_is_not_told_from_others_by_settings_of_the_method(written, lines):
    written("30.00%", use_hyclora=False)
    folder = written("31.00%", attention="eager", layer_type="intra")
    assert {line[0] for line in lines(folder)[3:]} >= {"LoRA", "intra"}


def test_a_remark_is_a_star(written, lines):
    arithmetic = {"driver": "multitask", "data_name": "arithmetic", "metric": "SVAMP"}
    found = lines(written("80.00%", remark=" (8 of 10 trained on)", **arithmetic))
    assert found[1] == ["method", "bit", "SVAMP", "published"]
    assert ["intra_inter", "4", "80.00*", "56.6"] in found and "trained on" in found[-1][0]


def test_models_and_drivers_have_tables_of_their_own(written, lines):
    written("5.5123", metric="perplexity_per_token", driver="wikitext2", data_name="wikitext2")
    found = lines(written("1.00%", model_name="tiny-llama"), written("2.00%").parent / "exp_results_wikitext2")
    titles = [line[0] for line in found if line[0].startswith("##")]
    assert titles == ["## gsm8k, tiny-llama", "## gsm8k, llama-2-7b", "## wikitext2, llama-2-7b"]
    assert ["intra_inter", "4", "1.00"] in found and ["intra_inter", "4", "5.5123", "5.57"] in found


def test_columns_name_their_data_where_there_are_several(written, lines):
    written("60.00%", data_name="rte")
    found = lines(written("90.00%", data_name="sst2"))
    assert found[1] == ["method", "bit", "rte accuracy", "sst2 accuracy"]
    assert found[3] == ["intra_inter", "4", "60.00", "90.00"]


def test_published_means_are_those_of_their_row():
    """A slip in copying would show."""
    found = {}
    for (driver, model, _, metric, method, bit), value in paper_tables.published().items():
        if driver == "multitask":
            found.setdefault((model, method, bit), {})[metric] = float(value)
    assert len(found) == 30
    for row in found.values():
        mean = row.pop("mean")
        assert set(row) == {"gsm8k", "SVAMP", "mawps", "AQuA"} and abs(sum(row.values()) / 4 - mean) < 0.02


def test_losses_are_drawn(written, lines, tmp_path):
    written("1.00%", use_hyclora=False)
    assert lines(written("2.00%"), "--figures", tmp_path / "drawn")[-1] == [str(tmp_path / "drawn/loss_gsm8k.png")]
    assert (tmp_path / "drawn/loss_gsm8k.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda folder: None, "no finished run with an evaluation in {folder}: run a driver first"),
        (lambda folder: folder.rmdir(), "folder {folder} does not exist"),
        (lambda folder: (folder / "a.json").write_text("{}"), "{folder}/a.json is no results file of a run (KeyError)"),
        (lambda folder: (folder / "a.json").write_text("{"), "{folder}/a.json is no results file of a run"),
    ],
)
def test_mistakes(tmp_path, capsys, make, named):
    folder = tmp_path / "exp_results_gsm8k"
    folder.mkdir()
    make(folder)
    with pytest.raises(SystemExit) as exit:
        paper_tables.main([str(folder)])
    assert exit.value.code == 2 and named.format(folder=folder) in capsys.readouterr().err
