"""Gradient checkpointing of a decoder layer whose input is kept like any slot: by a saver, and by the store.

Torch's own keeps the input of every layer on the GPU, exactly.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from hyclora.operators.first_order import first_order
from hyclora.operators.random_state import get_rng_state, replayed_rng
from hyclora.operators.savers import Keeper


class CheckpointFunction(torch.autograd.Function):
    """y = run(x); only slot layer_in (x [..., C]) is kept, and backward runs again, with random state and autocast.

    parameters: whatever else run may give a gradient to. They are arguments so that their gradients go the usual way
    (torch.autograd.grad, hooks of a distributed run). Keeps what the saver of layer_in does (exact: x by reference) and
    a random state; backward has, for a time, what one run of the layer keeps.
    """

    @staticmethod
    def forward(ctx, x: Tensor, run: Callable[[Tensor], Tensor], keeper: Keeper, *parameters: Tensor) -> Tensor:
        device = x.device.type
        keeper.keep("layer_in", x.reshape(-1, x.shape[-1]))
        keeper.save(ctx)
        ctx.run, ctx.store, ctx.parameters, ctx.shape = run, keeper.store, parameters, x.shape
        ctx.rng = get_rng_state(x.device)
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        return run(x)

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor):
        x = Keeper.load(ctx).restore("layer_in").view(ctx.shape).detach().requires_grad_(ctx.needs_input_grad[0])
        resident = nullcontext() if ctx.store is None else ctx.store.paused()
        with torch.enable_grad(), resident, torch.autocast(**ctx.autocast), replayed_rng(x.device, ctx.rng):
            y = ctx.run(x)
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        inputs = [t for t, need in zip((x, *ctx.parameters), needed, strict=True) if need]
        grads = iter(torch.autograd.grad(y, inputs, dy, allow_unused=True))
        dx, *dparameters = (next(grads) if need else None for need in needed)
        return dx, None, None, *dparameters
