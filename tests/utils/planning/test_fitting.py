"""The largest micro-step of rows of many lengths: what is computed of it, and what graphs fill it up to."""

import math
from dataclasses import replace

import pytest

from hyclora import HycloraConfig
from hyclora.models.graphs.sizes import Sizes
from hyclora.utils.planning import Savers, Shape, count
from hyclora.utils.planning.fitting import STEP, Load, longest


@pytest.fixture(scope="module")
def shape():
    return Shape("llama-3.2-1b")


def test_the_longest_rows_come_together():
    load = Load.of([5, 90, 7, 101, 33], rows=2, multiple=8)
    assert (load.rows, load.tokens, load.real, load.ragged) == (2, 104, 191, True)
    assert str(load) == "2 x 104 tokens (191 real tokens at most)"
    assert Load.of([64, 64], rows=4) == Load(4, 64, 128) and not Load.of([64, 64], rows=1).ragged


def test_padding_is_computed_only_where_rows_are_not_streamed(shape):
    load = Load.of([512, 200, 100, 100], rows=4)
    config = HycloraConfig(cuda_graphs=False, stream=False)
    padded = Savers(shape, config)
    assert load.need(padded) == count(padded, 4, 512)
    streamed = Savers(shape, HycloraConfig(cuda_graphs=False))
    assert load.need(streamed) == count(streamed, 1, 912, documents=4)


def test_a_recorded_row_is_no_longer_than_counted(shape):
    """Whatever the rows before were, what Sizes fills a row up to is within what is counted."""
    lengths = [700, 650, 900, 1024, 1000, 640, 1024, 333]
    sizes = Sizes()
    sizes.make_places(5)
    filled = max(sizes.choose(n, calibrating=False, room=True) for n in lengths)
    savers = Savers(shape, HycloraConfig())
    need = Load(4, 512, max(lengths), ragged=True).need(savers)
    recorded = count(savers, 1, filled, documents=sizes.places)
    assert recorded.dyn <= need.dyn < count(savers, 1, 2 * filled, documents=sizes.places).dyn


def test_several_processes_have_buckets_beside_gradients(shape):
    savers = Savers(shape, HycloraConfig())
    alone, one_of_two = (Load.full(2, 64, processes=n).need(savers) for n in (1, 2))
    assert one_of_two.static["DDP's buckets"] * 4 == shape.trained and one_of_two.dyn == alone.dyn


def test_a_step_of_adamw_can_be_the_peak():
    """Of a large rank and few tokens: a copy of what is trained."""
    savers = Savers(Shape("llama-3.2-1b", rank=256), HycloraConfig(offload=True, cuda_graphs=False))
    with_step, without = (count(savers, 1, 64, steps=steps) for steps in (True, False))
    assert with_step.peak == "the optimizer's step" and with_step.dyn == savers.shape.trained // 4 > without.dyn


@pytest.mark.parametrize("graphs, ragged", [(False, False), (True, False), (True, True)])
def test_longer_rows_may_need_less(shape, graphs, ragged):
    """From some length on x A^T is in host memory too; a card that lacks a little before has room for longer rows."""
    savers, load = Savers(shape, HycloraConfig(offload=True, cuda_graphs=graphs)), Load(2, 0, 0, ragged=ragged)
    of = {tokens: replace(load, tokens=tokens, real=2 * tokens) for tokens in range(STEP, 4096, STEP)}
    needs = {tokens: one.need(savers).gpu for tokens, one in of.items()}
    falls = [tokens for tokens in of if needs.get(tokens + STEP, math.inf) < needs[tokens]]
    assert falls
    for gpu in (needs[tokens] - 1 for tokens in falls):
        assert longest(savers, load, gpu, 2**60) == max(tokens for tokens, need in needs.items() if need <= gpu)
