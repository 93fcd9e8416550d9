"""Alpaca's rows: its prompt format, what is learned, which rows are held out, and what is refused."""

import json

import pytest
from transformers import AutoTokenizer

from hyclora.utils.data import alpaca
from hyclora.utils.data.alpaca import demo_rows, load_examples, prompt_of
from hyclora.utils.data.tokens import IGNORED, tokenize_rows
from hyclora.utils.errors import UserError
from run_alpaca import AlpacaArguments

ROWS = [{"instruction": f"Say {n}.", "input": "aloud" * (n % 2), "output": f"It is {n}."} for n in range(30)]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.json") -> AlpacaArguments:
        file = tmp_path / name
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows, indent=1), encoding="utf-8")
        return AlpacaArguments(data_name="alpaca", data_dir=str(file))

    return write


def test_prompts_are_alpacas():
    assert prompt_of("Say 1.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 1.\n\n### Response:"
    )
    assert prompt_of("Add {it}.", "2 and {x}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {it}.\n\n"
        "### Input:\n2 and {x}\n\n### Response:"
    )


def test_only_the_response_is_learned(write, tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    examples = load_examples(write(ROWS)).train
    for row, example in zip(tokenize_rows(examples, tokenizer, 512).rows, ROWS, strict=False):
        learned = [token for token in row["labels"] if token != IGNORED]
        assert tokenizer.decode(learned) == example["output"] + tokenizer.eos_token
        assert row["input_ids"][-len(learned) :] == learned


def test_the_first_rows_are_trained_on_and_the_last_held_out(write):
    args = write(ROWS)
    train, test, _ = load_examples(args)
    assert (len(train), len(test)) == (27, 3)
    args.max_train_samples, args.max_eval_samples = 5, 10
    train, test, _ = load_examples(args)
    assert [e.exchanges[0][1] for e in train] == [row["output"] for row in ROWS[:5]]
    assert [e.exchanges[0][1] for e in test] == [row["output"] for row in ROWS[20:]]
    args.max_eval_samples = 0
    assert load_examples(args).held_out == []


def test_rows_of_the_hub_without_a_response_are_left_out_and_counted(monkeypatch):
    """Alpaca has some, which its user cannot correct."""
    rows = [row | {"output": ""} if i in (0, 29) else row for i, row in enumerate(ROWS)]
    monkeypatch.setattr(alpaca, "download", lambda *_: rows)
    found = load_examples(AlpacaArguments(data_name="alpaca", max_train_samples=2, max_eval_samples=1))
    assert [e.exchanges[0][1] for e in found.train + found.held_out] == ["It is 1.", "It is 2.", "It is 28."]
    assert found.unanswered == 2 and load_examples(AlpacaArguments()).unanswered == 0


def test_a_question_may_be_in_the_input_alone(write):
    assert load_examples(write([row | {"instruction": "", "input": "2 + 2"} for row in ROWS])).unanswered == 0


def test_input_may_be_missing_and_rows_may_be_lines(write):
    lines = "\n".join(json.dumps({"instruction": row["instruction"], "output": row["output"]}) for row in ROWS)
    assert "### Input" not in load_examples(write(lines, "rows.jsonl")).train[0].exchanges[0][0]


def test_demo_rows_have_both_formats():
    rows = demo_rows(10, 0)
    assert [bool(row["input"]) for row in rows] == [False, True] * 5
    assert all("####" in row["output"] for row in rows) and rows == demo_rows(10, 0)


@pytest.mark.parametrize(
    "rows, named",
    [
        ({"data": ROWS}, "rows.json is one JSON object: it needs a JSON list of objects, or one object a line"),
        (json.dumps({"data": ROWS}), 'rows.json:1: the key "instruction" is missing, found the keys data'),
        (
            [ROWS[0], {"input": "", "output": "1"}],
            'item 2: the key "instruction" is missing, found the keys input',
        ),
        ([{"instruction": "Say 1."}], 'item 1: the key "output" is missing, found the keys instruction'),
        ([ROWS[0], ROWS[1] | {"output": " \n"}], 'item 2: the response under "output" is empty: write or remove it'),
        (
            [ROWS[0] | {"instruction": " "}],
            'item 1: neither "instruction" nor "input" asks anything: write or remove it',
        ),
        ([ROWS[0] | {"input": 3}], 'item 1: the value of "input" is not a text but 3'),
        ([ROWS[0] | {"output": ["a"]}], 'item 1: the value of "output" is not a text'),
        ([ROWS[0], ROWS[1] | {"system": "Be brief."}], 'item 2: "system" would not be trained on: write it into'),
        ([], "rows.json is empty"),
        ("[1, 2", "rows.json: not a JSON list"),
    ],
)
def test_a_mistake_is_named_by_file_and_row(write, rows, named):
    with pytest.raises(UserError) as error:
        load_examples(write(rows))
    assert named in str(error.value)


def test_something_is_left_to_train_on(write, tmp_path):
    args = write(ROWS)
    args.max_eval_samples = 30
    with pytest.raises(UserError, match="max_eval_samples 30 would hold out all of the 30 rows"):
        load_examples(args)
    with pytest.raises(UserError, match="is no file: name its file"):
        load_examples(AlpacaArguments(data_name="alpaca", data_dir=str(tmp_path)))
