"""What verify() cannot measure is refused, and the model left as it was."""

import pytest
import torch
from torch.utils.data import DataLoader

from hyclora import remove_hyclora, verify
from tests.helpers.small_models import padded_batch
from tests.models.test_verify import batches, patched


def without(model):
    for p in model.parameters():
        p.requires_grad = False


def hooked(model):
    next(p for p in model.parameters() if p.requires_grad).register_post_accumulate_grad_hook(lambda p: None)


@pytest.mark.parametrize(
    "change, given, said",
    [
        (remove_hyclora, batches, "this model is not patched; call apply_hyclora first"),
        (without, batches, "no weight of this model is trained"),
        (hooked, batches, "a hook acts on the gradient of .*lora_A"),
        (lambda model: None, list, "there are no batches"),
        (lambda model: None, padded_batch, "batches is a dict: give a list of batches, for instance \\[batch\\]"),
        (lambda model: None, lambda: torch.ones(1, 4).long(), "batches is a Tensor: give a list of batches"),
        (lambda model: None, lambda: DataLoader(batches()), "batches is a DataLoader: give a list of batches"),
        (lambda model: None, lambda: [torch.ones(1, 4).long()], "batch 1 of 1 has no labels"),
        (
            lambda model: None,
            lambda: [*batches(1), {"input_ids": torch.ones(1, 4).long()}],
            "batch 2 of 2 has no labels",
        ),
        (
            lambda model: None,
            lambda: [padded_batch() | {"labels": torch.full_like(padded_batch()["labels"], -100)}],
            "the loss of measured batch 1 is nan with exact LoRA too",
        ),
        (lambda model: model.base_model.disable_adapter_layers(), batches, "no weight of this model is trained"),
    ],
)
def test_what_cannot_be_verified_is_refused_and_the_model_left_alone(change, given, said):
    model = patched()
    change(model)
    patches = [module for module in model.modules() if "_hyclora_patch" in module.__dict__]
    with pytest.raises(ValueError, match=said):
        verify(model, given())
    assert [module for module in model.modules() if "_hyclora_patch" in module.__dict__] == patches
