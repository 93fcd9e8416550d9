"""The driver of several test sets: table and results, what it says of questions that it was trained on, mistakes."""

import json

import pytest

import run_multitask
from hyclora.utils import driver

ROW = {"instruction": "Tom has 3 pens and buys 4. How many?", "input": "", "output": "7 pens. The answer is 7."}
CHOICE = {"instruction": "1 + 1? Answer Choices: (A) 1 (B) 2", "input": "", "output": "", "answer": "B"}


@pytest.fixture
def folder(tmp_path):
    """Two test sets and a training file that has a question of one of them, and two rows without an output."""
    numbered = [{**ROW, "instruction": f"Tom has {n} pens. How many?", "answer": f"{n}.0"} for n in range(1, 7)]
    for name, rows in {"SVAMP": numbered[:4], "AQuA": [CHOICE] * 3}.items():
        (tmp_path / "sets" / name).mkdir(parents=True)
        (tmp_path / "sets" / name / "test.json").write_text(json.dumps(rows))
    training = [*numbered[3:], CHOICE, {**ROW, "output": " "}]
    (tmp_path / "sets/math_10k.json").write_text(json.dumps(training))
    return tmp_path / "sets"


@pytest.fixture
def options(tiny_llama_folder, tmp_path):
    """Of the shortest run that there is."""
    return [
        *("--model_dir", str(tiny_llama_folder.parent), "--model_name", tiny_llama_folder.name),
        *("--output_dir", str(tmp_path / "results"), "--max_steps", "2", "--iteration_threshold", "1"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--max_new_tokens", "4"),
        *("--use_cpu", "True", "--disable_tqdm", "True"),
    ]


@pytest.fixture
def run(options, tmp_path, capsys):
    def run(*more):
        run_multitask.main([*options, *map(str, more)])
        (file,) = (tmp_path / "results").glob("*.json")
        return file, json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_the_demo_gives_a_row_a_set_and_their_mean(run):
    file, found, printed = run("--evaluate_before", "True", "--max_train_samples", "20", "--max_eval_samples", "2")
    table = printed.splitlines()
    start = next(i for i, line in enumerate(table) if line.split() == ["before", "after"])
    assert [line.split()[0] for line in table[start + 1 : start + 5]] == [
        "two_steps",
        "three_steps",
        "division",
        "mean",
    ]
    assert all(line.count("%") == 2 for line in table[start + 1 : start + 5])
    scores = found["metrics"]
    for when in ("before", "after"):
        mean = sum(scores[name][when] for name in ("two_steps", "three_steps", "division")) / 3
        assert scores["mean"][when] == pytest.approx(mean)
    assert found["overlap"] == {"two_steps": 0, "three_steps": 0, "division": 0} and "WARNING" not in printed
    predictions = json.loads((file.with_suffix("") / "predictions.json").read_text())
    assert [row["set"] for row in predictions] == ["two_steps"] * 2 + ["three_steps"] * 2 + ["division"] * 2


def test_accuracies_are_by_set_and_overlaps_are_marked(run, folder, monkeypatch):
    def generated(model, tokenizer, rows, args, prompt_of):
        assert args.greedy and prompt_of("1 + 1?").endswith("### Instruction:\n1 + 1?\n\n### Response:\n")
        return 0.0, [{**row, "correct": row["answer"] in ("B", "1.0")} for row in rows]

    monkeypatch.setattr(run_multitask, "evaluate_generation", generated)
    file, found, printed = run("--data_name", "arithmetic", "--data_dir", folder, "--tests", "SVAMP,AQuA,SVAMP")
    assert found["metrics"] == {"SVAMP": {"after": 0.25}, "AQuA": {"after": 1.0}, "mean": {"after": 0.625}}
    assert found["overlap"] == {"SVAMP": 1, "AQuA": 0}
    assert found["left_out"] == {"without a response": 2, "tested": 0}
    for said in (
        "3 training rows, ",
        "2 rows left out, as they have no response",
        "WARNING: SVAMP (1 of 4 trained on)",
    ):
        assert said in printed
    assert "AQuA: 3 test rows, 1 different questions" in printed
    assert "\nSVAMP (1 of 4 trained on)  " in printed and "\nmean (with questions trained on)  " in printed
    card = (file.with_suffix("") / "README.md").read_text()
    assert "| SVAMP (1 of 4 trained on) after training | 25.00% |" in card


def test_tested_questions_can_be_left_out_of_training(run, folder):
    _, found, printed = run(
        "--data_dir", folder, "--data_name", "arithmetic", "--tests", "SVAMP", "--drop_seen", "True"
    )
    assert found["overlap"] == {"SVAMP": 0} and "2 training rows, " in printed and "WARNING" not in printed


def test_another_training_file_and_no_evaluation(run, folder, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 4)
    _, found, _ = run(
        *("--data_name", "arithmetic", "--data_dir", folder, "--train_file", tmp_path / "train.jsonl"),
        *("--tests", "AQuA SVAMP", "--max_eval_samples", "0"),
    )
    assert found["metrics"] == {"AQuA": {}, "SVAMP": {}, "mean": {}} and found["final_loss"] > 0


MISTAKES = [
    (["--tests", "gsm8k"], None, "unknown test set gsm8k: {folder} has AQuA, SVAMP"),
    (["--max_new_tokens", "0"], None, "max_new_tokens 0 leaves no answers, by which this task is judged"),
    (["--tests", ","], None, "tests ',' names no test set: write for example gsm8k,SVAMP,mawps,AQuA"),
    (["--train_file", "nowhere.json"], None, "training file nowhere.json does not exist"),
    (
        [],
        ("AQuA/test.json", [{**CHOICE, "answer": ""}]),
        'test.json: item 1: the answer "" is not one of its options A, B',
    ),
    ([], ("AQuA/test.json", []), "{folder}/AQuA/test.json is empty"),
    ([], ("math_10k.json", [ROW, {"instruction": "1?"}]), 'math_10k.json: item 2: the key "output" is missing'),
    ([], ("math_10k.json", [{**ROW, "output": ""}]), "none of its 1 rows has a response to learn"),
    (
        ["--drop_seen", "True"],
        ("math_10k.json", [{**CHOICE, "output": "(B)"}]),
        "drop_seen leaves none of the 1 training",
    ),
    (["--data_dir", ""], None, "has no NAME/test.json of a test set: fetch them with download_datasets.sh"),
]


@pytest.mark.parametrize("more, file, named", MISTAKES, ids=lambda value: None)
def test_mistakes_end_before_anything_is_loaded(options, folder, tmp_path, capsys, monkeypatch, more, file, named):
    monkeypatch.setattr(driver, "load_model", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.setattr(run_multitask, "FILES", tmp_path / "not-downloaded")
    if file:
        (folder / file[0]).write_text(json.dumps(file[1]))
    with pytest.raises(SystemExit) as exit:
        run_multitask.main(
            [*options, "--data_name", "arithmetic", "--data_dir", str(folder), "--tests", "SVAMP,AQuA", *more]
        )
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert named.format(folder=folder) in error and not list((tmp_path / "results").glob("*"))


@pytest.mark.parametrize(
    "more, named",
    [
        (["--train_file", "a.json"], "train_file 'a.json' would be ignored with data_name demo"),
        (["--data_dir", "data"], "data_dir 'data' would be ignored with data_name demo"),
        (["--tests", "SVAMP"], "unknown test set SVAMP: the demo has two_steps, three_steps, division"),
        (["--data_name", "math"], "invalid choice: 'math'"),
    ],
)
def test_the_demo_needs_no_files(options, capsys, more, named):
    with pytest.raises(SystemExit) as exit:
        run_multitask.main([*options, *more])
    assert exit.value.code == 2 and named in capsys.readouterr().err
