"""Gradient checkpointing in two processes that gather gradients in between: as in one process on the rows of both."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from hyclora import apply_hyclora
from hyclora.models.patch import find_patch
from tests.helpers.offloading import equal
from tests.helpers.ranks import run_ranks
from tests.helpers.replaying import CALIBRATION, Rerun, config, graphed
from tests.helpers.small_models import largest_error, llama, mean_cosine
from tests.models.test_stream import half, ragged

N_STEPS = 16
OFF, BACK = CALIBRATION + 5, CALIBRATION + 9


def batches_of(step: int) -> tuple[list[dict], dict]:
    """The rows of each rank, and of both; each token counts as much in all of them."""
    pair = [ragged(2 * step + rank) for rank in (0, 1)]
    whole = {name: torch.cat([batch[name] for batch in pair]) for name in pair[0]}
    n_labels = int((whole["labels"][:, 1:] != -100).sum())
    return [batch | {"num_items_in_batch": n_labels / 2} for batch in pair], whole | {"num_items_in_batch": n_labels}


def train(model, batch_of, reentrant: bool, late: bool, graphs=None) -> tuple[list[dict], int]:
    """Gradients after each second backward, the first of which is within no_sync, and how many steps were replayed.

    Checkpointing is on for all layers from the first step on, or after calibration if late; off for some steps, and on
    for every second layer at last.
    """
    inner, found, replays = getattr(model, "module", model), [], 0
    for step in range(N_STEPS):
        if step == (CALIBRATION + 2 if late else 0) or step == BACK:
            inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if step == OFF:
            inner.gradient_checkpointing_disable()
        if step == BACK:
            layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
            layers[0].gradient_checkpointing = False
        first = step % 2 == 0
        if first:
            model.zero_grad(set_to_none=step % 4 == 0)
        with model.no_sync() if first and model is not inner else nullcontext():
            loss = model(**batch_of(step)).loss
            replays += graphs is not None and graphs._pending() is not None
            loss.backward()
        if not first:
            found.append({n: p.grad.float().clone() for n, p in inner.named_parameters() if p.grad is not None})
    return found, replays


def scales(model) -> dict[str, torch.Tensor]:
    """What quantizers of inputs have found, each rank's by itself being the same."""
    savers = {c.name: c.savers["layer_in"] for c in find_patch(model).checkpoints if c.savers["layer_in"].state_dict()}
    return {f"{name}.{n}": getattr(saver, n) for name, saver in savers.items() for n in ("mean", "std")}


def compare(rank: int, options: dict, reentrant: bool, late: bool, wrapped: dict) -> None:
    exact = not options
    options = {"layer_type": "baseline", "stream": True} | options
    one, layered, ours = half(llama()), half(llama()), half(llama())
    if not exact:
        apply_hyclora(one, config(**options, cuda_graphs=False))
    by_layers, graphs = graphed(layered, options, recorder=Rerun()), graphed(ours, options, recorder=Rerun())
    by_layers._possible = lambda: False
    expected, _ = train(one, lambda step: batches_of(step)[1], reentrant, late)
    found = []
    for model, recorded in ((layered, by_layers), (ours, graphs)):
        parallel = DistributedDataParallel(model, **wrapped)
        grads, replays = train(parallel, lambda step: batches_of(step)[0][rank], reentrant, late, recorded)
        found.append(grads)
    assert replays and all(equal(a, b) for a, b in zip(*found, strict=True))
    if exact:
        assert all(largest_error(a, b) < 1e-5 for a, b in zip(found[-1], expected, strict=True))
        return
    assert all(mean_cosine(a, b) > 0.999 for a, b in zip(found[-1], expected, strict=True))
    assert scales(ours) and largest_error(scales(ours), scales(one)) < 1e-5


WAYS = {
    "exact": ({}, False, False, {}),
    "reentrant, views": ({}, True, False, {"gradient_as_bucket_view": True}),
    "later, unused": ({}, False, True, {"find_unused_parameters": True}),
    "8 bit": ({"slot_savers": {"layer_in": "quant8"}}, False, False, {}),
    "8 bit, later": ({"slot_savers": {"layer_in": "quant8"}}, True, True, {}),
    "differences": ({"layers": "1*slots,input4"}, False, False, {}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_two_ranks_are_one_on_the_rows_of_both(tmp_path, way):
    run_ranks(compare, tmp_path, *way)
