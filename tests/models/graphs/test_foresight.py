"""Replays that start before Hugging Face's code: only where their input is known."""

import pytest
import torch
from torch import nn

from hyclora import apply_hyclora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, batches, config, graphed, starts, train
from tests.helpers.small_models import llama


def test_a_replay_starts_before_hugging_faces_code(recorded, monkeypatch):
    """Where nothing but the tokens is new: not where this step or the last has positions or embeddings of its own."""
    model, graphs, batch = recorded
    stock = llama()
    apply_hyclora(stock, config())
    train(stock, batches(CALIBRATION))
    events, lookup = starts(graphs), nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda *args: (events.append("embeddings"), lookup(*args))[1])
    plain = batches(3)
    elsewhere = batch | {"position_ids": 3 * torch.arange(16, device=DEVICE)[None]}
    early, late = ["start", "embeddings"], ["embeddings", "start"]

    def check(given, expected):
        theirs = train(stock, [given])[0]
        events.clear()
        assert equal(train(model, [given])[0], theirs)
        assert events == expected

    for given, expected in ((plain[0], early), (elsewhere, late), (plain[1], late), (plain[2], early)):
        check(given, expected)
    for m in (model, stock):  # as NEFTune does
        m.get_input_embeddings().register_forward_hook(lambda module, args, x: 2 * x)
    check(plain[0], late)


def change_ids(model):
    """As word dropout does."""
    decoder = model.get_base_model().model
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"input_ids": kwargs["input_ids"].flip(1)}), with_kwargs=True
    )


def change_angles(model):
    model.get_base_model().model.rotary_emb.inv_freq.mul_(0.5)


def hook_angles(model):
    model.get_base_model().model.rotary_emb.register_forward_hook(lambda module, args, found: [t * 0.5 for t in found])


@pytest.mark.parametrize("change", [change_ids, change_angles, hook_angles])
def test_what_changes_the_first_layers_input_is_seen(recorded, change):
    model, graphs, batch = recorded
    for _ in range(2):  # as they were, and after the change
        found = train(model, [batch])[0]
        with graphs.paused():
            assert equal(found, train(model, [batch])[0])
        change(model)


def test_angles_that_follow_the_longest_row():
    """Dynamic scaling: an evaluation of longer rows changes cos and sin of later steps with the same input."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = llama(max_position_embeddings=8, rope_parameters=scaling)
    graphs, batch = graphed(model, {}), batches(1)[0]
    train(model, [batch] * (CALIBRATION + 3))
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 40, dtype=torch.long, device=DEVICE))
    model.train()
    found = train(model, [batch])[0]
    with graphs.paused():
        assert equal(found, train(model, [batch])[0])
