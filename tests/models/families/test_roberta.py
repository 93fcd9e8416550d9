"""RoBERTa: what an encoder has that decoders have not, against stock HF + PEFT."""

import copy

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch
from hyclora.models.state import load_calibration, save_calibration
from hyclora.operators import dispatch, token_tiles
from hyclora.operators.savers import ChannelQuant, Derived
from hyclora.utils.profiling import buffered_bytes
from tests.helpers.offloading import equal, offloaded
from tests.helpers.small_models import (
    gradients,
    largest_error,
    mean_cosine,
    our_dropout,
    our_map_dropout,
    padded_batch,
    roberta,
)

DROPS = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}


def sentences(seed=0, **options) -> dict:
    """Padded sentences of three classes."""
    batch = padded_batch(seed=seed, **options)
    return batch | {"labels": torch.arange(len(batch["input_ids"]), device=batch["labels"].device) % 3}


def encoder_layers(model):
    return model.get_base_model().roberta.encoder.layer


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_a_classifier_equals_hf_and_peft(side, attention, implementation):
    """Loss and every gradient, those of the head that PEFT saves whole too; whichever end the padding is at."""
    model, batch = roberta(task="classification", attn_implementation=implementation), sentences()
    if side == "left":
        batch |= {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    elif side == "none":
        del batch["attention_mask"]
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert any("classifier" in name for name in ours)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_tokens_see_later_ones():
    """A change of the last token changes what the first one gives, in the patched model as in the stock one."""
    model, batch = roberta(), padded_batch(rows=1)
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, -1] += 1
    found = []
    for _ in range(2):
        found.append([model(**b).logits[0, 0] for b in (batch, other)])
        assert not torch.allclose(*found[-1])
        if len(found) == 1:
            apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2}, {"bias": "all"}], ids=str)
@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("task", ["masked", "classification"])
def test_dropout_has_the_same_masks_in_backward(task, attention, lora):
    """That of hidden states, of attention and of adapters; stock with the same masks has the same gradients.

    Of batches as they are: masks of a stream are of another shape (tests/models/test_encoder_stream.py).
    """
    maps = {"attn_implementation": "eager"} if attention == "eager" else {}
    model = roberta(lora, task=task, **DROPS, **maps)
    batch = sentences() if task == "classification" else padded_batch()
    loss, exact = gradients(model, batch, dropping=our_map_dropout if maps else our_dropout)
    assert loss != gradients(model, batch, seed=2)[0]
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention, stream=False))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter"])
def test_dropout_under_gradient_checkpointing(layer_type, use_reentrant):
    """The second run of a layer drops what the first did, which was stock code where torch ran it without grad."""
    model, batch = roberta({"lora_dropout": 0.1}, **DROPS).double(), padded_batch()
    config = HycloraConfig(layer_type=layer_type, q_bit=8, iteration_threshold=1)
    apply_hyclora(model, config)
    expected = gradients(model, batch)[1]
    remove_hyclora(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    apply_hyclora(model, config)
    found = gradients(model, batch)[1]
    # the first norm's output is not at hand in the second run, so attn_in is packed once more
    assert largest_error(found, expected) < (1e-5 if layer_type == "baseline" else 0.02)


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize("stream", [False, "auto"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_of_tiles_under_gradient_checkpointing(monkeypatch, use_reentrant, stream):
    """A long batch's MLP draws its masks a tile of tokens at a time, so stock code that runs first does too."""
    monkeypatch.setattr(token_tiles, "TILE_TOKENS", 16)
    model, batch, found = roberta({"lora_dropout": 0.1}, **DROPS).double(), padded_batch(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        apply_hyclora(model, HycloraConfig(layer_type="baseline", stream=stream))
        found.append(gradients(model, batch))
        remove_hyclora(model)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6) and largest_error(found[1][1], found[0][1]) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_layer_inputs_alone(use_reentrant):
    """As many bytes as in stock, and fewer if they are packed; the stream has none of the padding."""
    model, batch = roberta(num_hidden_layers=4), padded_batch()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    stock, found = buffered_bytes(model.train(), batch), []
    for savers in ({}, {"layer_in": "quant8"}):
        apply_hyclora(model, HycloraConfig(iteration_threshold=1, stream=False, slot_savers=savers))
        gradients(model, batch)
        found.append(buffered_bytes(model, batch))
        remove_hyclora(model)
    assert found[1] < found[0] <= stock


# intra_inter has the kernels of intra
@pytest.mark.parametrize("layer_type", ["baseline", "intra", "intra_inter_full_fuse"])
def test_kernels_give_what_plain_torch_gives(layer_type, kernels, monkeypatch):
    found = []
    for interpreting in (dispatch.INTERPRETING, False):
        monkeypatch.setattr(dispatch, "INTERPRETING", interpreting)
        model, batch = roberta({"lora_dropout": 0.1}, num_hidden_layers=1, **DROPS), padded_batch(rows=2, width=5)
        apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=8, iteration_threshold=1))
        gradients(model, batch)
        found.append(gradients(model, batch))
    (loss, ours), (plain_loss, plain) = found
    assert abs(loss - plain_loss) < 1e-5 and largest_error(ours, plain) < (1e-5 if layer_type == "baseline" else 0.02)


@pytest.mark.parametrize("bits, goal", [(8, 0.9999), (4, 0.99), (2, 0.85)])
@pytest.mark.parametrize("layer_type", ["intra", "intra_inter", "intra_inter_full_fuse"])
def test_gradients_stay_near_the_exact_ones(layer_type, bits, goal):
    """Of a classifier, mean cosine over all parameters."""
    model, batch = roberta(task="classification"), sentences(rows=6)
    _, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=bits))
    assert mean_cosine(gradients(model, batch)[1], exact) > goal


