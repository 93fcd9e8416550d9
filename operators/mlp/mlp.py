"""MLP block: gate and up, or up alone, an activation, down, in one autograd Function."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hyclora.operators.dispatch import as_output, use_triton
from hyclora.operators.first_order import first_order
from hyclora.operators.linear.lora import ProjectionGroup
from hyclora.operators.linear.low_rank import LowRank
from hyclora.operators.linear.residual import overwritable
from hyclora.operators.mlp.activation import GELU, SILU_MUL, Activation
from hyclora.operators.mlp.fused_gelu import fused_gelu_bwd, fused_gelu_fwd
from hyclora.operators.mlp.fused_mlp import fused_mlp_bwd, fused_mlp_fwd
from hyclora.operators.random_state import get_rng_state, replayed_rng
from hyclora.operators.savers import Exact, Keeper, Observer
from hyclora.operators.token_tiles import place, token_tiles

# activation, LoRA add and packing in one kernel each way
FUSED = {SILU_MUL: (fused_mlp_fwd, fused_mlp_bwd), GELU: (fused_gelu_fwd, fused_gelu_bwd)}


@dataclass
class MlpSpec:
    """The frozen description of one MLP block.

    gate_up and down: projection groups. compensate: keep the frozen paths of gate and up and add the LoRA part back
    (else the sums are kept). fused: LoRA add, activation, product and packing in one kernel each way. activation: what
    makes hidden of gate and up, or of up alone.
    """

    gate_up: ProjectionGroup
    down: ProjectionGroup
    compensate: bool
    fused: bool
    activation: Activation = SILU_MUL

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.gate_up.parameters() + self.down.parameters()

    @property
    def can_fuse(self) -> bool:
        """Whether the fused kernels run on a GPU; what they pack is the same either way."""
        return self.fused and not self.gate_up.has_lora_bias


class MlpFunction(torch.autograd.Function):
    """y = hidden W_d^T + LoRA (+ residual), hidden = silu(gate) * up or gelu(up), gate/up = x W^T + LoRA.

    x [..., C], taken in tiles when it is long; residual: of y's shape, or None; y takes its memory if it fits;
    parameters as spec.parameters(). Slots: mlp_in, those of the activation, act if that is gated, hidden. Gradients:
    linear/lora.py for the projections, reference.silu_mul_bwd or gelu_bwd between them (a kept act, silu(gate),
    replaces its recomputation), dy for the residual. Keeps what the savers of slots do, and x A^T of both groups, R
    elements a token (low_rank.LowRank) each. Temporary, a token of a tile: 3 F elements each way if fused, for gate, up
    and hidden or their gradients; 6 F in backward if not, 8 F with a kept act and hidden; half without a gate; and a
    piece of W (weight_pieces.py) where it is NF4.

    late: y is read by nobody, as at the end of a layer that is run again. It is nan then, one number seen as many, and
    the forward draws seeds and computes nothing. Keeps mlp_in alone, exactly: derived from a norm that is exact, else x
    by reference, 2 C bytes a token. Backward makes gate, up and x A^T of a tile from there, so y itself is never made;
    gradients are those of exact slots. Temporary, a token of a tile: C and 3 F elements, half of F without a gate, as
    gradients take the place of gate and up; a piece of W; of all tokens x A^T of both groups.
    """

    @staticmethod
    def forward(ctx, x, residual, spec: MlpSpec, keeper: Keeper, source, late: bool, *parameters):
        rows = x.reshape(-1, x.shape[-1])
        if late and not (source and isinstance(source.saver, Exact)):
            keeper.keep_exact("mlp_in", rows)
        elif late or spec.gate_up.needs_input:
            keeper.derive("mlp_in", source) if source else keeper.keep("mlp_in", rows)
        ctx.tiles = [(tile, {}) for tile in token_tiles(len(rows))]
        branch = None if residual is None else residual.reshape(len(rows), -1)
        y = (_postpone if late else _run)(spec, rows, branch, parameters, keeper, ctx.tiles)
        keeper.save(ctx)
        ctx.spec, ctx.late, ctx.shape, ctx.dtype = spec, late, x.shape, x.dtype
        return as_output(y, x.shape)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        keeper, needs = Keeper.load(ctx), (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:])
        dresidual, dy = dy if ctx.needs_input_grad[1] else None, dy.reshape(-1, dy.shape[-1]).to(ctx.dtype)
        dx = grads = None
        half = _down_late if ctx.late else _down
        for i, (tile, switches) in enumerate(ctx.tiles):
            # of a single tile the slot is freed as it is read, which it is once if not late
            once = len(ctx.tiles) == 1 and not ctx.late
            restore_x = keeper.restore if once else partial(keeper.restore_rows, rows=tile)
            part_dx, part = _backward_tile(ctx.spec, half, dy[tile], keeper.part(i), switches, needs, restore_x)
            dx = place(dx, part_dx, tile, len(dy))
            grads = part if i == 0 else [g if g is None else t.add_(g) for t, g in zip(grads, part, strict=True)]
            del part_dx, part
        return None if dx is None else dx.view(ctx.shape), dresidual, *[None] * 4, *grads


def _run(spec: MlpSpec, x: Tensor, residual: Tensor | None, parameters: tuple, keeper: Keeper, tiles: list) -> Tensor:
    """y [T, C] of x [T, C], residual included; keeps all slots but mlp_in. tiles: each with its switches."""
    if len(tiles) > 1:
        _calibrate(spec, x, parameters, keeper)
    overwrite = overwritable(residual, x.dtype)
    y = None
    for i, (tile, switches) in enumerate(tiles):
        around = None if residual is None else residual[tile]
        part = _forward_tile(spec, x[tile], parameters, keeper.part(i), switches, around, overwrite)
        y = residual.detach() if overwrite else place(y, part, tile, len(x))
    return y


def _postpone(
    spec: MlpSpec, x: Tensor, residual: Tensor | None, parameters: tuple, keeper: Keeper, tiles: list
) -> Tensor:
    """In place of _run's y one without memory; keeps what _down_late needs beside mlp_in, with the seeds of _run."""
    n_gate_up = len(spec.gate_up.parameters())
    for i, (_, switches) in enumerate(tiles):
        spec.gate_up.keep(parameters[:n_gate_up], keeper.part(i), switches, x.device)
        spec.down.keep(parameters[n_gate_up:], keeper.part(i), switches, x.device)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_full((), math.nan, dtype=dtype).expand(len(x), spec.down.width)


