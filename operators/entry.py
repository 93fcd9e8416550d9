"""Where an autograd graph begins that must not hold its inputs, as the leaves of any other do."""

import torch
from torch import Tensor


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, *inputs: Tensor):
        return tuple(t.detach() for t in inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("this graph ends here; ask for gradients at the edges of what enter() gave")


def enter(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as the beginning of a graph, in their memory: gradients are told by their edges, which hold nothing.

    For use where grad is enabled.
    """
    return _Entry.apply(torch.empty(0, device=inputs[0].device).requires_grad_(), *inputs)
