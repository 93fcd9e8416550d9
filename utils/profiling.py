"""What a training forward leaves behind: the bytes that autograd keeps until backward."""

import contextlib

import torch
from torch import Tensor, nn


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
    """Bytes of the storages that one training forward of `batch` saves for backward.

    A storage counts once however many operators save views of it; parameters, buffers and the batch itself do not
    count, as they live anyway. Random state, gradients and training mode are left as they were.
    """
    resident = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in resident}
    # Holding the storages keeps their addresses from being given to a later tensor.
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with undisturbed(model, train=True), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())
