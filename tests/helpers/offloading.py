"""Models whose slots go to a store, and copies for stores that are tested without a GPU."""

import ctypes
import itertools
from dataclasses import replace

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.patch import find_patch
from hyclora.operators.store import CudaCopies, Store
from tests.helpers.kernel_checks import DEVICE

# savers that give what an MLP gives that is left to its backward (operators/mlp/mlp.py: late)
EXACT_MLP = {"mlp_in": "exact", "gate": "exact", "up": "exact", "act": "recompute", "hidden": "recompute"}
SLAB = 2**14  # smaller than a slot of the small models, so that copies straddle slabs


class LazyCopies:
    """Copies as late as they can be: nothing moves before somebody waits, and new memory is full of NaN bytes.

    A wait that is missing shows as NaN in what is read. Device memory is not held while a copy is queued: bytes that
    went before they were copied to the host stay NaN there, and a copy into memory that is gone is an error.
    """

    device = torch.device("cpu")

    def __init__(self):
        self.slabs: set[int] = set()
        self.queue: dict[int, list[tuple]] = {}
        self._tokens = itertools.count()

    def __reduce__(self):
        return LazyCopies, ()

    def pin(self, nbytes: int) -> torch.Tensor:
        slab = torch.full((nbytes,), 255, dtype=torch.uint8)
        self.slabs.add(slab.untyped_storage().data_ptr())
        return slab

    def current(self) -> None:
        """There is one stream."""

    def copy(self, pairs) -> int:
        token = next(self._tokens)
        self.queue[token] = [self._job(target, source) for target, source in pairs]
        return token

    def wait(self, token: int) -> None:
        for earlier in [t for t in self.queue if t <= token]:
            for to_host, nbytes, target, source, device_side in self.queue.pop(earlier):
                if not device_side.expired():
                    ctypes.memmove(target, source, nbytes)
                elif not to_host:
                    raise AssertionError("a copy wrote to device memory that was freed before it")

    def _job(self, target: torch.Tensor, source: torch.Tensor) -> tuple:
        assert target.is_contiguous() and source.is_contiguous() and target.numel() == source.numel()
        to_host = target.untyped_storage().data_ptr() in self.slabs
        device_side = source if to_host else target
        if not to_host:
            target.fill_(255)
        weak = StorageWeakRef(device_side.untyped_storage())
        return to_host, target.numel(), target.data_ptr(), source.data_ptr(), weak


def offloaded(model, config, copies=None, **options) -> Store:
    """Patch a model, its slots sent to a store, on the GPU or to late copies on the CPU. Graphs only if asked for."""
    config = config or HycloraConfig()
    apply_hyclora(model, replace(config, cuda_graphs=config.cuda_graphs is True))
    copies = copies or (CudaCopies(torch.device("cuda", 0)) if DEVICE == "cuda" else LazyCopies())
    store = Store(copies, **{"slab": SLAB} | options)
    find_patch(model).use(store)
    return store


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
