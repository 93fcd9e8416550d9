"""Patched models against stock HF + PEFT: the exact layer type equals it, the others approximate it."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.config import POLICIES, SLOTS
from hyclora.models.patch import find_patch
from hyclora.operators.savers import ChannelQuant
from tests.helpers.small_models import (
    gradients,
    largest_error,
    llama,
    mean_cosine,
    mistral,
    our_dropout,
    our_map_dropout,
    padded_batch,
    qwen2,
    qwen3,
    roberta,
)

VARIANTS = {
    "alpha != r": {},
    "dropout": {"lora": {"lora_dropout": 0.2}},
    "rslora": {"lora": {"use_rslora": True}},
    "trainable biases": {"lora": {"bias": "all"}, "attention_bias": True, "mlp_bias": True},
    "frozen biases": {"attention_bias": True, "mlp_bias": True},
    "lora bias": {"lora": {"lora_bias": True}},
    "q and v only": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "down only": {"lora": {"target_modules": ["down_proj"]}},
    "rank pattern": {"lora": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 5}}},
    "one layer only": {"lora": {"layers_to_transform": [1]}},
    # grouped queries in fp32 are several calls on a GPU, which draw apart
    "attention dropout": {"attention_dropout": 0.2, "num_key_value_heads": 6},
    "multi-head": {"num_key_value_heads": 6},
    "head_dim": {"head_dim": 20},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}  # fmt: skip


def rows(**options) -> HycloraConfig:
    """Without a stream, in which dropout is drawn for another shape."""
    return HycloraConfig(stream=False, **options)


@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_baseline_equals_hf_and_peft(variant, attention, request):
    """Every gradient within 1e-5 in fp32; LoRA scaling and dropout were ignored by the original."""
    if "attention_dropout" in variant:  # a GPU's other kernels draw as their tiles go, and HF's mask chooses another
        request.getfixturevalue("deterministic_attention")
    maps = attention == "eager" and "attention_dropout" in variant
    model, batch = llama(**variant, **({"attn_implementation": "eager"} if maps else {})), padded_batch()
    loss, exact = gradients(model, batch, dropping=our_map_dropout if maps else our_dropout)
    apply_hyclora(model, rows(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5
    assert largest_error(ours, exact) < 1e-5


@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_nf4_base_weights(layer_type):
    """bitsandbytes NF4 with double quantization under LoRA: exact blocks equal stock, 8 bit comes close."""
    model = llama({"lora_dropout": 0.1}, hidden_size=128, num_attention_heads=4, intermediate_size=192, base="nf4")
    batch = padded_batch()
    loss, exact = gradients(model, batch)
    apply_hyclora(model, rows(layer_type=layer_type, q_bit=8))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-4
    if layer_type == "baseline":
        assert largest_error(ours, exact) < 1e-4
    else:
        assert mean_cosine(ours, exact) > 0.999


@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("layer_type", list(POLICIES))
@pytest.mark.parametrize("variant", ["dropout", "trainable biases", "q and v only", "head_dim"])
def test_every_layer_type_approximates_exact(variant, layer_type, attention):
    """8-bit slots and a whole attention map leave gradients within cosine 0.999; the forward is exact."""
    model, batch = llama(**VARIANTS[variant]), padded_batch()
    loss, exact = gradients(model, batch)
    config = rows(layer_type=layer_type, q_bit=8, attention=attention, softmax_outlier_ratio=1.0)
    apply_hyclora(model, config)
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5
    assert mean_cosine(ours, exact) > 0.999


@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("family", [llama, mistral, qwen2, qwen3, roberta])
def test_compression_is_real_and_ordered(family, attention):
    """Fewer bits, larger error; 4 and 2 bit stay useful."""
    model, batch = family(), padded_batch()
    _, exact = gradients(model, batch)
    cosines = []
    for bits in (8, 4, 3, 2):
        apply_hyclora(model, rows(q_bit=bits, attention=attention, softmax_outlier_ratio=0.5))
        cosines.append(mean_cosine(gradients(model, batch)[1], exact))
        remove_hyclora(model)
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] < 1 - 1e-6 and cosines[-1] > 0.85


def test_each_norm_restores_its_own_outliers():
    """Defect of the original: the first norm's outliers went into the second norm's channels."""
    model, batch = llama(), padded_batch()
    layer = model.get_base_model().model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.base_layer.weight[7] *= 50  # an outlier channel that only the second norm sees
    _, exact = gradients(model, batch)
    apply_hyclora(model, rows(q_bit=8, layernorm_outlier_ratio=0.01))
    assert mean_cosine(gradients(model, batch)[1], exact) > 0.999
    savers = {
        b.name.split("layers.")[1]: b.savers["norm_in"] for b in find_patch(model).blocks if "layernorm" in b.name
    }
    channels = {name: saver.outliers.tolist() for name, saver in savers.items()}
    assert channels["0.post_attention_layernorm"] == [7] != channels["0.input_layernorm"]


def test_k_and_v_are_kept_for_their_own_heads():
    """Defect of the original: k and v kept after repeat_kv, here 3 times the bytes."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, rows(layer_type="baseline", attention="eager"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(**batch).loss.backward()
    assert (63, 32) in kept and (63, 96) in kept


