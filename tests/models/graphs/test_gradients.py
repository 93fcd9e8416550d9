"""The gradients that graphs add to: whose they are, where they are, and what a backward cannot do."""

import pytest
import torch

from hyclora import apply_hyclora
from tests.helpers.offloading import equal
from tests.helpers.replaying import CALIBRATION, batches, config, graphed, train
from tests.helpers.small_models import llama


def test_an_adapter_that_is_not_trained_gets_no_gradient(recorded):
    """Not even zeros: an optimizer would move it by its momentum."""
    model, graphs, batch = recorded
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)  # PEFT freezes those that are not active
    model.zero_grad()
    train(model, [batch] * 3)
    assert len(graphs.recordings) == 2
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None and "lora" in name}
    assert trained == {"other"}


def halve_in_other_memory(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data = p.grad.data / 2


def test_gradients_that_were_moved(recorded):
    """Their memory is not the buffer's any more, although they are the same tensors."""
    model, graphs, batch = recorded
    reference = llama()
    apply_hyclora(reference, config())
    train(reference, batches(CALIBRATION))
    found = []
    for m in (model, reference):
        m.zero_grad()
        train(m, [batch])
        halve_in_other_memory(m)
        m(**batch).loss.backward()
        found.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    assert equal(*found)


def test_gradients_that_somebody_keeps(recorded):
    """Those of one backward are there after the next one, as for PCGrad."""
    model, graphs, batch = recorded
    model.zero_grad()
    model(**batch).loss.backward()
    kept = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {name: grad.clone() for name, grad in kept.items()}
    model.zero_grad()
    train(model, batches(1))
    assert equal(kept, values)


def test_backwards_that_a_graph_cannot_do_are_refused(recorded):
    model, graphs, batch = recorded
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through the layers"):
        loss.backward()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    train(model, [batch | {"inputs_embeds": embeds}] * 2)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="gradients of single tensors were asked for"):
        torch.autograd.grad(model(**batch, inputs_embeds=embeds).loss, embeds)
    assert all(p.grad is None for p in model.parameters())


def test_recordings_follow_the_dtype():
    """A buffer of the former dtype is no gradient of the new one."""
    model = llama()
    graphs, batch = graphed(model, {}), batches(1)[0]
    train(model, [batch] * (CALIBRATION + 3))
    model.to(torch.bfloat16)
    train(model, [batch] * 3)
    assert len(graphs.recordings) == 2
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.grad is not None)
