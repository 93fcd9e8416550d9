"""The time of all layers from that of a few: what a batch has to do, and the fit."""

import numpy as np
import pytest

from hyclora.utils.planning.times import ALIKE, Batch, Time, Work, expected, fastest, least_squares


def true_time(work: Work, wobble: float = 0.0) -> float:
    """A rest, its part a token, and what each layer does once, a token and a pair."""
    time = 8 + 0.0009 * work.tokens + work.layers * (0.7 + 0.002 * work.tokens) + 0.16 * work.pairs
    return time * (1 + wobble)


def work(layers: int, batch: Batch, window: int | None = None) -> Work:
    return Work.of(batch, [window] * layers)


def test_documents_share_rows_evenly():
    assert Batch(2, 10).lengths == [[10], [10]]
    assert Batch(2, 10, 5).lengths == [[4, 3, 3], [5, 5]]
    assert Batch(2, 10, 5).size == 20


def test_attention_is_quadratic_in_a_document_and_linear_beyond_a_window():
    assert Batch(1, 2000).pairs(None) == 2 == Batch(4, 1000).pairs(None) == 2 * Batch(1, 2000, 2).pairs(None)
    assert Batch(1, 2000).pairs(2000) == 2 and Batch(1, 4000).pairs(1000) == pytest.approx(4 - 0.5)
    assert work(3, Batch(1, 2000)) == Work(3, 2000, 6.0)


def test_shorter_rows_have_documents_as_long_as_before():
    assert Batch(2, 1000, 20).shorter(500) == Batch(2, 500, 10)
    assert Batch(2, 1000, 3).shorter(100) == Batch(2, 100, 2)  # one a row at least
    assert Batch(2, 1000).shorter(500) == Batch(2, 500)


def test_two_depths_tell_all_layers():
    """Whatever shorter rows took."""
    batch, short = Batch(4, 512), Batch(4, 128)
    measured = [(work(layers, batch), true_time(work(layers, batch))) for layers in (4, 12)]
    measured += [(work(4, short), 1000.0)]
    assert expected(measured, work(32, batch)) == pytest.approx(true_time(work(32, batch)))


def test_a_layer_takes_no_negative_time():
    batch = Batch(4, 512)
    measured = [(work(2, batch), 10.0), (work(4, batch), 9.0)]
    assert 9 < expected(measured, work(32, batch)) < 10


LONG = [Batch(1, 2**17), Batch(2, 2**15), Batch(1, 2**17, 16)]


def few_of_few(batch: Batch, wobbles=(0, 0, 0), window: int | None = None) -> list[tuple[Work, float]]:
    """Two depths at three lengths."""
    lengths = zip((batch.tokens // 64, batch.tokens // 23, batch.tokens // 8), wobbles, strict=True)
    works = [(work(layers, batch.shorter(n), window), w) for n, w in lengths for layers in (2, 4)]
    return [(one, true_time(one, wobble)) for one, wobble in works]


@pytest.mark.parametrize("batch", LONG, ids=str)
@pytest.mark.parametrize("window", [None, 4096])
def test_three_lengths_tell_long_rows(batch, window):
    wanted = work(32, batch, window)
    assert expected(few_of_few(batch, window=window), wanted) == pytest.approx(true_time(wanted))


def test_small_errors_stay_small():
    """Of half a per cent at an eighth of the length."""
    wanted = work(32, LONG[0])
    for wobbles in ((0.005, -0.005, 0.005), (-0.005, 0.005, -0.005), (0.005, 0, -0.005)):
        assert expected(few_of_few(LONG[0], wobbles), wanted) == pytest.approx(true_time(wanted), rel=0.06)


def test_errors_are_relative():
    """A part that is there twice, measured as 1.0 and 1.2 of one: both count, however long they took."""
    parts, times = np.array([[1.0], [100.0]]), np.array([1.0, 120.0])
    # least (f - 1)^2 + (f / 1.2 - 1)^2
    assert least_squares(parts, times) == pytest.approx((1 + 1 / 1.2) / (1 + 1 / 1.44))


def test_what_is_alike_is_not_told_apart():
    assert fastest([110.0, 100.0, 99.0]) == 1 and fastest([100 * (1 + ALIKE / 2), 100.0]) == 0
    assert fastest([100 * (1 + 2 * ALIKE), 100.0]) == 1


def test_a_time_in_words():
    assert [str(Time(ms)) for ms in (114.4, 23.46)] == ["114 ms", "23.5 ms"]
    assert str(Time()) == "unknown" and str(Time(why="out of memory")) == "unknown: out of memory"
    assert str(Time(elsewhere="114 ms (H200)")) == "unknown here, 114 ms (H200)"
