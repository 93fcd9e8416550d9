"""A layer of which the input alone is kept, like any slot, by a saver and by the store; backward runs it again.

Torch's gradient checkpointing keeps the input of every layer on the GPU, exactly.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hyclora.operators.entry import enter
from hyclora.operators.first_order import first_order
from hyclora.operators.random_state import Draws, get_rng_state, replayed_rng
from hyclora.operators.savers import InputKeeper, Keeper
from hyclora.operators.store import Store


class CheckpointFunction(torch.autograd.Function):
    """y = run(x); only slot layer_in (x [..., C]) is kept, and backward runs again, with random state and autocast.

    y is that of the exact x, and the same code runs both times. What an operator of the layer keeps for its own
    backward dies with it in the first run, where all slots are calibrated that are due.
    whole: the layer that run is, no more and no less, or None. It is told in both runs (Step.whole): of the second one
    nobody reads y, which is but where its gradient enters. parameters: whatever else run may give a gradient to. They
    are arguments so that their gradients go the usual way (torch.autograd.grad, hooks of a distributed run). Keeps what
    the saver of layer_in does (exact: x by reference; a difference: by reference too what layers before it keep, see
    savers/difference.py) and a random state; backward has, for a time, what one run of the layer keeps.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, run: Callable[[Tensor], Tensor], keeper: Keeper, whole: object | None, *parameters: Tensor
    ) -> Tensor:
        device = x.device.type
        keeper.keep("layer_in", x.reshape(-1, x.shape[-1]))
        keeper.save(ctx)
        ctx.run, ctx.store, ctx.parameters, ctx.shape, ctx.whole = run, keeper.store, parameters, x.shape, whole
        step = ctx.step = keeper.step
        ctx.rng, ctx.draws = (None, Draws()) if step.recording else (get_rng_state(x.device), None)
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        first = step.layer(passing=True, holds_input=keeper.aliases("layer_in"), draws=ctx.draws, whole=whole)
        with first, _resident(ctx.store):
            return run(x)

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor):
        keeper = InputKeeper.load(ctx)
        held = keeper.saver("layer_in").aliases
        x = keeper.restore("layer_in").view(ctx.shape)
        again = ctx.step.layer(passing=False, holds_input=held, draws=ctx.draws, whole=ctx.whole)
        resident, autocast = _resident(ctx.store), torch.autocast(**ctx.autocast)
        needs_dx, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        # those that were frozen since get none, as from autograd
        needed = [need and t.requires_grad for t, need in zip(ctx.parameters, needed, strict=True)]
        inputs = [t for t, need in zip(ctx.parameters, needed, strict=True) if need]
        with torch.enable_grad(), again, resident, autocast, _same_random(x.device, ctx):
            if needs_dx:
                (x,) = enter(x)
                inputs.append(get_gradient_edge(x))
            y = ctx.run(x)
            # none where nothing that is trained was used: adapters that are merged or not active
            y = get_gradient_edge(y) if y.requires_grad else None
        del x  # neither it nor the output is looked at by what comes now
        found = [None] * len(inputs) if y is None else torch.autograd.grad(y, inputs, dy, allow_unused=True)
        grads = iter(found)
        dparameters = [next(grads) if need else None for need in needed]
        return found[-1] if needs_dx else None, *[None] * 3, *dparameters


def _same_random(device: torch.device, ctx):
    """What is drawn inside is what the first run drew."""
    if ctx.draws is None:
        return replayed_rng(device, ctx.rng)
    ctx.draws.rewind()
    return nullcontext()


def _resident(store: Store | None):
    """Slots of the blocks inside stay on the device."""
    return nullcontext() if store is None else store.paused()
