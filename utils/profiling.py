"""What a training forward leaves behind: the bytes that autograd keeps until backward."""

import contextlib

import torch
from torch import Tensor, nn

from models.patch import PATCH


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, train: bool):
    """Put the model into training or eval mode; mode and random state come back as they were."""
    devices = [parameter.device for parameter in model.parameters() if parameter.is_cuda][:1]
    mode = model.training
    with torch.random.fork_rng(devices):
        model.train(train)
        try:
            yield
        finally:
            model.train(mode)


def buffered_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of the storages that one training forward of `batch` saves for backward on the model's device.

    A storage counts once however many operators save views of it; parameters, buffers and the batch itself do not
    count, as they live anyway. With offload=True, host memory does not count (the patch's store knows it), but what the
    store has on the device when the forward ends does. Random state, gradients and training mode are left as they were.
    """
    resident = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in resident}
    # Holding the storages keeps their addresses from being given to a later tensor.
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        # an operator that holds its own output in a hook's result would never be freed
        return tensor if tensor.grad_fn is None else tensor.detach()

    with undisturbed(model, train=True), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**batch)
        patch = getattr(model, PATCH, None)
        in_store = patch.store.device_bytes if patch is not None and patch.store is not None else 0
        del output
    return in_store + sum(storage.nbytes() for storage in kept.values())
