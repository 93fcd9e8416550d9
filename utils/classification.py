"""Texts, or pairs of them, to be told apart: their tokens, a model's outputs on them, and what these are worth."""

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from hyclora.utils.errors import UserError
from hyclora.utils.profiling import undisturbed
from hyclora.utils.ranks import share_batches


@dataclass(frozen=True)
class Metric:
    """function: of labels and predictions, by its place. form: how the number is written."""

    function: str
    form: str = ".4f"


METRICS = {
    "accuracy": Metric("sklearn.metrics.accuracy_score", ".2%"),
    "F1": Metric("sklearn.metrics.f1_score", ".2%"),
    "Matthews correlation": Metric("sklearn.metrics.matthews_corrcoef"),
    "Pearson correlation": Metric("scipy.stats.pearsonr"),
    "Spearman correlation": Metric("scipy.stats.spearmanr"),
}


def metric(name: str) -> Callable[[list, list], float]:
    """The metric of labels and predictions, as the official evaluation has it; 0 where it is not defined."""
    module, _, function = METRICS[name].function.rpartition(".")
    try:
        compute = getattr(importlib.import_module(module), function)
    except ImportError:
        raise UserError("the metrics of GLUE need scikit-learn and scipy: pip install scikit-learn scipy") from None

    def value(labels: list, predictions: list) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of predictions that are all one: a correlation with these is not defined
            found = compute(labels, predictions)
        number = float(getattr(found, "statistic", found))
        return 0.0 if math.isnan(number) else number

    return value


@dataclass
class EncodedRows:
    """Rows {"input_ids", "label"} without padding, and how many texts are cut to `longest` tokens."""

    rows: list[dict]
    cut: int
    longest: int

    def __str__(self) -> str:
        return f"{self.cut} cut at {self.longest} tokens"


def encode_rows(rows: list[dict], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> EncodedRows:
    """Token ids of rows {"texts", "label"}, of no more tokens than seq_len or the model has positions.

    An encoder's tokenizer frames a text or a pair itself; a decoder reads two texts as two lines. Of a pair that is too
    long, the longer text is cut.
    """
    longest = min(seq_len, tokenizer.model_max_length)
    if longest <= tokenizer.num_special_tokens_to_add(pair=True):
        raise UserError(f"seq_len {seq_len} has no room for a text: raise --seq_len")
    encode = _framed if tokenizer.cls_token and tokenizer.sep_token else _lines
    encoded, cut = [], 0
    for row in rows:
        ids = encode(row["texts"], tokenizer)
        if len(ids) > longest:
            cut += 1
            ids = encode(row["texts"], tokenizer, longest)
        if not ids:
            raise UserError(f"row {len(encoded) + 1} has no text: remove it")
        encoded.append({"input_ids": ids, "label": row["label"]})
    return EncodedRows(encoded, cut, longest)


def _framed(texts: list[str], tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> list[int]:
    return tokenizer(*texts, truncation=longest is not None, max_length=longest, verbose=False).input_ids


def _lines(texts: list[str], tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> list[int]:
    first = tokenizer(texts[0], verbose=False).input_ids
    second = tokenizer("\n" + texts[1], add_special_tokens=False, verbose=False).input_ids if texts[1:] else []
    while longest is not None and len(first) + len(second) > longest:
        max(first, second, key=len).pop()
    return first + second


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Encoded rows to a batch: token ids and mask padded on the right, labels."""
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)


@torch.no_grad()
def outputs_of(model: PreTrainedModel, rows: list[dict], collate: Callable, batch_size: int) -> Tensor:
    """The model's logits or scores [rows, outputs], in float32 on the host, in the order of the rows, which processes
    share.
    """
    half = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else None  # the head is float32
    autocast = torch.autocast(model.device.type, half, enabled=half is not None)

    def outputs(places: list[int]) -> Tensor:
        batch = collate([rows[i] for i in places]).to(model.device)
        batch.pop("labels")
        return model(**batch).logits.float().cpu()

    with undisturbed(model, train=False), autocast:
        found = share_batches([len(row["input_ids"]) for row in rows], batch_size, outputs)
    by_place = {i: output for places, several in found for i, output in zip(places, several, strict=True)}
    return torch.stack([by_place[i] for i in range(len(rows))])
