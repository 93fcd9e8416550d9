"""Every family against stock HF + PEFT: whatever its layout, biases and windows, padded and packed."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.families import FAMILIES
from tests.helpers import small_models
from tests.helpers.small_models import gradients, largest_error, padded_batch

FAMILY = {name: getattr(small_models, name) for name in FAMILIES}
VARIANTS = [
    *((name, {}) for name in FAMILIES),
    *((name, {"sliding_window": 64}) for name in ("mistral", "qwen2")),
    ("qwen2", {"use_sliding_window": False}),
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
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5
    assert largest_error(ours, exact) < 1e-5
