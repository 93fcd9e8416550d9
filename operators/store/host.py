"""Pinned host memory, and the copies between it and the GPU."""

import math
from bisect import bisect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SLAB = 2**27
RESERVE = 2**31
ALIGNMENT = 512


class CudaCopies:
    """Copies on a stream beside the one that computes. The store needs nothing else of the device.

    All copies run in order on one stream, so host bytes may be given to a new owner while a copy of them is queued.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._fork = torch.cuda.Event()
        self._compute = torch.cuda.current_stream(device)

    def __reduce__(self):
        return CudaCopies, (self.device,)

    def pin(self, nbytes: int) -> Tensor:
        """Pinned bytes; RuntimeError if the driver gives none. (Torch rounds up to a power of two.)"""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def current(self) -> torch.cuda.Stream:
        """The stream that computes here and now. (Making a Stream object takes longer than asking for its handle.)"""
        compute = self._compute
        if compute.cuda_stream != torch._C._cuda_getCurrentRawStream(compute.device_index):
            compute = self._compute = torch.cuda.current_stream(self.device)
        return compute

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple:
        """Queue target, source copies behind the work queued so far; a token for wait()."""
        compute = self.current()
        self._fork.record(compute)
        self._fork.wait(self.stream)
        with torch.cuda.device(self.stream.device_index):
            torch.cuda.set_stream(self.stream)  # the context manager makes Stream objects each time
            try:
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
            finally:
                torch.cuda.set_stream(compute)
        return self.stream.record_event(), compute

    def wait(self, token: tuple) -> None:
        """Work queued from now on runs after the copies: here, and where they were asked for (it owns the memory)."""
        event, compute = token
        event.wait(compute)
        current = self.current()
        if current != compute:
            event.wait(current)


class Arena:
    """Byte extents [start, end) of one address range that slabs of pinned memory back as far as it was ever used.

    The lowest gap that fits is taken, so that every step finds the extents of the step before; slabs are never given
    back. An extent may straddle slabs: pieces() are what it is made of.
    """

    def __init__(self, pin: Callable[[int], Tensor], slab: int = SLAB):
        self._pin, self.slab = pin, slab
        self.slabs: list[Tensor] = []
        self.used = 0
        self.closed = False
        self._gaps: list[tuple[float, float]] = [(0, math.inf)]

    @property
    def pinned(self) -> int:
        return len(self.slabs) * self.slab

    def take(self, nbytes: int) -> tuple[int, int] | None:
        """An extent of nbytes, or None if the host has no memory for another slab."""
        index = next(i for i, (start, end) in enumerate(self._gaps) if end - start >= nbytes)
        start, end = self._gaps[index]
        while self.pinned < start + nbytes:
            if not self._grow():
                return None
        self._gaps[index : index + 1] = [(start + nbytes, end)] if start + nbytes < end else []
        self.used += nbytes
        return start, start + nbytes

    def give(self, extent: tuple[int, int]) -> None:
        """Take an extent back; it merges with the gaps at its sides."""
        start, end = extent
        self.used -= end - start
        index = bisect(self._gaps, extent)
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end = self._gaps.pop(index)[1]
        if index and self._gaps[index - 1][1] == start:
            index -= 1
            start = self._gaps.pop(index)[0]
        self._gaps.insert(index, (start, end))

    def pieces(self, start: int, nbytes: int) -> list[Tensor]:
        """The bytes from start on, as views of the slabs."""
        pieces = []
        end = start + nbytes
        while start < end:
            index, offset = divmod(start, self.slab)
            length = min(end - start, self.slab - offset)
            pieces.append(self.slabs[index][offset : offset + length])
            start += length
        return pieces

    def _grow(self) -> bool:
        """One more slab; after a refusal no more are asked for, as each attempt costs time in every step."""
        self.closed = self.closed or available_bytes() < self.slab + RESERVE
        if not self.closed:
            try:
                self.slabs.append(self._pin(self.slab))
            except RuntimeError:
                self.closed = True
        return not self.closed


def available_bytes(root: Path = Path("/")) -> float:
    """Host memory that this process may still take, by the kernel and by its control group; inf where unknown."""
    limits = [math.inf]
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            limits.append(1024 * int(line.split()[1]))
    own = [line.rpartition(":")[2].strip("/") for line in _lines(root / "proc/self/cgroup") if line.startswith("0::")]
    for folder in {root / "sys/fs/cgroup", *(root / "sys/fs/cgroup" / path for path in own)}:
        limits.append(_group_bytes(folder, "memory.max", "memory.current", "inactive_file"))
    group = root / "sys/fs/cgroup/memory"
    limits.append(_group_bytes(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return min(limits)


def _group_bytes(folder: Path, limit: str, usage: str, cache: str) -> float:
    """What a control group may still take; file cache that can be dropped does not count as used."""
    numbers = [line for name in (limit, usage) for line in _lines(folder / name)]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return math.inf
    droppable = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.split()[0] == cache]
    return int(numbers[0]) - int(numbers[1]) + sum(droppable)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
