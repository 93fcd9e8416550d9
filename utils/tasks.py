"""What a driver trains on, and the number that tells what training changed; `data_name` chooses."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyclora.utils.args import DataArguments, EvalArguments
from hyclora.utils.data.gsm8k import examples_of, load_rows
from hyclora.utils.data.instructions import load_examples
from hyclora.utils.data.tokens import tokenize_rows
from hyclora.utils.metrics import evaluate_generation, evaluate_loss


@dataclass
class Task:
    """train: tokenized rows. summary: how many rows there are, for a person. metric: the number's name; form: how it is
    written. evaluate: a model's number and, row by row, the texts that it generated; None without test rows."""

    train: list[dict]
    summary: str
    metric: str
    form: str
    evaluate: Callable[[PreTrainedModel], tuple[float, list[dict]]] | None

    def shown(self, found: dict[str, float]) -> list[tuple[str, str]]:
        """Name and text of the numbers found "before" and "after" training."""
        return [(f"{self.metric} {when} training", format(score, self.form)) for when, score in found.items()]


def load_task(data: DataArguments, evaluation: EvalArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Read and tokenize all rows; UserError for a mistake in them."""
    return TASKS[data.data_name](data, evaluation, tokenizer)


def _word_problems(data: DataArguments, evaluation: EvalArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    rows, test = load_rows(data, "train"), load_rows(data, "test")
    train = tokenize_rows(examples_of(rows), tokenizer, data.seq_len)

    def accuracy(model):
        return evaluate_generation(model, tokenizer, test, evaluation)

    return Task(train.rows, str(train), "accuracy", ".2%", accuracy if test else None)


def _instructions(data: DataArguments, evaluation: EvalArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    examples, test = load_examples(data, "train"), load_examples(data, "test")
    train = tokenize_rows(examples, tokenizer, data.seq_len)
    if not test:
        return Task(train.rows, f"{train}\nno test rows", "test loss", ".4f", None)
    held_out = tokenize_rows(test, tokenizer, data.seq_len, kind="test")

    def loss(model):
        return evaluate_loss(model, held_out.rows, tokenizer.pad_token_id, evaluation), []

    return Task(train.rows, f"{train}\n{held_out}", "test loss", ".4f", loss)


TASKS = {"demo": _word_problems, "gsm8k": _word_problems, "json": _instructions}
