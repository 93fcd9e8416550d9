"""Layers that run one by one, as a graph cannot do what they are to do: and are replayed again afterwards."""

import pytest
import torch

from hyclora import apply_hyclora, remove_hyclora
from hyclora.models.graphs import layer_graphs
from hyclora.utils.checkpointing import checkpoint_layers
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, batches, config, graphed, nothing_around, replayed, train
from tests.helpers.small_models import llama


def test_layers_run_by_themselves_where_a_graph_cannot(recorded):
    model, graphs, batch = recorded
    with graphs.paused():
        assert not replayed(model, graphs, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": nothing_around})
    assert not graphs.able and not replayed(model, graphs, batch)
    model.gradient_checkpointing_disable()
    with model.disable_adapter():
        model(**batch)
        assert graphs._pending() is None
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    assert graphs._pending() is None
    model.train()
    # checkpointing has made the embeddings' output require a gradient, which is another kind of input
    train(model, [batch] * 2)
    assert replayed(model, graphs, batch)
    remove_hyclora(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)


def test_one_layer_that_is_checkpointed_by_a_function_of_somebodys_is_enough(recorded):
    """A stream must not be filled up for recordings that cannot be."""
    model, graphs, batch = recorded
    assert graphs.able
    checkpoint_layers(model, leave_out=2)
    assert not graphs.layers[0].module.gradient_checkpointing
    graphs.layers[1].module._gradient_checkpointing_func = lambda function, *args: function(*args)
    assert not replayed(model, graphs, batch) and not graphs.able


def test_saved_tensors_that_somebody_packs(recorded):
    """As save_on_cpu does, and checkpointing of the whole model: they get what the layers save."""
    model, graphs, batch = recorded
    with torch.autograd.graph.save_on_cpu():
        assert not replayed(model, graphs, batch)
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(lambda: model(**batch).loss, use_reentrant=False).backward()
    assert replayed(model, graphs, batch)


def test_a_layer_by_itself_between_two_steps(recorded):
    """Says nothing of the step before."""
    model, graphs, batch = recorded
    decoder = model.get_base_model().model
    hidden = decoder.embed_tokens(batch["input_ids"]).detach()
    angles = decoder.rotary_emb(hidden, torch.arange(16, device=DEVICE)[None])
    with torch.no_grad():
        decoder.layers[1](hidden, position_embeddings=angles)
    assert replayed(model, graphs, batch)


def test_a_final_norm_that_is_trained_alone():
    model = llama({"target_modules": ["lm_head"]})
    model.get_base_model().model.norm.weight.requires_grad_()
    graphs = graphed(model, {})
    train(model, batches(CALIBRATION + 3))
    assert not graphs.recordings


def test_arguments_that_cannot_be_compared(recorded):
    model, graphs, batch = recorded
    output = model(**batch, tag={1, 2})
    assert graphs._pending() is None
    output.loss.backward()


def test_recordings_of_adapters_as_they_were_make_room(recorded, monkeypatch):
    """Where other parameters are trained every few steps there is no end of states."""
    model, graphs, batch = recorded
    monkeypatch.setattr(layer_graphs, "MAX_RECORDINGS", 2)
    reference = llama()
    apply_hyclora(reference, config())
    train(reference, batches(CALIBRATION))
    pools = []
    for i in range(4):
        for m in (model, reference):
            names = [n for n, _ in m.named_parameters() if "lora_" in n]
            for j, name in enumerate(names):
                m.get_parameter(name).requires_grad_(j % 5 != i)
        pools.append(graphs.recorder)
        for step in batches(3):
            assert equal(train(model, [step])[0], train(reference, [step])[0])
        assert replayed(model, graphs, batch) and len(graphs.recordings) <= 2
    assert len(set(map(id, pools))) > 1, "a pool whose graphs are all gone is used again"


@pytest.mark.parametrize("graphs_are", ["auto", True])
def test_no_memory_to_record(graphs_are, monkeypatch, caplog):
    """auto goes on layer by layer, and says so."""
    model, reference = llama(), llama()
    graphs = graphed(model, {})
    apply_hyclora(reference, config())
    graphs.patch.config.cuda_graphs = graphs_are

    def full(run):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs.recorder, "record", full)
    steps = batches(CALIBRATION + 4)
    if graphs_are is True:
        with pytest.raises(torch.OutOfMemoryError):
            train(model, steps)
        return
    found, expected = train(model, steps), train(reference, steps)
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert caplog.text.count("not enough GPU memory to record") == 1
