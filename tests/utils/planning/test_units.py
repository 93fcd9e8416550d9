"""Sizes and batches as a person writes them."""

import math

import numpy as np
import pytest

from hyclora.utils.errors import UserError
from hyclora.utils.planning.units import parse_size, parse_tokens


@pytest.mark.parametrize(
    "text, nbytes", [("24GiB", 24 * 2**30), ("7.5 GB", 7_500_000_000), ("512MiB", 2**29), (" 1TiB ", 2**40)]
)
def test_sizes(text, nbytes):
    assert parse_size(text, "gpu") == nbytes


@pytest.mark.parametrize(
    "text",
    [
        *("24", "24G", "GiB", "-1GiB", "1.2.3GiB", "0GiB", "H100", "", "24gib", "9" * 400 + "GiB", b"1GiB"),
        *(-5, -24 * 2**30, 1.5, 24e9, math.nan, math.inf, True, False, None, [2**30]),
    ],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="^gpu: .* is no size of memory: "):
        parse_size(text, "gpu")


def test_bytes():
    assert parse_size(24 * 2**30, "gpu") == parse_size(np.int64(24 * 2**30), "gpu") == 24 * 2**30
    for few in (0, 24):
        with pytest.raises(UserError, match=f"^gpu={few} are bytes: write a unit, for instance 24GiB"):
            parse_size(few, "gpu")


def test_there_may_be_none_of_it():
    assert parse_size("0GiB", "host", or_none=True) == parse_size(0, "host", or_none=True) == 0
    assert parse_size("0", "host", or_none=True) == 0
    with pytest.raises(UserError, match="'' is not a number, of"):
        parse_size("GiB", "host", or_none=True)


def test_batches():
    assert parse_tokens("4x512", "tokens") == (4, 512)


@pytest.mark.parametrize("text", ["4", "4x", "x512", "0x512", "4x1", "4x512x2", "four", "9" * 5000 + "x4", 4, None])
def test_what_is_no_batch_is_refused(text):
    with pytest.raises(UserError, match="^tokens: .* is no batch: "):
        parse_tokens(text, "tokens")
