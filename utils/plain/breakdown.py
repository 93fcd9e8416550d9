"""What takes memory and FLOPs in a training step, counted tensor by tensor: the same on a GPU and on a CPU."""

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hyclora.utils.profiling import MIB, buffered, layer_by_layer, pinned_bytes
from hyclora.utils.results import table

NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations kept for backward",
    "weight_copies": "16-bit copies of weights kept for backward",
    "host": "activations that wait in host memory",
}
HEAD = 64  # elements that tell most tensors apart


class WeightCopies:
    """Tells a tensor that autocast made of a weight: a frozen one is cast again in every forward and kept until
    backward, which needs it for the gradient of the layer's input.
    """

    def __init__(self, model: nn.Module):
        self.weights: dict[int, list[nn.Parameter]] = {}
        for p in model.parameters():
            if p.is_floating_point():
                self.weights.setdefault(p.numel(), []).append(p)

    def kind_of(self, tensor: Tensor) -> str:
        numel, size = tensor.numel(), tensor.element_size()
        if tensor.is_floating_point() and tensor.untyped_storage().nbytes() == numel * size:
            flat = tensor.as_strided((numel,), (1,), 0)
            for weight in self.weights.get(numel, ()):
                if weight.dtype != tensor.dtype and _same(flat, weight.detach().flatten()):
                    return "weight_copies"
        return "kept"


class Flops(TorchDispatchMode):
    """Adds up what torch's table of FLOPs says of each operator: two a multiplication and addition.

    torch's own FlopCounterMode puts hooks on all modules, which HyC-LoRA would have to call.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _same(copy: Tensor, weight: Tensor) -> bool:
    return all(torch.equal(copy[:n], weight[:n].to(copy.dtype)) for n in (HEAD, len(copy)))


def breakdown(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], autocast: Callable
) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer_state, and of what one forward of the batch keeps for backward:
    weight_copies and all else, activations, host being what waits in host memory. flops: of matrix products and
    attention in a forward and backward, as far as torch sees them (kernels of our own it does not).

    optimizer: with a state, so that it has taken a step. autocast: makes a context. Gradients are gone afterwards.
    """
    with autocast():
        kept = buffered(model, batch, WeightCopies(model).kind_of)
    optimizer.zero_grad()
    # the kernel of attention decides what the counter sees of it
    with layer_by_layer(model), Flops() as counter, sdpa_kernel(SDPBackend.MATH):
        with autocast():
            loss = model.train()(**batch).loss
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    found = {
        "parameters": _bytes(model.parameters()),
        "gradients": _bytes(p.grad for p in trained if p.grad is not None),
        "optimizer_state": _bytes(state),
        "activations": kept["kept"],
        "weight_copies": kept.get("weight_copies", 0),
        "host": pinned_bytes(model),
        "flops": counter.total,
    }
    optimizer.zero_grad()
    return found


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def kept_bytes(found: dict[str, int]) -> int:
    """Of a breakdown, what the forward keeps on the device until backward."""
    return found["activations"] + found["weight_copies"]


def counted_peak(found: dict[str, int]) -> int:
    """The bytes of a breakdown that are there at the same time, when a forward has ended and gradients are added up."""
    return sum(found[name] for name in ("parameters", "gradients", "optimizer_state")) + kept_bytes(found)


def told(found: dict[str, int]) -> str:
    """A breakdown as a table."""
    rows = [(words, f"{found[name] / MIB:.2f} MiB") for name, words in NAMES.items()]
    rows.insert(-1, ("all of these on the device", f"{counted_peak(found) / MIB:.2f} MiB"))
    return table([*rows, ("FLOPs of a forward and a backward", f"{found['flops']:.3g}")])


def count_parameters(model: nn.Module) -> dict[str, float]:
    """How many parameters are trained, of how many; NF4 weights count as they were before they were packed."""
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
    else:
        trained = total = sum(p.numel() for p in model.parameters())
    return {"trained": trained, "total": total, "share": trained / total}
