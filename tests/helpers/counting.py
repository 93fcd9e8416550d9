"""Bytes of tensors: those that are alive at a time, and those that autograd keeps for backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hyclora.utils.checkpointing import checkpoint_layers

aten = torch.ops.aten
PRODUCTS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward,
}  # fmt: skip
PRODUCTS_IN_PLACE = {aten.addmm_, aten.baddbmm_}


def step_of(model: nn.Module, rows: int, length: int, checkpointing: bool) -> tuple[Callable[[], None], Tensor]:
    """A forward and backward of a model, under autocast and gradient checkpointing if asked for, and its ids."""
    if checkpointing:
        checkpoint_layers(model)
        model.enable_input_require_grads()
    ids = torch.arange(rows * length).view(rows, length) % model.config.vocab_size

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()

    return step, ids


def peak_of(tensors: Callable, function: Callable, *args) -> int:
    """The most bytes alive of what a function makes of its arguments; tensors: finds those in these."""
    with Live(*tensors(args)) as live:
        results = function(*args)
    assert results is not None
    return live.peak


class Live(TorchDispatchMode):
    """The most bytes of tensors made inside that lived at the same time; those of tensors given do not count."""

    def __init__(self, *given: Tensor):
        super().__init__()
        self.peak, self._storages = 0, {}
        self._given = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._given:
                storage = t.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: (ref, n) for key, (ref, n) in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self._storages.values()))
        return out


class Uncomputed(TorchDispatchMode):
    """Products of matrices and attention are left out, zeros are there instead: bytes do not depend on what they are.

    A CPU without instructions for bf16 takes minutes for them.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS_IN_PLACE:
            return args[0]
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        out = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args), **kwargs)
        return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_(), out)


def kept(run: Callable, *given: Tensor) -> int:
    """Bytes of the storages that run() saves for backward, each once; those of tensors given do not count."""
    known = {t.untyped_storage().data_ptr() for t in given}
    found: dict[int, torch.UntypedStorage] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return t.detach()

    with saved_tensors_hooks(note, lambda t: t):
        run()
    return sum(storage.nbytes() for storage in found.values())
