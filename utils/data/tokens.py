"""From texts to batches: token ids, labels on what is to be learned, padding."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from hyclora.utils.data.chat import Part, rendered
from hyclora.utils.errors import UserError

IGNORED = -100


@dataclass
class Example:
    """What to learn: in each exchange the response to its prompt and to all exchanges before.

    messages: the same as a chat, for a tokenizer with a chat template. place: where it comes from, for messages.
    """

    exchanges: list[tuple[str, str]]
    messages: list[dict] | None = None
    place: str = ""


@dataclass
class TokenizedRows:
    """Rows {"input_ids", "labels"} without padding, and what happened to those that did not fit."""

    rows: list[dict]
    cut: int
    dropped: int
    kind: str = "training"

    def __str__(self) -> str:
        fate = f"{self.cut} cut at seq_len, {self.dropped} dropped (no room for an answer)"
        return f"{len(self.rows)} {self.kind} rows, {fate}"


def tokenize_rows(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, kind: str = "training"
) -> TokenizedRows:
    """input_ids and labels of the examples; the loss is on responses only.

    An example is one row, but for a chat template that rewrites earlier turns (see `rendered`). A row of which seq_len
    leaves nothing to learn is dropped; UserError if that is every row.
    """
    kept, cut, dropped = [], 0, 0
    for example in examples:
        for ids, labels in _encode(example, tokenizer):
            # nothing predicts the first token
            if all(label == IGNORED for label in labels[1:seq_len]):
                dropped += 1
                continue
            cut += len(ids) > seq_len
            kept.append({"input_ids": ids[:seq_len], "labels": labels[:seq_len]})
    if not kept:
        raise UserError(f"no {kind} row has room for an answer within seq_len {seq_len}: raise --seq_len")
    return TokenizedRows(kept, cut, dropped, kind)


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """ids and labels of the example's rows: a chat template writes its own special tokens, elsewhere they are added."""
    if example.messages and tokenizer.chat_template:
        parts = rendered(example.messages, tokenizer, example.place)
        return [_encode_part(part, tokenizer, add_special_tokens=False) for part in parts]
    ids, labels = [], []
    for prompt, response in example.exchanges:
        part = Part(prompt + response, [(len(prompt), len(prompt) + len(response))])
        options = {"add_special_tokens": False} if ids else {}
        for row, more in zip((ids, labels), _encode_part(part, tokenizer, **options), strict=True):
            row += [*more, tokenizer.eos_token_id]
    return [(ids, labels)]


def _encode_part(part: Part, tokenizer: PreTrainedTokenizerBase, **options) -> tuple[list[int], list[int]]:
    """ids and labels. A token on the edge of a learned stretch is learned at its start and belongs to it at its end."""
    options["verbose"] = False  # no warning that a row is long: it is cut or dropped
    ids = tokenizer(part.text, **options).input_ids
    labels = [IGNORED] * len(ids)

    def tokens_before(character: int) -> int:
        """The tokens of the text that its first characters alone begin with too."""
        if character == len(part.text):
            return len(ids)
        alone = tokenizer(part.text[:character], **options).input_ids
        pairs = enumerate(zip(alone, ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(alone), len(ids)))

    for start, end in part.learned:
        stretch = slice(tokens_before(start), tokens_before(end))
        labels[stretch] = ids[stretch]
    return ids, labels


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
