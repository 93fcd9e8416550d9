"""Sizes and batches as a person writes them."""

import pytest

from hyclora.utils.errors import UserError
from hyclora.utils.planning.units import parse_size, parse_tokens


@pytest.mark.parametrize(
    "text, nbytes", [("24GiB", 24 * 2**30), ("7.5 GB", 7_500_000_000), ("512MiB", 2**29), (" 1TiB ", 2**40)]
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "-1GiB", "1.2.3GiB", "0GiB", "H100", "", "24gib"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="is no size of memory"):
        parse_size(text)


def test_batches():
    assert parse_tokens("4x512") == (4, 512)


@pytest.mark.parametrize("text", ["4", "4x", "x512", "0x512", "4x1", "4x512x2", "four"])
def test_what_is_no_batch_is_refused(text):
    with pytest.raises(UserError, match="is no batch"):
        parse_tokens(text)
