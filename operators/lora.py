"""Linear layers with LoRA adapters: y = x W^T + b + scaling * dropout(x) A^T B^T (+ scaling * b_B).

A Projection is a view of one PEFT layer (or of a plain linear without an adapter); a ProjectionGroup is several that
share their input (q, k, v; gate, up). The frozen path x W^T + b and the low-rank x A^T are returned apart, because
HyC-LoRA quantizes the first and keeps the second exactly.

Gradients, with g = scaling * dy B [T, r] and x' = dropout(x):
    dB = scaling * dy^T (x' A^T)    dA = g^T x'    dx = dy W + dropout(g A)    db = sum dy    db_B = scaling * sum dy
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

PARAMETERS_PER_PROJECTION = 4


@contextmanager
def replayed_rng(device: torch.device, state: Tensor):
    """Run with the default generator of device put back to state, and restored afterwards."""
    generator = torch.cuda if device.type == "cuda" else torch
    now = get_rng_state(device)
    generator.set_rng_state(state)
    try:
        yield
    finally:
        generator.set_rng_state(now)


def get_rng_state(device: torch.device) -> Tensor:
    """State of the default generator that draws for tensors on device (a CPU byte tensor, no sync)."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class Projection:
    """One linear layer of a block as the block's Functions see it; weights are read from the module at each use.

    adapter: name of the active adapter or None; scaling: lora_alpha / r (/ sqrt(r) with rsLoRA); dropout: its
    probability. They are read from PEFT by refresh(), once a forward.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.base = getattr(module, "base_layer", module)
        self.refresh()

    def refresh(self) -> bool:
        """Follow PEFT's switches; False while it has the adapter disabled or merged, ValueError for several active."""
        active = [a for a in getattr(self.module, "active_adapters", ()) if a in self.module.lora_A]
        if len(active) > 1:
            raise ValueError(f"{self.name}: several active adapters, {', '.join(active)}; activate one")
        self.adapter = active[0] if active else None
        self.scaling, self.dropout = 0.0, 0.0
        if self.has_adapter:
            self.scaling = self.module.scaling[self.adapter]
            dropout = self.module.lora_dropout[self.adapter]
            self.dropout = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return not (getattr(self.module, "disable_adapters", False) or getattr(self.module, "merged", False))

    @property
    def has_adapter(self) -> bool:
        return self.adapter is not None

    def parameters(self) -> tuple[Tensor | None, ...]:
        """(lora_A, lora_B, lora_B bias, base bias): what may get a gradient; None where there is no such tensor."""
        if not self.has_adapter:
            return None, None, None, self.base.bias
        lora_A, lora_B = self.module.lora_A[self.adapter], self.module.lora_B[self.adapter]
        return lora_A.weight, lora_B.weight, lora_B.bias, self.base.bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in dtype; NF4 weights are dequantized on the way."""
        weight = self.base.weight
        if bnb is not None and isinstance(weight, bnb.nn.Params4bit):
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                raise RuntimeError(
                    f"{self.name}: bitsandbytes has repacked this weight for CPU inference; set "
                    "support_avx512bf16_for_cpu = False on the Linear4bit modules before the first evaluation"
                )
            # [N K / 2, 1] is the layout for which all bitsandbytes versions return [N, K] untransposed
            return bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state).to(dtype)
        return weight.to(dtype)

    def frozen(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, out]."""
        bias = self.base.bias
        return nn.functional.linear(x, self.weight(x.dtype), None if bias is None else bias.to(x.dtype))

    def down(self, x: Tensor, lora_A: Tensor) -> Tensor:
        """dropout(x) A^T, [T, r]; the mask is drawn in the adapter's dtype, as PEFT draws it."""
        dropped = nn.functional.dropout(x.to(lora_A.dtype), self.dropout).to(x.dtype) if self.dropout else x
        return dropped @ lora_A.to(x.dtype).t()

    def dropout_factors(self, x: Tensor) -> Tensor:
        """What dropout multiplies x by (0 or 1 / (1 - p)), in the adapter's dtype."""
        ones = torch.ones_like(x, dtype=self.parameters()[0].dtype)
        return nn.functional.dropout(ones, self.dropout)

    def up(self, frozen: Tensor, xa: Tensor | None, lora_B: Tensor | None, bias_B: Tensor | None) -> Tensor:
        """frozen + scaling * (xa B^T + b_B); frozen itself without an adapter."""
        if xa is None:
            return frozen
        y = torch.addmm(frozen, xa, lora_B.to(xa.dtype).t(), alpha=self.scaling)
        return y if bias_B is None else y.add_(bias_B.to(y.dtype), alpha=self.scaling)


