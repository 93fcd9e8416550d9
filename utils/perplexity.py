"""Language modelling as a task: blocks of text to train on, and the perplexity of other text before and after.

Perplexity is the exponential of the mean negative log-likelihood of a token, which depends on the tokenizer, or of a
word (what is between blanks), which compares across tokenizers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hyclora.utils.args import EvalArguments, option, require
from hyclora.utils.data.tokens import Collator
from hyclora.utils.heads import NEXT_TOKEN, Head
from hyclora.utils.metrics import evaluate_loss
from hyclora.utils.tasks import Task


@dataclass
class PerplexityArguments(EvalArguments):
    eval_batch_size: int = option(8, "Rows evaluated at once.")
    stride: int = option(512, "Tokens that the sliding window moves on.")

    def __post_init__(self):
        super().__post_init__()
        require(self.stride >= 0, f"stride must not be negative, not {self.stride}")


def language_task(
    train: Sequence[dict],
    summary: str,
    judged: dict[str, Sequence[dict]],
    units: dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvalArguments,
    head: Head = NEXT_TOKEN,
    reach: int = 0,
) -> Task:
    """Train on rows of one length, which need no padding, and judge by others.

    judged: tokenized rows by the name of their perplexity; without any there is nothing to evaluate. units: what a
    perplexity is of, "token" or "word", and how many tokens that is. summary, head, reach: of the Task.
    """

    def perplexities(model) -> tuple[dict[str, float], list[dict]]:
        found = {}
        for name, rows in judged.items():
            loss = evaluate_loss(model, rows, tokenizer.pad_token_id, evaluation)
            found |= {f"{name} per {unit}": math.exp(loss * tokens) for unit, tokens in units.items()}
        return found, []

    forms = {f"{name} per {unit}": ".3f" for name in judged for unit in units}
    collate = Collator(tokenizer.pad_token_id, multiple=1)
    return Task(train, next(iter(judged.values()), []), summary, forms, perplexities, collate, head, reach=reach)
