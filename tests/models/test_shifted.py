"""Shifted sparse attention in whole models: stock and patched ones alike, in training alone."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.shifted import shifted_sparse
from hyclora.operators import reference
from hyclora.utils.checkpointing import checkpoint_layers
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, padded_batch, qwen2

GROUP = 8


def batch_of(width=32) -> dict:
    ids = torch.randint(0, 128, (2, width), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def shifted(make, **config):
    model = make(**config)
    model.get_base_model().set_attn_implementation(shifted_sparse(GROUP))
    return model


def in_plain_torch(q, k, v, group, scaling, dropout):
    return reference.shifted_sparse_attention(q, k, v, group, scaling)


@pytest.mark.parametrize("kv_heads", [2, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_exact_layer_is_the_plain_one(kv_heads, checkpointed, monkeypatch):
    """Loss and every gradient of a model whose layers are patched and keep all exactly: 1e-5 in fp32."""
    model = shifted(llama, num_key_value_heads=kv_heads)
    with monkeypatch.context() as patch:
        patch.setattr("hyclora.models.shifted.shifted_sparse_attention", in_plain_torch)
        loss, expected = gradients(model, batch_of())
    report = apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    assert not any("layers" in reason for reason in report.not_patched)
    if checkpointed:
        checkpoint_layers(model)
    ours, found = gradients(model, batch_of())
    assert ours == pytest.approx(loss, rel=1e-6) and largest_error(found, expected) < 1e-5
    remove_hyclora(model)
    plain, found = gradients(model, batch_of())
    assert plain == pytest.approx(loss, rel=1e-6) and largest_error(found, expected) < 1e-5


def test_it_is_another_model_in_training_and_the_same_in_evaluation():
    full, model = llama(), shifted(llama)
    loss, expected = gradients(full, batch_of())
    assert abs(gradients(model, batch_of())[0] - loss) > 1e-3
    logits = [m.eval()(**batch_of()).logits for m in (full, model)]
    torch.testing.assert_close(*logits)


def test_the_compressed_layer_is_near():
    model = shifted(llama)
    _, expected = gradients(model, batch_of())
    apply_hyclora(model, HycloraConfig(q_bit=8, iteration_threshold=1))
    for _ in range(3):
        _, found = gradients(model, batch_of())
    assert mean_cosine(found, expected) > 0.999


@pytest.mark.parametrize("patched", [False, True])
def test_what_is_no_whole_row_is_refused(patched):
    model = shifted(llama)
    if patched:
        apply_hyclora(model, HycloraConfig())
    with pytest.raises(ValueError, match="trains on whole rows: leave padding, packed documents and sliding windows"):
        model(**padded_batch())


def test_a_sliding_window_shorter_than_the_row_is_refused():
    with pytest.raises(ValueError, match="trains on whole rows"):
        gradients(shifted(qwen2), batch_of())


def test_a_kept_attention_map_is_refused():
    with pytest.raises(ValueError, match="attention=eager keeps the map of all tokens, not of shifted groups"):
        apply_hyclora(shifted(llama), HycloraConfig(attention="eager"))
