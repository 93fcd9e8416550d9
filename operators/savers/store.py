"""Packed slots in pinned host memory between forward and backward.

A block's packed tensors are one Unit. put() starts its copy to the host on a side stream and keeps the GPU copy for the
next few units, until the compute stream has waited for the copy: then the memory may be used again, with no host sync
and no record_stream. read() gives the tensors back, and fetches the units that backward will ask for next, which are
those that were put before. The youngest units are still on the GPU when backward starts, and are read there.

A unit lives as long as an empty tensor that autograd saves with the block's other tensors: a backward that is done, a
graph that is dropped, an exception or a checkpoint's discarded forward frees it as it frees any saved tensor.
"""

import sys
import warnings
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.savers.host import ALIGNMENT, SLAB, Arena

UNITS_A_LAYER = 4
HOMES = "_hyclora_homes"


@dataclass(frozen=True)
class Home:
    """Where a packed tensor is: the unit, and its place there."""

    unit: "Unit"
    index: int


@dataclass(frozen=True)
class View:
    """How a tensor is cut out of a buffer of bytes; stride None: it is the whole buffer, contiguous."""

    buffer: int
    dtype: torch.dtype
    size: torch.Size
    offset: int = 0
    stride: tuple[int, ...] | None = None

    def of(self, buffers: list[Tensor]) -> Tensor:
        if self.stride is None:
            return buffers[self.buffer].view(self.dtype).view(self.size)
        nbytes = _extent(self.size, self.stride) * self.dtype.itemsize
        flat = buffers[self.buffer][self.offset : self.offset + nbytes].view(self.dtype)
        return flat.as_strided(self.size, self.stride)


