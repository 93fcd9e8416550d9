"""What is advised where memory has run out fits, and takes less than what ran."""

import re

import pytest

from hyclora import HycloraConfig
from hyclora.utils.planning import Savers, Shape
from hyclora.utils.planning.advice import advice
from hyclora.utils.planning.fitting import Load

GIB = 2**30
RESIDENT, LEAST = HycloraConfig(), HycloraConfig(q_bit=2, offload=True, cuda_graphs=False)


@pytest.fixture(scope="module")
def shape():
    return Shape("llama-2-7b")


def size(sentence: str) -> float:
    return float(re.search(r"([\d.]+) GiB", sentence)[1])


def test_three_plans_that_fit(shape):
    other, fewer, shorter = advice(shape, RESIDENT, 8, 2048, 9 * GIB, 64 * GIB)
    assert other.startswith("offload=True (offloaded, CUDA graphs, 4 bit): 8 x 2048 tokens take ")
    assert fewer.startswith("1 instead of 8 rows at a time, more of them a step, settings as they are: ")
    found = re.match(r"rows of at most 1984 instead of 2048 tokens, q_bit=2, offload=True, cuda_graphs=False ", shorter)
    assert found and all(size(sentence) <= 9 for sentence in (other, fewer, shorter))


def test_shorter_rows_are_the_longest_that_fit(shape):
    (shorter,) = advice(shape, LEAST, 1, 131072, 9 * GIB, 64 * GIB)
    tokens = int(re.match(r"rows of at most (\d+) instead of 131072 tokens, settings as they are: ", shorter)[1])
    needs = [Load.full(1, n).need(Savers(shape, LEAST)).gpu for n in (tokens, tokens + 64)]
    assert needs[0] <= 9 * GIB < needs[1]


def test_bits_change_only_where_they_have_to(shape):
    (first, *_) = advice(shape, HycloraConfig(q_bit=8), 4, 512, 7 * GIB, 64 * GIB)
    assert first.startswith("offload=True (offloaded, CUDA graphs, 8 bit)")


def test_what_ran_with_the_least_can_only_become_smaller(shape):
    fewer, shorter = advice(shape, LEAST, 16, 2048, 8 * GIB, 64 * GIB)
    assert "rows at a time" in fewer and "rows of at most" in shorter


def test_a_prediction_that_fits_is_not_repeated(shape):
    """Memory ran out although it was predicted to fit: whatever is advised takes less."""
    now = Load.full(4, 512).need(Savers(shape, RESIDENT)).gpu / GIB
    found = advice(shape, RESIDENT, 4, 512, 80 * GIB, 64 * GIB)
    assert len(found) == 3 and all(size(sentence) < now for sentence in found)


def test_where_nothing_fits_nothing_is_advised(shape):
    assert advice(shape, RESIDENT, 4, 512, 3 * GIB, 64 * GIB) == []
    assert advice(shape, RESIDENT, 1, 2, 3 * GIB, 64 * GIB, checkpointing=True) == []
