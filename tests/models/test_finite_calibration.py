"""Numbers that are not finite, or too large, while slots are calibrated: calibration begins again without them."""

import math

import pytest
import torch

from hyclora import FiniteGradients
from hyclora.models.config import POLICIES
from hyclora.models.patch import find_patch
from tests.helpers.offloading import equal
from tests.helpers.small_models import gradients, llama, padded_batch
from tests.models.test_finite import BASELINE, LAYER, POISON, Pair, overflow_embedding, patched, weights


@pytest.mark.parametrize("of, autocast", [(1e10, False), (1e20, True), (math.inf, True)], ids=str)
@pytest.mark.parametrize(
    "config",
    [{"layer_type": name} for name in POLICIES] + [{"layers": "input4"}, {"scale_rule": "paper", "attention": "eager"}],
    ids=str,
)
def test_a_calibrating_step_that_is_skipped_is_not_calibrated_on(config, of, autocast, caplog):
    """Bit for bit, though numbers before those that overflow are finite, and wide enough for errors of 1e7."""
    found = []
    for poisoned in (False, True):
        model = patched(llama, **config)
        finite = FiniteGradients(model, "skip")
        with finite.listening(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if poisoned:
                up = weights(model, f"{LAYER}.0.mlp.up_proj")
                before = up.clone()
                up.mul_(of)
                (model(**padded_batch(seed=1)).loss * math.inf).backward()
                up.copy_(before)
                assert not finite.allows(1)
                assert (", and calibration begins again" in caplog.text) == (config != BASELINE)
            found.append(gradients(model, padded_batch(seed=2))[1])
            assert finite.allows(2)
    assert equal(*found)


def test_a_calibration_on_numbers_that_are_not_finite_is_another_ones_place(caplog):
    """A GradScaler, or a loop that skips steps by itself, tells nobody."""
    found = []
    for poisoned in (False, True):
        model = overflow_embedding(patched(layer_type="intra_inter"))
        if poisoned:
            batch = padded_batch()
            batch["input_ids"][:, 0] = POISON
            gradients(model, batch)
        gradients(model, padded_batch(vocab=POISON, seed=1))
        found.append(gradients(model, padded_batch(vocab=POISON, seed=2))[1])
    assert equal(*found) and caplog.text.count("was finite while calibrating") == 1


def test_a_slot_that_is_never_finite_is_told_of_once(caplog):
    """By its name, and with what to do; others have theirs when they are not finite either."""
    model = overflow_embedding(patched(layer_type="intra_inter"))
    up = weights(model, f"{LAYER}.1.mlp.up_proj")
    before = up.clone()
    up.fill_(math.inf)
    batch = padded_batch(vocab=POISON)
    for _ in range(4):
        gradients(model, batch)
    (told,) = [record.getMessage() for record in caplog.records if "while calibrating" in record.getMessage()]
    assert f"no activation of slot up of {LAYER}.1.mlp (and " in told and "use bfloat16 in place of fp16" in told
    assert find_patch(model).calibration.restarts == 0, "the gauge looks as often as before"
    batch["input_ids"][:, 0] = POISON  # which all tokens see
    for _ in range(2):
        gradients(model, batch)
    assert caplog.text.count("was finite while calibrating") == 2
    up.copy_(before)
    for seed in range(2):
        gradients(model, padded_batch(vocab=POISON, seed=seed))
    assert not find_patch(model).step.calibrating and caplog.text.count("was finite while calibrating") == 2


def test_of_two_models_those_that_calibrate_on_a_skipped_step_begin_anew(caplog):
    pair = Pair()
    gradients(pair.actor, padded_batch())
    finite = FiniteGradients(pair, "skip")
    with finite.listening():
        pair.step(seed=1)
        assert not finite.allows(1, math.inf)
    assert "critic" not in caplog.text and "calibration begins again" in caplog.text
    assert [find_patch(model).calibration.begun for model in (pair.actor, pair.critic)] == [0, 1]
    assert all(p.grad is None for p in pair.parameters())
