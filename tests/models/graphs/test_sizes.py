"""What rows of tokens are filled up to: few sizes, of which those are recorded that pay for it."""

import random

import pytest

from hyclora.models.graphs.sizes import PATIENCE, PRICE, Sizes, filled_size


@pytest.mark.parametrize("n", [1, 63, 64, 65, 255, 256, 257, 512, 513, 640, 641, 1000, 1024, 1025, 4097, 131071])
def test_sizes_are_few(n):
    size = filled_size(n)
    assert n <= size == filled_size(size) and size - n < max(64, n / 8)


def choose(sizes: Sizes, n: int, **options) -> int:
    """As where every row that no recording serves is recorded."""
    size = sizes.choose(n, **{"calibrating": False, "room": True} | options)
    if size not in sizes.recorded:
        sizes.record(size)
    return size


def test_the_largest_comes_first():
    sizes = Sizes()
    for n in (500, 1100, 700):
        assert sizes.choose(n, calibrating=True, room=True) == filled_size(n)
    first = filled_size(filled_size(1100) * 9 // 8)
    assert choose(sizes, 600) == first and choose(sizes, 10) == first
    assert choose(sizes, 1500) == filled_size(filled_size(1500) * 9 // 8)


def test_rows_of_one_length_have_no_filler():
    sizes = Sizes()
    sizes.choose(2048, calibrating=True, room=True)
    assert choose(sizes, 2048) == 2048


def test_packed_rows_have_no_more_filler_than_they_need():
    """They are as long as a row may be, but for some."""
    sizes = Sizes()
    for n in (2040, 1700, 2048, 2020):
        sizes.choose(n, calibrating=True, room=True)
    assert choose(sizes, 1800) == 2048


def test_rows_of_about_one_length_leave_room_for_a_longer_one():
    """The first batches of GSM8K's rows, four at a time: they are filled up to one size, and later ones are longer."""
    sizes = Sizes()
    for n in (1117, 1102, 1079, 930, 1125):
        sizes.choose(n, calibrating=True, room=True)
    assert choose(sizes, 885) == 1408 and choose(sizes, 1295) == 1408


def test_rows_that_nobody_records_are_soon_as_short_as_they_can_be():
    sizes = Sizes()
    sizes.choose(1000, calibrating=True, room=True)
    found = [sizes.choose(100, calibrating=False, room=True) for _ in range(PATIENCE + 2)]
    assert found == [1152] * PATIENCE + [128] * 2


def test_a_size_is_recorded_once_it_would_have_paid():
    """Rows of two sizes share one that serves both; what is rare never has its own."""
    sizes = Sizes()
    choose(sizes, 1000)
    paid = 0
    while (found := choose(sizes, 500 if paid % 2 else 630)) == 1024:
        paid += 1024 - 640
    assert found == 640 and PRICE - 384 <= paid <= PRICE
    assert choose(sizes, 20) == 640 and choose(sizes, 641) == 1024


def test_what_filler_and_recordings_cost():
    """At most twice what never recording again would have cost."""
    draw = random.Random(0)
    sizes, rows = Sizes(), [draw.randint(500, 1000) for _ in range(1000)]
    choose(sizes, 1000)
    filler = sum(choose(sizes, n) - filled_size(n) for n in rows)
    never = sum(1024 - filled_size(n) for n in rows)
    price = PRICE * (len(sizes.recorded) - 1)
    assert 3 < len(sizes.recorded) < 9 and filler + price < never
    few = Sizes()
    choose(few, 1000)
    assert sum(choose(few, n) for n in rows[:8]) == 8 * 1024


def test_no_room():
    sizes = Sizes()
    choose(sizes, 640)
    found = {sizes.choose(n, calibrating=False, room=False) for n in [100] * 50 + [700]}
    assert found == {640, 704}


def test_places_grow_ahead_of_documents():
    sizes = Sizes()
    assert sizes.make_places(5) and sizes.places == 8
    choose(sizes, 100)
    assert not sizes.make_places(8) and sizes.recorded
    assert sizes.make_places(17) and sizes.places == 24 and not sizes.recorded


def test_usual_shapes():
    sizes = Sizes()
    assert sizes.is_usual((4, 512)) and sizes.is_usual((4, 512)) and not sizes.is_usual((2, 512))
    lengths = Sizes()
    assert [lengths.is_usual((1, n)) for n in (9, 5, 7, 9)] == [True, False, False, False]
