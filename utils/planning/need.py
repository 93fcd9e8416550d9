"""What a setting and batch needs in all: what is counted, and an allowance for what no count sees."""

from dataclasses import dataclass, field

from hyclora.operators.store.host import SLAB

# Gaps of the allocator's segments, which no count sees: they depend on the order in which tensors come and go. With
# expandable segments a pool's memory is mapped up to its highest tensor, in pages of 20 MiB. Pages that static tensors
# have a part of, and no other tensor fits, were 45 to 136 MiB before the step; a pool of graphs shares none of them, so
# it is PAGES again. What is free between tensors of a step is HOLES of dyn, and MOST_HOLES at most, or LONG_HOLES of
# dyn: of the longest rows, beside 4 to 53 GiB of dyn, all gaps were 0.3 to 0.8 GiB, but 2.5 beside 26 in the line of
# 409,600 tokens. And a tensor that is larger, as PEFT's logits of all tokens are, leaves a hole of its own size. An
# allowance, no count: of the pairs with which no line of plan_check and memory_throughput was above, about the one that
# is nearest in the median; by lines of llama-2-7b it would be 98 MiB and 0.28. Two later lines of offloaded slots,
# layer by layer, are above it, by 11 and 21 MiB. Without expandable segments gaps are larger.
PAGES = 96 * 2**20
HOLES, MOST_HOLES, LONG_HOLES = 0.3, 2**30, 0.1
# what a driver and CUDA take for themselves
RESERVE = 10**9


@dataclass(frozen=True)
class Need:
    """Bytes of one setting and batch.

    static: by what they are. dyn: peak of live tensors over it, at the moment `peak`; moments: all of them. apart: what
    the loss, or else the optimizer, has beside a pool of graphs, which shares nothing. host: packed slots in host
    memory, which is pinned in slabs of so many bytes (store/host.py). embeddings: those that wait there. largest: a
    tensor that is larger than MOST_HOLES.
    """

    static: dict[str, int]
    moments: dict[str, int] = field(repr=False)
    apart: int
    host: int
    slab: int = SLAB
    embeddings: int = 0
    largest: int = 0

    @property
    def peak(self) -> str:
        return max(self.moments, key=self.moments.get)

    @property
    def dyn(self) -> int:
        return self.moments[self.peak]

    @property
    def held(self) -> int:
        """What the allocator is expected to take over static: live tensors, and an allowance for its gaps."""
        pools = 2 if self.apart else 1
        holes = min(HOLES * self.dyn, max(MOST_HOLES, LONG_HOLES * self.dyn, self.largest))
        return int(self.dyn + self.apart + holes) + pools * PAGES

    @property
    def gpu(self) -> int:
        """All that a card has to have: static and held memory, and RESERVE."""
        return sum(self.static.values()) + self.held + RESERVE

    @property
    def on_host(self) -> int:
        """All that the host has to have: slabs, whole, and embeddings."""
        return -(-self.host // self.slab) * self.slab + self.embeddings
