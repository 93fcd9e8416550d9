"""What every Function's backward begins with: it is computed outside of autograd, so it can be taken only once."""

from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Callable) -> Callable:
    """once_differentiable, which refuses gradients of gradients at once.

    Torch's own raises only where it is given gradients that want one, and would leave terms out where a loss is the
    first to be differentiated. ValueError under create_graph=True, before anything is computed.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():  # as autograd has it in a backward that shall be differentiated
            raise ValueError(
                "create_graph=True: a patched model has no second-order gradients; take remove_hyclora(model) for them"
            )
        return once(ctx, *grads)

    return checked
