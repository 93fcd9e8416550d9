"""Copies of a patched model and of its parts, and what PEFT makes of it."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import peft
import pytest
import torch
from torch import nn

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch, patch_of
from hyclora.utils.args import LINEARS
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal, offloaded
from tests.helpers.replaying import CALIBRATION, batches, config, graphed, train
from tests.helpers.small_models import gradients, is_late, largest_error, llama, padded_batch, qwen3, roberta

BASELINE = HycloraConfig(layer_type="baseline")


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "inside another": lambda model: copy.deepcopy(nn.Sequential(nn.Linear(1, 1), model))[1],
    "copy of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


def checkpointed(model, patch) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()  # Hugging Face's hook for that cannot be pickled
    patch()


PATCHES = {
    "baseline": lambda model: apply_hyclora(model, config(layer_type="baseline")),
    "4 bit": lambda model: apply_hyclora(model, config()),
    "fused": lambda model: apply_hyclora(model, config(layer_type="intra_inter_full_fuse", q_bit=2)),
    "offload": lambda model: offloaded(model, config()),
    "checkpointing, offload": lambda model: checkpointed(model, lambda: offloaded(model, config())),
    "checkpointing, 8 bit": lambda model: checkpointed(
        model, lambda: apply_hyclora(model, config(slot_savers={"layer_in": "quant8"}))
    ),
    "graphs": lambda model: graphed(model, {}),
    "graphs, offload": lambda model: graphed(model, {}, offload=True),
}


def bring(model) -> None:
    """The stand-in for CUDA graphs wants to know whose it is."""
    patch = find_patch(model)
    if patch.graphs is not None and DEVICE != "cuda":
        patch.graphs.recorder.graphs = patch.graphs


def parts(model) -> set[int]:
    """All tensors that training may change, and the objects that count."""
    patch = find_patch(model)
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [
        t
        for block in patch.blocks
        for saver in block.savers.values()
        for t in getattr(saver, "statistics", {}).values()
    ]
    return {t.data_ptr() for t in tensors if t.numel()} | {id(patch), id(patch.step), *map(id, model.modules())}


STEPS = {"not calibrated": 0, "calibrating": 1, "calibrated": CALIBRATION + 3}
# every way to copy with every patch, and either of them with every number of steps before
CASES = [
    (clone, patch, list(STEPS)[(i + j) % len(STEPS)])
    for i, clone in enumerate(COPIES)
    for j, patch in enumerate(PATCHES)
]


@pytest.mark.parametrize("clone, patch, before", CASES)
def test_a_copy_trains_by_itself_as_the_original_would(clone, patch, before):
    """Bit for bit: the next losses, gradients and statistics; neither sees the other's steps."""
    before = STEPS[before]
    model, steps = llama(), batches(before + 4)
    PATCHES[patch](model)
    train(model, steps[:before])
    twin = COPIES[clone](model).train()
    bring(twin)
    assert not parts(model) & parts(twin)
    found = train(twin, steps[before:])
    assert find_patch(model).step.index == before
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    expected = train(model, steps[before:])
    assert all(equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert find_patch(model).step.index == find_patch(twin).step.index == before + 4
    states = [[s.state_dict() for b in find_patch(m).blocks for s in b.savers.values()] for m in (model, twin)]
    assert all(equal(a, b) for a, b in zip(*states, strict=True))
    remove_hyclora(model)
    assert is_late(twin(**steps[0])) and not is_late(model(**steps[0]))


@pytest.mark.parametrize("family", [llama, qwen3, roberta])
@pytest.mark.parametrize("clone", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
def test_a_copy_between_forward_and_backward(clone, family):
    """The original's backward goes on; the copy has nothing in flight."""
    (model, batch), steps = (family(), padded_batch()), [padded_batch(seed=seed) for seed in range(2)]
    store = offloaded(model, HycloraConfig(iteration_threshold=1))
    expected = [gradients(model, b)[1] for b in (steps[0], batch, batch)][1]
    model.zero_grad()
    loss = model(**batch).loss
    twin = clone(model)
    loss.backward()
    assert equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    assert equal(gradients(twin, batch)[1], expected) and store.host_bytes == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("family", [llama, qwen3])
def test_a_copy_on_nf4_weights(clone, family):
    model = family(hidden_size=128, num_attention_heads=4, intermediate_size=192, base="nf4")
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    gradients(model, padded_batch())
    twin = clone(model)
    found = [gradients(m, padded_batch(seed=1)) for m in (twin, model)]
    assert found[0][0] == found[1][0] and equal(found[0][1], found[1][1])


@pytest.mark.skipif(DEVICE == "cuda", reason="memory of a GPU is not shared within one process")
def test_a_model_that_goes_to_another_process():
    """As torch.multiprocessing sends it: its parameters are shared, all else is a copy."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    gradients(model, batch)
    twin = pickle.loads(ForkingPickler.dumps(model))
    assert equal(gradients(twin, batch)[1], gradients(model, batch)[1])
    assert find_patch(twin) is not find_patch(model)


def test_a_shallow_copy_is_the_same_model():
    """It shares all modules, as ever: patched and taken off together."""
    model, batch = llama(), padded_batch()
    _, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    twin = copy.copy(model)
    assert find_patch(twin) is find_patch(model) and largest_error(gradients(twin, batch)[1], exact) < 1e-5
    with pytest.raises(ValueError, match="patched already"):
        apply_hyclora(twin)
    remove_hyclora(twin)
    assert equal(gradients(model, batch)[1], exact)
    with pytest.raises(ValueError, match="not patched"):
        remove_hyclora(model)


PARTS = ["model.layers.0", "model.layers.0.self_attn", "model.layers.1.mlp", "model.norm", "lm_head"]


@pytest.mark.parametrize("clone", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("name", PARTS)
def test_a_copy_of_one_module_is_stock_and_takes_nothing_else_along(name, clone):
    """Nobody counts steps for it. A layer kept for reference must not keep a second model."""
    model = llama()
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    gradients(model, padded_batch())
    part, stock = (m.get_base_model().get_submodule(name) for m in (model, llama()))
    twin = clone(part)
    assert len(pickle.dumps(twin)) < len(pickle.dumps(stock)) + 4000
    x = torch.randn(2, 7, 96, device=DEVICE, requires_grad=True)
    inputs = {"hidden_states" if name != "lm_head" else "input": x}
    if "mlp" in name:
        inputs = {"x": x}
    if "layers" in name and "mlp" not in name:
        angles = model.get_base_model().model.rotary_emb(x, torch.arange(7, device=DEVICE)[None])
        inputs |= {"position_embeddings": angles, "attention_mask": None}
    found = []
    for module in (twin, stock):
        y = module(**inputs)
        loss = (y[0] if isinstance(y, tuple) else y).square().mean()
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert equal(*found)
    replica = twin._replicate_for_data_parallel()
    for name, p in twin._parameters.items():
        setattr(replica, name, None if p is None else p * 2)
    if twin._parameters:
        assert torch.equal(replica(**inputs), 2 * twin(**inputs)), "a replica has weights of its own"


@pytest.mark.parametrize("name", ["", "model"])
def test_a_copy_of_the_base_model_is_patched(name):
    """The causal LM and the decoder by themselves have all that counts steps."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    gradients(model, batch)
    part = model.get_base_model().get_submodule(name)
    twin = copy.deepcopy(part)
    inputs = batch if not name else {n: t for n, t in batch.items() if n != "labels"}
    found = []
    for module in (twin, part):
        module.zero_grad()
        module(**inputs)[0].square().mean().backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    assert equal(*found) and find_patch(twin).step.index == find_patch(model).step.index == 2
    remove_hyclora(twin)
    assert patch_of(model) is not None


def test_a_copied_layer_checkpoints_as_stock_ones_do():
    """Here too: nobody calibrates what it keeps."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig("baseline", slot_savers={"layer_in": "quant2"}, iteration_threshold=1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    stock, _ = gradients(model, batch)
    layers = model.get_base_model().model.layers
    copies = copy.deepcopy(layers)
    remove_hyclora(model)
    _, exact = gradients(model, batch)
    model.get_base_model().model.layers = copies
    assert equal(gradients(model, batch)[1], exact)
    apply_hyclora(model, HycloraConfig("baseline", slot_savers={"layer_in": "quant8"}, iteration_threshold=1))
    assert 1e-6 < largest_error(gradients(model, batch)[1], exact) < 0.1


def test_a_layer_put_together_from_copies_can_be_patched():
    """Layers are doubled by copying them: what a copy still has of the first patch is not in the way."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, BASELINE)
    layers = model.get_base_model().model.layers
    copies = copy.deepcopy(layers)
    remove_hyclora(model)
    model.get_base_model().model.layers = copies
    loss, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
    remove_hyclora(model)
    assert equal(gradients(model, batch)[1], exact) and not traces(model)


def traces(model) -> list[str]:
    """What is left of us on the modules."""
    own = ("forward", "_replicate_for_data_parallel")
    return [f"{n}.{k}" for n, m in model.named_modules() for k in m.__dict__ if "hyclora" in k or k in own]


@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
def test_copies_of_a_model_that_was_patched_once_are_stock(clone):
    model, batch = llama(), padded_batch()
    _, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    twin = clone(model)
    for patched in (model, twin):
        remove_hyclora(patched)
    for stock in (model, twin, clone(model)):
        assert not traces(stock) and equal(gradients(stock.train(), batch)[1], exact)


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["down_proj"]}, {"layers_to_transform": [1]}], ids=str)
def test_the_base_model_that_peft_gives_back(method, options):
    """It evaluates as stock's does, says how to train it, and is clean after remove_hyclora."""
    batch, found = padded_batch(), []
    for patched in (True, False):
        model = llama(options)
        if patched:
            apply_hyclora(model, HycloraConfig(iteration_threshold=1))
            gradients(model, batch)
        base = getattr(model, method)()
        with torch.no_grad():
            logits = base.eval()(**batch).logits
        base.train().requires_grad_(True)
        if patched:
            with pytest.raises(ValueError, match="was replaced after apply_hyclora; call remove_hyclora"):
                base(**batch)
            remove_hyclora(base)
            assert not traces(base)
        found.append({"logits": logits} | gradients(base, batch)[1])
    assert equal(*found)


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_a_second_adapter_around_a_patched_model(how):
    """PEFT puts it into the LoRA layers that are there: the losses and gradients are stock's."""
    batch, found = padded_batch(), []
    for patched in (True, False):
        model = llama()
        if patched:
            apply_hyclora(model, BASELINE)
            gradients(model, batch)
        torch.manual_seed(3)
        second = peft.LoraConfig(r=4, target_modules=LINEARS)
        if how == "get_peft_model":
            outer = peft.get_peft_model(model.get_base_model(), second)
        else:
            outer = model
            outer.add_adapter("second", second)
            outer.set_adapter("second")
        found.append(gradients(outer, batch))
        if patched:
            with pytest.raises(ValueError, match="patched already"):
                apply_hyclora(outer)
            remove_hyclora(outer)
            assert not traces(outer)
    (our_loss, ours), (loss, exact) = found
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_adapters_are_saved_without_us(tmp_path):
    model = llama()
    apply_hyclora(model, BASELINE)
    model.save_pretrained(tmp_path)
    stock = llama().unload()
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path, is_trainable=True)
    assert not traces(loaded)
    loss, exact = gradients(loaded.train(), padded_batch())
    assert abs(gradients(model, padded_batch())[0] - loss) < 1e-5


def test_two_patched_models_in_one():
    pair = nn.ModuleList([llama(), llama()])
    for model in pair:
        apply_hyclora(model, BASELINE)
    with pytest.raises(ValueError, match="there are 2 patched models in this one; give one of them"):
        remove_hyclora(pair)
    remove_hyclora(pair[0])
    remove_hyclora(pair)
    assert not traces(pair)


@pytest.mark.parametrize("clone", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
def test_a_copy_that_begins_at_the_forward(clone):
    """A bound method brings its model along: a patched one, as ever."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, BASELINE)
    base = model.get_base_model()
    twin = clone(base.forward)
    assert twin.module is not base and find_patch(twin.module) is not find_patch(model)
    assert is_late(twin(**batch)) and equal(gradients(twin.module, batch)[1], gradients(base, batch)[1])
