"""The MLP of a decoder layer that is run again: late where nobody reads the layer's output, and as ever elsewhere."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.layers import LayerBlock
from hyclora.models.patch import find_patch
from hyclora.operators import token_tiles
from hyclora.operators.mlp import mlp
from tests.helpers.offloading import offloaded
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, padded_batch, qwen3, roberta

pytestmark = pytest.mark.usefixtures("deterministic_attention")

LORAS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "biases": {"bias": "all", "lora_bias": True},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
}
INPUT8 = {"slot_savers": {"layer_in": "quant8"}}


@pytest.fixture
def late(monkeypatch) -> list[int]:
    """Tokens of each MLP that is postponed."""
    monkeypatch.setattr(token_tiles, "TILE_TOKENS", 16)
    found, postpone = [], mlp._postpone
    monkeypatch.setattr(mlp, "_postpone", lambda spec, x, *args: found.append(len(x)) or postpone(spec, x, *args))
    return found


def config(**settings) -> HycloraConfig:
    return HycloraConfig(stream=False, **settings)


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("family", [llama, qwen3], ids=lambda f: f.__name__)
def test_gradients_are_those_of_exact_slots(late, family, lora, offload):
    """In several tiles, all masks being those of the first run; nothing of the blocks inside goes to the host."""
    bias = {"mlp_bias": True} if lora.get("bias") and family is llama else {}
    model, batch = family(lora, **bias), padded_batch()
    apply_hyclora(model, config(layer_type="baseline"))
    loss, expected = gradients(model, batch)
    remove_hyclora(model)
    settings = config(layers="input")
    store = offloaded(model, settings) if offload else apply_hyclora(model, settings) and None
    ours_loss, ours = gradients(model, batch)
    assert ours_loss == pytest.approx(loss, abs=1e-6) and largest_error(ours, expected) < 1e-5
    assert late == [63, 63]
    assert not offload or store.host_bytes == store.device_bytes == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("savers", [INPUT8, {}], ids=["8 bit", "exact, offloaded"])
def test_checkpointing_of_hugging_face(late, savers, use_reentrant):
    """Kept by our slot, offloaded, or as torch keeps it."""
    model, batch = llama({"lora_dropout": 0.3}), padded_batch()
    apply_hyclora(model, config(layer_type="baseline"))
    _, expected = gradients(model, batch)
    remove_hyclora(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    settings = config(layer_type="baseline", **savers)
    apply_hyclora(model, settings) if savers else offloaded(model, settings)
    _, ours = gradients(model, batch)
    assert late == [63, 63] and mean_cosine(ours, expected) > 0.9998
    assert savers or largest_error(ours, expected) < 1e-5
    remove_hyclora(model)
    apply_hyclora(model, config(layer_type="baseline"))
    assert largest_error(gradients(model, batch)[1], expected) < 1e-5 and len(late) == 4


def test_quantized_slots_do_not_show_in_the_mlp(late):
    """Where checkpointing runs a layer again its MLP is as exact as the layer's input, whatever its slots are."""
    model, batch = llama(num_hidden_layers=4), padded_batch()
    _, exact = gradients(model, batch)
    model.gradient_checkpointing_enable()
    found = []
    for postponed in (False, True):
        apply_hyclora(model, config(q_bit=2, iteration_threshold=1, **INPUT8))
        if not postponed:
            for checkpoint in find_patch(model).checkpoints:
                checkpoint.layer = None
        gradients(model, batch)
        found.append(mean_cosine(gradients(model, batch)[1], exact))
        remove_hyclora(model)
    assert len(late) == 8 and found[1] > found[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_hooks_look_at(late, checkpointing):
    """They get what the layer gives, each time that it is called."""
    model, batch, seen = llama(), padded_batch(), []
    _, expected = gradients(model, batch)
    if checkpointing:
        model.gradient_checkpointing_enable()
    apply_hyclora(model, config(**INPUT8, layer_type="baseline") if checkpointing else config(layers="input8"))
    first = model.get_base_model().model.layers[0]
    handle = first.register_forward_hook(lambda module, args, output: seen.append(output.isfinite().all()))
    assert mean_cosine(gradients(model, batch)[1], expected) > 0.9998
    assert seen and all(seen) and len(late) == 1
    handle.remove()
    gradients(model, batch)
    assert len(late) == 3


@pytest.mark.parametrize("part", ["self_attn", "self_attn.q_proj", "mlp", "input_layernorm", ""])
def test_what_hooks_add_and_take_is_part_of_the_loss(part):
    """Under exact checkpointing too: a trained shift of a part's output, and that output as a term of the loss."""
    found = []
    for ours in (False, True):
        model, taken = llama(), []
        shift = torch.nn.Parameter(torch.full((96,), 0.1, device=model.device))
        if ours:
            apply_hyclora(model, config(layer_type="baseline"))
        model.gradient_checkpointing_enable()
        layer = model.get_base_model().model.layers[1]
        own = layer.get_submodule(part) if part else layer

        def hook(module, args, output, taken=taken, shift=shift):
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            taken.append(first)
            return first + shift if rest is None else (first + shift, *rest)

        own.register_forward_hook(hook)
        (model(**padded_batch()).loss + taken[0].square().mean()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(grads | {"shift": shift.grad})
    assert largest_error(*found) < 1e-5


@pytest.mark.parametrize("part", ["mlp", "self_attn.q_proj.base_layer"])
@pytest.mark.parametrize("comes", ["first", "later", "before checkpointing"])
@pytest.mark.parametrize(
    ("settings", "checkpointing", "expected"),
    [({"layers": "input"}, False, True), (INPUT8, True, True), ({}, True, False), ({}, False, False)],
    ids=["input", "8 bit", "exact checkpointing", "slots"],
)
def test_hooks_whose_gradients_are_lost_are_told_of(settings, checkpointing, expected, comes, part, caplog):
    """Once for a layer, and once for all that come together."""
    model = llama(num_hidden_layers=4)
    layers = model.get_base_model().model.layers
    apply_hyclora(model, config(layer_type="baseline", **settings))

    def hook(*indices):
        for i in indices:
            layers[i].get_submodule(part).register_forward_hook(lambda *_: None)

    def told(i):
        return caplog.text.count(f"there are hooks inside of base_model.model.model.layers.{i},")

    if checkpointing and comes != "before checkpointing":
        model.gradient_checkpointing_enable()
    if comes != "first":
        gradients(model, padded_batch())
    hook(1, 2)
    gradients(model, padded_batch())
    if checkpointing and comes == "before checkpointing":
        assert not told(1)
        model.gradient_checkpointing_enable()
    for _ in range(2):
        gradients(model, padded_batch())
    assert [told(i) for i in range(4)] == [0, expected, 0, 0]
    hook(2, 3)
    for _ in range(2):
        gradients(model, padded_batch())
    assert [told(i) for i in range(4)] == [0, expected, 0, expected]


def test_a_function_that_does_more_than_the_layer(late):
    """Checkpointing may be given one that reads the layer's output in the second run too."""
    model, batch = llama(), padded_batch()
    model.gradient_checkpointing_enable()
    apply_hyclora(model, config(**INPUT8, layer_type="baseline"))
    patch = find_patch(model)
    gradients(model, batch)
    late.clear()
    checkpoint, read = patch.checkpoints[0], []
    x = torch.randn(1, 5, 96, requires_grad=True)
    y = checkpoint.forward(lambda x: read.append(2 * x) or read[-1], x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.full_like(x, 2)) and len(read) == 2 and not late


def test_gradients_of_inputs_alone(late):
    model, batch = llama(), padded_batch()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    batch |= {"inputs_embeds": embeds}
    found = []
    for settings in (config(layer_type="baseline"), config(layers="input")):
        apply_hyclora(model, settings)
        found.append(torch.autograd.grad(model(**batch).loss, embeds)[0])
        remove_hyclora(model)
    assert torch.allclose(*found, atol=1e-6) and len(late) == 2


def test_bfloat16(late):
    """Near: a hidden that baseline keeps is rounded otherwise than one that is made again."""
    model, batch, found = llama().bfloat16(), padded_batch(), []
    for settings in (config(layer_type="baseline"), config(layers="input")):
        apply_hyclora(model, settings)
        found.append(gradients(model, batch)[1])
        remove_hyclora(model)
    assert mean_cosine(*found) > 0.999 and len(late) == 2


def test_autocast(late):
    model, batch, found = llama(), padded_batch(), []
    for settings in (config(layer_type="baseline"), config(layers="input")):
        apply_hyclora(model, settings)
        with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16):
            found.append(gradients(model, batch)[1])
        remove_hyclora(model)
    assert mean_cosine(*found) > 0.9999 and len(late) == 2


def test_a_norm_after_the_mlp_reads_it(late):
    model, batch = roberta(), padded_batch()
    _, expected = gradients(model, batch)
    apply_hyclora(model, config(layers="input"))
    assert not any(isinstance(block, LayerBlock) for block in find_patch(model).blocks)
    assert largest_error(gradients(model, batch)[1], expected) < 1e-5 and not late


@pytest.mark.parametrize("savers", [{}, INPUT8], ids=["exact", "8 bit"])
def test_a_flag_without_a_function_is_hugging_faces_to_refuse(savers):
    model = llama()
    apply_hyclora(model, config(**savers))
    layer = model.get_base_model().model.layers[1]
    layer.gradient_checkpointing = True
    with pytest.raises(AttributeError, match="has no attribute '_gradient_checkpointing_func'"):
        model(**padded_batch())
    model.gradient_checkpointing_enable()
    gradients(model, padded_batch())