class Unit:
    """Packed tensors that are put and read together.

    buffers: their bytes on the device, None while they are on the host alone; extent: their bytes on the host, None if
    the host had no room; pending: token of the last copy, until somebody has waited for it; fetched: it was one back.
    """

    def __init__(self, store: "Store", serial: int, tensors: list[Tensor]):
        self.store, self.serial = store, serial
        self.extent: tuple[int, int] | None = None
        self.pending: tuple | None = None
        self.fetched = False
        self.buffers, self.views = as_buffers(tensors)
        self._spans = []
        self.nbytes = 0
        for buffer in self.buffers:
            self._spans.append((self.nbytes, buffer.numel()))
            self.nbytes += -(-buffer.numel() // ALIGNMENT) * ALIGNMENT
        self._versions = [(buffer, buffer._version) for buffer in self.buffers]

    def __del__(self):
        if sys.is_finalizing():
            return
        if self.fetched and self.pending is not None:  # a copy that still writes to the buffers that go now
            self.store.copies.wait(self.pending)
        if self.extent is not None:
            self.store.discarded.append(self.extent)

    def send(self) -> None:
        """Start the copy to the host."""
        pieces, first = self.store.arena.pieces, self.extent[0]
        hosts = [pieces(first + start, size) for start, size in self._spans]
        pairs = [pair for host, buffer in zip(hosts, self.buffers, strict=True) for pair in _pairs(host, buffer)]
        self.pending = self.store.copies.copy(pairs)

    def fetch(self) -> None:
        """Start the copy back, if the bytes are on the host alone: one buffer, as the host has them in one extent."""
        if self.buffers is not None:
            return
        whole = torch.empty(self.nbytes, dtype=torch.uint8, device=self.store.device)
        host = self.store.arena.pieces(self.extent[0], self.nbytes)
        self.pending = self.store.copies.copy([(target, source) for source, target in _pairs(host, whole)])
        self.fetched = True
        self.buffers = [whole[start : start + size] for start, size in self._spans]

    def arrive(self) -> list[Tensor]:
        """The tensors on the device, for work queued from now on."""
        if self.fetched and self.pending is not None:
            self.store.copies.wait(self.pending)
            self.pending = None
        self._check_versions()
        return [view.of(self.buffers) for view in self.views]

    def park(self) -> None:
        """Leave the bytes to the host alone."""
        if self.buffers is None:
            return
        self._check_versions()
        if self.pending is not None:
            self.store.copies.wait(self.pending)
            self.pending = None
        self.buffers, self._versions = None, []

    def _check_versions(self) -> None:
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError("a tensor that was kept for backward has been modified by an inplace operation")


class Store:
    """Units of one patched model, in the order in which they were put.

    The last `window` units stay on the device, and `ahead` are fetched before they are asked for; both are a decoder
    layer by default. A unit that stands for more than one block counts as several (`span`). Where the host is short of
    memory, units stay on the device.
    """

    def __init__(self, copies, *, window: int = UNITS_A_LAYER, ahead: int = UNITS_A_LAYER, slab: int = SLAB):
        self.copies, self.window, self.ahead = copies, window, ahead
        self.device = copies.device
        self.arena = Arena(copies.pin, slab)
        self.active = True
        self.discarded: deque[tuple[int, int]] = deque()
        self._units: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()
        self._window: deque[tuple[int, weakref.ref[Unit]]] = deque()
        self._serial = 0
        self._warned = False

    def __reduce__(self):
        """A copy of a model gets an empty store of its own."""
        return _new_store, (self.copies, self.window, self.ahead, self.arena.slab)

    @property
    def host_bytes(self) -> int:
        """Bytes of live units in host memory."""
        self._sweep()
        return self.arena.used

    @property
    def device_bytes(self) -> int:
        """Bytes of live units on the device."""
        units = [unit for unit in list(self._units.values()) if unit.buffers is not None]
        storages = [buffer.untyped_storage() for unit in units for buffer in unit.buffers]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @contextmanager
    def paused(self):
        """Blocks that run inside keep their slots on the device."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def put(self, tensors: list[Tensor], span: int = 1) -> list[Home]:
        """Send tensors to the host as one unit; where each is from now on."""
        if not tensors:
            return []
        self._sweep()
        self._serial += span
        self._units[self._serial] = unit = Unit(self, self._serial, tensors)
        unit.extent = self.arena.take(unit.nbytes)
        if unit.extent is None:
            self._warn()
        else:
            unit.send()
            self._settle(unit)
        return [Home(unit, index) for index in range(len(tensors))]

    def read(self, unit: Unit) -> list[Tensor]:
        """The tensors of a unit; those put before it are on their way when this returns."""
        unit.fetch()
        for serial in range(unit.serial - 1, unit.serial - 1 - self.ahead, -1):
            if (earlier := self._units.get(serial)) is not None:
                earlier.fetch()
        tensors = unit.arrive()
        if unit.fetched:
            self._settle(unit)
        return tensors

    def settle(self) -> None:
        """Have the work queued from now on run after all copies."""
        for unit in list(self._units.values()):
            if unit.pending is not None:
                self.copies.wait(unit.pending)
                unit.pending = None

    def _settle(self, unit: Unit) -> None:
        """Count a unit among those on the device that nobody waits for; those beyond the window leave it."""
        self._window.append((unit.serial, weakref.ref(unit)))
        while self._window and abs(unit.serial - self._window[0][0]) >= self.window:
            oldest = self._window.popleft()[1]()
            if oldest is not None:
                oldest.park()

    def _sweep(self) -> None:
        """Give the extents of dead units back; not when they die, which may be inside of the arena."""
        while self.discarded:
            self.arena.give(self.discarded.popleft())

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                f"offload: the host has no memory for another {self.arena.slab / 2**20:.0f} MiB of pinned memory "
                f"beside the {self.arena.pinned / 2**20:.0f} MiB that it has given; what does not fit there stays on "
                "the GPU",
                stacklevel=2,
            )
        self._warned = True


def _new_store(copies, window: int, ahead: int, slab: int) -> Store:
    return Store(copies, window=window, ahead=ahead, slab=slab)


def ticket(homes: dict[int, Home]) -> Tensor:
    """An empty tensor for autograd to save: it holds the units of a block's tensors, by position."""
    empty = torch.empty(0)
    setattr(empty, HOMES, homes)
    return empty


def redeem(empty: Tensor) -> dict[int, Tensor]:
    """The tensors of a ticket, by position."""
    homes = getattr(empty, HOMES, None)
    if homes is None:
        raise RuntimeError(
            "a saved-tensor hook has copied what offload=True saves for backward; use one kind of offloading at a time"
        )
    units = sorted({home.unit for home in homes.values()}, key=lambda unit: unit.serial, reverse=True)
    tensors = {unit: unit.store.read(unit) for unit in units}
    return {position: tensors[home.unit][home.index] for position, home in homes.items()}


def as_buffers(tensors: list[Tensor]) -> tuple[list[Tensor], list[View]]:
    """Byte buffers that hold tensors, and how each is cut out of them.

    Tensors that together fill their storage's range share one buffer; any other gets one of its own, contiguous. A
    buffer has the version counter of the first tensor in it.
    """
    storages: dict[int, list[int]] = {}
    for i, t in enumerate(tensors):
        storages.setdefault(t.untyped_storage().data_ptr(), []).append(i)
    buffers: list[Tensor] = []
    views: dict[int, View] = {}
    for indices in storages.values():
        members = [tensors[i].detach() for i in indices]
        low = high = 0
        if len(members) > 1 or not members[0].is_contiguous():
            low, high = _range(members)
        if 0 < high - low <= 1.125 * sum(t.nbytes for t in members) + ALIGNMENT:
            for i, t in zip(indices, members, strict=True):
                views[i] = View(len(buffers), t.dtype, t.shape, t.storage_offset() * t.itemsize - low, t.stride())
            flat = members[0].as_strided((1,), (1,), 0).view(torch.uint8)
            buffers.append(flat.as_strided((high - low,), (1,), low))
            continue
        for i, t in zip(indices, members, strict=True):
            views[i] = View(len(buffers), t.dtype, t.shape)
            buffers.append(t.contiguous().view(-1).view(torch.uint8))
    return buffers, [views[i] for i in range(len(tensors))]


def _range(tensors: list[Tensor]) -> tuple[int, int]:
    """Byte range in their storage; it starts at a multiple of the largest element."""
    starts = [t.storage_offset() * t.itemsize for t in tensors]
    ends = [start + _extent(t.shape, t.stride()) * t.itemsize for start, t in zip(starts, tensors, strict=True)]
    return min(starts) // 16 * 16, max(ends)


def _extent(size, stride) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _pairs(pieces: list[Tensor], buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pieces of host memory with the parts of a device buffer that belong to them."""
    if len(pieces) == 1:
        return [(pieces[0], buffer)]
    return list(zip(pieces, buffer.split([piece.numel() for piece in pieces]), strict=True))
