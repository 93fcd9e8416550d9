"""Rows and activations at the edge: gradients are finite, and as near the exact ones as those of usual rows."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, padded_batch, qwen3, roberta

MODELS = {"llama": llama, "qwen3": qwen3, "roberta": roberta}
USUAL = 0.98  # of the default on usual rows, whatever the model
# the least cosine of settings on usual rows
CONFIGS = [({}, USUAL), ({"layer_type": "intra_inter", "scale_rule": "paper"}, 0.97), ({"layers": "input4"}, 0.98)]
FIRST = 1  # a token that begins rows


def usual(seed):
    return padded_batch(seed=seed)


def begins(seed):
    batch = padded_batch(seed=seed)
    batch["input_ids"][:, 0] = FIRST
    return batch


def shortened(length, row=1):
    """A row has so many tokens, the others are padded on the left."""

    def make(seed):
        batch = padded_batch(seed=seed)
        mask = batch["attention_mask"].flip(1)
        mask[row, : mask.shape[1] - length] = 0
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        return batch | {"attention_mask": mask, "labels": labels}

    return make


def unchanged(model):
    pass


@torch.no_grad()
def silent_channels(model):
    """8 channels that are 0 for every token: of the residual stream, and of q, gate and up."""
    parts = ("q_proj", "gate_proj", "up_proj", "o_proj", "down_proj", "query", "intermediate.dense", "output.dense")
    for name, p in model.named_parameters():
        if "embeddings.weight" in name or "embed_tokens" in name:
            p[:, :8] = 0
        elif any(f"{part}." in name for part in parts) and "lora_A" not in name:
            p[:8] = 0


@torch.no_grad()
def massive_activation(model):
    """The first token of each row has 10,000 times the median in one channel, as pretrained models have."""
    weight = model.get_input_embeddings().weight
    weight[FIRST, 3] = 1e4 * weight.abs().median()


EDGES = {
    "silent channels": (silent_channels, usual),
    "massive activation": (massive_activation, begins),
    "a row of padding alone": (unchanged, shortened(0)),
    "a row of one token": (unchanged, shortened(1)),
}


@pytest.mark.parametrize("config, least", CONFIGS, ids=["default", "paper", "input4"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_as_near_as_usual(name, edge, config, least):
    model, (change, make) = MODELS[name](), EDGES[edge]
    change(model)
    exact = gradients(model, make(9))[1]
    apply_hyclora(model, HycloraConfig(iteration_threshold=2, **config))
    for seed in range(2):
        gradients(model, make(seed))
    ours = gradients(model, make(9))[1]
    assert all(g.isfinite().all() for g in ours.values()) and ours.keys() == exact.keys()
    largest = max(g.norm() for g in exact.values())
    told = {name: g for name, g in exact.items() if g.norm() > 1e-6 * largest}
    assert len(told) > len(exact) / 2 and mean_cosine(ours, told) > least


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", MODELS)
def test_exact_slots_give_exact_gradients(name, edge):
    model, (change, make) = MODELS[name](), EDGES[edge]
    change(model)
    exact = gradients(model, make(9))[1]
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    ours = gradients(model, make(9))[1]
    largest = max(g.norm() for g in exact.values())
    told = {name for name, g in exact.items() if g.norm() > 1e-6 * largest}
    assert largest_error({n: ours[n] for n in told}, {n: exact[n] for n in told}) < 1e-3


def of_shape(rows, width):
    ids = torch.zeros(rows, width, dtype=torch.long, device=DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def without_targets(padding):
    batch = padded_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    return batch | ({"attention_mask": torch.zeros_like(batch["attention_mask"])} if padding else {})


LOST = {"masked": without_targets(False), "padding alone": without_targets(True), "one token a row": of_shape(3, 1)}


def outcome(model, batch):
    """Whether the loss is a number, which gradients are more than rounding, and whether all are finite."""
    loss, found = gradients(model, batch)
    some = {name for name, g in found.items() if not g.abs().max() <= 1e-8}
    return loss == loss, some, all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("batch", LOST)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_targets_does_what_it_does_in_stock_and_harms_no_other(name, batch):
    """While calibration lasts, too."""
    model, batch = MODELS[name](), LOST[batch]
    stock = outcome(model, batch)
    exact = gradients(model, usual(9))[1]
    apply_hyclora(model, HycloraConfig(iteration_threshold=2))
    assert outcome(model, batch) == stock
    for seed in range(2):
        gradients(model, usual(seed))
    assert outcome(model, batch) == stock
    assert mean_cosine(gradients(model, usual(9))[1], exact) > USUAL


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_tokens_is_refused(name, shape):
    """Stock code cannot have it either; the next batch is as if it had not been."""
    model = MODELS[name]()
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        model(**of_shape(*shape))
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    with pytest.raises(ValueError, match=rf"a batch of shape \[{shape[0]}, {shape[1]}\] has no token: leave it out"):
        model(**of_shape(*shape))
    assert all(g.isfinite().all() for g in gradients(model, usual(0))[1].values())
