"""Gradient checkpointing whose layer inputs are slots."""

import inspect
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.config import POLICIES
from hyclora.models.patch import find_patch
from hyclora.operators.store import UNITS_A_LAYER
from hyclora.utils.profiling import buffered_bytes
from tests.helpers.offloading import EXACT_MLP, equal, offloaded
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, padded_batch

pytestmark = pytest.mark.usefixtures("deterministic_attention")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_checkpointing_gives_what_torchs_gives(layer_type, use_reentrant):
    """Layer inputs go to the host instead of blocks' slots; random state and calibration are those of torch's.

    Gradients are those of MLPs with exact slots, whatever their savers. In fp64, where no code is rounded to another
    side.
    """
    model, batches = llama({"lora_dropout": 0.1}).double(), [padded_batch(seed=seed) for seed in range(3)]
    config = HycloraConfig(layer_type=layer_type, iteration_threshold=2)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, iteration_threshold=2, slot_savers=EXACT_MLP))
    expected = [gradients(model, batch)[1] for batch in batches]
    remove_hyclora(model)
    stock = model.get_base_model().model.layers[0]._gradient_checkpointing_func
    store = offloaded(model, config)
    for batch, theirs in zip(batches, expected, strict=True):
        assert largest_error(gradients(model, batch)[1], theirs) < 1e-6
        assert store.host_bytes == store.device_bytes == 0
    assert store._serial == 3 * (2 * UNITS_A_LAYER + 1)
    remove_hyclora(model)
    assert model.get_base_model().model.layers[0]._gradient_checkpointing_func is stock


def test_checkpointing_that_a_trainer_switches():
    """Switched on after apply_hyclora, without gradients of the input; off again, nothing is left of it."""
    model, batch = llama(), padded_batch()
    store = offloaded(model, HycloraConfig(layer_type="baseline"))
    _, expected = gradients(model, batch)
    blocks = store._serial
    model.gradient_checkpointing_enable()
    _, ours = gradients(model, batch)
    assert store._serial == blocks + 2 * UNITS_A_LAYER + 1 and largest_error(ours, expected) < 1e-5
    model.gradient_checkpointing_disable()
    assert equal(gradients(model, batch)[1], expected) and store._serial == 2 * blocks + 2 * UNITS_A_LAYER + 1


@pytest.mark.parametrize("store", [False, True])
def test_checkpointing_with_compressed_layer_inputs(store):
    """slot_savers can compress what checkpointing keeps, on the device as well."""
    model, batch = llama(num_hidden_layers=4), padded_batch()
    _, exact = gradients(model, batch)
    model.gradient_checkpointing_enable()
    bytes_kept = {}
    for name in ("exact", "quant8", "quant4"):
        config = HycloraConfig(layer_type="baseline", slot_savers={"layer_in": name})
        offloaded(model, config, window=0) if store else apply_hyclora(model, config)
        _, ours = gradients(model, batch)
        bytes_kept[name] = find_patch(model).store.arena.pinned if store else buffered_bytes(model, batch)
        assert mean_cosine(ours, exact) > {"exact": 1 - 1e-6, "quant8": 0.999, "quant4": 0.97}[name]
        assert (largest_error(ours, exact) > 1e-5) == (name != "exact")
        remove_hyclora(model)
    assert bytes_kept["quant4"] < bytes_kept["quant8"] < bytes_kept["exact"]


@pytest.mark.parametrize("options", [{"offload": True}, {"gradient_checkpointing_kwargs": {"context_fn": nullcontext}}])
def test_options_of_checkpointing_are_not_dropped(options):
    """Ours would take the place of a function that offloads, or that is told what to recompute."""
    model = llama()
    apply_hyclora(model, HycloraConfig(slot_savers={"layer_in": "quant8"}))
    model.gradient_checkpointing_enable(**options)
    with pytest.raises(ValueError, match="layers.0: gradient checkpointing is offloaded or has options of its own"):
        gradients(model, padded_batch())
    remove_hyclora(model)
    model.gradient_checkpointing_disable()
    offloaded(model, HycloraConfig())
    model.gradient_checkpointing_enable(offload=True)
    gradients(model, padded_batch())


def test_an_option_of_newer_torch_that_counts_with_context_fn_alone_is_taken():
    """torch 2.14 has it: whether hooks around the region get what context_fn has it keep."""
    model = llama()
    _, exact = gradients(model, padded_batch())
    apply_hyclora(model, HycloraConfig(layer_type="baseline", slot_savers={"layer_in": "quant8"}))
    model.gradient_checkpointing_enable({"use_reentrant": False, "respect_saved_tensors_hooks": True})
    assert mean_cosine(gradients(model, padded_batch())[1], exact) > 0.999


@pytest.mark.parametrize("layer_type, error", [("baseline", 1e-5), ("intra_inter_full_fuse", 0.2)])
def test_selective_checkpointing_keeps_products_on_the_host(layer_type, error):
    """Torch's own, around patched layers, calibrating too; from 2.14 on hooks around it get what it keeps."""

    def keep_products(context, operation, *args, **kwargs):
        product = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    model, batch = llama(), padded_batch()
    options = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, keep_products)}
    if (newer := "respect_saved_tensors_hooks") in inspect.signature(checkpoint).parameters:
        options[newer] = True
    model.gradient_checkpointing_enable(options)
    _, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, iteration_threshold=2))
    for _ in range(3):
        with torch.autograd.graph.save_on_cpu():
            _, ours = gradients(model, batch)
        assert largest_error(ours, exact) < error


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_saver_for_layer_inputs_that_nothing_keeps_is_told_of(checkpointing, caplog):
    model = llama()
    apply_hyclora(model, HycloraConfig(slot_savers={"layer_in": "quant8"}))
    if checkpointing:
        model.gradient_checkpointing_enable()
    for _ in range(2):
        gradients(model, padded_batch())
    told = [
        record.message for record in caplog.records if "counts under gradient checkpointing alone" in record.message
    ]
    assert len(told) == (0 if checkpointing else 1)


def test_checkpointing_passes_gradients_the_usual_way():
    """torch.autograd.grad works, as it does not with torch's reentrant kind; autocast is replayed."""
    model, batch = llama(), padded_batch()
    offloaded(model, HycloraConfig(layer_type="baseline"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = batch["input_ids"].device.type

    def grads():
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**batch).loss
        return dict(enumerate(torch.autograd.grad(loss, parameters)))

    expected = grads()
    model.gradient_checkpointing_enable()
    assert mean_cosine(grads(), expected) > 0.999


def test_a_layer_of_which_nothing_that_is_trained_is_used():
    """Adapters that are merged, below a weight that is trained: there is nothing to go back to, as in stock."""
    model, batch = llama(), padded_batch()
    model.merge_adapter()
    apply_hyclora(model, HycloraConfig(layers="input"))
    model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.requires_grad_()
    ours = gradients(model, batch)[1]
    remove_hyclora(model)
    expected = gradients(model, batch)[1]
    assert len(expected) == 1 and largest_error(ours, expected) < 1e-5
