"""Every family against stock HF + PEFT: whatever its layout, biases and windows, padded and packed."""

import json

import pytest
import torch
from transformers import AutoConfig

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.config import POLICIES, RECOMPUTABLE, SLOTS
from hyclora.models.families import FAMILIES
from hyclora.operators import dispatch
from hyclora.utils.args import ROOT
from tests.helpers import small_models
from tests.helpers.small_models import gradients, largest_error, mean_cosine, padded_batch
from tests.models.test_blocks import check_autocast, check_recomputation

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILY = {name: getattr(small_models, name) for name in FAMILIES}
VARIANTS = [
    *((name, {}) for name in FAMILIES),
    *((name, {"sliding_window": 64}) for name in ("mistral", "qwen2", "qwen3")),
    *((name, {"use_sliding_window": False}) for name in ("qwen2", "qwen3")),
    *((name, {"tie_word_embeddings": True}) for name in ("qwen2", "qwen3")),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"rope_parameters": YARN}),
]


def packed_batch() -> dict:
    """Two documents in each row: position ids restart, and HF masks across them (without a cache)."""
    batch = padded_batch()
    positions = torch.arange(21).expand(3, -1).clone()
    positions[:, 9:] -= 9
    ids = batch["input_ids"]
    return {"input_ids": ids, "labels": ids, "position_ids": positions.to(ids.device), "use_cache": False}


BATCHES = {
    "right padding": padded_batch(),
    "left padding": {name: t.flip(1) for name, t in padded_batch().items()},
    "packed": packed_batch(),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_baseline_equals_hf_and_peft(variant, attention, batch):
    """Every gradient within 1e-5 in fp32, whether the window is shorter than a row or longer."""
    name, config = variant
    model = FAMILY[name](**config)
    loss, exact = gradients(model, batch)
    report = apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert (report.head is not None) == (FAMILIES[name].head is not None) and abs(our_loss - loss) < 1e-5
    assert largest_error(ours, exact) < 1e-5


@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("layer_type", list(POLICIES))
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "roberta"])
def test_every_layer_type_approximates_exact(name, layer_type, attention):
    """8-bit slots and a whole attention map leave gradients within cosine 0.999; the forward is exact."""
    model, batch = FAMILY[name]({"lora_dropout": 0.2, "bias": "all"}), padded_batch()
    loss, exact = gradients(model, batch)
    # dropout of a stream is drawn for another shape
    kept = {"q_bit": 8, "attention": attention, "softmax_outlier_ratio": 1.0, "stream": False}
    config = HycloraConfig(layer_type=layer_type, **kept)
    apply_hyclora(model, config)
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5
    assert mean_cosine(ours, exact) > 0.999


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "roberta"])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    # RoBERTa derives it from the layer before, which is not run again
    slots = {"attn_in": "quant8"} if FAMILIES[name].post_norm else {}
    check_recomputation("intra_inter", use_reentrant, FAMILY[name], slot_savers=slots)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "roberta"])
def test_bf16_autocast_with_fp32_adapters(name, base):
    check_autocast(FAMILY[name](), base)


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "roberta"])
def test_slots_kept_exactly_give_exact_gradients(name, layer_type):
    """With and without compensation; q, k and v at 2 bit do not."""
    model, batch = FAMILY[name](), padded_batch()
    _, exact = gradients(model, batch)
    savers = dict.fromkeys(SLOTS, "exact") | dict.fromkeys(RECOMPUTABLE, "recompute")
    if not FAMILIES[name].activation.gated:
        del savers["gate"], savers["act"]
    for slots, is_exact in ((savers, True), (savers | dict.fromkeys("qkv", "quant2"), False)):
        apply_hyclora(model, HycloraConfig(layer_type=layer_type, slot_savers=slots))
        assert (largest_error(gradients(model, batch)[1], exact) < 1e-5) == is_exact
        remove_hyclora(model)


# intra_inter has the kernels of intra
@pytest.mark.parametrize("layer_type", ["baseline", "intra", "intra_inter_full_fuse"])
def test_norms_of_heads_in_kernels(layer_type, kernels, monkeypatch):
    """Loss and gradients are those of plain torch."""
    found = []
    for interpreting in (dispatch.INTERPRETING, False):
        monkeypatch.setattr(dispatch, "INTERPRETING", interpreting)
        model, batch = FAMILY["qwen3"](num_hidden_layers=1), padded_batch(rows=2, width=5)
        apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=8, iteration_threshold=1))
        gradients(model, batch)
        found.append(gradients(model, batch))
    (loss, ours), (plain_loss, plain) = found
    # a code may fall to the other side of a rounding where the order of a sum differs
    assert abs(loss - plain_loss) < 1e-5 and largest_error(ours, plain) < (1e-5 if layer_type == "baseline" else 0.02)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_a_trained_norm_of_heads_gets_its_gradient(name):
    """From stock code, whether it was made trainable before the patch or a step after; the report says so."""
    model, batch = FAMILY["qwen3"](), padded_batch()
    weight = model.get_submodule(f"base_model.model.model.layers.1.self_attn.{name}").weight
    weight.requires_grad_()
    _, exact = gradients(model, batch)
    for earlier in (True, False):
        weight.requires_grad_(earlier)
        report = apply_hyclora(model, HycloraConfig(layer_type="baseline"))
        gradients(model, batch)
        weight.requires_grad_()
        assert largest_error(gradients(model, batch)[1], exact) < 1e-5
        reason = f"layers.1.self_attn.{name}: the weight is trainable"
        assert sum(reason in line for line in report.not_patched) == 1
        remove_hyclora(model)


@pytest.mark.parametrize("folder", sorted((ROOT / "benchmarks/shapes").iterdir()), ids=lambda folder: folder.name)
def test_shapes_of_benchmarks_are_of_supported_families(folder):
    """Each loads as the configuration of a family, without a key that it does not know."""
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type in FAMILIES
    unknown = json.loads((folder / "config.json").read_text()).keys() - config.to_dict().keys()
    assert unknown <= {"rope_theta", "rope_scaling"} and config.rope_parameters["rope_theta"] >= 10000
