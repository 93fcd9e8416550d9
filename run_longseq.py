"""Fine-tune on long rows with HyC-LoRA, on top of gradient checkpointing; report the perplexity at several lengths.

    bash run_longseq.sh                                                # demo, minutes on a CPU
    model_name=llama-2-7b-hf data_name=text data_dir=redpajama eval_files=test.bin rope_scaling=2 bash run_longseq.sh

Rows of seq_len tokens are cut out of all documents, one behind the other (utils/data/long_text.py says what is read).
Perplexity, of a token, is that of windows as long as each of eval_lengths which slide by `stride` tokens: every token
but the first is judged once, whatever the length, and all but the first ones after length - stride tokens or more.
(LongLoRA's eval.py averages over whole windows, where many tokens are judged after few.) Rows longer than the model's
positions need rope_scaling; group_size trains by shifted sparse attention, and judges by full attention.

The settings are at the top of run_longseq.sh and in utils/settings.sh; `python run_longseq.py --help` lists all.
"""

import hyclora.utils.interrupts

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hyclora.models.shifted import shifted_sparse
from hyclora.utils.args import DataArguments, option, require
from hyclora.utils.data.long_text import read_long_text
from hyclora.utils.data.text import TokenizedText, Windows, blocks, demo_text, tokenize
from hyclora.utils.driver import Driver
from hyclora.utils.heads import NEXT_TOKEN
from hyclora.utils.perplexity import PerplexityArguments, language_task
from hyclora.utils.tasks import Task

# what of LLaMA's modules each word of trainable_params names
WHOLE = {"norm": ("input_layernorm", "post_attention_layernorm", "model.norm"), "embed": ("embed_tokens",)}


@dataclass
class LongArguments(DataArguments):
    data_name: Literal["demo", "text"] = option("demo", "demo: a generated text; text: your own from data_dir.")
    data_dir: str = option(
        "",
        "What to train on: a data set written by save_to_disk (with a column input_ids or text), a .bin file of token "
        "ids as uint16, or a folder of documents (.txt, .tex, .md, .jsonl).",
    )
    eval_files: str = option(
        "",
        "Evaluated on, each by itself, and left out of training: files or folders in data_dir or elsewhere, blanks or "
        "commas between.",
    )
    seq_len: int = option(8192, "Tokens of a row.")
    group_size: int = option(0, "Train by shifted sparse attention within groups of so many tokens; 0: full attention.")
    rope_scaling: float = option(1.0, "Positions are divided by this factor, and the model has as many times more.")
    trainable_params: str = option("", f"Train these whole, beside adapters, as LongLoRA does: {', '.join(WHOLE)}.")
    max_train_samples: int | None = option(None, "Train on the first N rows only; no more is read than they take.")
    max_eval_samples: int | None = option(None, "Evaluate on the first N x seq_len tokens only; 0 skips it.")

    def __post_init__(self):
        super().__post_init__()
        require(self.data_name == "demo" or bool(self.data_dir), "data_name text needs --data_dir: a file or a folder")
        require(Path(self.data_dir).exists(), f"data_dir {self.data_dir} does not exist: name a file or a folder")
        require(
            self.data_name == "text" or not self.eval_files,
            f"eval_files {self.eval_files!r} would be ignored with data_name demo: drop it, or set --data_name text",
        )
        group, factor = self.group_size, self.rope_scaling
        require(group == 0 or group >= 2, f"group_size must be 2 or more, or 0 for full attention, not {group}")
        whole = group == 0 or self.seq_len % group == 0
        require(whole, f"group_size {group} does not divide seq_len {self.seq_len}: take a quarter of it, as LongLoRA")
        require(1 <= factor < math.inf, f"rope_scaling must be a number of at least 1, not {factor}")
        unknown = [name for name in words(self.trainable_params) if name not in WHOLE]
        require(not unknown, f"trainable_params has no {', '.join(unknown)}: choose among {', '.join(WHOLE)}")


@dataclass
class LengthArguments(PerplexityArguments):
    eval_batch_size: int = option(1, "Windows evaluated at once.")
    eval_lengths: str = option("2048 4096 8192", "Tokens of the windows, each of these lengths by itself.")
    stride: int = option(256, "Tokens that the windows move on, fewer than the shortest length.")

    def __post_init__(self):
        super().__post_init__()
        right = bool(self.lengths) and all(length.isdecimal() for length in words(self.eval_lengths))
        require(right, f"eval_lengths {self.eval_lengths!r} are no numbers: write for example '2048 4096 8192'")
        least = min(self.lengths)
        require(least >= 2, f"eval_lengths {self.eval_lengths!r}: a window of fewer than 2 tokens predicts none")
        # the first token of a window is predicted by none in it
        moves = 0 < self.stride < least
        require(moves, f"stride must be from 1 to below the shortest of eval_lengths, {least}, not {self.stride}")

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in dict.fromkeys(words(self.eval_lengths)) if length.isdecimal()]


def words(text: str) -> list[str]:
    return re.findall(r"[^,\s]+", text)


def read_texts(data: LongArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenizedText, list[TokenizedText]]:
    """What to train on, and each text to evaluate on."""
    enough = data.max_train_samples and data.max_train_samples * data.seq_len
    limit = data.max_eval_samples and data.max_eval_samples * data.seq_len
    if data.data_name == "demo":
        train, test = (tokenize(f"generated {split} text", demo_text(split), tokenizer) for split in ("train", "test"))
        return train.first(enough), [test.first(limit)] if limit != 0 else []
    source, judged = Path(data.data_dir), {}
    folder = source if source.is_dir() else source.parent
    for name in words(data.eval_files):
        judged[name] = folder / name if (folder / name).exists() else Path(name)
        require(judged[name].exists(), f"eval_files: there is no {name}, in {folder} or here")
        whole = judged[name].resolve() in (source.resolve(), *source.resolve().parents)
        require(not whole, f"eval_files: {name} holds all that is trained on: name other files")
    train = read_long_text(source, tokenizer, judged.values(), enough)
    texts = {} if limit == 0 else {name: read_long_text(path, tokenizer, (), limit) for name, path in judged.items()}
    return train, [replace(text, name=name) for name, text in texts.items()]


def long_rows(data: LongArguments, evaluation: LengthArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    train, texts = read_texts(data, tokenizer)
    rows = blocks(train, data.seq_len)
    judged = {}
    for text, length in itertools.product(texts, evaluation.lengths):
        n = len(text.ids)
        cut = " within max_eval_samples" if data.max_eval_samples else ""
        require(length <= n, f"eval_lengths: {text.name} has only {n} tokens{cut}, fewer than {length}: drop {length}")
        judged[f"perplexity of {text.name} at {length}"] = Windows(text.ids, length, evaluation.stride)
    lines = [f"{train}; {len(rows)} rows of {data.seq_len}", *map(str, texts or ["no text to evaluate on"])]
    head = replace(
        NEXT_TOKEN,
        whole=tuple(module for name in words(data.trainable_params) for module in WHOLE[name]),
        attention=shifted_sparse(data.group_size) if data.group_size else "",
        rope_scaling=data.rope_scaling,
    )
    reach = max(evaluation.lengths) if judged else 0
    return language_task(rows, "\n".join(lines), judged, {"token": 1.0}, tokenizer, evaluation, head, reach)


DRIVER = Driver(
    "longseq",
    LongArguments,
    LengthArguments,
    dict.fromkeys(("demo", "text"), long_rows),
    {"learning_rate": 2e-5, "num_train_epochs": 1.0, "gradient_checkpointing": True},
)
main = DRIVER.main

if __name__ == "__main__":
    main()
