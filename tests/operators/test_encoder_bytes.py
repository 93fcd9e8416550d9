"""What docstrings of an encoder's operators say of bytes, and what a layer keeps; counted as in test_bytes.py."""

import math
from functools import partial

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.blocks import SOURCE
from hyclora.models.patch import find_patch
from hyclora.operators.layer_norm import layer_norm_bwd, layer_norm_fwd, layer_norm_pack, layer_norm_unpack_bwd
from hyclora.operators.mlp.activation import gelu_bwd, gelu_fwd
from hyclora.operators.mlp.fused_gelu import fused_gelu_bwd, fused_gelu_fwd
from tests.helpers.counting import kept, peak_of
from tests.helpers.small_models import roberta
from tests.operators.mlp.test_fused_gelu import prepare
from tests.operators.test_bytes import BF16, SHAPES, no_launches, packed, saver, tensors, up, x  # noqa: F401

SEED = torch.zeros(1, dtype=torch.int64)


def unpacking(t, c):
    found, _ = saver(c, 3, 0.02)
    rstd, slot = x(t, dtype=torch.float32), found.pack(x(t, c), saver(c, 3)[1])
    return layer_norm_unpack_bwd, x(t, c), rstd, x(c), slot, found.book


def gelu(t, c, backward=False):
    spec, frozen, adapters, keeper = prepare(t, c, 4, 8, BF16)
    slots = keeper()
    fused_gelu_fwd(spec, frozen, adapters, slots)
    if backward:
        return fused_gelu_bwd, spec, x(t, c), None, adapters, slots
    slots.step.index = 2
    return fused_gelu_fwd, spec, frozen, adapters, keeper()


MADE = {
    "layer_norm_fwd": (lambda t, c: (layer_norm_fwd, *[x(t, c)] * 2, *[x(c)] * 2, 1e-5), lambda t, c: t * (4 * c + 4)),
    "layer_norm_bwd": (
        lambda t, c: (layer_norm_bwd, x(t, c), x(t, c), x(t, dtype=torch.float32), x(c)), lambda t, c: 2 * t * c
    ),
    "layer_norm_bwd, dropped": (
        lambda t, c: (layer_norm_bwd, x(t, c), x(t, c), x(t, dtype=torch.float32), x(c), SEED, 0.1),
        lambda t, c: 4 * t * c,
    ),
    "layer_norm_pack": (
        lambda t, c: (layer_norm_pack, *[x(t, c)] * 2, *[x(c)] * 2, 1e-5, saver(c, 3, 0.02)[0]),
        lambda t, c: t * (2 * c + 4) + packed(t, c, 3, math.ceil(0.02 * c)),
    ),
    "layer_norm_unpack_bwd": (unpacking, lambda t, c: 2 * t * c),
    "gelu_fwd": (lambda t, c: (gelu_fwd, x(t, c)), lambda t, c: 2 * t * c),
    "gelu_bwd": (lambda t, c: (gelu_bwd, x(t, c), x(t, c)), lambda t, c: 4 * t * c),
    "fused_gelu_fwd": (gelu, lambda t, c: 2 * t * c + packed(t, c, 4)),
    "fused_gelu_bwd": (lambda t, c: gelu(t, c, backward=True), lambda t, c: 2 * t * c),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_made(name, shape):
    call, formula = MADE[name]
    assert peak_of(tensors, *call(*shape)) == formula(*shape)


@pytest.mark.parametrize("layer_type", ["intra_inter", "intra_inter_full_fuse"])
def test_kept_by_a_layer(layer_type):
    """Packed q, k, v, up and x_hat of both norms, x A^T of four groups, two rstd; nothing of what goes in."""
    c, f, rank = 256, 512, 8
    model = roberta({"r": rank}, hidden_size=c, intermediate_size=f, num_attention_heads=4).cpu()
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, iteration_threshold=1, layernorm_outlier_ratio=0))
    first, second = model.get_base_model().roberta.encoder.layer
    patch = find_patch(model)
    patch.step.index = 1
    second(first(x(1, 3, c, dtype=torch.float32)))
    patch.step.index = 2
    for t in (8, 48):
        hidden = first(x(1, t, c, dtype=torch.float32))
        known = [*model.parameters(), *tensors([s for b in patch.blocks for s in b.savers.values()]), hidden]
        known += tensors(getattr(hidden, SOURCE)[0].packed)
        expected = 3 * packed(t, c, 4) + packed(t, f, 4) + 2 * packed(t, c, 4) + 2 * 4 * t
        expected += 4 * t * (up(3 * rank) + 3 * up(rank))
        assert kept(partial(second, hidden), *known) == expected
