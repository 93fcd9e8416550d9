"""The counted peak of long rows against that of a step, as in test_counting.py.

An MLP's tiles and attention's pieces are small here, so that what is there of all tokens is what weighs.
"""

import pytest
from transformers import LlamaConfig

from hyclora import HycloraConfig
from hyclora.operators import token_tiles
from hyclora.operators.attention import flash
from hyclora.operators.linear import low_rank_grad
from hyclora.operators.reference import padded_rank
from hyclora.operators.savers import base
from hyclora.utils.planning import Savers, Shape, count, live
from tests.utils.planning.test_counting import RANK, as_on_a_gpu, peak

assert as_on_a_gpu  # the fixture
LENGTH, HIDDEN, HEADS = 2048, 512, 8
HIDDEN_STATE = 2 * LENGTH * HIDDEN
PACKED = {"offload": True, "slot_savers": {"layer_in": "quant8"}}


def sizes(kv_heads: int, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, vocab_size=256, use_cache=False, max_position_embeddings=LENGTH,
    )  # fmt: skip


@pytest.fixture
def small_pieces(monkeypatch):
    """Eight tiles, and a piece for each head of k."""
    for module in (token_tiles, live):
        monkeypatch.setattr(module, "TILE_TOKENS", LENGTH // 8)
    monkeypatch.setattr(flash, "AT_ONCE", LENGTH * HEADS // 8)
    monkeypatch.setattr(low_rank_grad, "PROGRAMS", 8)


# settings, checkpointing, heads of k, and how many hidden states there are at most beside what grows with nothing
CASES = {
    "4-bit inputs, offloaded": ({"layers": "input4", "offload": True}, False, 8, 10.2),
    "8-bit inputs": ({"layers": "input8"}, False, 8, 10.25),
    "exact inputs": ({"layers": "input"}, False, 8, 11.4),
    "4-bit inputs, grouped queries": ({"layers": "input4"}, False, 4, 9.2),
    "checkpointing, packed slots, offloaded": (PACKED, True, 8, 11.95),
    "checkpointing, packed slots, grouped queries": (PACKED, True, 4, 10.2),
}


@pytest.mark.parametrize("settings, checkpointing, kv_heads, most", CASES.values(), ids=CASES)
def test_the_peak_of_a_long_row(small_pieces, settings, checkpointing, kv_heads, most):
    config = HycloraConfig(cuda_graphs=False, iteration_threshold=1, **settings)
    counted = count(Savers(Shape(sizes(kv_heads), "bf16", RANK), config), 1, LENGTH, checkpointing)
    measured = peak(config, checkpointing, sizes=sizes(kv_heads), rows=(1, LENGTH))
    # dq in fp32, and dk and dv of all heads, are there in kernels of a GPU alone
    assert 0.98 <= counted.dyn / measured <= 1.15, (counted.dyn / HIDDEN_STATE, measured / HIDDEN_STATE, counted.peak)
    assert measured / HIDDEN_STATE <= most


@pytest.mark.parametrize("q_bit, heads, kv_heads, most", [(2, 4, 4, 8.7), (8, 8, 4, 12.3)])
def test_the_peak_of_a_long_row_of_slots(small_pieces, q_bit, heads, kv_heads, most):
    """Of heads in the fused kernel, whose gradients come where q, k and v were; of others attention's forward."""
    config = HycloraConfig(cuda_graphs=False, iteration_threshold=1, q_bit=q_bit, offload=True)
    shape = sizes(kv_heads)
    shape.num_attention_heads, shape.head_dim = heads, HIDDEN // heads
    counted = count(Savers(Shape(shape, "bf16", RANK), config), 1, LENGTH)
    measured = peak(config, sizes=shape, rows=(1, LENGTH))
    assert 0.98 <= counted.dyn / measured <= 1.1, (counted.dyn / HIDDEN_STATE, measured / HIDDEN_STATE, counted.peak)
    assert measured / HIDDEN_STATE <= most


def test_the_peak_does_not_grow_with_x_a_of_layers_that_a_store_has(small_pieces, monkeypatch):
    monkeypatch.setattr(base, "LARGE", 0)
    config, found = HycloraConfig(cuda_graphs=False, iteration_threshold=1, q_bit=2, offload=True), []
    for layers in (2, 6):
        counted = count(Savers(Shape(sizes(4, layers), "bf16", RANK), config), 1, LENGTH)
        found.append(peak(config, sizes=sizes(4, layers), rows=(1, LENGTH)))
        assert 0.98 <= counted.dyn / found[-1] <= 1.1, counted.peak
    x_a = 4 * 2 * LENGTH * 4 * padded_rank(3 * RANK)
    assert found[1] - found[0] < 0.3 * x_a, "statistics of a token that stay: rstd, a mask"


@pytest.mark.parametrize("settings, most", [({"offload": True}, 10.2), ({}, 12.6)], ids=["offloaded", "resident"])
def test_the_peak_of_a_chain_of_inputs(small_pieces, settings, most):
    """What is added up for a layer is gone when that runs again."""
    config = HycloraConfig(cuda_graphs=False, iteration_threshold=1, layers="input4", **settings)
    counted = count(Savers(Shape(sizes(8, layers=10), "bf16", RANK), config), 1, LENGTH)
    measured = peak(config, sizes=sizes(8, layers=10), rows=(1, LENGTH))
    assert 0.98 <= counted.dyn / measured <= 1.15, (counted.dyn / HIDDEN_STATE, measured / HIDDEN_STATE, counted.peak)
    assert measured / HIDDEN_STATE <= most
