"""Plain text for language modelling: files to token ids, token ids to blocks that are learned and windows to judge by.

A text is tokenized as a whole, with bos in front where the model was trained with it, and then cut: blocks inside of
it have no bos of their own. WikiText-2 (Merity et al., 2016) is read as LLM papers do: its rows, of which blank ones
are empty and others keep their line end, are joined by two more line ends. Its raw test split (241,211 words) then has,
with the tokenizer of LLaMA-2 and bos,

    convention                              tokens     whole blocks of 1024
    rows joined by two line ends (ours)     341,469    333
    the file as it is                       335,688    327
    rows joined by two, blank ones kept     344,402    336
    rows joined by nothing, blank empty     332,755    324
    rows stripped, joined by two            333,295    325

and perplexities of different rows of this table do not compare.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hyclora.utils.data import files
from hyclora.utils.data.tokens import IGNORED
from hyclora.utils.data.word_problems import word_problems
from hyclora.utils.errors import UserError

HUB_ID, HUB_NAME = "Salesforce/wikitext", "wikitext-2-raw-v1"
# in a folder, the first of these that is there; each may be packed as .gz
NAMES = ("wiki.{split}.raw", "{split}.txt", "wiki.{split}.tokens")
DEMO_PROBLEMS = {"train": 600, "test": 60}
DEMO_SEED = 5


@dataclass
class TokenizedText:
    """Token ids of a text, integers [N]; those of a file stay in it until they are read.

    tokens_per_word: what turns the mean loss of a token into that of a word; words are what is between blanks, and bos
    is no token here. None where words are unknown. masked: whether rare words are <unk> in it.
    """

    name: str
    ids: np.ndarray
    tokens_per_word: float | None = None
    masked: bool = False

    def __str__(self) -> str:
        words = f", {self.tokens_per_word:.2f} a word" if self.tokens_per_word else ""
        return f"{self.name}: {len(self.ids)} tokens{words}"

    def first(self, n_tokens: int | None) -> "TokenizedText":
        """Its beginning; all of it with None."""
        return replace(self, ids=self.ids[:n_tokens])


def find_file(folder: Path, split: str) -> Path | None:
    """The file of a split ("train" or "test"), None without one; tokens if there is no text."""
    names = [f"{name.format(split=split)}{packed}" for name in NAMES for packed in ("", ".gz")] + [f"{split}.bin"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, .gz unpacked; UserError if it cannot be read or there is none in it."""
    text = files.read_text(file)
    if not text.strip():
        raise UserError(f"{file} has no text in it")
    return text.replace("\r\n", "\n")


def join_rows(rows: Iterable[str]) -> str:
    """WikiText's rows, which are lines without their ends, as one text."""
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)


def download(split: str) -> list[str]:
    """WikiText-2's raw rows ("train" or "test") from the hub, or from its local cache."""
    by_hand = "put wiki.train.raw and wiki.test.raw into a folder and give it with --data_dir"
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError(f"{HUB_ID} needs the package datasets: pip install datasets, or {by_hand}") from None
    logging.set_verbosity_error()  # its retries would bury the sentence below
    try:
        rows = load_dataset(HUB_ID, HUB_NAME, split=split)["text"]
    except Exception as error:  # the hub client raises its own, httpx's, OSError, ... when it cannot connect
        raise UserError(f"{HUB_ID} cannot be read from the hub ({type(error).__name__}): {by_hand}") from error
    return [row.removesuffix("\n") for row in rows]


def demo_text(split: str) -> str:
    """Word problems with their answers, one after the other; no problem is in both splits."""
    problems = word_problems(DEMO_PROBLEMS[split], DEMO_SEED, split=split)
    return "\n\n".join(f"{problem['question']}\n{problem['answer']}" for problem in problems)


def tokenize(name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> TokenizedText:
    ids = tokenizer(text, verbose=False).input_ids
    with_bos = ids[0] == tokenizer.bos_token_id
    return TokenizedText(name, np.array(ids, np.int32), (len(ids) - with_bos) / len(text.split()), "<unk>" in text)


def read_token_file(file: Path, n_tokens: int) -> TokenizedText:
    """Token ids as uint16 (little endian), as LongLoRA ships its texts; n_tokens: how many there are of the tokenizer.

    The file is mapped, not loaded. UserError for one of odd size, of which numpy's fromfile would drop the last byte,
    and for ids that the tokenizer has not.
    """
    size = file.stat().st_size
    if not size:
        raise UserError(f"{file} has no tokens in it")
    if size % 2:
        raise UserError(f"{file} has {size} bytes, an odd number: it is cut, or not of uint16: copy it again")
    ids = np.memmap(file, dtype="<u2", mode="r")
    check_ids(str(file), ids, n_tokens)
    return TokenizedText(file.name, ids)


def check_ids(place: str, ids: np.ndarray, n_tokens: int) -> None:
    """UserError for ids [N] that a tokenizer of n_tokens has not."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < n_tokens:
        first = int(((ids < 0) | (ids >= n_tokens)).argmax())
        raise UserError(
            f"{place}: token {first} has the id {ids[first]}, the tokenizer only {n_tokens} tokens: "
            "it was made for another model"
        )


@dataclass(frozen=True)
class Blocks(Sequence):
    """Rows {"input_ids", "labels"}, all learned, of ids [N, size]; a row is made when it is asked for."""

    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return Blocks(self.ids[place])
        ids = self.ids[place].tolist()
        return {"input_ids": ids, "labels": ids}


def blocks(text: TokenizedText, size: int) -> Blocks:
    """Blocks of `size` tokens; what is left at the end is dropped. UserError if that is everything."""
    whole = len(text.ids) // size
    if not whole:
        raise UserError(
            f"{text.name} has {len(text.ids)} tokens, too few for a block of {size}: give more text or lower --seq_len"
        )
    return Blocks(text.ids[: whole * size].reshape(whole, size))


@dataclass(frozen=True)
class Windows(Sequence):
    """Rows of at most `size` tokens, each `stride` further on, that predict every token of ids [N] but the first once.

    A token is judged in the first window that holds it: with size - stride tokens before it or more, but in the first
    one. What is in a window besides is context, with the label IGNORED. With stride = size there is none, and the first
    token of each window is predicted by nothing.
    """

    ids: np.ndarray
    size: int
    stride: int

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.ids) - self.size) // self.stride))

    def __getitem__(self, place: int) -> dict:
        start = range(0, len(self) * self.stride, self.stride)[place]
        ids = self.ids[start : start + self.size].tolist()
        context = min(self.size - self.stride, len(ids)) if start else 0
        return {"input_ids": ids, "labels": [IGNORED] * context + ids[context:]}
