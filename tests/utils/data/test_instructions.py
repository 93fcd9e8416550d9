"""Own instruction data: one meaning gives the same tokens in every format, and a mistake is named by file and row."""

import json
import random

import pytest
from transformers import AutoTokenizer

from hyclora.utils.args import DataArguments
from hyclora.utils.data.gsm8k import examples_of, prompt_of, target_of
from hyclora.utils.data.instructions import load_examples
from hyclora.utils.data.tokens import IGNORED, Example, tokenize_rows
from hyclora.utils.errors import UserError

GOOD = {"prompt": "One and one?\n", "response": "two"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "five"},
    {"role": "user", "content": "Thanks."},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THOUGHT = "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}"


@pytest.fixture
def tokenizer(tiny_llama_folder):
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def load(tmp_path):
    """The examples of a file, given its rows or its content."""

    def load(content, name="rows.jsonl"):
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_examples(DataArguments(data_name="json", data_dir=str(tmp_path / name)), "train")

    return load


def learned_texts(row: dict, tokenizer) -> list[str]:
    """The stretches of a row that are learned, decoded."""
    stretches, previous = [], IGNORED
    for label in row["labels"]:
        if label != IGNORED:
            stretches += [[]] if previous == IGNORED else []
            stretches[-1].append(label)
        previous = label
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    "row, exchange",
    [
        (GOOD, ("One and one?\n", "two")),
        ({"prompt": "One and one?\n", "completion": "two", "id": 1}, ("One and one?\n", "two")),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, ("Task:\nAdd.\n\nInput:\n1 1\n\nAnswer:\n", "2")),
        ({"instruction": "Add.", "input": "", "output": "2"}, ("Task:\nAdd.\n\nAnswer:\n", "2")),
        ({"instruction": "Add.", "input": None, "output": "2"}, ("Task:\nAdd.\n\nAnswer:\n", "2")),
        ({"instruction": "Add.", "output": "2"}, ("Task:\nAdd.\n\nAnswer:\n", "2")),
        ({"question": "1 + 1?", "answer": "2\n#### 2"}, (prompt_of("1 + 1?"), target_of("2\n#### 2"))),
        ({"messages": CHAT[1:3]}, ("User:\nOne and one?\n\nAssistant:\n", "two")),
        (
            {"messages": [{**CHAT[1], "tool_calls": None}, {**CHAT[2], "weight": 1, "name": "A"}], "tools": []},
            ("User:\nOne and one?\n\nAssistant:\n", "two"),
        ),
    ],
)
def test_a_format_is_a_way_to_write_prompt_and_response(row, exchange, load, tokenizer):
    assert [example.exchanges for example in load([row])] == [[exchange]]
    as_prompt = load([dict(zip(("prompt", "response"), exchange, strict=True))])
    assert tokenize_rows(load([row]), tokenizer, 512).rows == tokenize_rows(as_prompt, tokenizer, 512).rows


def test_gsm8k_rows_are_the_same_by_either_name(load, tokenizer):
    rows = [{"question": "1 + 1?", "answer": "2\n#### 2"}]
    assert tokenize_rows(load(rows), tokenizer, 99) == tokenize_rows(examples_of(rows), tokenizer, 99)


def test_a_list_lines_and_a_folder_hold_the_same(load, tmp_path):
    rows = [GOOD, {**GOOD, "response": "zwei \u2028 deux\x85"}]
    expected = load(rows)
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert load(b"\xef\xbb\xbf" + f"{lines}\r\n\r\n".encode(), "train.jsonl") == expected
    folder = DataArguments(data_name="json", data_dir=str(tmp_path), max_train_samples=1, max_eval_samples=0)
    assert load_examples(folder, "train") == expected[:1] and load_examples(folder, "test") == []
    assert load(json.dumps(rows, indent=1), "test.json") == expected
    assert load_examples(DataArguments(data_name="json", data_dir=str(tmp_path)), "test") == expected


def test_a_chat_is_learned_in_its_assistant_turns(load, tokenizer):
    (row,) = tokenize_rows(load([{"messages": CHAT}]), tokenizer, 512).rows
    assert learned_texts(row, tokenizer) == ["two</s>", "five</s>"]
    assert tokenizer.decode(row["input_ids"]) == (
        "<s>System:\nBe brief.\n\nUser:\nOne and one?\n\nAssistant:\ntwo</s>User:\nAnd three?\n\nAssistant:\nfive</s>"
    )