def token_counts(model) -> list[float]:
    """Tokens that each quantizer was calibrated on."""
    savers = [s for block in find_patch(model).blocks for s in block.savers.values()]
    return [s.statistics["count"].item() for s in savers if isinstance(s, ChannelQuant) and s.statistics]


def check_recomputation(layer_type: str, use_reentrant: bool, family=llama, **settings) -> None:
    """Gradients under gradient checkpointing are as good as without it, or better; calibration is the same."""
    model, batches = family({"lora_dropout": 0.1}).double(), [padded_batch(seed=seed) for seed in range(4)]
    config = rows(layer_type=layer_type, q_bit=8, iteration_threshold=2, **settings)
    found = []
    for each in (rows(layer_type="baseline"), config):
        apply_hyclora(model, each)
        found.append([gradients(model, batch)[1] for batch in batches])
        counted = token_counts(model)
        remove_hyclora(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    apply_hyclora(model, config)
    for batch, exact, plain in zip(batches, *found, strict=True):
        error = 1 - mean_cosine(gradients(model, batch)[1], exact)
        assert error < (1e-9 if layer_type == "baseline" else 1.01 * (1 - mean_cosine(plain, exact)))
    assert find_patch(model).step.index == 4 and token_counts(model) == counted


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_gradient_checkpointing_gives_the_same_gradients(layer_type, use_reentrant):
    """The recomputed forward neither calibrates again nor changes what is packed."""
    check_recomputation(layer_type, use_reentrant)


def test_dropout_of_maps_is_not_drawn_twice_apart():
    """Stock attention, which reentrant checkpointing of somebody's own runs first, cannot drop them."""
    for use_reentrant in (True, False):
        model, batch = llama(attention_dropout=0.2), padded_batch()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        apply_hyclora(model, rows(layer_type="baseline", attention="eager"))
        _, ours = gradients(model, batch)
        model.gradient_checkpointing_disable()
        assert largest_error(ours, gradients(model, batch)[1]) < 1e-5
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for layer in model.get_base_model().model.layers:
        layer._gradient_checkpointing_func = lambda run, *args: checkpoint(run, *args, use_reentrant=True)
    with pytest.raises(ValueError, match="self_attn: stock attention cannot drop what attention=eager does"):
        gradients(model, batch)


def test_a_kept_act_and_hidden_are_what_backward_reads():
    """With gate at 2 bit but act and hidden exact, up's and down's gradients in the last layer are exact."""
    model, batch = llama(), padded_batch()
    _, exact = gradients(model, batch)
    slots = dict.fromkeys(SLOTS, "exact") | {"gate": "quant2"}
    apply_hyclora(model, rows(layer_type="intra", slot_savers=slots))
    _, ours = gradients(model, batch)
    errors = {name: largest_error({name: ours[name]}, {name: exact[name]}) for name in exact if "layers.1.mlp" in name}
    assert len(errors) == 6
    for name, error in errors.items():
        assert (error > 1e-3) == ("gate_proj" in name), name


def test_calibration_freezes_and_skips_padding():
    """Statistics move for iteration_threshold training forwards, then never; what is padding does not matter."""
    model, batch = llama(), padded_batch()
    saver_of = {}

    def statistics():
        blocks = find_patch(model).blocks
        return {(b.name, n): t.clone() for b in blocks for s in b.savers.values() for n, t in s.state_dict().items()}

    apply_hyclora(model, rows(iteration_threshold=2))
    seen = []
    for seed in range(4):
        gradients(model, padded_batch(seed=seed))
        seen.append(statistics())
    key = next(k for k in seen[0] if k[1] == "total" and "mlp" in k[0])
    assert not torch.equal(seen[0][key], seen[1][key])
    assert all(torch.equal(seen[1][k], seen[3][k]) for k in seen[1])
    remove_hyclora(model)

    for filler in (3, 77):
        apply_hyclora(model, rows(iteration_threshold=2))
        noisy = dict(batch, input_ids=torch.where(batch["attention_mask"] == 1, batch["input_ids"], filler))
        gradients(model, noisy)
        saver_of[filler] = statistics()
        remove_hyclora(model)
    assert all(torch.allclose(saver_of[3][k], saver_of[77][k], atol=1e-5) for k in saver_of[3])


def test_eval_generate_disabled_and_merged_adapters_run_stock_code(monkeypatch):
    model, batch = llama(), padded_batch()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        generated = model.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False)
    _, disabled = _with_disabled(model.train(), batch)
    apply_hyclora(model, rows(q_bit=2))
    for function in ("RMSNormFunction", "AttentionFunction", "MlpFunction"):
        monkeypatch.delattr(f"hyclora.models.blocks.{function}")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, expected)
        assert torch.equal(model.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False), generated)
    assert find_patch(model).step.index == 0
    assert torch.equal(_with_disabled(model.train(), batch)[1], disabled)
    model.merge_adapter()
    model(**batch)
    model.unmerge_adapter()
    with pytest.raises(NameError):
        model(**batch)


