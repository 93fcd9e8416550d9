"""Numbers as a person writes them, 24GiB of memory, 4x512 tokens, or as a program has them."""

import re
from numbers import Integral

from hyclora.utils.errors import UserError

BASES = ("nf4", "bf16")  # what frozen weights are kept as
DEVICES = ("cuda", "cpu")
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
LEAST_BYTES = 2**20  # a whole number below is not meant in bytes


def parse_size(text: str | int, name: str, or_none: bool = False) -> int:
    """Bytes of a size like 24GiB or 7.5GB, or of whole bytes; UserError, with the setting's name, for anything else.

    or_none: whether it may be 0GiB, or 0.
    """
    if is_whole(text) and (text >= LEAST_BYTES or or_none and text == 0):
        return int(text)
    if or_none and isinstance(text, str) and text.strip() == "0":
        return 0
    if is_whole(text) and text >= 0:
        raise UserError(f"{name}={text} are bytes: write a unit, for instance 24GiB")
    number, unit = re.fullmatch(r"\s*([\d.]*)\s*(.*?)\s*", str(text), re.DOTALL).groups()
    if unit not in UNITS:
        raise UserError(
            f"{name}: {text!r} is no size of memory: write a number with {', '.join(UNITS)}, for instance 24GiB"
        )
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", number) or not (float(number) or or_none):
        kind = "number" if or_none else "positive number"
        raise UserError(f"{name}: {text!r} is no size of memory: {number!r} is not a {kind}, of at most 9 digits")
    return int(float(number) * UNITS[unit])


def parse_tokens(text: str, name: str) -> tuple[int, int]:
    """Rows and tokens a row of 4x512; UserError for anything else, with the setting's name before it."""
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", str(text))
    if not found or int(found[2]) < 2:
        raise UserError(
            f"{name}: {text!r} is no batch: write ROWSxTOKENS with two tokens or more, of at most 9 digits each, for "
            "instance 4x512"
        )
    return int(found[1]), int(found[2])


def is_whole(given) -> bool:
    """Whether something is a whole number; True and False are none."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def say_size(n: float) -> str:
    """Bytes in GiB."""
    return f"{n / 2**30:.2f} GiB"
