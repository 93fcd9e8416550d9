"""Logits, maps and padding of replayed layers: what somebody reads is what stock gives, graphs or not."""

import copy

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import CALIBRATION, batches, graphed, replayed
from tests.helpers.small_models import largest_error, llama, padded_batch
from tests.models.test_outputs import distil, results


def padded(n: int) -> list[dict]:
    """Batches of one shape with the same padding."""
    return [padded_batch(rows=2, width=16, seed=seed) for seed in range(n)]


@pytest.mark.parametrize("make", [batches, padded], ids=["whole", "padded"])
def test_a_loss_made_of_logits(make):
    """Looked at in replayed forwards, from the first on or all at once; a later replay writes to the same memory."""
    stock = llama()
    ours = copy.deepcopy(stock)
    graphs = graphed(ours, {"layer_type": "baseline"})
    first, kept = make(CALIBRATION + 4), []
    for batch in first[: CALIBRATION + 2]:
        ours.zero_grad()
        ours(**batch).loss.backward()
    assert replayed(ours, graphs, first[0])
    for batch in first:
        theirs, found = results(stock, batch), results(ours, batch)
        torch.testing.assert_close(found[:2], theirs[:2], atol=1e-5, rtol=1e-5)
        assert largest_error(found[2], theirs[2]) < 1e-5
        kept.append((found[1], found[1].detach().clone()))
    assert all(torch.equal(a, b) for a, b in kept)


def test_logits_of_a_replay_that_others_followed():
    """Its hidden states are its own, not those of the last replay; and so is what is looked at after backward."""
    stock, steps = llama(), batches(CALIBRATION + 5)
    ours = copy.deepcopy(stock)
    graphs = graphed(ours, {"layer_type": "baseline"})
    outputs = []
    for batch in steps:
        outputs.append(ours(**batch))
        outputs[-1].loss.backward()
    assert replayed(ours, graphs, steps[0])
    for batch, output in zip(steps, outputs, strict=True):
        torch.testing.assert_close(output.logits, stock(**batch).logits, atol=1e-5, rtol=1e-5)


def test_maps_are_not_replayed():
    """Before, between and after replays of the same kind of input."""
    stock = llama(attn_implementation="eager")
    ours = copy.deepcopy(stock)
    graphs = graphed(ours, {"layer_type": "baseline"})
    for i, batch in enumerate(batches(CALIBRATION + 6)):
        asked = {"output_attentions": True} if i in (1, CALIBRATION + 4) else {}
        expected, found = (model(**batch, **asked) for model in (stock, ours))
        if asked:
            torch.testing.assert_close(found.attentions, expected.attentions, atol=1e-5, rtol=1e-5)
        exact, mine = (_gradients(model, output) for model, output in ((stock, expected), (ours, found)))
        assert largest_error(mine, exact) < 1e-5
    assert replayed(ours, graphs, batch)


def _gradients(model, outputs) -> dict:
    model.zero_grad()
    loss = outputs.loss + sum(t.square().mean() for t in outputs.attentions or ())
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_states_that_are_asked_for_are_those_of_this_forward():
    stock, steps = llama(), batches(CALIBRATION + 5)
    ours = copy.deepcopy(stock)
    graphs = graphed(ours, {"layer_type": "baseline"})
    kept = []
    for batch in steps:
        ours(**batch).loss.backward()
        kept.append(ours(**batch, output_hidden_states=[0, 1]).hidden_states)
        distil(ours(**batch)).backward()
    assert replayed(ours, graphs, steps[0])
    for batch, states in zip(steps, kept, strict=True):
        expected = stock(**batch, output_hidden_states=[0, 1]).hidden_states
        # older transformers give all of them
        assert len(states) == len(expected) and states[0].device.type == DEVICE
        for mine, theirs in zip(states, expected, strict=True):
            assert mine is theirs is None or torch.allclose(mine, theirs, atol=1e-5)
