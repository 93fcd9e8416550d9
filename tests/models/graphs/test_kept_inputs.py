"""Layers that keep their input alone, replayed: a recorded backward runs them again."""

import copy

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from hyclora import apply_hyclora
from hyclora.models.patch import find_patch
from hyclora.operators import token_tiles
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, Rerun, batches, config, graphed, train
from tests.helpers.small_models import largest_error, llama, padded_batch, qwen3, roberta
from tests.models.test_stream import half, ragged


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}], ids=["plain", "dropout"])
@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("layers", ["input", "input8", "1*slots,input4"])
def test_replayed_steps_are_the_same(layers, offload, lora):
    """Bit for bit, with dropout too, which each replay draws anew; the generator ends where it would have."""
    stock = llama(lora)
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layers=layers))
    graphs = graphed(ours, {"layers": layers}, offload)
    steps, found = batches(1) * (CALIBRATION + 5), []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append((train(model, steps, zero_every=3), torch.rand(4), torch.rand(4, device=DEVICE)))
    (theirs, *after), (mine, *drawn) = found
    assert len(graphs.recordings) == 1
    assert all(equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(drawn, after, strict=True))
    assert (len({step["loss"].item() for step in mine}) == len(mine)) == bool(lora)


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize(
    ("family", "options", "leave_out"),
    [(llama, {}, None), (llama, {}, 2), (llama, {"slot_savers": {"layer_in": "quant8"}}, None), (roberta, {}, None)],
    ids=["all", "some", "quant8", "roberta"],
)
def test_gradient_checkpointing_is_replayed(family, options, leave_out, reentrant, offload):
    """As torch's runs layer by layer, dropout too, and switched on and off in between."""
    stock = family({"lora_dropout": 0.3})
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(cuda_graphs=False, **options))
    graphs = graphed(ours, options, offload)
    steps, found = batches(1) * (CALIBRATION + 4), []
    for model in (stock, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[::leave_out] if leave_out else ():
            layer.gradient_checkpointing = False
        torch.manual_seed(7)
        found.append(train(model, steps))
        assert model is stock or len(graphs.recordings) == 1
        model.gradient_checkpointing_disable()
        found[-1] += train(model, steps[:3])
    assert len(graphs.recordings) == 2
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
def test_inputs_that_are_kept_as_differences(offload):
    """Those of a whole chain are in the memory of one recording, or on the host."""
    stock = llama({"lora_dropout": 0.3}, num_hidden_layers=6)
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layers="input4"))
    graphs, steps, found = graphed(ours, {"layers": "input4"}, offload), batches(1) * (CALIBRATION + 5), []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append(train(model, steps, zero_every=3))
    assert len(graphs.recordings) == 1 and graphs.step.restored is None
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


def test_steps_of_several_tiles(monkeypatch):
    """Each of which draws seeds of its own; late MLPs, whose gradients are recorded with what they make first."""
    monkeypatch.setattr(token_tiles, "TILE_TOKENS", 8)
    stock = llama({"lora_dropout": 0.3})
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layers="input8"))
    graphs, found = graphed(ours, {"layers": "input8"}), []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append(train(model, batches(1) * (CALIBRATION + 4)))
    assert len(graphs.recordings) == 1
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


def test_an_encoders_steps():
    stock = roberta(hidden_dropout_prob=0.1)
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layers="input8"))
    graphs = graphed(ours, {"layers": "input8"})
    found = []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append(train(model, batches(1) * (CALIBRATION + 4)))
    assert len(graphs.recordings) == 1
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


def test_a_stream_of_other_rows():
    """One recording serves rows of other lengths, which the second run of a layer finds in their places."""
    stock = half(llama())
    ours = copy.deepcopy(stock)
    apply_hyclora(stock, config(layers="input8"))
    graphs = graphed(ours, {"layers": "input8"})
    steps = [padded_batch(seed=seed) for seed in range(CALIBRATION + 4)]
    theirs, mine = train(stock, steps), train(ours, steps)
    assert graphs.recordings and graphs.sizes.recorded
    near = {"atol": 1e-5, "rtol": 1e-4} if DEVICE == "cpu" else {"atol": 1e-2, "rtol": 0}
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys() and all(torch.allclose(a[n], b[n], **near) for n in a)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("drops", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", [llama, qwen3, roberta], ids=lambda f: f.__name__)
def test_gradient_checkpointing_of_a_stream_of_other_rows(family, side, drops, reentrant):
    """As layer by layer bit for bit, rows filled up alike; and as stock does it, but for what that drops."""
    stock = half(family({"lora_dropout": 0.3} if drops else {}, num_hidden_layers=3))
    theirs, ours = copy.deepcopy(stock), copy.deepcopy(stock)
    options = {"layer_type": "baseline", "stream": True}
    by_layers, graphs = graphed(theirs, options, recorder=Rerun()), graphed(ours, options, recorder=Rerun())
    by_layers._possible = lambda: False
    steps, found = [ragged(seed, side=side) for seed in range(CALIBRATION + 6)], []
    for model in (stock, theirs, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(7)
        found.append(train(model, steps))
    exact, expected, found = found
    assert graphs.recordings and len({int(batch["attention_mask"].sum()) for batch in steps}) > len(graphs.recordings)
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    near = 0.1 if DEVICE == "cuda" else 1e-5
    assert drops or all(largest_error(a, b) < near for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_inputs_of_a_stream_that_were_not_there_to_calibrate_on(some):
    """Checkpointing begins after calibration: the first such step calibrates, layer by layer, and what is frozen then
    is what all replays read."""
    stock = half(llama({"lora_dropout": 0.3}))
    ours = copy.deepcopy(stock)
    options = {"slot_savers": {"layer_in": "quant8"}, "stream": True}
    by_layers, graphs = graphed(stock, options, recorder=Rerun()), graphed(ours, options, recorder=Rerun())
    by_layers._possible = lambda: False
    found, savers = [], []
    for model in (stock, ours):
        torch.manual_seed(7)
        found.append(train(model, [ragged(seed) for seed in range(CALIBRATION + 4)]))
        model.gradient_checkpointing_enable()
        first, *_ = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        first.gradient_checkpointing = not some
        found[-1] += train(model, [ragged(seed) for seed in range(9, 15)])
        first.gradient_checkpointing = True
        found[-1] += train(model, [ragged(seed) for seed in range(15, 20)])
        savers.append([checkpoint.savers["layer_in"] for checkpoint in find_patch(model).checkpoints])
    assert len({kind[1] for kind in graphs.recordings}) == 2 + some
    assert all(equal(a.statistics, b.statistics) and a.statistics for a, b in zip(*savers, strict=True))
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layers", ["slots", "input"])
def test_a_weight_that_two_projections_of_a_layer_share(layers):
    """Its gradient is the sum of both, as in stock."""
    found = []
    for recorded in (False, True):
        model = llama()
        for layer in model.get_base_model().model.layers:
            layer.self_attn.k_proj.lora_A["default"].weight = layer.self_attn.q_proj.lora_A["default"].weight
        graphs = graphed(model, {"layer_type": "baseline", "layers": layers}) if recorded else None
        if layers == "slots":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(train(model, batches(CALIBRATION + 4)))
    assert len(graphs.recordings) == 1
    assert all(largest_error(a, b) < 1e-5 for a, b in zip(*found, strict=True))
