"""Layer inputs in few bits: chains of differences, each to what is restored of the input before."""

import copy
import gc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.building import CHAIN
from hyclora.models.layers import WholeLayer
from hyclora.models.patch import find_patch
from hyclora.models.state import load_calibration, save_calibration
from hyclora.operators.savers import ChannelQuant, Difference
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal, offloaded
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, padded_batch, roberta

pytestmark = pytest.mark.usefixtures("deterministic_attention")
DEPTH = CHAIN + 3


def deep(**options):
    """A model with two chains, and a channel that is hundreds of times as large as others, as trained models have."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=DEPTH, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 7] *= 300
    return model


def patched(model, **config):
    apply_hyclora(model, HycloraConfig(**{"layers": "input4", "iteration_threshold": 2} | config))
    return find_patch(model)


def inputs_of(model, batch) -> list[list[torch.Tensor]]:
    """What each layer's runs were given: the input, and what was restored of it."""
    found = []
    for layer in [block for block in find_patch(model).blocks if isinstance(block, WholeLayer)]:
        given, run_once = [], layer.run_once
        found.append(given)
        layer.run_once = lambda x, *a, g=given, run=run_once, **kw: g.append(x.detach().clone()) or run(x, *a, **kw)
    gradients(model, batch)
    for layer in [block for block in find_patch(model).blocks if isinstance(block, WholeLayer)]:
        del layer.run_once
    return found


def error(restored: torch.Tensor, x: torch.Tensor) -> float:
    return float((restored - x).norm() / x.norm())


def direct(x: torch.Tensor, step, ratio: float) -> torch.Tensor:
    """x in 4 bit by itself."""
    rows, saver = x.flatten(0, 1), ChannelQuant(4, "channel_group", ratio)
    return saver.unpack(saver.pack(rows, step), rows.shape, rows.dtype).view(x.shape)


@pytest.mark.parametrize("ratio", [0.0, 0.02], ids=["all channels", "exact channels"])
def test_restored_inputs_are_nearer_than_inputs_by_themselves(ratio):
    model, batch = deep(), padded_batch()
    patch = patched(model, layernorm_outlier_ratio=ratio)
    for _ in range(3):
        gradients(model, batch)
    for x, restored in inputs_of(model, batch):
        assert error(restored, x) < 0.7 * error(direct(x, patch.step, ratio), x)


@pytest.mark.parametrize("family", [deep, lambda: roberta(num_hidden_layers=4)], ids=["llama", "roberta"])
def test_gradients_are_nearer_than_with_inputs_by_themselves(family):
    model, batch, found = family(), padded_batch(), []
    _, exact = gradients(model, batch)
    for differences in (True, False):
        patch = patched(model)
        if not differences:
            for checkpoint in patch.checkpoints:
                checkpoint.savers["layer_in"] = ChannelQuant(4, "channel_group", 0.005)
        found.append(1 - mean_cosine(gradients(model, batch)[1], exact))
        remove_hyclora(model)
    assert found[0] < 0.5 * found[1]


FIRST, LINK = (ChannelQuant, 8), (Difference, 2)


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("input2", [FIRST, FIRST, *[LINK] * (CHAIN - 1), FIRST, LINK]),
        ("1*input2,2*slots,input2", [FIRST, FIRST, *[LINK] * (CHAIN - 3), FIRST, LINK]),
        ("3*input2,1*input,2*input2,slots", [FIRST, FIRST, LINK, FIRST, LINK]),
        ("input8", [FIRST] * DEPTH),
    ],
)
def test_which_layers_keep_a_difference(layers, expected):
    """The first two of a model, of each chain and after another kind of layer are by themselves, in 8 bit."""
    savers = [checkpoint.savers["layer_in"] for checkpoint in patched(deep(), layers=layers).checkpoints]
    assert [(type(saver), saver.book.bits) for saver in savers if isinstance(saver, ChannelQuant)] == expected


def losses(model, batches) -> dict:
    """Gradients of forwards that come before all of their backwards."""
    model.zero_grad()
    for loss in [model(**batch).loss for batch in batches]:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_forwards_that_overlap():
    """Gradients add up to those of one after another, in whichever order the backwards come."""
    model, batches = deep(), [padded_batch(seed=seed) for seed in range(2)]
    patched(model, iteration_threshold=1)
    gradients(model, batches[0])
    one, other = (gradients(model, batch)[1] for batch in batches)
    together, swapped = losses(model, batches), losses(model, batches[::-1])
    for name in together:
        torch.testing.assert_close(together[name], one[name] + other[name])
        torch.testing.assert_close(swapped[name], one[name] + other[name])


