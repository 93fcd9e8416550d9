"""Dropout whose masks are computed from a seed where they are used: 8 bytes are kept of them, drawn on the device.

A mask is a function of (seed, which projection of a group, row, column), so that forward, dA and dx have the same one
though each is a kernel of its own. The host never sees the seed: a CUDA graph draws another one at each replay.
"""

from contextlib import ExitStack, contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from hyclora.operators import reference
from hyclora.operators.dispatch import as_rows, cdiv, device_guard, use_triton

COLUMNS = 1024  # of a program: one load of 16 bytes a thread in half precision


@triton.jit
def dropout_tile(seed_ptr, eight, place, row, which, least, scale, ROUNDS: tl.constexpr):
    """mask / (1 - p) of the columns 8 eight + place of a row, [N, 8]; eight [N, 1], place [1, 8].

    Eight columns of a thread share a draw, so that the hash costs less than the loads.
    """
    words = tl.philox(tl.load(seed_ptr), eight, row, which, 0, ROUNDS)
    word = tl.where(place < 4, tl.where(place < 2, words[0], words[1]), tl.where(place < 6, words[2], words[3]))
    piece = (word >> (place % 2 * 16).to(tl.uint32)) & 0xFFFF
    return tl.where(piece.to(tl.int32) >= least, scale, 0.0)


@triton.jit(do_not_specialize=["which", "least"])
def _dropout_kernel(
    x_ptr, out_ptr, seed_ptr, which, least, scale, n_cols, stride_x, stride_out,
    ROUNDS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * stride_x
    out_ptr += row.to(tl.int64) * stride_out
    eight, place = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None], tl.arange(0, 8)[None, :]
    col = eight * 8 + place
    inside = col < n_cols
    y = tl.load(x_ptr + col, mask=inside, other=0.0).to(tl.float32)
    y *= dropout_tile(seed_ptr, eight, place, row, which, least, scale, ROUNDS)
    if ADD:
        y += tl.load(out_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + col, y.to(out_ptr.dtype.element_ty), mask=inside)


def draw_seed(device: torch.device) -> Tensor:
    """A seed, int64 [1], from the default generator of device."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropped(x: Tensor, seed: Tensor, which: int, p: float) -> Tensor:
    """reference.dropped on any device: x [T, C] * mask / (1 - p), a new tensor that is contiguous."""
    if not use_triton(x):
        return reference.dropped(x, seed, which, p)
    x = as_rows(x)
    return _launch(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), seed, which, p, add=False)


def add_dropped(y: Tensor, x: Tensor, seed: Tensor, which: int, p: float) -> Tensor:
    """reference.add_dropped on any device: y [T, C] += x * mask / (1 - p), rows of unit stride; allocates nothing."""
    if not use_triton(x):
        return reference.add_dropped(y, x, seed, which, p)
    return _launch(x, y, seed, which, p, add=True)


def _launch(x: Tensor, out: Tensor, seed: Tensor, which: int, p: float, add: bool) -> Tensor:
    n_rows, n_cols = x.shape
    if n_rows:
        with device_guard(x):
            _dropout_kernel[(n_rows, cdiv(n_cols, COLUMNS))](
                x, out, seed, which, *reference.dropout_constants(p), n_cols, x.stride(0), out.stride(0),
                ROUNDS=reference.PHILOX_ROUNDS, ADD=add, BLOCK=COLUMNS // 8, num_warps=4,
            )  # fmt: skip
    return out


class DropoutFunction(torch.autograd.Function):
    """dropped of x [..., C] under autograd; dx = dropped(dy). Keeps the seed."""

    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, which: int, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.which, ctx.p = which, p
        return dropped(as_rows(x), seed, which, p).view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return DropoutFunction.apply(dy, *ctx.saved_tensors, ctx.which, ctx.p), None, None, None


@contextmanager
def same_dropout(*groups, modules=()):
    """Stock code inside drops what ours would: checkpointing runs it first, and ours later.

    groups: ProjectionGroups, refreshed, for PEFT's dropouts of their adapters; modules: nn.Dropouts of a model's own.
    A group's or a module's seed is drawn when its first dropout runs, and anew each time that it comes again.
    """
    with ExitStack() as replaced:

        def replace(module: nn.Dropout, forward) -> None:
            module.forward = forward
            replaced.callback(nn.Module.__delattr__, module, "forward")

        for group in groups:
            drawn = _Drawn()
            for which, p in enumerate(group.projections):
                if p.dropout:
                    replace(p.drop, drawn.dropout(which, p.dropout))
        for module in modules:
            if module.p and module.training:
                replace(module, _Drawn().dropout(0, module.p))
        yield


class _Drawn:
    """The seed that one run of a group has drawn."""

    def __init__(self):
        self.seed, self.last = None, -1

    def dropout(self, which: int, p: float):
        def forward(x: Tensor) -> Tensor:
            if self.seed is None or which <= self.last:
                self.seed = draw_seed(x.device)
            self.last = which
            return DropoutFunction.apply(x, self.seed, which, p)

        return forward
