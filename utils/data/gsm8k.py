"""GSM8K (Cobbe et al., 2021) as the paper trains it: question and instruction in, rationale and final number out.

`load_rows` gives rows {"question", "answer"} from the hub, from a folder of the original jsonl files or from the
generator of demo problems; `tokenize_rows` gives token ids with the loss on the answer only; `Collator` pads a batch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hyclora.utils.args import DataArguments
from hyclora.utils.data.word_problems import word_problems
from hyclora.utils.errors import UserError

INSTRUCTION = "\nAnswer the above question. First think step by step and then answer the final number.\n"
FINAL_ANSWER = "The final answer is: "
HUB_ID = "openai/gsm8k"
DEMO_ROWS = {"train": 2400, "test": 200}
DEMO_SEED = 0
IGNORED = -100


def load_rows(args: DataArguments, split: str) -> list[dict]:
    """The rows of a split ("train" or "test")."""
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    if args.data_name == "demo":
        return word_problems(DEMO_ROWS[split] if limit is None else limit, DEMO_SEED, split=split)
    rows = read_jsonl(Path(args.data_dir), split) if args.data_dir else download(split)
    return rows[:limit]


def read_jsonl(folder: Path, split: str) -> list[dict]:
    """The rows of `folder`/`split`.jsonl; a mistake in the file is named by line."""
    file = folder / f"{split}.jsonl"
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist: --data_dir is the folder of train.jsonl and test.jsonl")
    if not file.is_file():
        raise UserError(f"{file} does not exist: put gsm8k's {split}.jsonl into the folder given by --data_dir")
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [_row(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{file} is empty: it needs one JSON object with question and answer a line")
    return rows


def _row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not a JSON object ({error.msg}): correct or remove the line") from None
    for key in ("question", "answer"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise UserError(f'{place}: the text under key "{key}" is missing: correct or remove the line')
    return {"question": row["question"], "answer": row["answer"]}


def download(split: str) -> list[dict]:
    """The rows from the hub (or from its local cache)."""
    place_by_hand = "put gsm8k's train.jsonl and test.jsonl into a folder and give it with --data_dir"
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError(f"{HUB_ID} needs the package datasets: pip install datasets, or {place_by_hand}") from None
    logging.set_verbosity_error()  # its retries would bury the sentence below
    try:
        return load_dataset(HUB_ID, "main", split=split).to_list()
    except Exception as error:  # the hub client raises its own, httpx's, OSError, ... when it cannot connect
        raise UserError(f"{HUB_ID} cannot be read from the hub ({type(error).__name__}): {place_by_hand}") from error


def prompt_of(question: str) -> str:
    return question + INSTRUCTION


def target_of(answer: str) -> str:
    return answer.replace("#### ", FINAL_ANSWER)


@dataclass
class TokenizedRows:
    """Rows for the Trainer, and what happened to those that did not fit."""

    rows: list[dict]
    cut: int
    dropped: int

    def __str__(self) -> str:
        return (
            f"{len(self.rows)} training rows, {self.cut} cut at seq_len, {self.dropped} dropped (no room for an answer)"
        )


def tokenize_rows(rows: list[dict], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> TokenizedRows:
    """input_ids and labels of each row, without padding; the labels of the prompt are ignored by the loss."""
    kept, cut, dropped = [], 0, 0
    for row in rows:
        prompt = prompt_of(row["question"])
        prompt_ids = tokenizer(prompt).input_ids
        ids = tokenizer(prompt + target_of(row["answer"])).input_ids + [tokenizer.eos_token_id]
        # A tokenizer may merge the prompt's last token with the answer's first: the merged one is to be learned.
        pairs = enumerate(zip(prompt_ids, ids, strict=False))
        start = next((i for i, (alone, joined) in pairs if alone != joined), len(prompt_ids))
        if start >= seq_len:
            dropped += 1
            continue
        cut += len(ids) > seq_len
        kept.append({"input_ids": ids[:seq_len], "labels": [IGNORED] * start + ids[start:seq_len]})
    if not kept:
        raise UserError(f"no training row has room for an answer within seq_len {seq_len}: raise --seq_len")
    return TokenizedRows(kept, cut, dropped)


@dataclass
class Collator:
    """Pads on the right to the longest row of the batch, rounded up to a multiple."""

    pad_token_id: int
    multiple: int = 8

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple

        def stack(name, filler):
            return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": stack("input_ids", self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": stack("labels", IGNORED),
        }
