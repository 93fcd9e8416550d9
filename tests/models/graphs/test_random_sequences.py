"""Whatever follows on what: steps on batches of all kinds, evaluation, saving, switches; replayed or one by one."""

import copy
import random

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from hyclora import apply_hyclora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import Rerun, config, graphed, nothing_around
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


@torch.no_grad()
def generate(model, draw: random.Random, folder) -> None:
    """By a decoder, in training too, as TRL's trainers do in between."""
    if model.get_base_model().can_generate():
        model.train(draw.random() < 0.5)
        model.generate(input_ids=torch.arange(5, device=DEVICE)[None], max_new_tokens=3, do_sample=False)
        model.train()


def checkpoint(model, draw: random.Random, folder, **options) -> None:
    """Every so-many-th layer."""
    model.gradient_checkpointing_enable({"use_reentrant": draw.random() < 0.5} | options)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    every = draw.choice((1, 1, 2, 3))
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == every - 1


def checkpoint_otherwise(model, draw: random.Random, folder) -> None:
    """With an option of somebody's, which no graph knows."""
    checkpoint(model, draw, folder, use_reentrant=False, context_fn=nothing_around)


def stop_checkpointing(model, draw: random.Random, folder) -> None:
    model.gradient_checkpointing_disable()


EVENTS = (evaluate, save, switch_dropout, freeze, forget)
CHECKPOINTING = (checkpoint, checkpoint, stop_checkpointing, generate)


def run(model, seed: int, folder, events=EVENTS) -> list[dict]:
    """Losses and gradients; both are added up over some steps."""
    draw, found = random.Random(seed), []
    for step in range(N_STEPS):
        torch.manual_seed(step)
        if draw.random() < 0.3:
            draw.choice(events)(model, draw, folder)
        if draw.random() < 0.7:
            model.zero_grad(set_to_none=draw.random() < 0.5)
        loss = model(**BATCHES[draw.choice(list(BATCHES))](draw)).loss
        loss.backward()
        grads = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach().float()} | grads)
    return found


def by_layers(model, options: dict) -> None:
    apply_hyclora(model, config(**options, cuda_graphs=False))


def filled(model, options: dict) -> None:
    """Layer by layer too, of rows that are filled up: a sum that is rounded otherwise may turn a code."""
    graphed(model, options, recorder=Rerun())._possible = lambda: False


def stock(model, options: dict) -> None:
    pass


def compare(family, lora: dict, options: dict, events: tuple, seed: int, folder, *references) -> None:
    """Replayed steps with those of references."""
    model = half(family(lora, num_hidden_layers=3))
    others = [copy.deepcopy(model) for _ in references]
    options = {"layer_type": "baseline", "stream": True} | options
    graphs = graphed(model, options, recorder=Rerun())
    found = run(model, seed, folder, events)
    assert graphs.recordings
    for other, prepare in zip(others, references, strict=True):
        prepare(other, options)
        for ours, theirs in zip(found, run(other, seed, folder, events), strict=True):
            assert ours.keys() == theirs.keys()
            assert largest_error(ours, theirs) < (5e-2 if DEVICE == "cuda" else 1e-5)


@pytest.mark.parametrize(
    "family, seed", [*((llama, seed) for seed in range(7)), *((roberta, seed) for seed in range(3))]
)
def test_replays_give_what_layers_give(family, seed, tmp_path):
    compare(family, {"lora_dropout": 0.1}, {}, EVENTS, seed, tmp_path, by_layers)


KEPT = {
    "slots": {},
    "inputs": {"layers": "input"},
    "4 bit": {"layers": "1*slots,input4"},
    "8 bit": {"slot_savers": {"layer_in": "quant8"}},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kept", ["slots", "inputs"])
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_checkpointing_that_comes_and_goes_is_stocks(family, kept, seed, tmp_path):
    """Of which layers, and by what, without anything that drops."""
    events = (*(event for event in EVENTS if event is not switch_dropout), *CHECKPOINTING, checkpoint_otherwise)
    compare(family, {}, KEPT[kept], events, seed, tmp_path, by_layers, stock)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kept", ["inputs", "4 bit", "8 bit"])
def test_checkpointing_that_comes_and_goes(kept, seed, tmp_path):
    """With dropout, and inputs that are quantized."""
    compare(llama, {"lora_dropout": 0.1}, KEPT[kept], (*EVENTS, *CHECKPOINTING), seed, tmp_path, filled)
