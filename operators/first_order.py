"""What every Function's backward begins with: it is taken only once, and of gradients that are dense in memory."""

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Callable) -> Callable:
    """once_differentiable, which refuses gradients of gradients at once.

    Torch's own raises only where it is given gradients that want one, and would leave terms out where a loss is the
    first to be differentiated. ValueError under create_graph=True, before anything is computed.

    Kernels read a gradient row by row. One that is otherwise in memory is copied: that of a sum over y is a single
    number seen as many.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():  # as autograd has it in a backward that shall be differentiated
            raise ValueError(
                "create_graph=True: a patched model has no second-order gradients; take remove_hyclora(model) for them"
            )
        return once(ctx, *(g if g is None or g.is_contiguous() else g.contiguous() for g in grads))

    return checked
