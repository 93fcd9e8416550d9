"""Gated MLP block: gate, up, SiLU-Hadamard, down, in one autograd Function."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.activation import silu_mul_bwd, silu_mul_fwd
from operators.dispatch import use_triton
from operators.fused_mlp import fused_mlp_bwd, fused_mlp_fwd
from operators.lora import ProjectionGroup
from operators.savers import Keeper


@dataclass
class MlpSpec:
    """The frozen description of one MLP block.

    gate_up and down: projection groups. compensate: keep the frozen paths of gate and up and add the LoRA part back
    (else the sums are kept). fused: LoRA add, activation, product and packing in one kernel each way.
    """

    gate_up: ProjectionGroup
    down: ProjectionGroup
    compensate: bool
    fused: bool

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.gate_up.parameters() + self.down.parameters()


class MlpFunction(torch.autograd.Function):
    """y = hidden W_d^T + LoRA, hidden = silu(gate) * up, gate/up = x W^T + LoRA.

    x [..., C], parameters as spec.parameters(). Slots: mlp_in, gate, up, act, hidden. Gradients: operators/lora.py for
    the projections, reference.silu_mul_bwd for the product; a kept act (silu(gate)) replaces its recomputation.
    """

    @staticmethod
    def forward(ctx, x, spec: MlpSpec, keeper: Keeper, source, *parameters):
        rows = x.reshape(-1, x.shape[-1])
        n_gate_up = len(spec.gate_up.parameters())
        rng: dict = {}
        if spec.gate_up.needs_input:
            keeper.derive("mlp_in", source) if source else keeper.keep("mlp_in", rows)
        y, low_rank = spec.gate_up.project(rows, parameters[:n_gate_up], keeper, rng)
        hidden = (fused_mlp_fwd if spec.fused and use_triton(y) else _activate_fwd)(spec, y, low_rank, keeper)
        del y, low_rank
        if spec.down.needs_input:
            keeper.keep("hidden", hidden)
        y = spec.down.forward(hidden, parameters[n_gate_up:], keeper, rng)
        keeper.save(ctx)
        ctx.spec, ctx.rng, ctx.shape = spec, rng, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        spec, rng, keeper = ctx.spec, ctx.rng, Keeper.load(ctx)
        n_gate_up = len(spec.gate_up.parameters())
        needs = ctx.needs_input_grad[4:]
        dy = dy.reshape(-1, dy.shape[-1])
        fused = spec.fused and use_triton(dy)
        down = spec.down.kept_low_rank(keeper, dy.dtype)
        # the fused kernel adds g A where it reads dhidden, dropout's factors apart
        in_kernel = fused and down is not None and not spec.down.dropout
        dhidden, g = spec.down.backward_input(dy, down, keeper, rng, add_low_rank=not in_kernel)
        low_rank = spec.gate_up.kept_low_rank(keeper, dy.dtype)
        if fused:
            dgate_up, hidden = fused_mlp_bwd(spec, dhidden, (g, down.A) if in_kernel else None, low_rank, keeper)
        else:
            dgate_up, hidden = _activate_bwd(spec, dhidden, low_rank, keeper)
        del dhidden, down
        down_grads = spec.down.backward_parameters(dy, g, hidden, keeper, rng, needs[n_gate_up:])
        del hidden
        dx, g = spec.gate_up.backward_input(dgate_up, low_rank, keeper, rng, ctx.needs_input_grad[0])
        x = keeper.restore("mlp_in", dy.dtype)
        grads = spec.gate_up.backward_parameters(dgate_up, g, x, keeper, rng, needs[:n_gate_up])
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, None, None, *grads, *down_grads


def _activate_fwd(spec: MlpSpec, y: Tensor, low_rank, keeper: Keeper) -> Tensor:
    """hidden [T, F] from the frozen paths y [T, 2F]; keeps gate, up and act."""
    names = ("gate", "up")
    if spec.compensate:
        for name, columns in zip(names, spec.gate_up.columns, strict=True):
            keeper.keep(name, y[:, columns])
    y = spec.gate_up.add(y, low_rank, keeper, in_place=not (spec.compensate and keeper.aliases(*names)))
    gate, up = (y[:, columns] for columns in spec.gate_up.columns)
    if not spec.compensate:
        keeper.keep("gate", gate)
        keeper.keep("up", up)
    if keeper.keeps("act"):
        keeper.keep("act", torch.nn.functional.silu(gate))
    return silu_mul_fwd(gate, up)


def _activate_bwd(spec: MlpSpec, dhidden: Tensor, low_rank, keeper: Keeper) -> tuple[Tensor, Tensor]:
    """[dgate, dup] [T, 2F] and hidden [T, F] from the restored slots."""
    gate, up = keeper.restore("gate"), keeper.restore("up")
    if spec.compensate:
        gate, up = (spec.gate_up.add(t, low_rank, keeper, i, in_place=False) for i, t in enumerate((gate, up)))
    dy, hidden = silu_mul_bwd(dhidden, gate, up)
    act, kept = keeper.restore("act"), keeper.restore("hidden")
    if act is not None:
        torch.mul(dhidden, act, out=dy[:, spec.gate_up.columns[1]])
    return dy, hidden if kept is None else kept
