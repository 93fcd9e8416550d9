"""What a setting and batch needs in all: what is counted, and an allowance for what no count sees."""

from dataclasses import dataclass, field

from hyclora.operators.store.host import SLAB

# an allowance, not a count, chosen so that no line measured with expandable segments is above it; without them the
# allocator takes more
GAPS = (0.45, 2**27)
# what a driver and CUDA take for themselves
RESERVE = 10**9


@dataclass(frozen=True)
class Need:
    """Bytes of one setting and batch.

    static: by what they are. dyn: peak of live tensors over it, at the moment `peak`; moments: all of them. apart: what
    the loss, or else the optimizer, has beside a pool of graphs, which shares nothing. host: packed slots in host
    memory.
    """

    static: dict[str, int]
    moments: dict[str, int] = field(repr=False)
    apart: int
    host: int

    @property
    def peak(self) -> str:
        return max(self.moments, key=self.moments.get)

    @property
    def dyn(self) -> int:
        return self.moments[self.peak]

    @property
    def held(self) -> int:
        """What the allocator is expected to take over static: live tensors, and GAPS."""
        share, least = GAPS
        return int(self.dyn + self.apart + share * self.dyn) + least

    @property
    def gpu(self) -> int:
        """All that a card has to have: static and held memory, and RESERVE."""
        return sum(self.static.values()) + self.held + RESERVE

    @property
    def pinned(self) -> int:
        """Host memory that is pinned, in whole slabs (store/host.py)."""
        return -(-self.host // SLAB) * SLAB
