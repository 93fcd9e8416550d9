"""Fixed memory for gradients: graphs add to it, and it is handed out as the parameters' .grad."""

import weakref

import torch
from torch import Tensor, nn

PIECE = 2**14  # elements of a gradient that one program adds


class GradientBuffers:
    """A buffer a parameter, which all recordings share.

    Whoever keeps a gradient after it has been taken off its parameter keeps its values: then that tensor moves.
    """

    def __init__(self):
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._handed: dict[nn.Parameter, weakref.ref[Tensor]] = {}

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's buffer: the memory of its gradient if it has one."""
        buffer = self._buffers.get(parameter)
        if buffer is None or (buffer.dtype, buffer.device) != (parameter.dtype, parameter.device):
            buffer = torch.zeros_like(parameter)
            if parameter.grad is not None:
                buffer = parameter.grad.detach()
                self._handed[parameter] = weakref.ref(parameter.grad)
            self._buffers[parameter] = buffer
        return buffer

    def attach(self, buffers: dict[nn.Parameter, Tensor]) -> None:
        """Make these the parameters' gradients, with what those hold."""
        empty = []
        for parameter, buffer in buffers.items():
            grad = parameter.grad
            if grad is not None and grad.data_ptr() == buffer.data_ptr():
                continue
            handed = self._handed[parameter]() if parameter in self._handed else None
            if handed is not None and handed.data_ptr() == buffer.data_ptr():
                handed.data = handed.clone()
            if grad is None:
                empty.append(buffer)
            else:
                buffer.copy_(grad)
            parameter.grad = buffer.detach()
            self._handed[parameter] = weakref.ref(parameter.grad)
        if empty:
            torch._foreach_zero_(empty)


def add_gradients(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Add gradients to their buffers in one kernel, in pieces: whole ones would occupy a sixth of a large GPU."""
    now, later = {}, []
    for buffer, gradient in pairs:  # of tied parameters, two belong to one buffer
        if buffer in now:
            later.append((buffer, gradient))
        else:
            now[buffer] = gradient
    if not now:
        return
    dense = all(t.is_contiguous() for pair in now.items() for t in pair)
    buffers, gradients = (
        [piece for t in tensors for piece in (t.view(-1).split(PIECE) if dense else [t])]
        for tensors in (now.keys(), now.values())
    )
    torch._foreach_add_(buffers, gradients)
    add_gradients(later)
