"""Gated MLP block: gate, up, SiLU-Hadamard, down, in one autograd Function."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators.activation import silu_mul_bwd, silu_mul_fwd
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
        frozen = spec.gate_up.forward(rows, parameters[:n_gate_up], keeper, rng)
        hidden = (fused_mlp_fwd if spec.fused else _activate_fwd)(spec, frozen, keeper)
        del frozen
        if spec.down.needs_input:
            keeper.keep("hidden", hidden)
        (frozen,) = spec.down.forward(hidden, parameters[n_gate_up:], keeper, rng)
        y = spec.down.compensate(0, frozen, keeper)
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
        dhidden, gs = spec.down.backward_input([dy], keeper, rng, True)
        activate_bwd = fused_mlp_bwd if spec.fused else _activate_bwd
        dgate, dup, hidden = activate_bwd(spec, dhidden, keeper)
        del dhidden
        down_grads = spec.down.backward_parameters([dy], gs, hidden, keeper, rng, needs[n_gate_up:])
        del hidden
        dx, gs = spec.gate_up.backward_input([dgate, dup], keeper, rng, ctx.needs_input_grad[0])
        x = keeper.restore("mlp_in")
        grads = spec.gate_up.backward_parameters([dgate, dup], gs, x, keeper, rng, needs[:n_gate_up])
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, None, None, *grads, *down_grads


def _activate_fwd(spec: MlpSpec, frozen: list[Tensor], keeper: Keeper) -> Tensor:
    """hidden [T, F] from the frozen paths; keeps gate, up and act."""
    summed = []
    for i, name in enumerate(("gate", "up")):
        if spec.compensate:
            keeper.keep(name, frozen[i])
        summed.append(spec.gate_up.compensate(i, frozen[i], keeper))
        if not spec.compensate:
            keeper.keep(name, summed[i])
    if keeper.keeps("act"):
        keeper.keep("act", torch.nn.functional.silu(summed[0]))
    return silu_mul_fwd(*summed)


def _activate_bwd(spec: MlpSpec, dhidden: Tensor, keeper: Keeper) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup and hidden [T, F] from the restored slots."""
    gate, up = keeper.restore("gate"), keeper.restore("up")
    if spec.compensate:
        gate, up = spec.gate_up.compensate(0, gate, keeper), spec.gate_up.compensate(1, up, keeper)
    dgate, dup, hidden = silu_mul_bwd(dhidden, gate, up)
    act, kept = keeper.restore("act"), keeper.restore("hidden")
    return dgate, dup if act is None else dhidden * act, hidden if kept is None else kept
