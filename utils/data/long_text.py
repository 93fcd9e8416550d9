"""Long texts of many documents: a data set on disk, token files, or folders of text; each is one stream of token ids.

A document is tokenized as a whole, with bos in front where the model was trained with it and eos behind it. Documents
follow each other without padding, in the order of their paths, and rows are cut out of the stream: attention goes
across their ends, as in LongLoRA. What is read is told by what lies there:

    a folder with state.json   a data set that save_to_disk of datasets wrote, as LongLoRA's sample of RedPajama is: its
                               column input_ids is taken as it is, or else text is tokenized, a document a row
    *.bin                      token ids as uint16, as LongLoRA ships proof-pile and PG-19, taken as they are
    *.jsonl                    an object a line, whose text is a document; *.json, if the file itself is named, too
    *.txt, *.tex, *.md         a document

Both kinds of text may be packed as .gz.

A folder of files is read with all that is below it.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hyclora.utils.data.files import read_each, text_of
from hyclora.utils.data.text import TokenizedText, check_ids, read_text, read_token_file
from hyclora.utils.errors import UserError

TEXT = (".txt", ".tex", ".md")
SAVED, SPLITS = "state.json", "dataset_dict.json"
AT_ONCE = 256  # rows of a data set


def read_long_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, without: Iterable[Path] = (), enough: int | None = None
) -> TokenizedText:
    """The stream of what is in a file or a folder, less the files and folders `without`.

    enough: not more than so many tokens are wanted, and no more documents read than that takes. UserError for what
    cannot be read, and if there is nothing.
    """
    if (path / SPLITS).is_file():
        found = ", ".join(sorted(str(folder.parent) for folder in path.glob(f"*/{SAVED}")))
        raise UserError(f"{path} has several splits of a data set: name the one to read: {found}")
    if (path / SAVED).is_file():
        documents = _saved(path, tokenizer)
    else:
        documents = itertools.chain.from_iterable(_documents(file, tokenizer) for file in _files(path, without))
    parts, n_tokens = [], 0
    for ids in documents:
        parts.append(ids)
        n_tokens += len(ids)
        if enough is not None and n_tokens >= enough:
            break
    if not n_tokens:
        raise UserError(f"{path} has no tokens in it")
    # one file stays where it is
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts, dtype=np.int32, casting="same_kind")
    return TokenizedText(path.name, ids).first(enough)


def _files(path: Path, without: Iterable[Path]) -> list[Path]:
    """The files of a folder that are read, or the file itself; UserError if there are none."""
    if path.is_file():
        return [path]
    held_out = {file.resolve() for file in without}
    every = sorted(file for file in path.rglob("*") if file.is_file())
    known = [file for file in every if file.suffix == ".bin" or _unpacked(file) in (*TEXT, ".jsonl")]
    files = [file for file in known if not held_out & {file.resolve(), *file.resolve().parents}]
    if files:
        return files
    if any(file.suffix == ".arrow" for file in every):
        raise UserError(f"{path} has .arrow files but no {SAVED}: write the data set with its save_to_disk")
    kinds = ", ".join((*TEXT, ".jsonl", ".bin"))
    raise UserError(
        f"{path} has no text{' but what is evaluated on' if known else ''}: put files there that end in {kinds}"
    )


def _unpacked(file: Path) -> str:
    """What a file's name ends in, .gz aside."""
    return Path(file.name.removesuffix(".gz")).suffix


def _documents(file: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of each document of a file."""
    if file.suffix == ".bin":
        yield read_token_file(file, len(tokenizer)).ids
    elif _unpacked(file) in (".jsonl", ".json"):
        texts = read_each(file, lambda place, row: text_of(row, "text", place))
        for start in range(0, len(texts), AT_ONCE):
            yield from _tokenized(texts[start : start + AT_ONCE], tokenizer)
    else:
        yield from _tokenized([read_text(file)], tokenizer)


def _tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    for ids in tokenizer(texts, verbose=False).input_ids:
        yield np.array([*ids, tokenizer.eos_token_id], np.int32)


def _saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of the rows of a data set on disk, documents of it or many at once."""
    try:
        from datasets import load_from_disk
    except ImportError:
        raise UserError(f"{folder} needs the package datasets: pip install datasets") from None
    try:
        rows = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's own, ValueError, KeyError, ... for files that are torn or missing
        raise UserError(f"{folder} cannot be read as a data set ({error}): copy it again") from error
    column = next((name for name in ("input_ids", "text") if name in rows.column_names), None)
    if column is None:
        found = ", ".join(rows.column_names)
        raise UserError(f"{folder} has no column input_ids or text, only {found}: rename the one with the text")
    for start, batch in enumerate(rows.select_columns([column]).with_format("arrow").iter(AT_ONCE)):
        values, place = batch[column].combine_chunks(), f"{folder}, rows from {start * AT_ONCE}"
        values = values.drop_null().to_pylist() if column == "text" else values.flatten().to_numpy(zero_copy_only=False)
        if column == "text":
            if not all(isinstance(text, str) for text in values):
                raise UserError(f"{place}: the column text holds something else: name the column with the text so")
            yield from _tokenized(values, tokenizer)
        else:
            if not np.issubdtype(values.dtype, np.integer):  # numbers with a null among them are no integers either
                raise UserError(f"{place}: the column input_ids holds {values.dtype}, not whole numbers: make it anew")
            check_ids(place, values, len(tokenizer))
            yield values.astype(np.int32)
