"""A patch that is taken off between a forward and its backward: kept slots are enough, what runs again is refused."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch, roberta

REFUSED = "the patch was taken off between a forward and its backward, which runs .* again; run the backward first"
SETTINGS = {
    "slots": {},
    "exact": {"layer_type": "baseline"},
    "layers of their own": {"layers": "input4"},
    "quantized": {"slot_savers": {"layer_in": "quant8"}},
}


def hugging_face(reentrant: bool):
    def enable(model) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    return enable


def around_forwards(reentrant: bool):
    """What somebody puts around each layer's forward."""

    def wrap(model) -> None:
        model.enable_input_require_grads()
        for layer in layers_of(model):
            layer.forward = wrapped(layer.forward)

    def wrapped(forward):
        return lambda x, *args, **kwargs: checkpoint(lambda x: forward(x, *args, **kwargs), x, use_reentrant=reentrant)

    return wrap


def around_modules(model) -> None:
    """As torch wraps them."""
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))


def layers_of(model) -> list:
    base = model.get_base_model()
    return list(base.model.layers if hasattr(base, "model") else base.roberta.encoder.layer)


WAYS = {
    "transformers, reentrant": hugging_face(True),
    "transformers": hugging_face(False),
    "around forwards, reentrant": around_forwards(True),
    "around forwards": around_forwards(False),
    "around modules": around_modules,
}


def forward(make, settings: dict, checkpointing, batch: dict) -> tuple:
    """A model and its loss, behind a step that calibrated."""
    model = make()
    apply_hyclora(model, HycloraConfig(iteration_threshold=1, **settings))
    gradients(model, batch)
    checkpointing(model)
    return model, model(**batch).loss


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("checkpointing", WAYS.values(), ids=WAYS)
def test_what_runs_again_is_refused(checkpointing, settings):
    """Before, stock attention was given what tells blocks of the mask, or torch counted other tensors."""
    model, loss = forward(llama, settings, checkpointing, padded_batch())
    remove_hyclora(model)
    with pytest.raises(ValueError, match=REFUSED):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_encoder_that_runs_again_is_refused(reentrant):
    model, loss = forward(roberta, {}, hugging_face(reentrant), padded_batch())
    remove_hyclora(model)
    with pytest.raises(ValueError, match=REFUSED):
        loss.backward()


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter"])
def test_without_checkpointing_the_slots_are_enough(layer_type):
    found, batch = [], padded_batch()
    for taken_off in (False, True):
        model, loss = forward(llama, {"layer_type": layer_type}, lambda model: None, batch)
        if taken_off:
            remove_hyclora(model)
        model.zero_grad()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert largest_error(*found) == 0


@pytest.mark.parametrize("checkpointing", WAYS.values(), ids=WAYS)
def test_training_goes_on_as_stock(checkpointing):
    """Behind the refusal too, with the same checkpointing around it."""
    batch, stock = padded_batch() | {"use_cache": False}, llama()  # which stock layers would add to twice
    model, loss = forward(llama, {}, checkpointing, batch)
    remove_hyclora(model)
    with pytest.raises(ValueError, match=REFUSED):
        loss.backward()
    checkpointing(stock)
    assert all(map(torch.equal, *(gradients(m, batch)[1].values() for m in (model, stock))))


@pytest.mark.parametrize("checkpointing", [hugging_face(True), hugging_face(False)], ids=["reentrant", "not reentrant"])
def test_torchs_checkpointing_is_as_it_was(checkpointing):
    model = llama()
    checkpointing(model)
    before = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    gradients(model, padded_batch())
    remove_hyclora(model)
    assert [layer._gradient_checkpointing_func for layer in layers_of(model)] == before