def test_a_backward_that_comes_twice():
    model, batch = deep(), padded_batch()
    patched(model)
    _, expected = gradients(model, batch)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert equal({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("store", [False, True], ids=["resident", "offloaded"])
def test_a_forward_without_a_backward_leaves_nothing(store):
    model, batch = deep(), padded_batch()
    config = HycloraConfig(layers="input4", iteration_threshold=1)
    store = offloaded(model, config) if store else apply_hyclora(model, config) and None
    _, expected = gradients(model, batch)
    model(**batch)
    gc.collect()
    assert find_patch(model).step.restored is None and (store is None or store.empty)
    assert equal(gradients(model, batch)[1], expected)


def test_a_forward_that_fails_leaves_nothing():
    model, batch = deep(), padded_batch()
    patch = patched(model, iteration_threshold=1)
    gradients(model, batch)
    _, expected = gradients(model, batch)
    layer = model.get_base_model().model.layers[3]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    assert patch.step.restored is None and equal(gradients(model, batch)[1], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layers", ["input4", "2*slots,input4"])
def test_the_host_gives_the_same_bits(layers, dtype):
    batch, found = padded_batch(), []
    for options in (None, {}, {"window": 0}, {"group": 8, "ahead": 4}):
        model = deep().to(dtype)
        config = HycloraConfig(layers=layers, iteration_threshold=1)
        store = apply_hyclora(model, config) and None if options is None else offloaded(model, config, **options)
        gradients(model, batch)
        found.append(gradients(model, batch)[1])
        assert store is None or store.empty and store.arena.pinned
    assert all(equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_gradients_that_accumulate(dtype):
    """Of two micro-steps with autocast, from the host as well: the sum of each by itself."""
    batches, found = [padded_batch(seed=seed) for seed in range(2)], []
    for offload in (False, True):
        model, config = deep(), HycloraConfig(layers="input4", iteration_threshold=1)
        offloaded(model, config) if offload else apply_hyclora(model, config)
        with torch.autocast("cpu", dtype):
            gradients(model, batches[0])
            one, other = (gradients(model, batch)[1] for batch in batches)
            model.zero_grad()
            for batch in batches:
                model(**batch).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        for name, grad in found[-1].items():
            torch.testing.assert_close(grad, one[name] + other[name])
    assert equal(*found)


def test_checkpointing_of_hugging_face_keeps_differences_too():
    found, batch = [], padded_batch()
    for checkpointing in (False, True):
        model = deep()
        if checkpointing:
            model.gradient_checkpointing_enable()
        patched(model, iteration_threshold=1)
        gradients(model, batch)
        found.append(gradients(model, batch)[1])
    assert equal(*found)


def test_layers_that_are_gathered_when_they_run(one_process):
    """fully_shard gives each layer its input as another tensor."""
    found, batch = [], padded_batch()
    for sharded in (False, True):
        model = deep()
        patched(model, iteration_threshold=1)
        if sharded:
            for layer in model.get_base_model().model.layers:
                fully_shard(layer)
            fully_shard(model)
        for _ in range(2):
            grads = gradients(model, batch)[1]
        found.append({name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in grads.items()})
    # on a GPU attention's backward adds in any order, and a code may be another one
    assert equal(*found) if DEVICE == "cpu" else largest_error(*found) < 1e-2


def test_what_was_calibrated_goes_on(tmp_path):
    """Half way: the statistics are of differences."""
    model, batch = deep(), padded_batch()
    patched(model)
    gradients(model, batch)
    save_calibration(model, tmp_path)
    later = [padded_batch(seed=seed) for seed in (1, 2)]
    expected = [gradients(model, batch)[1] for batch in later]
    resumed = deep()
    patched(resumed)
    load_calibration(resumed, tmp_path)
    found = [gradients(resumed, batch)[1] for batch in later]
    assert all(equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("told", [True, False], ids=["", "of versions that did not say how"])
def test_statistics_of_inputs_are_not_taken_for_those_of_differences(told, tmp_path, caplog):
    """As a checkpoint has them of a version that kept each input by itself: calibration begins again."""
    model, batch = deep(), padded_batch()
    _, exact = gradients(model, batch)
    for checkpoint in patched(model).checkpoints:
        checkpoint.savers["layer_in"] = ChannelQuant(4, "channel_group", 0.005)
    for _ in range(4):
        gradients(model, batch)
    file = save_calibration(model, tmp_path)
    if not told:
        with safe_open(file, framework="pt") as saved:
            metadata, tensors = saved.metadata(), {name: saved.get_tensor(name) for name in saved.keys()}
        save_file(tensors, file, {name: metadata[name] for name in metadata.keys() - {"kept", "digest"}})
    errors = []
    for resumed in (False, True):
        model = deep()
        patch = patched(model)
        if resumed:
            load_calibration(model, tmp_path)
            assert "layer_in were kept otherwise" in caplog.text and patch.step.index == 4
        gradients(model, batch)
        assert patch.step.calibrating
        for _ in range(2):
            _, found = gradients(model, batch)
        assert not patch.step.calibrating
        errors.append(1 - mean_cosine(found, exact))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_a_layer_that_is_called_by_itself_keeps_its_input_as_it_is():
    """There is no layer before it."""
    model, batch = deep(), padded_batch()
    patched(model, iteration_threshold=1)
    gradients(model, batch)
    base = model.get_base_model().model
    x = torch.randn(1, 5, 96, device=DEVICE, requires_grad=True)
    angles = base.rotary_emb(x, torch.arange(5, device=DEVICE)[None])
    found = []
    for layer in (base.layers[2], None):
        if layer is None:
            remove_hyclora(model)
            layer = base.layers[2]
        output = layer(x, position_embeddings=angles)
        (grad,) = torch.autograd.grad((output[0] if isinstance(output, tuple) else output).square().sum(), x)
        found.append(grad)
    torch.testing.assert_close(*found)


def test_a_copy_goes_its_own_way():
    model, batch = deep(), padded_batch()
    patched(model, iteration_threshold=1)
    gradients(model, batch)
    twin = copy.deepcopy(model)
    assert equal(gradients(twin, batch)[1], gradients(model, batch)[1])