class ProjectionGroup:
    """Projections that share one input x [T, in]; x A^T and the low-rank weights are kept exactly."""

    def __init__(self, projections: list[Projection]):
        self.projections = projections

    @property
    def needs_input(self) -> bool:
        """Whether backward needs x, which is for dA alone."""
        return any(p.has_adapter for p in self.projections)

    def parameters(self) -> tuple[Tensor | None, ...]:
        return tuple(t for p in self.projections for t in p.parameters())

    def compensate(self, index: int, frozen: Tensor, keeper) -> Tensor:
        """A restored frozen path with the exact LoRA part added back (paper section 4.2: inter-operator)."""
        p = self.projections[index]
        return p.up(frozen, *(keeper.exact(f"{p.name}_{part}") for part in ("xa", "B", "bias_B")))

    def forward(self, x: Tensor, parameters: tuple, keeper, rng: dict) -> list[Tensor]:
        """Frozen path of each projection; keeps x A^T, the low-rank weights and the RNG states of dropouts."""
        frozen = []
        for p, (lora_A, lora_B, bias_B, _) in zip(self.projections, split(parameters), strict=True):
            frozen.append(p.frozen(x))
            if p.dropout:
                rng[p.name] = get_rng_state(x.device)
            xa = p.down(x, lora_A) if p.has_adapter else None
            for part, tensor in (("xa", xa), ("A", lora_A), ("B", lora_B), ("bias_B", bias_B)):
                keeper.keep_exact(f"{p.name}_{part}", tensor)
        return frozen

    def backward_input(
        self, dys: list[Tensor], keeper, rng: dict, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx [T, in] (None if not needed) and g = scaling * dy B [T, r] of each projection."""
        dx, gs = None, []
        for p, dy in zip(self.projections, dys, strict=True):
            lora_A, lora_B = (keeper.exact(f"{p.name}_{part}") for part in ("A", "B"))
            gs.append((dy @ lora_B.to(dy.dtype)).mul_(p.scaling) if p.has_adapter else None)
            if not need_dx:
                continue
            weight = p.weight(dy.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            del weight
            if p.has_adapter and not p.dropout:
                dx.addmm_(gs[-1], lora_A.to(dy.dtype))
            elif p.has_adapter:
                dxa = gs[-1] @ lora_A.to(dy.dtype)
                dx.addcmul_(dxa, self._dropout_mask(p, dxa, rng))
        return dx, gs

    def backward_parameters(
        self, dys: list[Tensor], gs: list[Tensor | None], x: Tensor | None, keeper, rng: dict, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Gradients of parameters(), in order; x is the group's input as restored."""
        grads = []
        for p, dy, g, need in zip(self.projections, dys, gs, split(needs), strict=True):
            need_A, need_B, need_bias_B, need_bias = need
            total = dy.sum(dim=0, dtype=torch.float32) if need_bias or need_bias_B else None
            grad_A = grad_B = None
            if need_A:
                dropped = x * self._dropout_mask(p, x, rng) if p.dropout else x
                grad_A = (g.t() @ dropped).to(p.parameters()[0].dtype)
            if need_B:
                xa = keeper.exact(f"{p.name}_xa")
                grad_B = (dy.t() @ xa).mul_(p.scaling).to(p.parameters()[1].dtype)
            grads += [grad_A, grad_B]
            grads.append((total * p.scaling).to(p.parameters()[2].dtype) if need_bias_B else None)
            grads.append(total.to(p.base.bias.dtype) if need_bias else None)
        return grads

    @staticmethod
    def _dropout_mask(p: Projection, x: Tensor, rng: dict) -> Tensor:
        """The dropout's factors, drawn again from the generator state of the forward."""
        with replayed_rng(x.device, rng[p.name]):
            return p.dropout_factors(x).to(x.dtype)


def split(parameters: tuple) -> list[tuple]:
    """A flat tuple of Function arguments as one tuple a projection."""
    n = PARAMETERS_PER_PROJECTION
    return [tuple(parameters[i : i + n]) for i in range(0, len(parameters), n)]
