"""Tensors as buffers of bytes, which is how a store copies them."""

from typing import NamedTuple

import torch
from torch import Tensor

from hyclora.operators.store.host import ALIGNMENT


class View(NamedTuple):
    """How a tensor is cut out of a buffer of bytes; stride None: it is contiguous there."""

    buffer: int
    dtype: torch.dtype
    size: torch.Size
    nbytes: int
    offset: int = 0
    stride: tuple[int, ...] | None = None

    def of(self, buffers: list[Tensor]) -> Tensor:
        flat = buffers[self.buffer]
        if self.nbytes < flat.numel():
            flat = flat[self.offset : self.offset + self.nbytes]
        if self.dtype != torch.uint8:
            flat = flat.view(self.dtype)
        return flat.view(self.size) if self.stride is None else flat.as_strided(self.size, self.stride)


def as_buffers(tensors: list[Tensor]) -> tuple[list[Tensor], list[View]]:
    """Byte buffers that hold tensors, and how each is cut out of them.

    Tensors that together fill their storage's range share one buffer; any other gets one of its own, contiguous. A
    buffer has the version counter of the first tensor in it.
    """
    storages: dict[int, list[int]] = {}
    for i, t in enumerate(tensors):
        storages.setdefault(t.untyped_storage().data_ptr(), []).append(i)
    buffers: list[Tensor] = []
    views: list[View | None] = [None] * len(tensors)
    for indices in storages.values():
        members = [tensors[i] for i in indices]
        starts = [t.storage_offset() * t.itemsize for t in members]
        strides = [None if t.is_contiguous() else t.stride() for t in members]
        sizes = [t.nbytes if s is None else _extent(t, s) for t, s in zip(members, strides, strict=True)]
        # views of another dtype need an offset that their elements divide
        low, high = min(starts) // 16 * 16, max(map(sum, zip(starts, sizes, strict=True)))
        alone = len(members) == 1 and strides[0] is None
        if not alone and 0 < high - low <= 1.125 * sum(t.nbytes for t in members) + ALIGNMENT:
            flat = members[0].detach().as_strided((1,), (1,), 0).view(torch.uint8)
            for i, t, start, size, stride in zip(indices, members, starts, sizes, strides, strict=True):
                views[i] = View(len(buffers), t.dtype, t.shape, size, start - low, stride)
            buffers.append(flat.as_strided((high - low,), (1,), low))
        else:
            for i, t in zip(indices, members, strict=True):
                views[i] = View(len(buffers), t.dtype, t.shape, t.nbytes)
                buffers.append(t.detach().contiguous().view(-1).view(torch.uint8))
    return buffers, views


def _extent(t: Tensor, stride: tuple[int, ...]) -> int:
    """Bytes from a tensor's first element to its last."""
    return t.itemsize * (1 + sum((n - 1) * step for n, step in zip(t.shape, stride, strict=True)))
