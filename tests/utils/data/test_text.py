"""Plain text: how it is read, and the blocks and windows that it is cut into."""

import gzip
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyclora.utils.args import EvalArguments
from hyclora.utils.data.text import (
    TokenizedText,
    Windows,
    blocks,
    demo_text,
    download,
    find_file,
    join_rows,
    read_text,
    read_token_file,
    tokenize,
)
from hyclora.utils.data.tokens import IGNORED
from hyclora.utils.errors import UserError
from hyclora.utils.metrics import evaluate_loss


def text_of(n):
    return TokenizedText("text", np.arange(100, 100 + n), 1.5)


def test_rows_of_wikitext_are_joined_by_two_line_ends():
    """A row keeps its own, and a blank one is empty: " \\n = A = \\n \\n b \\n" has four."""
    assert join_rows([" ", " = A = ", " ", " b "]) == "\n\n = A = \n\n\n\n\n b \n"


def test_rows_from_the_hub_are_those_of_the_file(monkeypatch):
    rows = ["", " = A = \n", "", " b \n"]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, split: {"text": rows}))
    assert join_rows(download("test")) == join_rows(" \n = A = \n \n b \n".removesuffix("\n").split("\n"))


def test_blocks_are_whole_and_all_learned():
    rows = blocks(text_of(11), 4)
    assert [row["input_ids"] for row in rows] == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert [row["input_ids"][0] for row in rows[1:]] == [104] and rows[-1] == rows[1]
    with pytest.raises(UserError, match="text has 3 tokens, too few for a block of 4"):
        blocks(text_of(3), 4)


@pytest.mark.parametrize("n, size, stride", [(11, 4, 2), (12, 4, 4), (13, 5, 3), (9, 8, 1), (3, 8, 4), (8, 8, 4)])
def test_windows_predict_every_token_but_the_first_once(n, size, stride):
    rows, predicted = Windows(text_of(n).ids, size, stride), []
    for number, row in enumerate(rows):
        assert len(row["labels"]) == len(row["input_ids"]) <= size
        learned = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        assert all(row["labels"][i] == row["input_ids"][i] for i in learned)
        assert not number or stride == size or min(learned) >= size - stride
        predicted += [row["labels"][i] for i in learned if i or (stride < size)]
    if stride < size:
        assert predicted == text_of(n).ids.tolist()
    else:
        assert len(predicted) == n - len(rows)


def test_the_loss_over_windows_is_that_of_each_token_after_its_window(tiny_llama_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    ids = torch.randint(2, 500, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    size, stride, expected = 16, 6, []
    for position in range(1, len(ids)):
        start = max(0, math.ceil((position + 1 - size) / stride)) * stride
        context = torch.tensor([ids[start:position]])
        expected.append(-model(context).logits[0, -1].log_softmax(-1)[ids[position]].item())
    rows = Windows(np.array(ids), size, stride)
    found = evaluate_loss(model, rows, 1, EvalArguments(eval_batch_size=4))
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_bos_is_no_token_of_a_word(tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    text = tokenize("text", "three little words", tokenizer)
    assert text.ids[0] == tokenizer.bos_token_id and text.tokens_per_word == (len(text.ids) - 1) / 3
    assert text.first(2).ids.tolist() == text.ids[:2].tolist() and len(text.first(None).ids) == len(text.ids)


@pytest.mark.parametrize(
    "names, found",
    [
        (["wiki.test.raw", "test.txt"], "wiki.test.raw"),
        (["test.txt.gz", "wiki.test.tokens"], "test.txt.gz"),
        (["train.txt"], None),
    ],
)
def test_raw_text_comes_first(tmp_path, names, found):
    for name in names:
        (tmp_path / name).touch()
    assert find_file(tmp_path, "test") == (found and tmp_path / found)


def test_packed_text_and_line_ends_are_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffone\r\ntwo\n".encode()))
    assert read_text(tmp_path / "a.txt.gz") == "one\ntwo\n"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b" \n\t\n", "a.txt has no text in it"),
        ("a.txt", b"caf\xe9", "a.txt:1: not UTF-8"),
        ("a.txt.gz", b"plain", "a.txt.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"a text" * 50)[:-12], "a.txt.gz cannot be read"),
    ],
    ids=["blank", "Latin-1", "not packed", "cut"],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_text(tmp_path / name)


def test_token_files_are_read_to_their_last_token(tmp_path):
    np.array([5, 499, 0], dtype="<u2").tofile(tmp_path / "train.bin")
    text = read_token_file(find_file(tmp_path, "train"), 500)
    assert text.ids.tolist() == [5, 499, 0] and text.tokens_per_word is None and str(text) == "train.bin: 3 tokens"


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "train.bin has no tokens in it"),
        (b"\x01\x00\x02", "train.bin has 3 bytes, an odd number"),
        (np.array([1, 2, 500], dtype="<u2").tobytes(), "train.bin: token 2 has the id 500, the tokenizer only 500"),
    ],
    ids=["empty", "odd", "beyond"],
)
def test_token_files_that_cannot_be_right_are_refused(tmp_path, content, said):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_token_file(tmp_path / "train.bin", 500)


def test_the_demo_is_evaluated_on_other_text():
    train, test = (set(demo_text(split).split("\n\n")) for split in ("train", "test"))
    assert len(train) > len(test) > 50 and not train & test
