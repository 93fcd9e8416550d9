"""Norms and embeddings that PEFT trains whole (modules_to_save), as in LongLoRA: patched, with gradients of stock."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.utils.loading import checkpoint_layers
from run_longseq import WHOLE
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, mistral, padded_batch, qwen3

ALL = [*WHOLE["norm"], *WHOLE["embed"]]


def whole(make=llama, modules=ALL, **config):
    return make(lora={"modules_to_save": list(modules)}, **config)


@pytest.mark.parametrize("make", [llama, mistral, qwen3])
@pytest.mark.parametrize("modules", [WHOLE["norm"], WHOLE["embed"], ALL], ids=["norms", "embeddings", "both"])
def test_all_gradients_are_those_of_stock(make, modules):
    """Norms' and embeddings' too, and every layer is patched: exact slots within 1e-5 in fp32."""
    model = whole(make, modules)
    loss, expected = gradients(model, padded_batch())
    trained = {name for name in expected if "modules_to_save" in name}
    assert len(trained) == 5 * (len(modules) > 1) + ("embed_tokens" in modules)
    report = apply_hyclora(model, HycloraConfig(layer_type="baseline", stream=False))
    assert not any("layers" in reason or "norm" in reason for reason in report.not_patched)
    ours, found = gradients(model, padded_batch())
    assert ours == pytest.approx(loss, rel=1e-6) and largest_error(found, expected) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compressed_layers_train_them_too(checkpointed, tied):
    model = whole(tie_word_embeddings=tied)
    _, expected = gradients(model, padded_batch())
    apply_hyclora(model, HycloraConfig(q_bit=8, iteration_threshold=1))
    if checkpointed:
        checkpoint_layers(model)
    for _ in range(3):
        _, found = gradients(model, padded_batch())
    assert found.keys() == expected.keys() and mean_cosine(found, expected) > 0.99


def test_the_stock_copy_runs_while_adapters_are_off():
    """Its weights are others by now, and nobody may take one for the other."""
    model = whole()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    with model.disable_adapter():
        off = model(**padded_batch()).loss
    on, expected = gradients(model, padded_batch())
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    with model.disable_adapter():
        torch.testing.assert_close(model(**padded_batch()).loss, off)
    again, found = gradients(model, padded_batch())
    assert again == pytest.approx(on, rel=1e-6) and again != pytest.approx(off.item(), rel=1e-3)
    assert largest_error(found, expected) < 1e-5
    remove_hyclora(model)
    assert gradients(model, padded_batch())[0] == pytest.approx(on, rel=1e-6)


def test_a_hook_around_a_norm_is_called():
    model = whole()
    norm, seen = model.get_base_model().model.layers[0].input_layernorm, []
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    gradients(model, padded_batch())
    norm.register_forward_hook(lambda *_: seen.append(1))
    gradients(model, padded_batch())
    assert seen == [1]
