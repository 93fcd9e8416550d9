"""Long texts: data sets on disk, token files and folders of documents become one stream of ids."""

import gzip
import json
import sys

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from hyclora.utils.data.long_text import read_long_text
from hyclora.utils.errors import UserError

TEXTS = ["one little river", "two rivers", "the sea"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder):
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def stream(tokenizer):
    """What texts are as a stream: each with bos and eos."""
    return lambda *texts: [i for text in texts for i in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "deep/b.tex").write_text(TEXTS[1])
    (tmp_path / "z.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "notes").write_text("no document")
    return tmp_path


def test_documents_follow_each_other_in_the_order_of_their_paths(folder, tokenizer, stream):
    assert read_long_text(folder, tokenizer).ids.tolist() == stream(*TEXTS[:2], *TEXTS)
    assert read_long_text(folder / "deep/b.tex", tokenizer).ids.tolist() == stream(TEXTS[1])


@pytest.mark.parametrize("without, left", [("a.txt", TEXTS[1:2] + TEXTS), ("deep", TEXTS[:1] + TEXTS)])
def test_files_and_folders_are_held_out(folder, tokenizer, stream, without, left):
    assert read_long_text(folder, tokenizer, [folder / without]).ids.tolist() == stream(*left)


@pytest.mark.parametrize("text", [json.dumps([{"text": text} for text in TEXTS]), '{"text": "A list"}'])
def test_a_json_file_is_documents_too_if_it_is_named(tmp_path, tokenizer, stream, text):
    """And no text with brackets in it; in a folder such a file describes others."""
    (tmp_path / "a.json").write_text(text)
    documents = TEXTS if text.startswith("[") else ["A list"]
    assert read_long_text(tmp_path / "a.json", tokenizer).ids.tolist() == stream(*documents)
    with pytest.raises(UserError, match="has no text"):
        read_long_text(tmp_path, tokenizer)


def test_no_more_is_read_than_is_wanted(folder, tokenizer, stream):
    (folder / "deep/b.tex").write_bytes(b"\xff")
    assert read_long_text(folder, tokenizer, enough=4).ids.tolist() == stream(TEXTS[0])[:4]


def test_a_data_set_on_disk_is_read_by_its_ids_or_its_text(tmp_path, tokenizer, stream):
    Dataset.from_dict({"text": TEXTS, "meta": [1, 2, 3]}).save_to_disk(tmp_path / "text")
    assert read_long_text(tmp_path / "text", tokenizer).ids.tolist() == stream(*TEXTS)
    rows = [[5, 6, 7], [499, 0], [8]] * 200
    Dataset.from_dict({"input_ids": rows, "text": ["unread"] * 600}).save_to_disk(tmp_path / "ids")
    assert read_long_text(tmp_path / "ids", tokenizer).ids.tolist() == [i for row in rows for i in row]
    Dataset.from_dict({"input_ids": rows}).select([2, 0]).save_to_disk(tmp_path / "chosen")
    assert read_long_text(tmp_path / "chosen", tokenizer).ids.tolist() == [8, 5, 6, 7]


def test_token_files_stay_on_disk_until_they_are_read(tmp_path, tokenizer):
    np.arange(300, dtype="<u2").tofile(tmp_path / "test.bin")
    ids = read_long_text(tmp_path / "test.bin", tokenizer).ids
    assert isinstance(ids, np.memmap) and ids.tolist() == list(range(300))
    np.arange(9, dtype="<u2").tofile(tmp_path / "more.bin")
    assert read_long_text(tmp_path, tokenizer).ids.tolist() == [*range(9), *range(300)]


def odd(folder):
    (folder / "test.bin").write_bytes(b"\x01\x00\x02")


def beyond(folder):
    np.array([1, 500], dtype="<u2").tofile(folder / "test.bin")


def negative(folder):
    Dataset.from_dict({"input_ids": [[1, 2], [3, -1]]}).save_to_disk(folder)


def no_column(folder):
    Dataset.from_dict({"content": TEXTS}).save_to_disk(folder)


def torn(folder):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    next(folder.glob("*.arrow")).write_bytes(b"torn")


def without_state(folder):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    (folder / "state.json").unlink()
    (folder / "dataset_info.json").unlink()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: None, r"has no text: put files there that end in \.txt, \.tex, \.md, \.jsonl, \.bin"),
        (lambda folder: (folder / "a.txt").write_text(" \n"), "a.txt has no text in it"),
        (
            lambda folder: (folder / "a.jsonl").write_text('{"text": 3}'),
            r'a.jsonl:1: the value of "text" is not a text',
        ),
        (
            lambda folder: (folder / "a.jsonl").write_text('{"body": ""}'),
            r'a.jsonl:1: the key "text" is missing, found',
        ),
        (odd, "test.bin has 3 bytes, an odd number"),
        (beyond, "test.bin: token 1 has the id 500, the tokenizer only 500 tokens"),
        (negative, "rows from 0: token 3 has the id -1, the tokenizer only 500 tokens"),
        (no_column, "has no column input_ids or text, only content: rename the one with the text"),
        (torn, "cannot be read as a data set"),
        (without_state, "has .arrow files but no state.json: write the data set with its save_to_disk"),
        (
            lambda folder: DatasetDict(train=Dataset.from_dict({"text": TEXTS})).save_to_disk(folder),
            "has several splits of a data set: name the one to read: .*train",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, tokenizer, make, said):
    make(tmp_path)
    with pytest.raises(UserError, match=said):
        read_long_text(tmp_path, tokenizer)


def test_a_folder_of_held_out_files_alone_is_told(folder, tokenizer):
    with pytest.raises(UserError, match="has no text but what is evaluated on"):
        read_long_text(folder, tokenizer, [folder])


@pytest.mark.parametrize(
    "column, rows, said",
    [
        ("input_ids", [[1, 2], [3, None]], "input_ids holds float64, not whole numbers"),
        ("input_ids", [[1.5, 2.0]], "input_ids holds float64, not whole numbers"),
        ("input_ids", [["a", "b"]], "input_ids holds object, not whole numbers"),
        ("text", [1, 2], "the column text holds something else"),
        ("text", [["a"], ["b"]], "the column text holds something else"),
    ],
)
def test_columns_of_other_kinds_are_refused(tmp_path, tokenizer, column, rows, said):
    Dataset.from_dict({column: rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=f"saved, rows from 0: .*{said}"):
        read_long_text(tmp_path / "saved", tokenizer)


def test_rows_without_ids_are_left_out(tmp_path, tokenizer):
    Dataset.from_dict({"input_ids": [[3, 4], [], None, [5]]}).save_to_disk(tmp_path / "rows")
    assert read_long_text(tmp_path / "rows", tokenizer).ids.tolist() == [3, 4, 5]


def test_packed_rows_of_documents_are_read(tmp_path, tokenizer, stream):
    """And not their brackets."""
    text = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for path in (tmp_path, tmp_path / "a.jsonl.gz"):
        assert read_long_text(path, tokenizer).ids.tolist() == stream(*TEXTS)


def test_without_datasets_only_its_folders_cannot_be_read(folder, tmp_path, tokenizer, monkeypatch):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read_long_text(folder / "a.txt", tokenizer).ids)
    with pytest.raises(UserError, match="saved needs the package datasets: pip install datasets"):
        read_long_text(tmp_path / "saved", tokenizer)
