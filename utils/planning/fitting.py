"""Whether the largest micro-step of a run fits, and the longest rows that do."""

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
        config, options = savers.config, {"checkpointing": self.checkpointing, "processes": self.processes}
        if not (self.ragged and config.stream and config.attention == "flash"):
            return count(savers, self.rows, self.tokens, **options)
        if not config.cuda_graphs:
            return count(savers, 1, self.real, documents=self.rows, **options)
        sizes = Sizes()
        sizes.make_places(self.rows + 1)
        return count(savers, 1, filled_size(self.real * 9 // 8), documents=sizes.places, **options)


def fits(need: Need, gpu: int, host: int) -> bool:
    """Whether a card and a host have the memory."""
    return need.gpu <= gpu and need.on_host <= host


def longest(savers: Savers, load: Load, gpu: int, host: int) -> int:
    """Tokens of the longest rows of which load.rows fit, were all of that length; a multiple of STEP, 0 if none do."""
    return longest_of(lambda tokens: replace(load, tokens=tokens, real=load.rows * tokens).need(savers), gpu, host)


def longest_of(need: Callable[[int], Need], gpu: int, host: int, most: int = LONGEST) -> int:
    """The most tokens whose need fits, at most so many; a multiple of STEP, 0 if none do."""
    low, high = 0, most // STEP
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if fits(need(middle * STEP), gpu, host) else (low, middle - 1)
    return low * STEP
