"""Classifiers of texts: patched layers under a stock head, which reads one token of each row, and is trained whole."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import gradients, largest_error, mean_cosine, padded_batch

SHAPE = {
    "vocab_size": 128, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
PAD = 0


def classifier(model_type, n_labels=3):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(model_type, **SHAPE, num_labels=n_labels, pad_token_id=PAD)
    )
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.to(DEVICE).train()


def batch_of(n_labels):
    batch = padded_batch()
    batch["input_ids"] = batch["input_ids"].clamp(min=1).masked_fill(batch["attention_mask"] == 0, PAD)
    batch["labels"] = torch.tensor([0.5, 2.0, 4.0] if n_labels == 1 else [2, 0, 1], device=DEVICE)
    return batch


@pytest.mark.parametrize("n_labels", [1, 3])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_exact_slots_give_the_stock_gradients_of_adapters_and_head(model_type, n_labels, shapes):
    """And no padding is computed."""
    model, batch = classifier(model_type, n_labels), batch_of(n_labels)
    loss, expected = gradients(model, batch)
    assert any("modules_to_save" in name for name in expected)
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    ours, found = gradients(model, batch)
    assert ours == pytest.approx(loss, rel=1e-5) and largest_error(found, expected) < 1e-4
    assert set(shapes) == {(1, int(batch["attention_mask"].sum()))}
    remove_hyclora(model)
    assert gradients(model, batch)[0] == loss


def masked_at_the_end(batch):
    """A token that is no padding by its id, which the head goes by."""
    batch["attention_mask"][0, -1] = 0


def in_front(batch):
    """Read is the last token of each row, which is real."""
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name].flip(1)


def without_a_token(batch):
    batch["input_ids"][1] = PAD
    batch["attention_mask"][1, :3] = 0


CHANGES = {masked_at_the_end: False, in_front: True, without_a_token: False}


@pytest.mark.parametrize("change, streams", CHANGES.items(), ids=lambda value: getattr(value, "__name__", None))
def test_padding_that_the_head_reads_is_computed(change, streams, shapes):
    model, batch = classifier("llama"), batch_of(3)
    change(batch)
    loss, expected = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    ours, found = gradients(model, batch)
    assert ours == pytest.approx(loss, rel=1e-5) and largest_error(found, expected) < 1e-4
    assert set(shapes) == {(1, int(batch["attention_mask"].sum())) if streams else batch["input_ids"].shape}


def test_without_a_padding_id_the_last_place_is_read(shapes):
    model, batch = classifier("llama"), batch_of(3)
    model.get_base_model().config.pad_token_id = None
    one = {name: t[1:2] for name, t in batch.items()}
    loss, expected = gradients(model, one)
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    ours, found = gradients(model, one)
    assert ours == pytest.approx(loss, rel=1e-5) and largest_error(found, expected) < 1e-4
    assert set(shapes) == {(1, 21)}


def test_few_bits_give_nearly_the_stock_gradients():
    model, batch = classifier("llama"), batch_of(3)
    loss, expected = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(q_bit=4, iteration_threshold=1))
    gradients(model, batch)
    ours, found = gradients(model, batch)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys() and mean_cosine(found, expected) > 0.95
