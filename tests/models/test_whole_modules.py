"""Norms and embeddings that PEFT trains whole (modules_to_save), as in LongLoRA: patched, with gradients of stock."""

import copy

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch
from hyclora.utils.checkpointing import checkpoint_layers
from run_longseq import WHOLE
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import (
    gradients,
    largest_error,
    llama,
    mean_cosine,
    mistral,
    padded_batch,
    qwen3,
    roberta,
)

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


@pytest.mark.parametrize("switch", [lambda m: m.set_adapter("other"), lambda m: norm_of(m).enable_adapters(False)])
def test_an_encoders_norms_of_another_adapter(switch, caplog):
    """An encoder's layer runs as one, and yet each adapter trains its own norms; layers run again as they were."""
    model = roberta({"modules_to_save": ["LayerNorm", "classifier"]}, task="classification")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name or "original_module" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter.device)
    batch = padded_batch() | {"labels": torch.arange(3, device=DEVICE)}

    def found():
        first = gradients(model, batch)
        switch(model)
        between = gradients(model, batch)
        model.set_adapter("default")
        norm_of(model).enable_adapters(True)
        return first, between, gradients(model, batch)

    expected = found()
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    for (our_loss, ours), (loss, exact) in zip(found(), expected, strict=True):
        assert our_loss == pytest.approx(loss, abs=1e-5) and largest_error(ours, exact) < 1e-5
    assert "another copy of it runs" in caplog.text and not find_patch(model).watch.layers[0].reason


def norm_of(model):
    return model.get_base_model().roberta.encoder.layer[0].output.LayerNorm