def _forward_tile(
    spec: MlpSpec, x: Tensor, parameters: tuple, keeper: Keeper, switches: dict,
    residual: Tensor | None = None, overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """y [T, C] of x [T, C], residual included; keeps all slots but mlp_in."""
    n_gate_up = len(spec.gate_up.parameters())
    y, low_rank = spec.gate_up.project(x, parameters[:n_gate_up], keeper, switches)
    fused_fwd, _ = FUSED[spec.activation]
    hidden = (fused_fwd if spec.can_fuse and use_triton(y) else _activate_fwd)(spec, y, low_rank, keeper)
    del y, low_rank
    if spec.down.needs_input:
        keeper.keep("hidden", hidden)
    return spec.down.forward(hidden, parameters[n_gate_up:], keeper, switches, residual, overwrite)


def _backward_tile(
    spec: MlpSpec, half: Callable, dy: Tensor, keeper: Keeper, switches: dict, needs: tuple[bool, ...],
    restore_x: Callable,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """dx [T, C] and the gradients of spec.parameters() from dy [T, C]; needs: of x and these; restore_x: of mlp_in.

    half: _down or _down_late.
    """
    n_gate_up = len(spec.gate_up.parameters())
    need_dx, *needs = needs
    dgate_up, low_rank, down_grads = half(spec, dy, keeper, switches, needs[n_gate_up:], restore_x)
    g, dB = spec.gate_up.backward_low_rank(dgate_up, low_rank, keeper)
    dx = spec.gate_up.backward_input(dgate_up, g, low_rank, keeper) if need_dx else None
    x = restore_x("mlp_in", dtype=dy.dtype)
    grads = spec.gate_up.backward_parameters(dgate_up, g, dB, x, keeper, needs[:n_gate_up])
    return dx, grads + down_grads


def _down(
    spec: MlpSpec, dy: Tensor, keeper: Keeper, switches: dict, needs: tuple[bool, ...], restore_x: Callable
) -> tuple[Tensor, LowRank | None, list[Tensor | None]]:
    """Gradients of gate and up side by side and the adapters there, and down's gradients; needs: which of these."""
    fused = spec.can_fuse and use_triton(dy)
    down = spec.down.kept_low_rank(keeper, switches, dy.dtype)
    # the fused kernel adds g A where it reads dhidden, but no dropout of it
    in_kernel = fused and down is not None and not spec.down.dropout
    g, dB = spec.down.backward_low_rank(dy, down, keeper)
    dhidden = spec.down.backward_input(dy, g, down, keeper, add_low_rank=not in_kernel)
    low_rank = spec.gate_up.kept_low_rank(keeper, switches, dy.dtype)
    if fused:
        _, fused_bwd = FUSED[spec.activation]
        dgate_up, hidden = fused_bwd(spec, dhidden, (g, down.A) if in_kernel else None, low_rank, keeper)
    else:
        dgate_up, hidden = _activate_bwd(spec, dhidden, low_rank, keeper)
    del dhidden, down
    return dgate_up, low_rank, spec.down.backward_parameters(dy, g, dB, hidden, keeper, needs)


def _down_late(
    spec: MlpSpec, dy: Tensor, keeper: Keeper, switches: dict, needs: tuple[bool, ...], restore_x: Callable
) -> tuple[Tensor, LowRank | None, list[Tensor | None]]:
    """_down of a tile that was postponed: gate and up are made, and their gradients take their place."""
    low_rank = spec.gate_up.kept_low_rank(keeper, switches, dy.dtype)
    y = spec.gate_up.project_kept(restore_x("mlp_in", dtype=dy.dtype), low_rank, keeper)
    inputs = [y[:, columns] for columns in spec.gate_up.columns]
    spec.gate_up.add(y[:, : spec.gate_up.width], low_rank, keeper)
    down = spec.down.kept_low_rank(keeper, switches, dy.dtype)
    g, _ = spec.down.backward_low_rank(dy, down, keeper)  # hidden A^T, for dB, is not there yet
    hidden = spec.down.backward_input(dy, g, down, keeper)
    spec.activation.bwd_(hidden, *inputs)
    spec.down.down(hidden, down, keeper)
    return y, low_rank, spec.down.backward_parameters(dy, g, None, hidden, keeper, needs)


def _calibrate(spec: MlpSpec, x: Tensor, parameters: tuple, keeper: Keeper) -> None:
    """Calibrate on all tiles before the first is packed, by a forward of its own that draws the same dropout."""
    observer = Observer(keeper, len(x))
    if not observer.due:
        return
    with replayed_rng(x.device, get_rng_state(x.device)):
        for tile in token_tiles(len(x)):
            observer.rows = tile
            _forward_tile(replace(spec, fused=False), x[tile], parameters, observer, {})
    observer.calibrate()


def _activate_fwd(spec: MlpSpec, y: Tensor, low_rank, keeper: Keeper) -> Tensor:
    """hidden [T, F] from the frozen paths y [T, 2F] or [T, F]; keeps the activation's inputs, and act."""
    names = spec.activation.slots
    if spec.compensate:
        for name, columns in zip(names, spec.gate_up.columns, strict=True):
            keeper.keep(name, y[:, columns])
    y = spec.gate_up.add(y, low_rank, keeper, in_place=not (spec.compensate and keeper.aliases(*names)))
    inputs = [y[:, columns] for columns in spec.gate_up.columns]
    if not spec.compensate:
        for name, x in zip(names, inputs, strict=True):
            keeper.keep(name, x)
    if spec.activation.gated and keeper.keeps("act"):
        keeper.keep("act", torch.nn.functional.silu(inputs[0]))
    return spec.activation.fwd(*inputs)


def _activate_bwd(spec: MlpSpec, dhidden: Tensor, low_rank, keeper: Keeper) -> tuple[Tensor, Tensor]:
    """Gradients of the activation's inputs side by side, and hidden [T, F], from the restored slots."""
    inputs = [keeper.restore(name) for name in spec.activation.slots]
    if spec.compensate:
        inputs = [spec.gate_up.add(t, low_rank, keeper, i, in_place=False) for i, t in enumerate(inputs)]
    dy, hidden = spec.activation.bwd(dhidden, *inputs)
    act, kept = keeper.restore("act"), keeper.restore("hidden")
    if act is not None:
        torch.mul(dhidden, act, out=dy[:, spec.gate_up.columns[1]])
    return dy, hidden if kept is None else kept