def test_a_chat_is_written_by_the_chat_template(load, tokenizer):
    tokenizer.chat_template = TEMPLATE
    (row,) = tokenize_rows(load([{"messages": CHAT}]), tokenizer, 512).rows
    text = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False)
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False).input_ids
    assert learned_texts(row, tokenizer) == ["two</s>\n", "five</s>\n"]


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_a_row(load, tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", THOUGHT)
    rows = tokenize_rows(load([{"messages": CHAT}]), tokenizer, 512).rows
    learned = [["<think></think>two</s>\n"], ["<think></think>five</s>\n"]]
    assert [learned_texts(row, tokenizer) for row in rows] == learned
    assert tokenizer.decode(rows[1]["input_ids"]).count("<think>") == 1


@pytest.mark.parametrize(
    "template, named",
    [
        (TEMPLATE.replace("<assistant>", "<assistant><think>"), "writes message 3 in another way than it asks for it"),
        ("{{ raise_exception('roles must alternate') }}", "does not take these messages (roles must alternate)"),
    ],
)
def test_a_template_that_cannot_be_followed_is_named(template, named, load, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        tokenize_rows(load([{"messages": CHAT}]), tokenizer, 512)
    assert "rows.jsonl:1: the tokenizer's chat template " in str(caught.value) and named in str(caught.value)


def test_labels_are_the_response_whatever_its_characters(tokenizer):
    rng = random.Random(0)
    planes = [(1, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0x1F300, 0x1FAFF), (0x20, 0x7E)]

    def text():
        return "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 30)))

    for _ in range(300):
        # letters on either side of a line end are never merged into one token with it
        turns = [(text() + "\n", "a" + text()) for _ in range(rng.randint(1, 3))]
        (row,) = tokenize_rows([Example(turns)], tokenizer, 4096).rows
        assert learned_texts(row, tokenizer) == [response + "</s>" for _, response in turns]
        assert tokenizer.decode(row["input_ids"]) == "<s>" + "".join(p + r + "</s>" for p, r in turns)


def test_responses_that_seq_len_cuts_away_are_counted(load, tokenizer):
    long = {**GOOD, "prompt": "One and one? " * 20}
    tokenized = tokenize_rows(load([GOOD, long]), tokenizer, 40, kind="test")
    assert (len(tokenized.rows), tokenized.dropped) == (1, 1) and "1 test rows, " in str(tokenized)
    with pytest.raises(UserError, match="no training row has room"):
        tokenize_rows(load([long]), tokenizer, 40)


def messages(*turns):
    return [{"messages": list(turns)}]


ASKED, SAID = CHAT[1:3]
MISTAKES = {
    "": "rows.jsonl is empty",
    "[]": "rows.jsonl is empty",
    '{"prompt": "a"\n"response": "b"}': "rows.jsonl:1: not a JSON object",
    '[{"prompt": "a"},]': "rows.jsonl: not a JSON list",
    "7": "rows.jsonl:1: not a JSON object",
    '\n[{"prompt": "a", "response": "b"}, "c"]': "rows.jsonl: item 2: not a JSON object",
    b'{"prompt": "a", "response": "b"}\n{"prompt": "\xe4"}': "rows.jsonl:2: not UTF-8",
    '{"prompt": "a", "response": "\\ud800"}': 'rows.jsonl:1: the value of "response" holds half a character',
}
BAD_ROWS = [
    ([GOOD, {"prompt": "a", "answer": "b"}], ':2: the key "response" is missing, found the keys prompt, answer'),
    ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], ':2: the key "completion" is missing'),
    ([{"text": "a"}], ":1: a row needs the keys prompt and response, or prompt and completion, or instruction and"),
    ([{}], "found no keys"),
    ([{**GOOD, "response": 3}], ':1: the value of "response" is not a text but 3'),
    ([{**GOOD, "prompt": None}], ':1: the value of "prompt" is not a text but null'),
    ([{"instruction": "a", "input": 3, "output": "b"}], ':1: the value of "input" is not a text but'),
    ([{**GOOD, "response": " \n"}], ':1: the response under "response" is empty'),
    (
        [GOOD, {"instruction": "a", "output": "b"}],
        ":2: a row of instruction and output in a file of prompt and response",
    ),
    ([{**GOOD, "messages": []}], ":1: a row of prompt and response and of messages: remove"),
    ([{"messages": "hello"}], ':1: the value of "messages" is not a list'),
    (messages(), ":1: no message has the role assistant"),
    (messages(ASKED), ":1: no message has the role assistant"),
    (messages(ASKED, "two"), ":1: message 2 is not an object"),
    (messages(ASKED, {"role": "assistant"}), ':1: message 2: the key "content" is missing, found the keys role'),
    (messages(ASKED, {**SAID, "content": ""}), ':1: message 2: the response under "content" is empty'),
    (
        messages({**ASKED, "role": "human"}, SAID),
        ':1: message 1: the role "human" is unknown, known are system, user, ',
    ),
    (messages(ASKED, {**SAID, "tool_calls": [{"id": "1"}]}), ':1: message 2: "tool_calls" would not be trained on'),
    (messages(ASKED, {**SAID, "weight": 0}), ':1: message 2: "weight" would not be'),
    ([{"messages": [ASKED, SAID], "tools": [{"name": "add"}]}], ':1: "tools" would not be'),
    ([{"instruction": "a", "output": "b", "history": [["c", "d"]]}], ':1: "history" would not be'),
    ([{**GOOD, "system": "Be brief."}], ':1: "system" would not be'),
]


@pytest.mark.parametrize("content, named", [*MISTAKES.items(), *BAD_ROWS])
def test_mistakes_are_named_by_file_and_row(content, named, load):
    with pytest.raises(UserError) as caught:
        load(content)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_said_how_many_rows_have_mistakes(load):
    with pytest.raises(UserError, match=r"rows.jsonl:2: .* \(3 rows of 5 have mistakes\)"):
        load([GOOD, {**GOOD, "response": ""}, GOOD, {"prompt": "a"}, {**GOOD, "prompt": 1}])


def test_folders_without_one_training_file_are_refused(load, tmp_path):
    def refused():
        with pytest.raises(UserError) as caught:
            load_examples(DataArguments(data_name="json", data_dir=str(tmp_path)), "train")
        return str(caught.value)

    assert f"{tmp_path} has no train.jsonl" in refused()
    load([GOOD], "train.jsonl"), load([GOOD], "train.json")
    assert "train.jsonl and train.json are both there" in refused()
