"""Linear layers with LoRA adapters: y = x W^T + b + scaling * dropout(x) A^T B^T (+ scaling * b_B).

A Projection is a view of one PEFT layer (or of a plain linear without an adapter); a ProjectionGroup is several that
share their input (q, k, v; gate, up) and acts on their outputs side by side, y [T, N]. The frozen path x W^T + b and
the low-rank x A^T are returned apart, because HyC-LoRA quantizes the first and keeps the second exactly.

Gradients, with A scaled (operators/linear/low_rank.py), g = dy B [T, R] and x' = dropout(x):
    dB = dy^T (x' A^T)    dA = scaling * g^T x'    dx = dy W + dropout(g A)    db = sum dy    db_B = scaling * sum dy
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from hyclora.operators.linear.dropout import add_dropped, draw_seed, dropped
from hyclora.operators.linear.low_rank import LowRank, stack_adapters
from hyclora.operators.linear.low_rank_grad import in_one_pass, low_rank_grads
from hyclora.operators.linear.nf4 import dequantize_4bit, is_4bit, state_of
from hyclora.operators.linear.residual import add_residual
from hyclora.operators.linear.weight_pieces import MANY_TOKENS, Piece, make_pieces, weight_pieces

PARAMETERS_PER_PROJECTION = 4


class Projection:
    """One linear layer of a block as the block's Functions see it; W is read from the module at each use.

    owner has the layer under the last part of name, a path, and where tells a person.
    adapter: name of the active adapter or None; rank; scaling: lora_alpha / r (/ sqrt(r) with rsLoRA); dropout: its
    probability; drop: the module that PEFT has for it: these are read from PEFT by refresh(), once a forward.
    """

    def __init__(self, module: nn.Module, name: str, owner: nn.Module | None = None, where: str = ""):
        self.module, self.name, self.owner, self.where = module, name, owner, where or name
        self.base = getattr(module, "base_layer", module)
        self.width = self.base.out_features
        self._once: object | None = None
        self.find_adapters()
        self.refresh()

    def find_adapters(self) -> None:
        """Look up where PEFT has all adapters: a look at a module's child in each forward would cost more."""
        module = self.module
        self._adapters = None if module is self.base else (module.lora_A, module.lora_B, module.lora_dropout)

    def refresh(self, once: object | None = None) -> bool:
        """Follow PEFT's switches; False while it has the adapter disabled or merged, or what we do not compute.

        once: within what (Step.once); what was read within it already is not read again.
        """
        if once is not None and once == self._once:
            return self._active
        self._once = once
        module = self.module
        self.adapter, self.rank, self.scaling, self.dropout, self.drop = None, 0, 0.0, 0.0, None
        self._active = True
        self._read = None, 0.0, 0.0
        if self._adapters is None:
            self._parameters = None, None, None, module.bias
            return True
        lora_A, lora_B, dropouts = self._adapters
        active = [a for a in module.active_adapters if a in lora_A]
        weights = None, None, None
        if active:
            self.adapter = active[0]
            up = lora_B[self.adapter]
            weights = lora_A[self.adapter].weight, up.weight, up.bias
            self.rank, self.scaling = weights[0].shape[0], module.scaling[self.adapter]
            self.drop = dropouts[self.adapter]
            self.dropout = self.drop.p if isinstance(self.drop, nn.Dropout) and self.drop.training else 0.0
        self._parameters = *weights, self.base.bias
        self._read = self.adapter, self.scaling, self.dropout
        plain = len(active) <= 1 and isinstance(self.scaling, (int, float))
        self._active = plain and not (module.disable_adapters or module.merged_adapters)
        return self._active

    def switches(self) -> tuple:
        """What refresh() has read, and what tells W from another one and from itself once it has changed.

        Torch counts changes, but not PEFT's merging. Of a W that is no parameter, a part of the first FSDP's, nothing.
        """
        weight = self.base._parameters.get("weight")
        merged = self._adapters is not None and bool(self.module.merged_adapters)
        told = (id(weight), weight._version) if isinstance(weight, nn.Parameter) else ()
        return self._read, merged, *told

    @property
    def has_adapter(self) -> bool:
        return self.adapter is not None

    def parameters(self) -> tuple[Tensor | None, ...]:
        """(lora_A, lora_B, lora_B bias, base bias): what may get a gradient; None where there is no such tensor."""
        return self._parameters

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [N, in] in dtype: a new tensor for NF4 and for another dtype, else the weight itself."""
        weight = self.base.weight
        if not is_4bit(self.base):
            return weight.to(dtype)
        shape = self.width, self.base.in_features
        return dequantize_4bit(weight, torch.empty(shape, dtype=dtype, device=weight.device), state=state_of(self.base))

    def up(self, frozen: Tensor, xa: Tensor | None, lora_B: Tensor | None, bias_B: Tensor | None) -> Tensor:
        """frozen + scaling * (xa B^T + b_B); frozen itself without an adapter."""
        if xa is None:
            return frozen
        y = torch.addmm(frozen, xa, lora_B.to(xa.dtype).t(), alpha=self.scaling)
        return y if bias_B is None else y.add_(bias_B.to(y.dtype), alpha=self.scaling)


class ProjectionGroup:
    """Projections that share one input x [T, in]; their outputs stand side by side in y [T, N].

    x A^T is kept exactly, R elements a token (R as in LowRank); A, B and biases are saved by reference. W, where it is
    NF4, is there a piece at a time (weight_pieces.py). Dropout keeps a seed of 8 bytes, and for a time makes a tensor
    of x's size for each projection in turn: in forward, for dA and for dx.
    """

    def __init__(self, projections: list[Projection]):
        self.projections = projections
        self.width = sum(p.width for p in projections)
        self.columns = _slices([p.width for p in projections])
        name = "+".join(p.name for p in projections)
        self.xa_name, self.seed_name = f"{name}_xa", f"{name}_seed"
        self._pieces: dict[tuple[torch.dtype, bool, bool], list[Piece]] = {}

    @property
    def needs_input(self) -> bool:
        """Whether backward needs x, which is for dA alone."""
        return any(p.has_adapter for p in self.projections)

    @property
    def dropout(self) -> bool:
        return any(p.dropout for p in self.projections)

    @property
    def has_lora_bias(self) -> bool:
        """Whether an active adapter has a bias on lora_B, which the fused kernels do not add."""
        return any(p.parameters()[2] is not None for p in self.projections)

    @property
    def ranks(self) -> list[slice]:
        """Columns of x A^T that belong to each projection."""
        return _slices([p.rank for p in self.projections])

    def parameters(self) -> tuple[Tensor | None, ...]:
        return tuple(t for p in self.projections for t in p.parameters())

    def low_rank(self, parameters: tuple, dtype: torch.dtype) -> LowRank | None:
        """All adapters as one in dtype; None without any."""
        if not self.needs_input:
            return None
        adapters = [None if a is None else (a, b) for a, b, *_ in split(parameters)]
        scalings, widths = [p.scaling for p in self.projections], [p.width for p in self.projections]
        return stack_adapters(adapters, scalings, widths, dtype)

    def kept_low_rank(self, keeper, switches: dict, dtype: torch.dtype) -> LowRank | None:
        """low_rank of the parameters that forward kept; ValueError if what PEFT had set then is not what it has now."""
        if switches[self.xa_name] != self._switches():
            # as read by the last forward, which may have been that of another adapter, a reference without gradients
            for p in self.projections:
                p.refresh()
            if switches[self.xa_name] != self._switches():
                raise ValueError(
                    f"{self.projections[0].where}: adapter, scaling, dropout or base weight were changed between a "
                    "forward and its backward; run the backward first"
                )
        parts = ("A", "B", "bias_B", "bias")
        return self.low_rank(tuple(keeper.exact(f"{p.name}_{part}") for p in self.projections for part in parts), dtype)

    def weights(self, dtype: torch.dtype, n_tokens: int, below: Tensor | None = None, by_rows: bool = True):
        """(columns of y, columns of x, W [of y, of x]) in dtype, piece by piece, in the memory of the one before.

        n_tokens: rows of x; below: rows [R, in] to stand below those of the last projection, which has to be
        dequantized; by_rows: whether a W that is too large is cut between columns of y, or else of x.
        """
        kind = dtype, by_rows, n_tokens >= MANY_TOKENS
        if kind not in self._pieces:
            linears = [(p.base, own) for p, own in zip(self.projections, self.columns, strict=True)]
            self._pieces[kind] = weight_pieces(linears, *kind)
        return make_pieces(self._pieces[kind], dtype, below)

    def buffer(self, n_rows: int, low_rank: LowRank | None, like: Tensor) -> Tensor:
        """Room for y or dy [T, N], and beside it for x A^T or g [T, R] if the GEMM with W is to have A in it too.

        That is where W has to be dequantized, so that A can stand below it at no cost.
        """
        shared = low_rank is not None and not self.dropout and is_4bit(self.projections[-1].base)
        return like.new_empty(n_rows, self.width + (low_rank.A.shape[0] if shared else 0))

    def frozen(self, x: Tensor, y: Tensor | None = None, low_rank: LowRank | None = None) -> Tensor:
        """x W^T + b of all projections, [T, N]; into y = buffer(...), with x A^T beside it if that has room.

        Allocates y if it is not given, and a piece of W.
        """
        y = x.new_empty(x.shape[0], self.width) if y is None else y
        bias = self._bias(y)
        for columns, _, weight in self.weights(x.dtype, len(x), self._below(y, low_rank)):
            if bias is None:
                torch.mm(x, weight.t(), out=y[:, columns])
            else:
                y[:, columns] = nn.functional.linear(x, weight, bias[columns])
            del weight  # before the next one is made
        return y

    def _below(self, y: Tensor, low_rank: LowRank | None) -> Tensor | None:
        return low_rank.A if y.shape[1] > self.width else None

    def project(self, x: Tensor, parameters: tuple, keeper, switches: dict) -> tuple[Tensor, LowRank | None]:
        """x W^T + b [T, N] and the group's adapters; keeps what keep() and down() keep."""
        self.keep(parameters, keeper, switches, x.device)
        low_rank = self.low_rank(parameters, x.dtype)
        return self.project_kept(x, low_rank, keeper)[:, : self.width], low_rank

    def project_kept(self, x: Tensor, low_rank: LowRank | None, keeper) -> Tensor:
        """x W^T + b in a buffer(...), after keep(); keeps what down() keeps."""
        y = self.frozen(x, self.buffer(x.shape[0], low_rank, x), low_rank)
        self.down(x, low_rank, keeper, y[:, self.width :])
        return y

    def _switches(self) -> list[tuple]:
        """What PEFT has set of all adapters, and which W there is: forward and backward must find them alike."""
        return [p.switches() for p in self.projections]

    def _bias(self, y: Tensor) -> Tensor | None:
        """The base layers' biases in y's dtype, as wide as y; None without any."""
        if all(p.base.bias is None for p in self.projections):
            return None
        biases = [y.new_zeros(p.width) if p.base.bias is None else p.base.bias.to(y.dtype) for p in self.projections]
        return nn.functional.pad(torch.cat(biases), (0, y.shape[1] - self.width))

    def keep(self, parameters: tuple, keeper, switches: dict, device: torch.device) -> None:
        """Keeps the parameters and the dropouts' seed, which is drawn; switches gets what PEFT has set."""
        for p, tensors in zip(self.projections, split(parameters), strict=True):
            for part, tensor in zip(("A", "B", "bias_B"), tensors, strict=False):
                keeper.keep_exact(f"{p.name}_{part}", tensor)
        switches[self.xa_name] = self._switches()
        if self.dropout:
            keeper.keep_exact(self.seed_name, keeper.drawn(draw_seed, device))

    def down(self, x: Tensor, low_rank: LowRank | None, keeper, xa: Tensor | None = None) -> None:
        """Keeps dropout(x) A^T [T, R], after keep(); xa: that, if it is there."""
        if low_rank is None:
            return
        if xa is not None and xa.shape[1]:
            xa = xa.contiguous()
        elif not self.dropout:
            xa = x @ low_rank.A.t()
        else:
            xa = x.new_zeros(x.shape[0], low_rank.A.shape[0])
            seed = keeper.exact(self.seed_name)
            for i, (p, ranks) in enumerate(zip(self.projections, self.ranks, strict=True)):
                if p.has_adapter:
                    torch.mm(self._drop(x, i, seed), low_rank.A[ranks].t(), out=xa[:, ranks])
        keeper.keep_rows(self.xa_name, xa)

    def add(
        self, y: Tensor, low_rank: LowRank | None, keeper, index: int | None = None, in_place: bool = True
    ) -> Tensor:
        """y [T, N] (or the columns of one projection) + (x A^T) B^T + scaling * b_B (paper 4.2: inter-operator)."""
        if low_rank is None:
            return y
        B, xa = low_rank.B, keeper.exact(self.xa_name)
        if index is not None:
            B, xa = B[self.columns[index], self.ranks[index]], xa[:, self.ranks[index]]
        y = y.addmm_(xa, B.t()) if in_place else torch.addmm(y, xa, B.t())
        return self._add_bias_B(y, keeper, index)

    def _add_bias_B(self, y: Tensor, keeper, index: int | None = None) -> Tensor:
        for i, (p, columns) in enumerate(zip(self.projections, self.columns, strict=True)):
            bias = keeper.exact(f"{p.name}_bias_B")
            if bias is not None and index in (None, i):
                part = y if index is not None else y[:, columns]
                part.add_(bias.to(y.dtype), alpha=p.scaling)
        return y

    def forward(
        self, x: Tensor, parameters: tuple, keeper, switches: dict, residual: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:  # fmt: skip
        """x W^T + b + LoRA (+ residual) [T, N], for a group of which nothing is kept but x A^T.

        overwrite: the sum takes the residual's memory.
        """
        self.keep(parameters, keeper, switches, x.device)
        y = self.frozen(x)
        low_rank = self.low_rank(parameters, x.dtype)
        self.down(x, low_rank, keeper)
        if residual is None:
            return self.add(y, low_rank, keeper)
        xa, B = (None, None) if low_rank is None else (keeper.exact(self.xa_name), low_rank.B)
        return add_residual(self._add_bias_B(y, keeper), xa, B, residual, overwrite)

    def backward_low_rank(
        self, dy: Tensor, low_rank: LowRank | None, keeper
    ) -> tuple[Tensor | None, list[Tensor] | None]:
        """g = dy B [T, R], and dB of each projection in fp32 where one pass over dy gives both; None without adapters.

        That takes x A^T, so it must have been kept.
        dy [T, N], or a buffer(...) of which it is the beginning, and that g is put into.
        """
        if low_rank is None:
            return None, None
        narrow, beside = dy[:, : self.width], dy[:, self.width :]
        g = beside if beside.shape[1] else dy.new_empty(len(dy), low_rank.B.shape[1])
        ranks = [p.rank for p in self.projections]
        xa = keeper.exact(self.xa_name)
        if xa is None or not in_one_pass(dy, ranks):
            return torch.mm(narrow, low_rank.B, out=g), None
        widths = [p.width for p in self.projections]
        return g, low_rank_grads(narrow, xa, low_rank.B, widths, ranks, g)

    def backward_input(
        self, dy: Tensor, g: Tensor | None, low_rank: LowRank | None, keeper, add_low_rank: bool = True
    ) -> Tensor:
        """dx [T, in], without g A if not add_low_rank; dy and g as of backward_low_rank.

        Allocates dx and a piece of W.
        """
        beside = dy[:, self.width :]
        dx = dy.new_empty(len(dy), self.projections[0].base.in_features)
        for rows, columns, weight in self.weights(dy.dtype, len(dy), self._below(dy, low_rank), False):
            part, into = dy[:, rows], dx[:, columns]
            torch.mm(part, weight, out=into) if rows.start == 0 else into.addmm_(part, weight)
            del weight
        if g is None or beside.shape[1] or not add_low_rank:
            return dx
        if not self.dropout:
            return dx.addmm_(g, low_rank.A)
        seed = keeper.exact(self.seed_name)
        for i, (p, ranks) in enumerate(zip(self.projections, self.ranks, strict=True)):
            if p.dropout:
                add_dropped(dx, g[:, ranks] @ low_rank.A[ranks], seed, i, p.dropout)
            elif p.has_adapter:
                dx.addmm_(g[:, ranks], low_rank.A[ranks])
        return dx

    def backward_parameters(
        self, dy: Tensor, g: Tensor | None, dB: list[Tensor] | None, x: Tensor | None, keeper, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Gradients of parameters(), in order; dy, g, dB as of backward_low_rank; x is the group's input as restored.

        Those of half precision are in fp32, to be added up over tiles of tokens; autograd rounds them.
        """
        dy, needs = dy[:, : self.width], split(needs)
        grads: list[Tensor | None] = [None] * (len(needs) * PARAMETERS_PER_PROJECTION)
        xa, seed = keeper.exact(self.xa_name), keeper.exact(self.seed_name)
        grad_A = _mm32(g.t(), x) if any(need[0] for need in needs) and not self.dropout else None
        for i, (p, columns, ranks) in enumerate(zip(self.projections, self.columns, self.ranks, strict=True)):
            first = i * PARAMETERS_PER_PROJECTION
            need_A, need_B, need_bias_B, need_bias = needs[i]
            if need_A:
                dA = _mm32(g[:, ranks].t(), self._drop(x, i, seed)) if self.dropout else grad_A[ranks]
                grads[first] = dA if p.scaling == 1 else dA * p.scaling
            if need_B:
                # by itself: a part of one product for all would be strided, which makes adding it to .grad slow
                grads[first + 1] = _mm32(dy[:, columns].t(), xa[:, ranks]) if dB is None else dB[i]
            if need_bias or need_bias_B:
                total = dy[:, columns].sum(dim=0, dtype=torch.float32)
                grads[first + 2] = total * p.scaling if need_bias_B else None
                grads[first + 3] = total if need_bias else None
        return grads

    def _drop(self, x: Tensor, i: int, seed: Tensor) -> Tensor:
        """dropout(x) of projection i."""
        return dropped(x, seed, i, self.projections[i].dropout) if self.projections[i].dropout else x


def split(parameters: tuple) -> list[tuple]:
    """A flat tuple of Function arguments as one tuple a projection."""
    n = PARAMETERS_PER_PROJECTION
    return [tuple(parameters[i : i + n]) for i in range(0, len(parameters), n)]


def _slices(widths: list[int]) -> list[slice]:
    """Neighbouring columns of the given widths."""
    stops = list(accumulate(widths))
    return [slice(stop - width, stop) for width, stop in zip(widths, stops, strict=True)]


def _mm32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 from half-precision factors: gradients of fp32 adapters are not rounded to bf16 on the way."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype.itemsize == 2 else a @ b