def _with_disabled(model, batch):
    with model.disable_adapter():
        out = model(**batch, use_cache=False)
    return out.loss, out.logits


@pytest.mark.parametrize("family", [llama, qwen3, roberta])
def test_remove_restores_the_model_bit_for_bit(family):
    model, batch = family(), padded_batch()
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    loss, exact = gradients(model, batch)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    apply_hyclora(model, rows(q_bit=2))
    gradients(model, batch)
    assert model.state_dict().keys() == state.keys()
    remove_hyclora(model)
    assert forwards == {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    again_loss, again = gradients(model, batch)
    assert again_loss == loss and all(torch.equal(again[n], exact[n]) for n in exact)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_two_models_and_deep_copies_do_not_share_state():
    """Nothing is patched on a class; a deep copy calibrates by itself."""
    patched, plain, batch = llama(), llama(), padded_batch()
    _, exact = gradients(plain, batch)
    apply_hyclora(patched, rows(q_bit=2))
    clone = copy.deepcopy(patched)
    assert largest_error(gradients(plain, batch)[1], exact) == 0
    gradients(clone, batch)
    assert find_patch(clone).step.index == 1 and find_patch(patched).step.index == 0
    assert find_patch(patched).blocks[0].savers["norm_in"].mean is None


def test_gradient_accumulation_sums_micro_batches():
    """Several forwards before any backward keep their own slots, also while calibration still moves."""
    model = llama()
    batches = [padded_batch(seed=s) for s in range(3)]
    apply_hyclora(model, rows(q_bit=4, iteration_threshold=5))
    model.zero_grad()
    torch.stack([model(**b).loss for b in batches]).sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    remove_hyclora(model)
    apply_hyclora(model, rows(q_bit=4, iteration_threshold=5))
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    apart = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert largest_error(apart, together) < 1e-4


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_bf16_autocast_with_fp32_adapters(variant, base):
    check_autocast(llama(**variant), base)


def check_autocast(model, base: torch.dtype) -> None:
    """As HF Trainer runs with --bf16: adapters and their gradients stay fp32, errors are about those of torch.

    The worst parameter's may be twice as large: with biases a sum over tokens that nearly cancels decides it.
    """
    batch = padded_batch()
    _, exact = gradients(model, batch)

    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(base)

    def autocast_gradients():
        with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16):
            return gradients(model, batch)[1]

    stock = autocast_gradients()
    apply_hyclora(model, rows(layer_type="baseline"))
    ours = autocast_gradients()
    assert all(ours[name].dtype == g.dtype for name, g in stock.items())
    errors = [torch.stack([(g[n].float() - e).norm() / e.norm() for n, e in exact.items()]) for g in (ours, stock)]
    assert errors[0].mean() <= 1.5 * errors[1].mean()
    assert errors[0].max() <= 2 * errors[1].max()


