"""Arithmetic word problems: three formats, answers as files really spell them, questions that a training has seen."""

import json

import pytest

from hyclora.utils.answers import is_correct
from hyclora.utils.data.arithmetic import (
    DEMO_SETS,
    Problems,
    demo,
    demo_test,
    prompt_of,
    read,
    read_test,
    read_training,
)
from hyclora.utils.errors import UserError

ADAPTERS = {"instruction": "3 pens and 4. How many?", "input": "", "output": "\nA: 7 pens.", "answer": "7.0"}
GSM8K = {"question": "How many cents?", "answer": "1000 + 234 = 1,234\n#### 1,234"}
MAWPS = {"id": 1, "original_text": "He did n't eat 1.5 of 3 .", "segmented_text": "", "equation": "x=3-1.5", "ans": 1.5}
AQUA = {
    "instruction": "How old? Answer Choices: (A) A) 59 (B) B) 69 (C) C) 79 (D) D) 89 (E) E) 99",
    "input": "",
    "output": "The answer is (A).",
    "answer": "A",
}


@pytest.fixture
def written(tmp_path):
    """Write rows as a training file, or as the test set of a name; gives the file."""

    def write(rows, name="train"):
        file = tmp_path / ("train.json" if name == "train" else f"{name}/test.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return file

    return write


def test_each_format_is_learned_and_compared_by_its_own_keys(written, tmp_path):
    rows, left_out = read_training(written([ADAPTERS, GSM8K, MAWPS]))
    assert left_out == 0 and [row["response"] for row in rows] == [
        "A: 7 pens.",
        "1000 + 234 = 1,234\nThe final answer is: 1,234",
        "x=3-1.5\nThe final answer is: 1.5",
    ]
    written([ADAPTERS, GSM8K, MAWPS, AQUA], "mixed")
    tested = read_test(tmp_path, "mixed").rows
    assert [row["answer"] for row in tested] == ["7.0", "1,234", "1.5", "A"]
    assert [row["question"] for row in tested] == [
        row.get("instruction") or row.get("question") or row.get("original_text")
        for row in (ADAPTERS, GSM8K, MAWPS, AQUA)
    ]


def test_the_prompt_is_alpacas(written):
    (example,) = Problems(read_training(written([ADAPTERS]))[0], []).examples()
    ((prompt, response),) = example.exchanges
    task = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert prompt == f"{task}\n\n### Instruction:\n{ADAPTERS['instruction']}\n\n### Response:\n"
    assert prompt == prompt_of(ADAPTERS["instruction"])
    assert response == "A: 7 pens."


def test_an_input_belongs_to_the_question(written):
    rows, _ = read_training(written([{**ADAPTERS, "input": "Count pens."}, {**ADAPTERS, "input": None}]))
    assert [row["question"] for row in rows] == [f"{ADAPTERS['instruction']}\nCount pens.", ADAPTERS["instruction"]]


def test_training_needs_no_answer_and_tests_need_no_output(written, tmp_path):
    del (learned := dict(ADAPTERS))["answer"], (tested := dict(ADAPTERS))["output"]
    assert len(read_training(written([learned]))[0]) == 1
    written([tested], "mawps")
    assert len(read_test(tmp_path, "mawps").rows) == 1


def test_empty_outputs_are_never_learned_but_counted(written):
    empty = {**ADAPTERS, "output": " \n"}
    rows, left_out = read_training(written([ADAPTERS, empty, {**ADAPTERS, "output": ""}]))
    assert (len(rows), left_out) == (1, 2)
    assert str(Problems(rows, [], left_out)) == "2 rows left out, as they have no response"
    with pytest.raises(UserError, match="train.json: none of its 1 rows has a response to learn"):
        read_training(written([empty]))


@pytest.mark.parametrize(
    "ans, answer",
    [(2.0, "2"), ("0.53", "0.53"), (0.6666666666666666, "0.6666666666666666"), (7, "7")],
)
def test_mawps_mixes_numbers_and_texts(written, tmp_path, ans, answer):
    written([{**MAWPS, "ans": ans}], "mawps")
    (row,) = read_test(tmp_path, "mawps").rows
    assert row["answer"] == answer
    ((learned,),) = [read_training(written([{**MAWPS, "ans": ans}]))[0]]
    assert learned["response"].endswith(f"\nThe final answer is: {answer}")
    assert is_correct(learned["response"], row["answer"])


def test_answers_are_compared_and_not_outputs(written, tmp_path):
    written([{**ADAPTERS, "output": "The answer is 8."}], "SVAMP")
    (row,) = read_test(tmp_path, "SVAMP").rows
    assert is_correct("The answer is 7.", row["answer"]) and not is_correct("The answer is 8.", row["answer"])


def test_repeated_questions_are_kept_and_told(written, tmp_path):
    written([ADAPTERS, ADAPTERS, AQUA], "MultiArith")
    assert str(read_test(tmp_path, "MultiArith")) == "MultiArith: 3 test rows, 2 different questions"
    written([ADAPTERS, AQUA], "AddSub")
    assert str(read_test(tmp_path, "AddSub")) == "AddSub: 2 test rows"


@pytest.fixture
def overlapping(written, tmp_path):
    """Four training rows, of which three are asked in two test sets, spelled in another way."""
    written([{**ADAPTERS, "instruction": q} for q in ("He didn't eat 1.5 of 3.", "He ate 1,500 of 3?", "New?")], "a")
    written([AQUA, AQUA, {**AQUA, "instruction": AQUA["instruction"].replace("How old", "How tall")}], "b")
    written([ADAPTERS], "c")
    other_options = {**AQUA, "instruction": "How OLD?\nAnswer choices: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5"}
    training = written([MAWPS, other_options, {**GSM8K, "question": "He ate 1500 of 3 ?"}, GSM8K])
    return read(training, tmp_path, ["a", "b", "c"])


def test_questions_that_are_trained_on_are_counted_and_told(overlapping):
    problems = overlapping.prepared(False, None, None)
    assert [test.seen for test in problems.tests] == [2, 2, 0] and len(problems.training) == 4
    remarks = {"a": " (2 of 3 trained on)", "b": " (2 of 3 trained on)", "mean": " (with questions trained on)"}
    assert problems.remarks() == remarks
    assert "WARNING: a (2 of 3 trained on): its accuracy says nothing" in str(problems)
    assert "WARNING: --drop_seen True leaves those rows out" in str(problems)


def test_only_rows_that_are_used_count(overlapping):
    assert [test.seen for test in overlapping.prepared(False, 1, None).tests] == [1, 0, 0]
    assert [test.seen for test in overlapping.prepared(False, None, 1).tests] == [1, 1, 0]


def test_training_rows_that_are_tested_can_be_dropped(overlapping):
    problems = overlapping.prepared(True, None, None)
    assert [row["question"] for row in problems.training] == [GSM8K["question"]]
    assert [test.seen for test in problems.tests] == [0, 0, 0] and problems.remarks() == {}
    assert overlapping.prepared(True, None, 1).training == problems.training
    assert "3 rows left out, as their question is in a test set" in str(problems) and "WARNING" not in str(problems)
    with pytest.raises(UserError, match="drop_seen leaves none of the 3 training rows"):
        Problems(overlapping.training[:3], overlapping.tests).prepared(True, None, None)


def test_demo_sets_are_held_out():
    problems = demo(300, list(DEMO_SETS), 20).prepared(False, None, None)
    assert [(len(test.rows), test.seen) for test in problems.tests] == [(20, 0)] * 3
    assert all(row["answer"].isdecimal() for test in problems.tests for row in test.rows)
    assert len(problems.training) == 300 and "The final answer is: " in problems.training[0]["response"]


MISTAKES = [
    ([{**AQUA, "answer": ""}], ': item 1: the answer "" is not one of its options A, B, C, D, E'),
    ([AQUA, {**AQUA, "answer": "F"}], ': item 2: the answer "F" is not one of its options'),
    ([{k: v for k, v in AQUA.items() if k != "answer"}], ': item 1: the key "answer" is missing, found the keys'),
    ([{**ADAPTERS, "answer": "B"}], ': item 1: the answer "B" has no number, and the question no options'),
    ([{**ADAPTERS, "answer": None}], ': item 1: the value of "answer" is neither a number nor a text but null'),
    ([{**MAWPS, "ans": True}], ': item 1: the value of "ans" is neither a number nor a text but true'),
    ([{**MAWPS, "ans": float("nan")}], ': item 1: the value of "ans" is nan: write a number'),
    ([{**ADAPTERS, "instruction": " "}], ": item 1: the question is empty"),
    ([{**ADAPTERS, "instruction": 3}], ': item 1: the value of "instruction" is not a text but 3'),
    ([{"text": "a"}], ": item 1: a row needs the key instruction, or question, or original_text, found the keys text"),
    ([{}, {}, ADAPTERS], "found no keys (2 rows of 3 have mistakes)"),
    ([], " is empty"),
    ("", " is empty"),
    ('[{"instruction": "a"},]', ": not a JSON list"),
]


@pytest.mark.parametrize("rows, named", MISTAKES)
def test_mistakes_in_a_test_set_are_named(written, tmp_path, rows, named):
    file = written(rows, "AQuA")
    with pytest.raises(UserError) as caught:
        read_test(tmp_path, "AQuA")
    assert str(caught.value).startswith(str(file)) and named in str(caught.value)


@pytest.mark.parametrize(
    "rows, named",
    [
        ([{"instruction": "a", "answer": "1"}], ': item 1: the key "output" is missing'),
        ([{**ADAPTERS, "output": 7}], ': item 1: the value of "output" is not a text but 7'),
        ([{k: v for k, v in MAWPS.items() if k != "ans"}], ': item 1: the value of "ans" is neither'),
        ([{"prompt": "a", "response": "b"}], ": item 1: a row needs the key instruction, or question, or "),
    ],
)
def test_mistakes_in_a_training_file_are_named(written, rows, named):
    file = written(rows)
    with pytest.raises(UserError) as caught:
        read_training(file)
    assert str(caught.value).startswith(str(file)) and named in str(caught.value)


def test_files_and_sets_that_are_not_there_are_named(written, tmp_path):
    with pytest.raises(UserError, match="nothing.json does not exist"):
        read_training(tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"has no NAME/test.json of a test set: .*download_datasets.sh"):
        read_test(tmp_path, "SVAMP")
    written([ADAPTERS], "SVAMP"), written([AQUA], "AQuA")
    with pytest.raises(UserError, match=r"unknown test set svamp: .* has AQuA, SVAMP"):
        read_test(tmp_path, "svamp")
    with pytest.raises(UserError, match="unknown test set SVAMP: the demo has two_steps, three_steps, division"):
        demo_test("SVAMP", 5)
