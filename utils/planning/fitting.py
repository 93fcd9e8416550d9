"""Whether the largest micro-step of a run fits, and the longest rows that do."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hyclora.models.graphs.sizes import Sizes, filled_size
from hyclora.utils.planning.kept import Savers
from hyclora.utils.planning.live import count
from hyclora.utils.planning.need import Need

STEP = 64  # tokens that a longest row is told to
LONGEST = 2**24


@dataclass(frozen=True)
class Load:
    """The largest micro-step: rows of `tokens` tokens, and how many of all are real at most.

    ragged: rows are of many lengths, so that a batch is padded, or streamed without its padding. checkpointing:
    gradient checkpointing around each layer. processes: that train data parallel, each on so many rows.
    """

    rows: int
    tokens: int
    real: int
    ragged: bool = False
    checkpointing: bool = False
    processes: int = 1

    @classmethod
    def full(cls, rows: int, tokens: int, **options) -> "Load":
        """Rows of one length."""
        return cls(rows, tokens, rows * tokens, **options)

    @classmethod
    def of(cls, lengths: Sequence[int], rows: int, multiple: int = 1, **options) -> "Load":
        """The largest that rows of such lengths make, `rows` at a time, padded to a multiple."""
        longest = max(lengths)
        width = -(-longest // multiple) * multiple
        real = sum(sorted(lengths)[-rows:])
        return cls(rows, width, real, ragged=min(lengths) < width, **options)

    def __str__(self) -> str:
        most = f" ({self.real} real tokens at most)" if self.real < self.rows * self.tokens else ""
        return f"{self.rows} x {self.tokens} tokens{most}"

    def need(self, savers: Savers) -> Need:
        """Bytes of it.

        What is streamed is one row of the real tokens. With graphs it is filled up to a size, that of the longest row
        seen and an eighth more where longer ones may come, and has places for more documents (models/graphs/sizes.py).
        """
        rows, tokens, documents = self._computed(savers.config)
        return count(savers, rows, tokens, self.checkpointing, documents, self.processes)

    def sent(self, savers: Savers) -> float:
        """Bytes of x A^T a token of a layer that a store has: none of few tokens; less is on the card then."""
        rows, tokens, _ = self._computed(savers.config)
        return 0 if self.checkpointing else savers.low_rank(rows * tokens)[1].layer

    def _computed(self, config) -> tuple[int, int, int | None]:
        """Rows and tokens of what is computed, and the documents that are packed in it."""
        if not (self.ragged and config.stream and config.attention == "flash"):
            return self.rows, self.tokens, None
        if not config.cuda_graphs:
            return 1, self.real, self.rows
        sizes = Sizes()
        sizes.make_places(self.rows + 1)
        return 1, filled_size(self.real * 9 // 8), sizes.places


def fits(need: Need, gpu: int, host: int) -> bool:
    """Whether a card and a host have the memory."""
    return need.gpu <= gpu and need.on_host <= host


def longest(savers: Savers, load: Load, gpu: int, host: int) -> int:
    """Tokens of the longest rows of which load.rows fit, were all of that length; a multiple of STEP, 0 if none do."""

    def of(tokens: int) -> Load:
        return replace(load, tokens=tokens, real=load.rows * tokens)

    return longest_of(lambda tokens: of(tokens).need(savers), gpu, host, sent=lambda tokens: of(tokens).sent(savers))


def longest_of(
    need: Callable[[int], Need], gpu: int, host: int, most: int = LONGEST, sent: Callable[[int], float] = lambda _: 0
) -> int:
    """The most tokens whose need fits, at most so many; a multiple of STEP, 0 if none do.

    It grows with the tokens, but where more is sent to the host of each of them.
    """
    starts, high = [0], most // STEP
    while (level := sent(starts[-1] * STEP)) < sent(high * STEP):
        starts.append(bisect_left(range(high), True, key=lambda n, level=level: sent(n * STEP) > level))
    for low in reversed(starts):
        if low and not fits(need(low * STEP), gpu, host):
            high = low - 1
            continue
        while low < high:
            middle = -(-(low + high) // 2)
            low, high = (middle, high) if fits(need(middle * STEP), gpu, host) else (low, middle - 1)
        return low * STEP
