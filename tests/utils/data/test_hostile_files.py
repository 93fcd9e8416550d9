"""Data files that are torn, of other kinds or nearly right: a reader gives their rows, or says which file and why."""

import gzip
import json
import os
import random
import time
from functools import partial

import pytest
from transformers import AutoTokenizer

from ckpt.make_tiny_llama import read_documents
from hyclora.fidelity import FidelityArguments
from hyclora.utils.args import DataArguments
from hyclora.utils.data import alpaca, arithmetic, glue, gsm8k, instructions
from hyclora.utils.data.long_text import read_long_text
from hyclora.utils.errors import UserError
from hyclora.utils.fidelity import read as read_for_fidelity
from run_wikitext2 import TextArguments, read_split
from tests.helpers.fuzzing import JSON_VALUES, READ, spoil

SECONDS, SEED = float(os.environ.get("FUZZ_SECONDS", 3)), os.environ.get("FUZZ_SEED", "0")
TEXT = READ["run_wikitext2"][0][1]["train.txt"]
PAIRS, CHATS, PROBLEMS = (next(iter(files.values())) for _, files in READ["run_gsm8k"])
ASKED = READ["run_alpaca"][0][1]["rows.json"]
TSV = {options.split()[1]: files for options, files in READ["run_glue"]}
MAWPS = json.dumps([{"original_text": f"{n} + 1?", "equation": f"x={n}+1", "ans": n + 1} for n in range(4)])
DOCUMENTS = "\n".join(json.dumps({"text": f"The {n}th text."}) for n in range(4))


def _data(path, name="json"):
    return DataArguments(data_name=name, data_dir=str(path))


def _tests(file, tokenizer):
    folder = file.parent / "sets"
    (folder / "some").mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.replace(folder / "some" / "test.json")
    return arithmetic.read_test(folder, "some").rows


def _glue(name, file, tokenizer):
    return glue.read_tsv(file, glue.GLUE[name])


def _wikitext(file, tokenizer):
    return read_split(TextArguments("text", str(file)), "train", tokenizer).ids.tolist()


def _fidelity(file, tokenizer):
    rows = read_for_fidelity(FidelityArguments("model", str(file), seq_len=32), tokenizer, 4)
    return [row["input_ids"] for row in rows]


def _long_text(file, tokenizer):
    return read_long_text(file, tokenizer).ids.tolist()


# of each: a file's name, what is in it, and what reads it
READERS = {
    "pairs": ("train.jsonl", PAIRS, lambda file, _: instructions.load_examples(_data(file), "train")),
    "chats": ("train.json", CHATS, lambda file, _: instructions.load_examples(_data(file), "train")),
    "asked": ("train.json", ASKED, lambda file, _: instructions.load_examples(_data(file), "train")),
    "gsm8k": ("train.jsonl", PROBLEMS, lambda file, _: gsm8k.read_jsonl(file.parent, "train")),
    "alpaca": ("rows.json", ASKED, lambda file, _: alpaca.load_examples(_data(file, "alpaca"))),
    "arithmetic": ("math_10k.json", ASKED, lambda file, _: arithmetic.read_training(file)),
    "mawps": ("trainset.json", MAWPS, lambda file, _: arithmetic.read_training(file)),
    "tests": ("test.json", ASKED, _tests),
    "tests of mawps": ("test.json", MAWPS, _tests),
    **{name: ("train.tsv", next(iter(files.values())), partial(_glue, name)) for name, files in TSV.items()},
    "text": ("train.txt", TEXT, _wikitext),
    "long text": ("a.md", TEXT, _long_text),
    "documents": ("a.jsonl", DOCUMENTS, _long_text),
    "fidelity": ("rows.jsonl", PAIRS, _fidelity),
    "fidelity's text": ("text.txt", TEXT, _fidelity),
    "pre-training": ("a.jsonl", DOCUMENTS, lambda file, _: read_documents(file)),
    "pre-training of text": ("a.txt", TEXT, lambda file, _: read_documents(file)),
}
JSON = [name for name, (file, *_) in READERS.items() if ".json" in file]
PACKED = ["text", "long text", "documents", "pre-training", "pre-training of text"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder):
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def read(tmp_path, tokenizer):
    """What a reader makes of the content of its file."""

    def read(reader, content: bytes, suffix=""):
        name, _, call = READERS[reader]
        file = tmp_path / f"{name}{suffix}"
        file.write_bytes(content)
        return call(file, tokenizer)

    return read


def content_of(reader) -> bytes:
    return READERS[reader][1].encode()


@pytest.mark.parametrize("reader", READERS)
def test_marks_and_ends_of_lines_change_nothing(reader, read):
    content = content_of(reader).rstrip(b"\n") + b"\n"
    rows = read(reader, content)
    assert len(rows) and read(reader, b"\xef\xbb\xbf" + content) == rows
    assert read(reader, content.replace(b"\n", b"\r\n")) == rows
    if "text" not in reader:
        assert read(reader, content + b"\n\n") == rows
        assert read(reader, content.replace(b"\n", b"\r\n") + b"\r\n\r\n") == rows
    if reader in PACKED:
        assert read(reader, gzip.compress(content), ".gz") == rows


