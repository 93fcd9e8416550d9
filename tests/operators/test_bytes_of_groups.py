"""What is kept of slots in groups of 128 channels, counted as in test_bytes.py."""

from functools import partial

import pytest

from hyclora.operators.packing.quantize import quantize
from tests.helpers.counting import kept, peak_of
from tests.operators.test_bytes import RANKS, SHAPES, Layer, mlp, no_launches, packed, quantizing, tensors  # noqa: F401

MADE = {
    "quantize": (quantizing("channel_group", 2, quantize, 128), lambda t, c: packed(t, c, 2, group=128)),
    "fused_mlp_fwd": (partial(mlp, group=128), lambda t, c: 2 * t * c + 2 * packed(t, c, 4, group=128)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_made(name, shape):
    call, formula = MADE[name]
    assert peak_of(tensors, *call(*shape)) == formula(*shape)


def test_kept_by_blocks_whose_groups_pay_for_k():
    """At 2 bit: k in 4, gate and up in groups of 128, and the layer keeps what it did, or less."""
    c, f, n, n_kv, d = size = (256, 1024, 4, 1, 64)
    layer, t = Layer(size, layer_type="intra_inter_full_fuse", q_bit=2), 40
    parts = {
        "self_attn": packed(t, n * d, 2) + packed(t, n_kv * d, 4) + packed(t, n_kv * d, 2),
        "mlp": 2 * packed(t, f, 2, group=128),
    }
    for name, expected in parts.items():
        given = layer.given(name, t)
        found = kept(partial(layer.run, name, *given), *layer.known(given))
        assert found == 4 * t * RANKS[name] + expected
    before = packed(t, n * d, 2) + 2 * packed(t, n_kv * d, 2) + 2 * packed(t, f, 2)
    assert sum(parts.values()) <= before
