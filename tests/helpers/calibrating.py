"""Rows to calibrate on, usual and poor ones, and what calibration has made of them."""

import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.patch import find_patch
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import gradients, llama

WIDTH = 24


def batch_of(ids, mask=None) -> dict:
    mask = torch.ones_like(ids) if mask is None else mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: t.to(DEVICE) for name, t in batch.items()}


def usual(seed: int, rows=3, width=WIDTH, low=0, high=128) -> dict:
    return batch_of(torch.randint(low, high, (rows, width), generator=torch.Generator().manual_seed(seed)))


def as_embeddings(model, batch: dict) -> dict:
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    return {name: t for name, t in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}


def repeated(pattern: list[int], rows=4, width=64) -> dict:
    """Rows that are this over and over."""
    return batch_of(torch.tensor(pattern).repeat(rows, width // len(pattern)))


def padding_only() -> dict:
    ids = torch.full((4, 8), 5)
    return batch_of(ids, torch.zeros_like(ids)) | {"labels": ids.to(DEVICE)}


POOR = {
    "empty": lambda: batch_of(torch.tensor([[1, 2]] * 4)),
    "many empty": lambda: batch_of(torch.tensor([[1, 2]] * 64)),
    "one id": lambda: repeated([1]),
    "two ids": lambda: repeated([1, 7]),
    "one short row": lambda: batch_of(torch.tensor([[1, 9, 8, 4, 2]] * 40)),
    "padding only": padding_only,
    "no mask on the padding": lambda: batch_of(torch.tensor([[1, 5, 2] + [3] * 61] * 4)),
}


def patched(threshold=5, model=None, **config):
    model = llama() if model is None else model
    apply_hyclora(model, HycloraConfig(iteration_threshold=threshold, **config))
    return model, find_patch(model)


def run(model, batches) -> None:
    for batch in batches:
        gradients(model, batch)


def statistics(patch) -> dict:
    return {(b.name, n): s.state_dict() for b in patch.blocks for n, s in b.savers.items() if s.state_dict()}


def count(patch) -> int:
    """Tokens in the statistics."""
    (found,) = {int(state["count"]) for state in statistics(patch).values()}
    return found
