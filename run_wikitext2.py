"""Fine-tune on WikiText-2, a generated text or your own with HyC-LoRA; report what that did to the perplexity.

    bash run_wikitext2.sh                                              # demo, minutes on a CPU
    model_name=llama-2-7b-hf data_name=wikitext2 bash run_wikitext2.sh
    model_name=smollm2-135m data_name=text data_dir=my_book.txt bash run_wikitext2.sh

The text is cut into blocks of seq_len tokens (utils/data/text.py says how it is read). Perplexity is the exponential
of the mean negative log-likelihood of a token, which depends on the tokenizer, or of a word (what is between blanks),
which compares across tokenizers: over the whole blocks of the test text, each by itself, and over windows that slide by
`stride` tokens, so that all but the first tokens have at least seq_len - stride tokens before them.

The settings are at the top of run_wikitext2.sh and in utils/settings.sh; `python run_wikitext2.py --help` lists all.
"""

import hyclora.utils.interrupts

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hyclora.utils.args import DataArguments, option, require
from hyclora.utils.data.text import (
    HUB_NAME,
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
from hyclora.utils.driver import Driver
from hyclora.utils.errors import UserError
from hyclora.utils.perplexity import PerplexityArguments, language_task
from hyclora.utils.tasks import Task


@dataclass
class TextArguments(DataArguments):
    data_name: Literal["demo", "wikitext2", "text"] = option(
        "demo", "demo: a generated text; wikitext2: its rows, joined by two line ends; text: your own, as it is."
    )
    data_dir: str = option(
        "",
        "wikitext2: folder with wiki.train.raw (or train.txt) and wiki.test.raw (or test.txt), which may be .gz; '' "
        "downloads the raw text. text: the same, the test file being optional, or one file to train on; train.bin and "
        "test.bin are token ids as uint16.",
    )
    eval_file: str = option("", "File of data_dir to evaluate on, e.g. valid.txt; default: the test file.")
    seq_len: int = option(1024, "Tokens of a block.")
    max_train_samples: int | None = option(None, "Train on the first N blocks only.")
    max_eval_samples: int | None = option(None, "Evaluate on the first N blocks only; 0 skips the evaluation.")

    def __post_init__(self):
        super().__post_init__()
        require(self.data_name != "text" or bool(self.data_dir), "data_name text needs --data_dir: a file or a folder")
        path = Path(self.data_dir)
        require(path.exists(), f"data_dir {path} does not exist: name a file or a folder with train.txt")
        require(
            not self.eval_file or bool(self.data_dir),
            f"eval_file {self.eval_file} is looked for in data_dir, which is not given: set it, or drop eval_file",
        )
        require(
            not self.eval_file or (path / self.eval_file).is_file(),
            f"eval_file {self.eval_file} is no file in data_dir {self.data_dir!r}",
        )


@dataclass
class WindowArguments(PerplexityArguments):
    stride: int = option(512, "Tokens that the sliding window moves on, at most seq_len; 0: blocks only.")


def read_split(data: TextArguments, split: str, tokenizer: PreTrainedTokenizerBase) -> TokenizedText | None:
    """The tokens of a split; None where own text has nothing to evaluate on."""
    if data.data_name == "demo":
        return tokenize(f"generated {split} text", demo_text(split), tokenizer)
    if not data.data_dir:
        return tokenize(f"{HUB_NAME} {split}", join_rows(download(split)), tokenizer)
    path = Path(data.data_dir)
    file = path / data.eval_file if split == "test" and data.eval_file else find_file(path, split)
    if path.is_file():
        file = path if split == "train" else None
    if file is None and (split == "train" or data.data_name == "wikitext2"):
        raise UserError(f"{path} has no text for {split}: put wiki.{split}.raw or {split}.txt there, or set --data_dir")
    if file is None:
        return None
    if file.suffix == ".bin":
        return read_token_file(file, len(tokenizer))
    text = read_text(file)
    joined = join_rows(text.removesuffix("\n").split("\n")) if data.data_name == "wikitext2" else text
    return tokenize(file.name, joined, tokenizer)


def language_modelling(data: TextArguments, evaluation: WindowArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    size, stride, limit = data.seq_len, evaluation.stride, data.max_eval_samples
    require(stride <= size, f"stride {stride} is more than seq_len {size}: lower --stride")
    train = read_split(data, "train", tokenizer)
    test = None if limit == 0 else read_split(data, "test", tokenizer)
    rows = blocks(train, size)[: data.max_train_samples]
    summary = f"{train}; {len(rows)} blocks of {size}"
    if test is None:
        return language_task(rows, f"{summary}\nno test text", {}, {}, tokenizer, evaluation)

    test = test.first(limit and limit * size)
    whole = blocks(test, size)
    summary += f"\n{test}; {len(whole)} blocks of {size}"
    if train.masked != test.masked:
        masked = train.name if train.masked else test.name
        summary += f"\nrare words are <unk> in {masked} alone: the perplexity after training suffers from that"
    units = {"token": 1.0} | ({"word": test.tokens_per_word} if test.tokens_per_word else {})
    judged = {"perplexity": whole} | ({"sliding perplexity": Windows(test.ids, size, stride)} if stride else {})
    return language_task(rows, summary, judged, units, tokenizer, evaluation)


DRIVER = Driver(
    "wikitext2",
    TextArguments,
    WindowArguments,
    dict.fromkeys(("demo", "wikitext2", "text"), language_modelling),
    {"num_train_epochs": 3.0},
)
main = DRIVER.main

if __name__ == "__main__":
    main()
