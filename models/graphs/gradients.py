"""How gradients of replayed layers reach the parameters: graphs add them to fixed memory.

It is the parameters' .grad where nobody but autograd's user is waiting for them. Hooks see only what passes through
autograd: for them each backward begins with zeros in that memory, and gives autograd copies of what it adds.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from hyclora.models.graphs.recording import Recording
from hyclora.operators.first_order import first_order

PIECE = 2**14  # elements of a gradient that one program adds


class GradientBuffers:
    """A buffer a parameter, which all recordings share.

    Whoever keeps a gradient after it has been taken off its parameter keeps its values: then that tensor moves. Views
    of it do not, nor what .detach() and .data make.
    """

    def __init__(self):
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._handed: dict[nn.Parameter, weakref.ref[Tensor]] = {}

    def of(self, parameter: nn.Parameter, adopt: bool) -> Tensor:
        """The parameter's buffer; adopt: a new one is the memory of the gradient that it has."""
        buffer = self._buffers.get(parameter)
        if buffer is None or (buffer.dtype, buffer.device) != (parameter.dtype, parameter.device):
            buffer = torch.zeros_like(parameter)
            if adopt and parameter.grad is not None:
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
            self._let_go(parameter, buffer)
            if grad is None:
                empty.append(buffer)
            else:
                buffer.copy_(grad)
            parameter.grad = buffer.detach()
            self._handed[parameter] = weakref.ref(parameter.grad)
        if empty:
            torch._foreach_zero_(empty)

    def detach(self, buffers: dict[nn.Parameter, Tensor]) -> None:
        """Make these nobody's gradients, and zero."""
        for parameter in self._handed.keys() & buffers.keys():
            self._let_go(parameter, buffers[parameter])
        torch._foreach_zero_(list(buffers.values()))

    def _let_go(self, parameter: nn.Parameter, buffer: Tensor) -> None:
        """Whoever has what was handed out keeps it, in other memory."""
        handed = self._handed.pop(parameter, nothing)()
        if handed is not None and handed.data_ptr() == buffer.data_ptr():
            handed.data = handed.clone()


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


class Ticket:
    """Lives until the backward of a replayed forward has run, or its graph is dropped."""


class ReplayFunction(torch.autograd.Function):
    """All layers, started already, as one Function: the output for hidden, and its gradient.

    listened: gradients of parameters pass through autograd, and these are all that get one. Else the graph adds them to
    .grad, and parameters are some trained one, so that there is a backward although hidden may need no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, recording: Recording, ticket: Ticket, buffers: GradientBuffers, listened, *parameters):
        ctx.recording, ctx.ticket, ctx.buffers, ctx.listened = recording, ticket, buffers, listened
        return recording.output.detach()

    @staticmethod
    @first_order
    def backward(ctx, dy):
        recording = ctx.recording
        if ctx.ticket is None:
            raise RuntimeError(
                "cuda_graphs: a second backward through the layers, whose activations the first one has used up; "
                "retain_graph needs cuda_graphs=False"
            )
        if ctx.listened:
            ctx.buffers.detach(recording.gradients)
        elif torch._C._will_engine_execute_node(get_gradient_edge(recording.anchor).node):
            ctx.buffers.attach(recording.gradients)
        else:
            raise RuntimeError(
                "cuda_graphs: gradients of single tensors were asked for, but graphs add those of all adapters to "
                ".grad; use cuda_graphs=False"
            )
        recording.dy.copy_(dy)
        recording.backward()
        ctx.ticket = None
        dx = None if recording.dx is None else recording.dx.clone()
        return dx, None, None, None, None, *(_copies(recording.gradients.values()) if ctx.listened else [None])


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """New tensors, as autograd makes what it is given a .grad without a copy if nobody else has it."""
    tensors = list(tensors)
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def nothing() -> None:
    """A weak reference to nothing."""
