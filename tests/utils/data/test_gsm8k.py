"""GSM8K rows: from files to token ids, labels and batches."""

import json

import pytest
from transformers import AutoTokenizer

from hyclora.utils.args import DataArguments
from hyclora.utils.data.gsm8k import INSTRUCTION, examples_of, load_rows, prompt_of, target_of
from hyclora.utils.data.tokens import IGNORED, Collator, tokenize_rows
from hyclora.utils.errors import UserError

ROW = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3+4 = <<3+4=7>>7 pens.\n#### 7"}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_prompt_and_target_are_the_papers():
    assert prompt_of(ROW["question"]) == ROW["question"] + INSTRUCTION
    assert target_of(ROW["answer"]).endswith("7 pens.\nThe final answer is: 7")


def test_loss_is_on_the_answer_only(tokenizer):
    (row,) = tokenize_rows(examples_of([ROW]), tokenizer, seq_len=512).rows
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == target_of(ROW["answer"]) + tokenizer.eos_token
    assert row["input_ids"][: -len(learned)] == tokenizer(prompt_of(ROW["question"])).input_ids
    assert row["labels"][-len(learned) :] == learned


def test_long_answers_are_cut_and_long_questions_dropped(tokenizer):
    prompt = len(tokenizer(prompt_of(ROW["question"])).input_ids)
    long_question = {**ROW, "question": ROW["question"] * 9}
    tokenized = tokenize_rows(examples_of([ROW, long_question]), tokenizer, seq_len=prompt + 5)
    assert (tokenized.cut, tokenized.dropped) == (1, 1)
    assert len(tokenized.rows) == 1 and len(tokenized.rows[0]["input_ids"]) == prompt + 5
    assert "1 cut" in str(tokenized) and "1 dropped" in str(tokenized)
    with pytest.raises(UserError, match="seq_len"):
        tokenize_rows(examples_of([ROW]), tokenizer, seq_len=prompt)


def test_a_token_merged_over_the_boundary_is_learned():
    class Merging:
        eos_token_id = 9

        def __call__(self, text, **_):
            ids = [1, 2, 3] if text.endswith(INSTRUCTION) else [1, 2, 34, 5]
            return type("Encoding", (), {"input_ids": ids})

    (row,) = tokenize_rows(examples_of([ROW]), Merging(), seq_len=16).rows
    assert row == {"input_ids": [1, 2, 34, 5, 9], "labels": [IGNORED, IGNORED, 34, 5, 9]}


def test_collator_pads_right_to_a_multiple_of_8():
    rows = [{"input_ids": [5] * 9, "labels": [IGNORED] + [5] * 8}, {"input_ids": [7] * 3, "labels": [7] * 3}]
    batch = Collator(pad_token_id=0)(rows)
    assert all(tensor.shape == (2, 16) for tensor in batch.values())
    assert batch["input_ids"][1].tolist() == [7] * 3 + [0] * 13
    assert batch["attention_mask"].sum(1).tolist() == [9, 3]
    assert batch["labels"][1].tolist() == [7] * 3 + [IGNORED] * 13


def test_rows_from_a_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({**ROW, "extra": i}) for i in range(5)) + "\n\n")
    arguments = DataArguments(data_name="gsm8k", data_dir=str(tmp_path), max_train_samples=3)
    assert load_rows(arguments, "train") == [ROW] * 3
    with pytest.raises(UserError, match="test.jsonl does not exist"):
        load_rows(arguments, "test")


@pytest.mark.parametrize("limit", ["max_train_samples", "max_eval_samples"])
def test_more_demo_rows_than_there_are_are_refused(limit):
    """They were looked for without end."""
    args = DataArguments(**{limit: 10**9})
    with pytest.raises(UserError, match="at most 100000 generated problems, and 1000000000 are asked for: lower max"):
        load_rows(args, "train" if limit == "max_train_samples" else "test")


def test_demo_rows_need_no_files_and_hold_the_test_split_out():
    train, test = (load_rows(DataArguments(max_train_samples=50, max_eval_samples=20), s) for s in ("train", "test"))
    assert (len(train), len(test)) == (50, 20)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
