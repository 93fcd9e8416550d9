"""The time of a micro-step at full depth, from the times of a few layers of few tokens."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

# of the fastest, by which a mode may be slower and still count as fast: two measurements differ by as much
ALIKE = 0.03


@dataclass(frozen=True)
class Time:
    """Milliseconds of a micro-step; None: unknown, and why, or what was recorded on another machine."""

    ms: float | None = None
    why: str = ""
    elsewhere: str = ""

    def __str__(self) -> str:
        if self.ms is not None:
            return f"{self.ms:.0f} ms" if self.ms >= 100 else f"{self.ms:.1f} ms"
        return "unknown" + (f": {self.why}" if self.why else f" here, {self.elsewhere}" if self.elsewhere else "")

    @property
    def short(self) -> str:
        """The same for a narrow column, "" for what is unknown."""
        return self.why or self.elsewhere if self.ms is None else str(self)


@dataclass(frozen=True)
class Batch:
    """Full rows of so many tokens each; documents: that they are packed of in all, None for one a row."""

    rows: int
    tokens: int
    documents: int | None = None

    @property
    def size(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens of each document of each row, as even as can be."""
        return [_even(self.tokens, n) for n in _even(self.documents or self.rows, self.rows)]

    def shorter(self, tokens: int) -> "Batch":
        """Rows of so many tokens, of documents that are as long as before."""
        documents = self.documents and max(self.rows, self.documents * tokens // self.tokens)
        return replace(self, tokens=tokens, documents=documents)

    def pairs(self, window: int | None) -> float:
        """Queries with the keys that each sees, in millions; window: of a layer, None for all before the query."""
        lengths = [n for row in self.lengths for n in row]
        seen = (n * n / 2 if window is None or n <= window else window * (n - window / 2) for n in lengths)
        return sum(seen) / 1e6


def _even(n: int, parts: int) -> list[int]:
    return [n // parts + (i < n % parts) for i in range(parts)]


@dataclass(frozen=True)
class Work:
    """What a micro-step does: with how many layers, tokens, and millions of pairs of query and key in all layers."""

    layers: int
    tokens: int
    pairs: float

    @classmethod
    def of(cls, batch: Batch, windows: Sequence[int | None]) -> "Work":
        """windows: of each layer."""
        return cls(len(windows), batch.size, sum(batch.pairs(window) for window in windows))


def expected(measured: Iterable[tuple[Work, float]], wanted: Work) -> float:
    """The time of wanted work, from the times of other work.

    Where as many tokens were measured, it is what each layer adds and a rest (embeddings, head, loss, host):
    t = r + c L. Else t = r + s T + L (c + a T) + b P for L layers, T tokens and P pairs. No part of it is negative; the
    sum of squared relative errors is the least. Raises ValueError without a measurement.
    """
    measured = list(measured)
    alike = [pair for pair in measured if pair[0].tokens == wanted.tokens]
    parts = [_parts(work, bool(alike)) for work, _ in alike or measured]
    factors = least_squares(np.array(parts), np.array([time for _, time in alike or measured]))
    return float(np.dot(factors, _parts(wanted, bool(alike))))


def _parts(work: Work, alike: bool) -> list[float]:
    parts = [1, work.layers]
    return parts if alike else [*parts, work.tokens, work.layers * work.tokens, work.pairs]


def least_squares(parts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Factors >= 0 of parts [M, N] whose sum is off from times [M] by the least, relative to each."""
    relative = parts / times[:, None]
    scale = relative.max(axis=0)
    best, least = np.zeros(parts.shape[1]), np.inf
    for n in range(1, parts.shape[1] + 1):  # each set of parts that may be there: there are few
        for chosen in map(list, itertools.combinations(range(parts.shape[1]), n)):
            columns = relative[:, chosen] / scale[chosen]
            found = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0]
            off = np.square(columns @ found - 1).sum()
            if (found >= 0).all() and off < least - 1e-12:
                best, least = np.zeros(parts.shape[1]), off
                best[chosen] = found / scale[chosen]
    return best


def fastest(times: Sequence[float]) -> int:
    """The index of the first that is as fast as the fastest, as far as two measurements can be told apart."""
    return next(i for i, time in enumerate(times) if time <= min(times) * (1 + ALIKE))
