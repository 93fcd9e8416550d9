"""Whatever follows on what: steps on batches of all kinds, evaluation, saving, switches; replayed or one by one."""

import copy
import random

import pytest
import torch

from hyclora import apply_hyclora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import Rerun, config, graphed
from tests.helpers.small_models import largest_error, llama, padded_batch, roberta
from tests.models.test_stream import half, ragged

N_STEPS = 24


def full(draw: random.Random) -> dict:
    """Rows without padding, of one of few shapes."""
    batch = padded_batch(rows=draw.choice((1, 2)), width=draw.choice((16, 24)), seed=draw.randrange(99))
    batch["attention_mask"].fill_(1)
    return batch | {"labels": batch["input_ids"]}


BATCHES = {
    "right": lambda draw: ragged(draw.randrange(99), longest=draw.choice((33, 60))),
    "left": lambda draw: ragged(draw.randrange(99), side="left"),
    "packed": lambda draw: ragged(draw.randrange(99), rows=draw.choice((3, 9)), packed=True),
    "full": full,
}


@torch.no_grad()
def evaluate(model, draw: random.Random, folder) -> None:
    model.eval()
    model(**BATCHES["right"](draw))
    model.train()


def save(model, draw: random.Random, folder) -> None:
    model.save_pretrained(folder)


def switch_dropout(model, draw: random.Random, folder) -> None:
    p = draw.choice((0.0, 0.3))
    for name, module in model.named_modules():
        if "lora_dropout.default" in name:
            module.p = p


def freeze(model, draw: random.Random, folder) -> None:
    """Or train again: every third of the adapters' matrices."""
    trained = draw.random() < 0.5
    for name, parameter in list(model.named_parameters())[:: draw.choice((3, 5))]:
        if "lora_" in name:
            parameter.requires_grad_(trained)


def forget(model, draw: random.Random, folder) -> None:
    """A forward without a backward."""
    model(**BATCHES["right"](draw))


EVENTS = (evaluate, save, switch_dropout, freeze, forget)


def run(model, seed: int, folder) -> list[dict]:
    """Losses and gradients; both are added up over some steps."""
    draw, found = random.Random(seed), []
    for step in range(N_STEPS):
        torch.manual_seed(step)
        if draw.random() < 0.3:
            draw.choice(EVENTS)(model, draw, folder)
        if draw.random() < 0.7:
            model.zero_grad(set_to_none=draw.random() < 0.5)
        loss = model(**BATCHES[draw.choice(list(BATCHES))](draw)).loss
        loss.backward()
        grads = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach().float()} | grads)
    return found


@pytest.mark.parametrize(
    "family, seed", [*((llama, seed) for seed in range(10)), *((roberta, seed) for seed in range(4))]
)
def test_replays_give_what_layers_give(family, seed, tmp_path):
    options = {"layer_type": "baseline", "stream": True}
    reference = half(family({"lora_dropout": 0.1}))
    ours = copy.deepcopy(reference)
    apply_hyclora(reference, config(**options, cuda_graphs=False))
    graphs = graphed(ours, options, recorder=Rerun())
    found, expected = run(ours, seed, tmp_path), run(reference, seed, tmp_path)
    assert graphs.recordings
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert largest_error(ours, theirs) < (5e-2 if DEVICE == "cuda" else 1e-5)
