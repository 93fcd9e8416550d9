"""How gradients of replayed layers reach the parameters: graphs add them to fixed memory.

It is the parameters' .grad where nobody but autograd's user is waiting for them. Others see only what passes through
autograd. DDP is given that memory itself, with all that has been added to it. For hooks on parameters each backward
begins with zeros in it, and gives autograd copies of what it adds.
"""

import weakref
from collections.abc import Callable, Iterable
from enum import Enum, auto
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from hyclora.models.graphs.recording import Recording
from hyclora.operators.first_order import first_order

PIECE = 2**14  # elements of a gradient that one program adds


class Listener(Enum):
    """Who waits for gradients to pass through autograd: DDP for what .grad becomes, hooks for what is added to it."""

    NOBODY = auto()
    SUMS = auto()
    PARTS = auto()

    @classmethod
    def of(cls, parameters: list[Tensor]) -> "Listener":
        """Who waits for those of the backward of this forward.

        The hooks by which a wrapper of several processes reduces gradients cannot be seen: it is taken for a listener.
        DDP is one within no_sync too: it notes there which parameters were used (find_unused_parameters), and may be
        told before the backward to reduce after all (accelerate's trigger_sync_in_backward).
        """
        if _hooked(parameters):
            return cls.PARTS
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls.NOBODY
        return cls.PARTS if _wrapper() is None else cls.SUMS


def _wrapper() -> DistributedDataParallel | None:
    """The DDP whose forward runs."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def _hooked(parameters: Iterable[Tensor]) -> bool:
    return any(t._backward_hooks or t._post_accumulate_grad_hooks for t in parameters)


class GradientBuffers:
    """A buffer a parameter, which all recordings share.

    Whoever keeps a gradient after it has been taken off its parameter keeps its values: then that tensor moves. Views
    of it do not, nor what .detach() and .data make, nor memory of DDP's buckets, which is DDP's to overwrite.
    """

    def __init__(self):
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._handed: dict[nn.Parameter, weakref.ref[Tensor]] = {}
        self._in_buckets: set[nn.Parameter] = set()

    def of(self, parameter: nn.Parameter, adopt: bool) -> Tensor:
        """The parameter's buffer; adopt: a new one is the memory of the gradient that it has."""
        buffer = self._buffers.get(parameter)
        if buffer is None or (buffer.dtype, buffer.device) != (parameter.dtype, parameter.device):
            buffer = torch.zeros_like(parameter)
            self._in_buckets.discard(parameter)
            if adopt and parameter.grad is not None:
                buffer = parameter.grad.detach()
                if getattr(_wrapper(), "gradient_as_bucket_view", False):
                    self._in_buckets.add(parameter)
                self._hand(parameter, parameter.grad)
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
            self._hand(parameter, parameter.grad)
        if empty:
            torch._foreach_zero_(empty)

    def take(self, buffers: dict[nn.Parameter, Tensor]) -> list[Tensor]:
        """Take attached gradients off their parameters, for autograd to put them back."""
        # what it is given without another reference becomes .grad without a copy, as a new tensor
        Variable._execution_engine.queue_callback(partial(self._note, list(buffers.items())))
        taken = [parameter.grad for parameter in buffers]
        for parameter in buffers:
            parameter.grad = None
        return taken

    def _note(self, buffers: list[tuple[nn.Parameter, Tensor]]) -> None:
        """They are back."""
        for parameter, buffer in buffers:
            grad = parameter.grad
            if grad is not None and grad.data_ptr() == buffer.data_ptr():
                self._hand(parameter, grad)

    def detach(self, buffers: dict[nn.Parameter, Tensor]) -> None:
        """Make these nobody's gradients, and zero."""
        for parameter, buffer in buffers.items():
            self._let_go(parameter, buffer)
            grad = parameter.grad
            if grad is not None and grad.data_ptr() == buffer.data_ptr():
                parameter.grad = grad.clone()
        torch._foreach_zero_(list(buffers.values()))

    def _hand(self, parameter: nn.Parameter, grad: Tensor) -> None:
        # it may be DDP's own view of a bucket, which must not move: DDP would reduce memory that nobody reads
        if parameter not in self._in_buckets:
            self._handed[parameter] = weakref.ref(grad)

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
    """Lives until the backward of a replayed forward has run, or its graph is dropped.

    weights, adapted: tensors that a replay reads, and PEFT's layers that have an adapter, which must not be merged.
    """

    def __init__(self, weights: list[Tensor], adapted: list[nn.Module]):
        self._weights, self._adapted = weights, adapted
        self._versions = self._read()

    def _read(self) -> list[int]:
        return list(map(attrgetter("_version"), self._weights))

    def check(self) -> None:
        """ValueError if the backward would read other weights than the forward did."""
        if self._read() != self._versions or any(map(attrgetter("merged_adapters"), self._adapted)):
            raise ValueError(
                "cuda_graphs: weights were changed between a forward and its backward, which would read them again; "
                "run the backward first"
            )


class ReplayFunction(torch.autograd.Function):
    """All layers, started already, as one Function: the output for hidden, and its gradient.

    listener: of parameters' gradients, which pass through autograd; without one the graph adds them to .grad, and
    parameters are some trained one, so that there is a backward although hidden may need no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, recording: Recording, ticket: Ticket, buffers: GradientBuffers, listener, *parameters):
        ctx.recording, ctx.ticket, ctx.buffers, ctx.listener = recording, ticket, buffers, listener
        return recording.output.detach()

    @staticmethod
    @first_order
    def backward(ctx, dy):
        recording, buffers = ctx.recording, ctx.buffers
        if ctx.ticket is None:
            raise RuntimeError(
                "cuda_graphs: a second backward through the layers, whose activations the first one has used up; "
                "retain_graph needs cuda_graphs=False"
            )
        ctx.ticket.check()
        adds = _adds_all(ctx)
        take: Callable = _nothing_for
        hooked = _hooked(recording.gradients)  # since the forward, if there is no listener
        if ctx.listener is Listener.PARTS or ctx.listener is Listener.SUMS and (hooked or not adds):
            buffers.detach(recording.gradients)
            take = _copies
        elif hooked:
            raise RuntimeError(
                "cuda_graphs: a hook was registered on a parameter between forward and backward, which a replay cannot "
                "call; register it before the forward, or use cuda_graphs=False"
            )
        elif adds:
            buffers.attach(recording.gradients)
            take = buffers.take if ctx.listener is Listener.SUMS else take
        else:
            raise RuntimeError(
                "cuda_graphs: gradients of single tensors were asked for, but graphs add those of all adapters to "
                ".grad; use cuda_graphs=False"
            )
        recording.dy.copy_(dy)
        recording.backward()
        ctx.ticket = None
        dx = None if recording.dx is None else recording.dx.clone()
        return dx, None, None, None, None, *take(recording.gradients)


def _adds_all(ctx) -> bool:
    """Whether this backward adds to .grad of all parameters that a replay was called with."""
    nodes = [node for node, _ in ctx.next_functions if hasattr(node, "variable")]
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # of a tensor whose gradient torch.autograd.grad is to return
        return False


def _nothing_for(buffers: dict[nn.Parameter, Tensor]) -> list[None]:
    """Of the one parameter that is named, as the graph has added to .grad."""
    return [None]


def _copies(buffers: dict[nn.Parameter, Tensor]) -> list[Tensor]:
    """New tensors, as autograd makes what it is given a .grad without a copy if nobody else has it."""
    tensors = list(buffers.values())
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def nothing() -> None:
    """A weak reference to nothing."""
