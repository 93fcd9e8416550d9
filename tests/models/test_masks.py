"""Padded, packed and windowed batches: patched LLaMA and Mistral against stock ones, without a mask of S x S."""

from dataclasses import replace

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.config import POLICIES
from hyclora.models.masks import causal_bounds, row_bounds
from hyclora.models.patch import find_patch
from hyclora.models.step_hook import StepHook
from hyclora.operators.attention.flash import tells_runs
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import EXACT_MLP, equal, offloaded
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, mistral, padded_batch
from tests.operators.attention.test_flash import Recorder

FAMILIES = {"llama": llama, "mistral": mistral}
BATCHES = ["right-padded", "left-padded", "both sides", "packed", "flattened", "whole"]


def batch_of(kind: str, rows=3, width=21, seed=0) -> dict:
    """Training inputs of one kind; without a cache, as HF looks for packed documents only then."""
    padded = padded_batch(rows, width, seed=seed)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    if kind == "right-padded":
        return padded | {"use_cache": False}
    if kind == "left-padded":
        return {name: t.flip(1) for name, t in padded.items()} | {"use_cache": False}
    if kind == "both sides":
        mask = mask.roll(2, 1) * mask.flip(1)[:1]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)} | {
            "use_cache": False
        }
    if kind == "packed":
        positions = torch.arange(width, device=DEVICE).expand(rows, -1).clone()
        positions[:, width // 3 :] -= width // 3
        positions[1, width // 2 :] -= positions[1, width // 2].item()
        return {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    if kind == "flattened":
        documents = [{"input_ids": row[m == 1].tolist()} for row, m in zip(ids, mask, strict=True)]
        batch = DataCollatorWithFlattening()(documents)
        return {name: t.to(DEVICE) for name, t in batch.items()} | {"use_cache": False}
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def masks_given(model, batch) -> list:
    """What the decoder is given as attention mask, in training; a hook further inside would be somebody who reads."""
    found, begin = [], StepHook._begin

    def noted(*args, **kwargs):
        given = begin(*args, **kwargs)
        found.append(given[1].get("attention_mask"))
        return given

    StepHook._begin = noted
    try:
        model(**batch)
    finally:
        StepHook._begin = begin
    assert found
    return found[-1:]


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("attention", ["flash", "eager"])
def test_baseline_equals_stock(family, kind, attention):
    """Loss and gradients; the eager core still has HF's masks."""
    model, batch = family(), batch_of(kind)
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
    assert all(tells_runs(mask) == (attention == "flash") for mask in masks_given(model, batch))


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_nothing_of_the_size_of_the_map(family, kind):
    """1200 tokens a row: no operation of a training step gives S x S elements; stock ones do, where they make masks."""
    model = family(num_hidden_layers=1, max_position_embeddings=2048)
    batch = batch_of(kind, rows=2 if kind != "flattened" else 1, width=1200)

    def largest() -> int:
        with Recorder() as recorder:
            gradients(model, batch)
        return recorder.largest

    if kind == "packed" or kind == "right-padded" or family is mistral:
        assert largest() >= 1200**2
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    assert largest() < 1200**2


@pytest.mark.parametrize("layer_type", list(POLICIES))
@pytest.mark.parametrize("kind", ["right-padded", "packed"])
def test_compressed_layers_come_close(layer_type, kind):
    model, batch = mistral({"lora_dropout": 0.1}), batch_of(kind)
    _, exact = gradients(model, batch)
    # in a stream dropout is drawn for another shape
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=8, stream=False))
    assert mean_cosine(gradients(model, batch)[1], exact) > 0.999
    remove_hyclora(model)
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=2))
    assert all(g.isfinite().all() for g in gradients(model, batch)[1].values())


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["right-padded", "left-padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_offload_and_checkpointing(family, kind, use_reentrant):
    """Slots in host memory; layers that run again in backward, having run without grad first.

    On a GPU sums are not the same twice in the last digit, which moves a code here and there. Our checkpoint runs
    layers again with exact slots of MLPs.
    """
    tolerance = 5e-3 if use_reentrant is not None else 1e-6 if DEVICE == "cpu" else 1e-3
    # in fp64, as in fp32 the stock code that runs first rounds a code to the other side now and then
    model = family({"lora_dropout": 0.1}).double()
    batches = [batch_of(kind, seed=seed, width=21 + seed) for seed in range(3)]
    config = HycloraConfig(iteration_threshold=2)
    apply_hyclora(model, config if use_reentrant is None else replace(config, slot_savers=EXACT_MLP))
    expected = [gradients(model, batch)[1] for batch in batches]
    remove_hyclora(model)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        apply_hyclora(model, config)
        for batch, theirs in zip(batches, expected, strict=True):
            assert largest_error(gradients(model, batch)[1], theirs) < tolerance
        remove_hyclora(model)
    store = offloaded(model, config)
    for batch, theirs in zip(batches, expected, strict=True):
        assert largest_error(gradients(model, batch)[1], theirs) < tolerance
        assert store.host_bytes == store.device_bytes == 0


def test_several_forwards_before_one_backward():
    """Every forward keeps its own bounds."""
    model, batches = mistral(), [batch_of(kind) for kind in ("packed", "right-padded", "flattened")]

    def together():
        model.zero_grad()
        torch.stack([model(**batch).loss for batch in batches]).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    exact = together()
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    assert largest_error(together(), exact) < 1e-5


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_stock_code_gets_stock_masks(family, kind):
    """Evaluation, generation and training with the adapter off, bit for bit; and again after remove_hyclora."""
    model, batch = family(), batch_of(kind)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}

    def outputs():
        with torch.no_grad():
            found = [model.eval()(**batch).logits, model.generate(**prompt, max_new_tokens=4, do_sample=False)]
        with model.train().disable_adapter():
            return found + [model(**batch).logits]

    expected, (loss, exact) = outputs(), gradients(model, batch)
    apply_hyclora(model)
    gradients(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True))
    remove_hyclora(model)
    again_loss, again = gradients(model, batch)
    assert again_loss == loss and equal(again, exact)
    assert not model.get_base_model().model._forward_pre_hooks