def test_several_active_adapters_are_refused_when_they_are_used():
    model = llama()
    model.add_adapter("second", model.peft_config["default"])
    apply_hyclora(model, rows())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="q_proj: several active adapters, default, second"):
        model(**padded_batch())
    model.set_adapter("second")
    model.train()
    loss, ours = gradients(model, padded_batch())
    assert all("second" in name for name in ours)


@pytest.mark.parametrize("family", [llama, qwen3])
def test_fused_layers_are_the_unfused_ones(family, kernels):
    """Norms, q/k/v (heads of 128) and MLP in fused kernels, after calibration: loss and gradients of intra_inter."""
    found = {}
    for layer_type in ("intra_inter", "intra_inter_full_fuse"):
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
        model, batch = family(**sizes), padded_batch(rows=2, width=6)
        apply_hyclora(model, rows(layer_type=layer_type, q_bit=4, iteration_threshold=1))
        gradients(model, batch)
        found[layer_type] = gradients(model, batch)
        specs = [block.spec for block in find_patch(model).blocks if hasattr(block, "spec")]
        assert [spec.can_fuse for spec in specs] == [layer_type == "intra_inter_full_fuse"] * 2
    (loss, plain), (fused_loss, fused) = found.values()
    # a code may fall to the other side of a rounding where the order of a sum differs
    assert abs(loss - fused_loss) < 1e-5 and largest_error(fused, plain) < 0.05


def test_fused_layers_in_groups_of_two_tiles_are_the_unfused_ones(kernels):
    """At 2 bit, where gate and up pay for k: the packed bytes are the same, so gradients are but for rounding."""
    found = []
    for layer_type in ("intra_inter", "intra_inter_full_fuse"):
        sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 1024}
        model, batch = llama(num_hidden_layers=1, **sizes), padded_batch(rows=2, width=6)
        report = apply_hyclora(model, rows(layer_type=layer_type, q_bit=2, iteration_threshold=1))
        assert report.savers["gate"] == ["2 bit (groups of 128)"] and report.single_kernels == []
        gradients(model, batch)
        found.append(gradients(model, batch))
    (loss, plain), (fused_loss, fused) = found
    assert abs(loss - fused_loss) < 1e-5 and largest_error(fused, plain) < 0.05


@pytest.mark.parametrize("savers", [None, {"up": "exact"}, {"hidden": "quant8"}], ids=["lora bias", "up", "hidden"])
def test_what_the_fused_kernels_do_not_take_goes_the_other_way(kernels, monkeypatch, savers):
    """A bias on lora_B, gate or up exact, hidden kept: as intra_inter, but for what fused norms round otherwise."""
    for name in ("fused_mlp_fwd", "fused_mlp_bwd"):
        monkeypatch.setattr(f"hyclora.operators.mlp.mlp.{name}", lambda *args: pytest.fail("the fused kernel ran"))
    found = []
    for layer_type in ("intra_inter", "intra_inter_full_fuse"):
        model = llama({"lora_bias": True} if savers is None else {}, num_hidden_layers=1)
        config = rows(layer_type=layer_type, iteration_threshold=1, slot_savers=savers or {})
        apply_hyclora(model, config)
        for _ in range(2):
            loss, grads = gradients(model, padded_batch(rows=1, width=5))
        found.append((loss, grads))
    (loss, plain), (other_loss, other) = found
    assert abs(loss - other_loss) < 1e-5 and largest_error(other, plain) < 0.05
