"""What a driver trains on, and the numbers that tell what training changed."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hyclora.utils.heads import NEXT_TOKEN, Head


@dataclass
class Task:
    """What a driver reads for one value of data_name.

    train: tokenized rows. test: what to evaluate on, as JSON; empty if there is nothing. summary: what was read.
    forms: how each number that evaluating gives is written, by its name. evaluate: the numbers of a model by name, and
    row by row what it answered, if it did. collate: rows to a batch; default: `Collator`. head: what the model gives.
    write: what the model writes, to be read before and after training: {"texts": [{"prompt", "text"}]} and what else
    there is to tell. remarks: what must be read with a number, by its name. facts: more for the results file. reach:
    tokens of the longest row that evaluating reads, as far as that is known.
    """

    train: list[dict]
    test: list
    summary: str
    forms: dict[str, str]
    evaluate: Callable[[PreTrainedModel], tuple[dict[str, float], list[dict]]]
    collate: Callable[[list[dict]], dict] | None = None
    head: Head = NEXT_TOKEN
    write: Callable[[PreTrainedModel], dict] | None = None
    remarks: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    reach: int = 0

    @property
    def longest(self) -> tuple[int, str]:
        """Tokens of the longest row that the model is going to read, and the option that says how many."""
        return max((max(len(row["input_ids"]) for row in self.train), "seq_len"), (self.reach, "eval_lengths"))

    def shown(self, scores: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
        """The numbers found "before" and "after" training as a reader sees them: by name with its remark, then when."""
        return {
            name + self.remarks.get(name, ""): {when: format(found[name], form) for when, found in scores.items()}
            for name, form in self.forms.items()
        }

    def metrics(self, scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """The same for a program: each number under its name, and then "before" and "after"."""
        return {name.replace(" ", "_"): {when: found[name] for when, found in scores.items()} for name in self.forms}
