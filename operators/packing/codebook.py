"""Codebooks: how one normalised number t becomes a b-bit code.

    encode: code = clamp(floor(t / step + centre + 1/2), 0, 2^b - 1)
    decode: t = (code - centre) * step

Levels are uniform. Gaussian-optimal (Lloyd-Max) levels were measured and lose: activations have tails that they clip.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # channels of a group, if nothing else is said; other sizes are this times a power of two


@dataclass(frozen=True)
class Codebook:
    """Width and granularity of a quantizer.

    bits: 2, 3, 4 or 8. step, centre: the formulas above. grouped: t is relative to the middle and half-range of
    a token's group of `group` channels.
    """

    bits: int
    step: float
    centre: float
    grouped: bool
    group: int = GROUP

    def encode(self, t: Tensor) -> Tensor:
        """Real t to real-valued integer codes in [0, 2^b - 1]."""
        return torch.floor(t * (1 / self.step) + (self.centre + 0.5)).clamp(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (float) to the levels they stand for."""
        return (codes - self.centre) * self.step


def _in_range(bits: int, top: float) -> Codebook:
    """2^b levels between -top and top of a group's half-range; fewer bits gain more from clipping its ends."""
    last = 2**bits - 1
    return Codebook(bits, 2 * top / last, last / 2, grouped=True)


def _published(bits: int) -> Codebook:
    """The original's rule: code = round(x / scale), levels {-2^(b-1), ..., 2^(b-1) - 1}, no zero point, no groups."""
    return Codebook(bits, 1.0, 2.0 ** (bits - 1), grouped=False)


CODEBOOKS = {
    "channel_group": {
        2: _in_range(2, 0.75),
        3: _in_range(3, 0.90),
        4: _in_range(4, 0.95),
        8: _in_range(8, 1.05),
    },
    "paper": {bits: _published(bits) for bits in (2, 3, 4, 8)},
}


def book_constants(book: Codebook) -> dict:
    """A code book as the constexpr arguments of a kernel."""
    return {
        "BITS": book.bits,
        "STEP": book.step,
        "CENTRE": book.centre,
        "GROUPED": book.grouped,
        "GROUP": book.group,
    }
