"""Packed slots in pinned host memory between forward and backward.

A block's packed tensors, and x A^T where it is large, are one Unit. Units that are put one after another, those of
half a decoder layer, are one Group: a fork to a side stream starts its copy to the host, and a join with the compute
stream a few units later frees the GPU copy, with no host sync and no record_stream. read() gives a unit's tensors back,
and fetches the groups that backward will ask for next, which are those that were put before. The youngest units are
still on the GPU when backward starts, and are read there; a group that is not full then stays there.

A unit lives as long as an empty tensor that autograd saves with the block's other tensors: a backward that is done, a
graph that is dropped, an exception or a checkpoint's discarded forward frees it as it frees any saved tensor.
"""

import sys
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hyclora.operators.pausable import Pausable
from hyclora.operators.store.buffers import as_buffers
from hyclora.operators.store.host import ALIGNMENT, SLAB, Arena

UNITS_A_LAYER = 4
# half a layer: with whole layers the next one's work is over before their copy is, and the GPU waits for it
HALF = UNITS_A_LAYER // 2
GROUP_BYTES = 2**26
HOMES = "_hyclora_homes"


class Home(NamedTuple):
    """Where a packed tensor is: the unit, and its place there."""

    unit: "Unit"
    index: int


class Unit:
    """Tensors that are put and read together; in parts, each of which has its own memory when it is fetched.

    buffers: their bytes on the device, None while they are on the host alone; extent: their bytes on the host, None if
    they were not sent or the host had no room.
    """

    def __init__(self, group: "Group", first: int, last: int, parts: list[Sequence[Tensor]]):
        self.group, self.first, self.last = group, first, last
        self.extent: tuple[int, int] | None = None
        self.buffers, self.views = [], []
        self._parts: list[tuple[int, int]] = []
        self._spans: list[tuple[int, int, int]] = []
        self.nbytes = 0
        for part, tensors in enumerate(parts):
            buffers, views = as_buffers(tensors)
            self.views += [view._replace(buffer=view.buffer + len(self.buffers)) for view in views]
            self.buffers += buffers
            start = self.nbytes
            for buffer in buffers:
                self._spans.append((part, self.nbytes - start, buffer.numel()))
                self.nbytes += -(-buffer.numel() // ALIGNMENT) * ALIGNMENT
            self._parts.append((start, self.nbytes - start))
        self._versions = [(buffer, buffer._version) for buffer in self.buffers]

    def __del__(self):
        if sys.is_finalizing():
            return
        if self.group.coming:  # a copy that still writes to the buffers that go now
            self.group.wait()
        if self.extent is not None:
            self.group.store.discarded.append(self.extent)

    def outgoing(self, arena: Arena) -> list[tuple[Tensor, Tensor]]:
        """Copies to the host, none if it has no room."""
        self.extent = arena.take(self.nbytes)
        if self.extent is None:
            return []
        first = self.extent[0]
        hosts = [arena.pieces(first + self._parts[part][0] + start, size) for part, start, size in self._spans]
        return [pair for host, buffer in zip(hosts, self.buffers, strict=True) for pair in _pairs(host, buffer)]

    def make_room(self, device: torch.device) -> list[Tensor]:
        """A buffer for each part."""
        return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _, nbytes in self._parts]

    def incoming(self, arena: Arena, room: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Copies back to the buffers of all parts, as the host has them in one extent."""
        hosts = [arena.pieces(self.extent[0] + start, nbytes) for start, nbytes in self._parts]
        return [
            (target, source) for host, part in zip(hosts, room, strict=True) for source, target in _pairs(host, part)
        ]

    def place(self, room: list[Tensor]) -> None:
        """The bytes are in these buffers from now on."""
        self.buffers = [room[part][start : start + size] for part, start, size in self._spans]

    def leave(self) -> None:
        """Leave the bytes to the host alone."""
        self.buffers, self._versions = None, []

    def tensors(self) -> list[Tensor]:
        self.check()
        return [view.of(self.buffers) for view in self.views]

    def check(self) -> None:
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError("a tensor that was kept for backward has been modified by an inplace operation")


class Group:
    """Units put one after another on one stream, copied and waited for together; it does not keep them alive.

    pending: token of the last copy, until somebody has waited for it; coming: fetched, and no unit read since.
    """

    def __init__(self, store: "Store", stream, first: int):
        self.store, self.stream = store, stream
        self.first, self.last = first, first - 1
        self.pending: tuple | None = None
        self.coming = False
        self.nbytes = 0
        self._units: list[weakref.ref[Unit]] = []

    @property
    def units(self) -> list[Unit]:
        """Those alive."""
        return [unit for ref in self._units if (unit := ref()) is not None]

    def add(self, unit: Unit) -> None:
        self._units.append(weakref.ref(unit))
        self.last = unit.last
        self.nbytes += unit.nbytes

    def distance(self, place: int) -> int:
        """Places from there to the nearest unit."""
        return max(self.first - place, place - self.last, 0)

    def send(self) -> bool:
        """Start the copy to the host; False if the host had no room for all."""
        units = self.units
        if pairs := [pair for unit in units for pair in unit.outgoing(self.store.arena)]:
            self.pending = self.store.copies.copy(pairs)
        return all(unit.extent is not None for unit in units)

    def fetch(self) -> None:
        """Start the copy back of what is on the host alone."""
        away = [unit for unit in self.units if unit.buffers is None]
        if not away:
            return
        found = [(unit, unit.make_room(self.store.device)) for unit in away]
        pairs = [pair for unit, room in found for pair in unit.incoming(self.store.arena, room)]
        self.pending, self.coming = self.store.copies.copy(pairs), True
        for unit, room in found:
            unit.place(room)

    def wait(self) -> None:
        """Have the work queued from now on run after the copy."""
        if self.pending is not None:
            self.store.copies.wait(self.pending)
            self.pending = None

    def park(self) -> None:
        """Leave the bytes to the host alone, as far as it has them."""
        units = [unit for unit in self.units if unit.buffers is not None and unit.extent is not None]
        for unit in units:
            unit.check()
        self.wait()
        for unit in units:
            unit.leave()


class Store(Pausable):
    """Units of one patched model, in the order in which they were put.

    A group is full with `group` units or `group_bytes` bytes. It stays on the device until `window` more units are put,
    and is fetched `ahead` units before it is asked for. All are half a layer by default, so that about a layer is on
    the device. A unit that stands for several blocks counts as so many (`span`). Where the host is short of memory,
    units stay on the device. While it is paused blocks keep their slots there. A unit takes its tensors' bytes of host
    memory, each buffer (buffers.py) rounded up to 512; slabs of it are pinned as they are needed, and kept.
    """

    def __init__(
        self, copies, *, group: int = HALF, group_bytes: int = GROUP_BYTES, window: int = HALF, ahead: int = HALF,
        slab: int = SLAB,
    ):  # fmt: skip
        self.copies, self.window = copies, window
        self.group, self.group_bytes, self.ahead = group, group_bytes, ahead
        self.device = copies.device
        self.arena = Arena(copies.pin, slab)
        self.discarded: deque[tuple[int, int]] = deque()
        self._units: weakref.WeakValueDictionary[int, Unit] = weakref.WeakValueDictionary()
        self._open: Group | None = None
        self._window: deque[weakref.ref[Group]] = deque()
        self._serial = 0
        self._holds = False
        self._warned = False

    def __reduce__(self):
        """A copy of a model gets an empty store of its own."""
        options = {name: getattr(self, name) for name in ("group", "group_bytes", "window", "ahead")}
        return partial(Store, slab=self.arena.slab, **options), (self.copies,)

    @property
    def empty(self) -> bool:
        """No unit is alive."""
        return not self._units

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

    def put(self, tensors: list[Tensor], span: int = 1, longer: Sequence[Tensor] = ()) -> list[Home]:
        """Have tensors sent to the host as one unit, with its group; where each is from now on.

        longer: more of them, which backward needs when it has freed the others. Allocates nothing on the device, but a
        contiguous copy of what has holes in its memory.
        """
        parts = [part for part in (tensors, longer) if part]
        if not parts:
            return []
        stream = self.copies.current()
        if self._open is None or self._open.stream != stream or not self._open.units:
            self._open = Group(self, stream, self._serial + 1)
        group, self._serial = self._open, self._serial + span
        self._units[self._serial] = unit = Unit(group, self._serial - span + 1, self._serial, parts)
        group.add(unit)
        if unit.last - group.first + 1 >= self.group or group.nbytes >= self.group_bytes:
            self._close()
        self._shift(self._serial)
        return [Home(unit, index) for index in range(len(unit.views))]

    def read(self, unit: Unit, ahead: int | None = None) -> list[Tensor]:
        """The tensors of a unit; those put before it, self.ahead places or as many as given, are on their way then.

        A group that is fetched takes its bytes on the device, each part of a unit in one piece. RuntimeError for a
        tensor that was written to since it was put.
        """
        self._open = None  # what is put now belongs to another forward
        ahead = self.ahead if ahead is None else ahead
        for serial in range(unit.last, unit.first - 1 - ahead, -1):
            if (wanted := self._units.get(serial)) is not None and wanted.buffers is None:
                wanted.group.fetch()
        if unit.group.coming:
            unit.group.wait()
            unit.group.coming = False
            self._window.append(weakref.ref(unit.group))
        tensors = unit.tensors()
        self._shift(unit.last)
        return tensors

    @contextmanager
    def holding(self):
        """What is put inside stays on the device: backward comes to it first, and nothing waits for its copies."""
        self._close()
        self._holds = True
        try:
            yield
        finally:
            self._close()
            self._holds = False

    def settle(self) -> None:
        """Send what has not been sent, and have the work queued from now on run after all copies."""
        self._close()
        for group in dict.fromkeys(unit.group for unit in list(self._units.values())):
            group.wait()

    def _close(self) -> None:
        """Send the open group, if there is one and it may go."""
        group, self._open = self._open, None
        if group is None or self._holds:
            return
        self._sweep()
        if not group.send():
            self._warn()
        self._window.append(weakref.ref(group))

    def _shift(self, place: int) -> None:
        """Move the window to a place; groups beyond it leave the device."""
        while self._window:
            group = self._window[0]()
            if group is not None and group.distance(place) < self.window:
                return
            self._window.popleft()
            if group is not None:
                group.park()

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


def ticket(homes: dict[int, Home]) -> Tensor:
    """An empty tensor for autograd to save: it holds the units of a block's tensors, by position."""
    empty = torch.empty(0)
    setattr(empty, HOMES, homes)
    return empty


def redeem(empty: Tensor, ahead: int | None = None) -> dict[int, Tensor]:
    """The tensors of a ticket, by position; ahead: of Store.read."""
    homes = getattr(empty, HOMES, None)
    if homes is None:
        raise RuntimeError(
            "a saved-tensor hook has copied what offload=True saves for backward; use one kind of offloading at a time"
        )
    units = sorted({home.unit for home in homes.values()}, key=lambda unit: unit.last, reverse=True)
    tensors = {unit: unit.group.store.read(unit, ahead) for unit in units}
    return {position: tensors[home.unit][home.index] for position, home in homes.items()}


def _pairs(pieces: list[Tensor], buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pieces of host memory with the parts of a device buffer that belong to them."""
    if len(pieces) == 1:
        return [(pieces[0], buffer)]
    return list(zip(pieces, buffer.split([piece.numel() for piece in pieces]), strict=True))