@pytest.mark.parametrize("kind, index", [("right-padded", 0), ("left-padded", 1), ("packed", 0)])
def test_one_layer_without_its_adapters(kernels, kind, index):
    """It runs stock projections, whatever its mask is told in, and the others run as ever. No kernel that autograd does
    not know takes a gradient away.
    """
    model, batch = mistral(), batch_of(kind)
    model.get_base_model().model.layers[index].self_attn.q_proj.enable_adapters(False)
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_a_cache_in_training_runs_stock_code():
    model, batch = llama(), padded_batch() | {"use_cache": True}
    loss, exact = gradients(model, batch)
    apply_hyclora(model)
    assert not any(tells_runs(mask) for mask in masks_given(model, batch))
    assert abs(gradients(model, batch)[0] - loss) < 1e-5


def test_masks_that_bounds_cannot_tell():
    """Padding between real tokens, and a mask of the user's own: as HF does it."""
    model = mistral()
    apart, own, batch = padded_batch(), padded_batch(), padded_batch()
    apart["attention_mask"][:, 3:6] = 0
    allowed = torch.ones(3, 1, 21, 21, dtype=torch.bool, device=DEVICE).tril()
    allowed[..., 5:, 1] = False
    own["attention_mask"] = allowed
    for batch in (apart, own):
        loss, exact = gradients(model, batch)
        apply_hyclora(model, HycloraConfig(layer_type="baseline"))
        assert not any(tells_runs(mask) for mask in masks_given(model, batch))
        our_loss, ours = gradients(model, batch)
        assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5
        remove_hyclora(model)


def test_a_mask_given_by_position():
    """The decoder called by hand, without keywords: HF's mask, not none."""
    model, batch = llama(), padded_batch()
    decoder = model.get_base_model().model
    expected = decoder(batch["input_ids"], batch["attention_mask"].flip(1), use_cache=False).last_hidden_state
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    found = decoder(batch["input_ids"], batch["attention_mask"].flip(1)).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("sliding_window", [None, 2, 20, 21, 22, 100])
def test_windows_of_any_size(sliding_window, attention, implementation):
    """Shorter than a row of 21 tokens, as long, longer and none at all; on both cores, against both of stock's."""
    model, batch = mistral(sliding_window=sliding_window, attn_implementation=implementation), padded_batch()
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_tokens_that_see_nothing_in_double_precision():
    """Softmax is in fp32, where the lowest number of fp64 is minus infinity."""
    model, batch = llama().double(), padded_batch()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention="eager"))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_bounds():
    """Right-padded, left-padded and empty rows; documents of a row; nothing known; what cannot be told."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]])
    assert causal_bounds(mask, None, 4, 5)[0, 0].tolist() == [[0, 5, 7, 10, 15, 16, 20], [1, 0, 1, 1, 0, 1, 0]]
    positions = torch.tensor([[0, 1, 0, 1, 2], [3, 4, 5, 9, 10]])
    assert causal_bounds(None, positions, 2, 5)[0, 0].tolist() == [[0, 2, 5, 8, 10], [1, 1, 1, 1, 0]]
    assert causal_bounds(None, positions[:1], 2, 5)[0, 0].tolist() == [[0, 2, 5, 7, 10], [1, 1, 1, 1, 0]]
    for whole in (None, torch.ones(2, 5)):
        assert causal_bounds(whole, None, 2, 5)[0, 0].tolist() == [[0, 5, 10], [1, 1, 0]]
    assert causal_bounds(mask, None, 4, 3) is None and causal_bounds(mask[:, None], None, 4, 5) is None
    assert causal_bounds(torch.tensor([[1, 0, 1]]), None, 1, 3) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronisation is a matter of the GPU")
@pytest.mark.parametrize("kind", BATCHES)
def test_one_synchronisation_a_forward(kind):
    model, batch = mistral(), batch_of(kind)
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    for _ in range(2):
        gradients(model, batch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            model(**batch)
            torch.ones(1, device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # padding behind is looked for among the labels, while the GPU still waits
    expected = 3 if kind in ("right-padded", "both sides") else 2
    assert len([w for w in caught if "synchroniz" in str(w.message)]) <= expected
    assert find_patch(model).step.index == 3


def test_rows_of_an_encoder():
    """Each begins with its first real token, wherever the others are; an empty one is none."""
    real = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()
    assert row_bounds(real, 4, 3)[0, 0, 0].tolist() == [0, 4, 9, 12]
    assert row_bounds(None, 2, 3)[0, 0, 0].tolist() == [0, 3, 6]
    assert row_bounds(real, 4, 4) is None and row_bounds(real[:, None], 4, 3) is None
