"""What a row of tokens is filled up to, so that few recordings serve rows of every length.

A recording takes the host as long as some thousand tokens take the GPU. So a size is recorded when it would have saved
as much filler as that costs: what is rare never is, and at most twice the least is spent.
"""

from collections import Counter

# at least from one size to the next
STEP = 64
# tokens of filler that cost what a recording does: 0.4 seconds (7B on an H200)
PRICE = 8192
# of the longest row seen, by which another one may be shorter and still count as long as it
SHORTER = 1 / 64
# rows that are filled up to the largest size seen while nothing comes of it
PATIENCE = 2
# of documents come in as many at a time
PLACES = 8


class Sizes:
    """Of the rows that are recorded, and what rows of others have cost since.

    The first one to be recorded is the largest that was seen, or is likely to be, in whose memory all smaller ones find
    room.
    places: for where documents begin; attention's backward takes 128 tokens' memory for each, used or not.
    """

    def __init__(self):
        self.recorded: set[int] = set()
        self.places = 0
        self._served: Counter[tuple[int, int]] = Counter()
        self._shapes: Counter[tuple[int, int]] = Counter()
        self._seen: Counter[int] = Counter()
        self._in_vain = 0

    def choose(self, n: int, calibrating: bool, room: bool) -> int:
        """The size of a row for n tokens. room: whether another one can be recorded; calibrating: nothing can yet."""
        own = filled_size(n)
        self._seen[n] += 1
        if calibrating or own in self.recorded:
            return own
        larger = min((size for size in self.recorded if size > own), default=None)
        if larger is None:
            self._in_vain += 1
            if not room or self._in_vain > PATIENCE:
                return own
            # a longer row is still to come, unless all were of one size, or most are as long as they may be
            longest, largest = max(self._seen), filled_size(max(self._seen))
            full = sum(count for n, count in self._seen.items() if n >= longest * (1 - SHORTER))
            known = filled_size(min(self._seen)) == largest or 2 * full > self._seen.total()
            return largest if known else filled_size(largest * 9 // 8)
        self._served[own, larger] += 1
        size = max((size for size, _ in self._served if size >= own), key=self._saved)
        return size if room and self._saved(size) > PRICE else larger

    def _saved(self, size: int) -> int:
        """Tokens of filler that a recording of this size would have saved."""
        return sum(n * (larger - size) for (own, larger), n in self._served.items() if own <= size < larger)

    def record(self, size: int) -> None:
        """A row of this size is recorded now."""
        self.recorded.add(size)
        self._in_vain = 0
        for served in [served for served in self._served if served[0] <= size < served[1]]:
            del self._served[served]

    def make_places(self, n: int) -> bool:
        """Have places for n documents, and some more; whether there are more than before, which no recording has."""
        if n <= self.places:
            return False
        self.places = -(-(n + n // 4) // PLACES) * PLACES
        self.recorded.clear()
        return True

    def is_usual(self, shape: tuple[int, int]) -> bool:
        """Whether most batches without padding so far, this one counted, have this shape."""
        self._shapes[shape] += 1
        return 2 * self._shapes[shape] > self._shapes.total()


def filled_size(n: int) -> int:
    """The size of row for n tokens: one of eight between 2^k and 2^(k+1), so at most an eighth of n is filler."""
    step = max(STEP, 1 << max(0, (n - 1).bit_length() - 4))
    return -(-n // step) * step