# what is no file of rows or text, whatever is read
NONE = {
    "empty": b"",
    "blank": b" \n\r\n\t\n",
    "a mark alone": b"\xef\xbb\xbf",
    "zeros": bytes(5000),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
    "an archive": gzip.compress(b"some text"),
    "half a character": "some text \U0001f917".encode()[:-1],
    "surrogates": b"some \xed\xa0\xbd text",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_text_is_refused_by_name(kind, reader, read):
    with pytest.raises(UserError, match=READERS[reader][0].partition(".")[0]):
        read(reader, NONE[kind])


# of a file as it should be
SPOILED = {
    "utf-16": lambda text: text.decode().encode("utf-16"),
    "utf-16 without a mark": lambda text: text.decode().encode("utf-16-le"),
    "latin-1": lambda text: text + b"\xe9",
    "a zero": lambda text: text[: len(text) // 2] + b"\x00" + text[len(text) // 2 :],
    "zeros at its end": lambda text: text + bytes(512),
    "zeros at its begin": lambda text: bytes(512) + text,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", SPOILED)
def test_another_encoding_and_torn_blocks_are_refused(kind, reader, read):
    with pytest.raises(UserError, match=READERS[reader][0].partition(".")[0]):
        read(reader, SPOILED[kind](content_of(reader)))


@pytest.mark.parametrize("reader", PACKED)
def test_a_torn_archive_is_refused(reader, read):
    for content in (gzip.compress(content_of(reader))[:-9], content_of(reader), b""):
        with pytest.raises(UserError, match=READERS[reader][0].partition(".")[0]):
            read(reader, content, ".gz")


OTHERS = [b"5", b'"x"', b"null", b"NaN", b"[5]", b"[null]", b"[[]]", b"[]", b"{}", b"[{}]", b"{", b"[" * 10**5]
OTHERS += [b'{"a":' * 10**5, b'[{"a":' + b"[" * 900 + b"]" * 900 + b"}]", b'[{"text": ' + b"9" * 5000 + b"}]", b"x"]


@pytest.mark.parametrize("reader", JSON)
@pytest.mark.parametrize("content", OTHERS, ids=lambda content: content[:12].decode())
def test_other_json_is_refused(content, reader, read):
    with pytest.raises(UserError, match=READERS[reader][0].partition(".")[0]):
        read(reader, content)


@pytest.mark.parametrize("reader", JSON)
def test_no_value_of_another_kind_is_read(reader, read):
    """But a number where one is meant, and what a row may lack."""
    text = READERS[reader][1]
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    numbers, free = ("ans", "answer"), {"input"} | ({"answer"} if "answer" in rows[0] and len(rows[0]) > 2 else set())
    deep = json.loads("[" * 900 + "]" * 900)
    for key in rows[0].keys() - free | (rows[0].keys() & set(numbers) if reader.startswith("tests") else set()):
        for value in [value for value in (*JSON_VALUES, deep) if not isinstance(value, str)]:
            if key in numbers and type(value) in (int, float) and abs(value) < float("inf"):
                continue
            if reader.startswith("tests") and key not in ("original_text", "instruction", *numbers):
                continue
            changed = json.dumps([rows[0], {**rows[1], key: value}, *rows[2:]])
            with pytest.raises(UserError, match="item 2"):
                read(reader, changed.encode())


@pytest.mark.parametrize("reader", JSON)
def test_a_file_that_ends_early_is_refused(reader, read):
    content = content_of(reader).rstrip(b"\n]")
    for n in range(2, 20):
        with pytest.raises(UserError, match=READERS[reader][0].partition(".")[0]):
            read(reader, content[:-n])


@pytest.mark.timeout(SECONDS + 300)
def test_whatever_there_is_nothing_but_a_sentence_comes_of_it(tmp_path, tokenizer):
    """Seconds of files that are spoiled in one way or another, as tests/scripts/test_fuzz.py has them for drivers."""
    begun, number, faults = time.monotonic(), 0, []
    while time.monotonic() - begun < SECONDS:
        number += 1
        draw = random.Random(f"{SEED}-{number}")
        reader = draw.choice(list(READERS))
        name, text, call = READERS[reader]
        file = tmp_path / str(number) / name
        file.parent.mkdir()
        file.write_text(text)
        for _ in range(draw.randint(1, 2)):
            if file.is_file() and file.stat().st_size:
                spoil(draw, file)
        try:
            call(file, tokenizer)
        except UserError as error:
            if name.partition(".")[0] not in str(error):
                faults.append((number, reader, str(error)))
        except Exception as error:
            faults.append((number, reader, repr(error)))
    assert number > SECONDS and not faults, f"{len(faults)} of {number}: {faults[:5]}"
