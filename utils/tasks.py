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
    """train: tokenized rows. test: rows to evaluate on, none if there are none. summary: how many rows there are.

    metric: what the number is called; form: how it is written. evaluate: the number of a model over the test rows, and
    row by row the texts that it generated, if it did.
    """

    train: list[dict]
    test: list[dict]
    summary: str
    metric: str
    form: str
    evaluate: Callable[[PreTrainedModel], tuple[float, list[dict]]]

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

    return Task(train.rows, test, str(train), "accuracy", ".2%", accuracy)


def _instructions(data: DataArguments, evaluation: EvalArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    examples, held_out = load_examples(data, "train"), load_examples(data, "test")
    train = tokenize_rows(examples, tokenizer, data.seq_len)
    test, summary = [], f"{train}\nno test rows"
    if held_out:
        tokenized = tokenize_rows(held_out, tokenizer, data.seq_len, kind="test")
        test, summary = tokenized.rows, f"{train}\n{tokenized}"

    def loss(model):
        return evaluate_loss(model, test, tokenizer.pad_token_id, evaluation), []

    return Task(train.rows, test, summary, "test loss", ".4f", loss)


TASKS = {"demo": _word_problems, "gsm8k": _word_problems, "json": _instructions}