def test_what_is_kept():
    """The input of every layer but the first is the norm's before; an MLP keeps up alone; all linears are adapted."""
    model = roberta(task="classification", num_hidden_layers=12, hidden_size=32, intermediate_size=48,
                    num_attention_heads=2)  # fmt: skip
    report = apply_hyclora(model, HycloraConfig(q_bit=4))
    assert report.savers["attn_in"] == ["4 bit"] + ["derived"] * 11
    assert set(report.savers["mlp_in"]) == {"derived"} and set(report.savers["hidden"]) == {"recompute"}
    assert report.savers.keys().isdisjoint({"gate", "act"})
    assert sum(report.adapters.values()) == 72 and not report.single_kernels
    assert report.head is None and any("classifier" in name for name in report.not_patched)


def test_what_cannot_be_served_is_refused():
    assert "last norm" not in str(apply_hyclora(roberta()))
    with pytest.raises(ValueError, match="an MLP without a gate has no such slot"):
        apply_hyclora(roberta(), HycloraConfig(slot_savers={"gate": "exact"}))
    with pytest.raises(ValueError, match="ReLU is not supported, only GELUActivation"):
        apply_hyclora(roberta(hidden_act="relu"))
    with pytest.raises(ValueError, match="intermediate_act_fn: _gelu_python is not torch's own function"):
        apply_hyclora(roberta(hidden_act="gelu_python"))
    with pytest.raises(ValueError, match="is_causal=True, so that tokens do not see later ones"):
        apply_hyclora(roberta(is_decoder=True))


def hook(layer):
    layer.intermediate.dense.register_forward_hook(lambda module, args, output: output * 2)


def own_forward(layer):
    stock = layer.output.forward
    layer.output.forward = lambda *args: stock(*args) * 2


def own_chunk(layer):
    stock = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda x: stock(x) * 2


def without_dropout(layer):
    layer.output.dropout = torch.nn.Identity()


def other_norm(layer):
    layer.attention.output.LayerNorm = torch.nn.LayerNorm(96, eps=1e-5, device=layer.output.LayerNorm.weight.device)


def other_attention(layer):
    layer.attention.self = copy.deepcopy(layer.attention.self)
    for p in layer.attention.self.parameters():
        p.data.mul_(1.5)


@pytest.mark.parametrize("change", [hook, own_forward, own_chunk, without_dropout, other_norm, other_attention])
@pytest.mark.parametrize("running", [False, True])
def test_a_layer_that_somebody_changed_is_stock(change, running):
    """All of it, before the patch or a step after; the other layer is patched, gradients are those of stock."""
    model, batch = roberta(), padded_batch()
    if running:
        report = apply_hyclora(model, HycloraConfig(layer_type="baseline"))
        gradients(model, batch)
    change(encoder_layers(model)[0])
    if not running:
        _, expected = gradients(model, batch)
        report = apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    _, ours = gradients(model, batch)
    # before the patch a norm or an attention is one like any other
    known = not running and change in (other_norm, other_attention)
    assert sum("encoder.layer.0" in line for line in report.not_patched) == (not known)
    if running:
        remove_hyclora(model)
        _, expected = gradients(model, batch)
    assert largest_error(ours, expected) < 1e-5


def test_offloaded_slots_give_the_same_gradients():
    """Bit for bit, though attention reads what the norm of the layer before had sent away."""
    model, batches = roberta(num_hidden_layers=3), [padded_batch(seed=seed) for seed in range(3)]
    config = HycloraConfig(iteration_threshold=1)
    apply_hyclora(model, config)
    expected = [gradients(model, batch)[1] for batch in batches]
    remove_hyclora(model)
    store = offloaded(model, config)
    for batch, theirs in zip(batches, expected, strict=True):
        assert equal(gradients(model, batch)[1], theirs)
        assert store.host_bytes == store.device_bytes == 0


def test_resumed_gradients_are_bit_equal(tmp_path):
    """Under gradient checkpointing too, where attn_in has a quantizer of its own in every layer."""
    found = []
    for fresh in (False, True):
        model = roberta()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        apply_hyclora(model, HycloraConfig(iteration_threshold=2, q_bit=2))
        if fresh:
            load_calibration(model, tmp_path)
        else:
            for seed in range(2):
                gradients(model, padded_batch(seed=seed))
            save_calibration(model, tmp_path)
        found.append(gradients(model, padded_batch(seed=9))[1])
        savers = [block.savers.get("attn_in") for block in find_patch(model).blocks]
        own = [saver.own if isinstance(saver, Derived) else saver for saver in savers if saver is not None]
        assert len(own) == 2 and all(isinstance(saver, ChannelQuant) and saver.statistics for saver in own)
    assert equal(*found)


def test_evaluation_and_disabled_adapters_run_stock_code():
    model, batch = roberta(task="classification", **DROPS), sentences()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def answers():
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
            with model.disable_adapter():
                return logits, model(**inputs).logits

    expected = answers()
    apply_hyclora(model.train(), HycloraConfig(q_bit=2))
    gradients(model, batch)
    assert equal(dict(enumerate(answers())), dict(enumerate(expected)))
