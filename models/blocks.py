"""The three blocks inside a decoder layer: what is bound to a norm, an attention and an MLP module.

A block owns the training forward of one module. It is bound to that instance alone (binding.py); evaluation,
generation, disabled or merged adapters run the stock forward.
"""

import logging
import sys
from contextlib import nullcontext
from operator import attrgetter

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hyclora.models.binding import BoundForward, bind, unbind
from hyclora.models.families.family import Family
from hyclora.operators import reference
from hyclora.operators.attention import flash4
from hyclora.operators.attention.attention import CORES, AttentionFunction, AttentionSpec
from hyclora.operators.attention.flash import takes_varlen, tells_runs
from hyclora.operators.attention.fused_qkv import fits
from hyclora.operators.attention.rope import rope
from hyclora.operators.layer_norm import LayerNormFunction
from hyclora.operators.linear.dropout import same_dropout
from hyclora.operators.linear.lora import Projection, ProjectionGroup
from hyclora.operators.mlp import fused_mlp
from hyclora.operators.mlp.mlp import MlpFunction, MlpSpec
from hyclora.operators.norm import RMSNormFunction
from hyclora.operators.savers import Derived, Keeper, Saver, Source, Step
from hyclora.operators.store import Store
from hyclora.operators.token_tiles import place, token_tiles

logger = logging.getLogger("hyclora")
SOURCE = "_hyclora_source"


class Block:
    """What all blocks share: savers, the model's Step and Store (None: slots stay put), the binding, when to run."""

    store: Store | None = None
    span = 1
    bound: BoundForward | None = None
    part = False  # of another block, which is bound and runs it
    norms: tuple[nn.Module, ...] = ()  # whose weights it reads
    groups: tuple[ProjectionGroup, ...] = ()
    drops: tuple[nn.Dropout, ...] = ()  # of the model's own, whose masks are made of seeds too
    fed_by: nn.Module | None = None  # the norm that its input comes from
    reason: str | None = None  # why it may not run (models/watch.py)

    def __init__(self, module: nn.Module, name: str, savers: dict[str, Saver], step: Step):
        self.module, self.name, self.savers, self.step = module, name, savers, step
        self.projections: list[Projection] = []
        self.told = False
        derived = [saver for saver in savers.values() if isinstance(saver, Derived)]
        self.derives, self.must_derive = bool(derived), any(saver.own is None for saver in derived)

    def bind(self) -> None:
        """Put this block in front of the module's forward."""
        if not self.part:
            self.bound = bind(self.module, self)

    def unbind(self) -> None:
        """Give the module its own forward back."""
        if self.bound is not None:
            unbind(self.bound)

    @property
    def alone(self) -> bool:
        """Whether nobody else has replaced the module's forward, before or since."""
        bound = self.bound
        ours = bound is not None and bound.block is self and bound.former is None
        return ours and self.module.__dict__.get("forward") is bound

    def forward(self, *args, **kwargs):
        if not self.applies(*args, **kwargs):
            with self.stock_dropout():
                return self.run_stock(*args, **kwargs)
        device_type = (args[0] if args else kwargs["hidden_states"]).device.type
        dtype = autocast_dtype(device_type)
        if dtype is None:
            return self.run(None, *args, **kwargs)
        # what torch.autocast(enabled=False) does, without making one: this runs four times a layer
        torch.set_autocast_enabled(device_type, False)
        try:
            return self.run(dtype, *args, **kwargs)
        finally:
            torch.set_autocast_enabled(device_type, True)

    def run_stock(self, *args, **kwargs):
        return self.bound.run_stock(*args, **kwargs)

    def stock_dropout(self):
        """Stock code that runs in training, as it does first under checkpointing, drops what run() will."""
        trains = self.groups and self.module.training and self.reason is None
        ours = trains and all([p.refresh() for p in self.projections])
        if ours and self.step.running is not None and not self.step.trains:
            self.check_dropout()
        return same_dropout(*self.groups, modules=self.drops) if ours else nullcontext()

    def check_dropout(self) -> None:
        """ValueError if checkpointing runs stock code first that cannot drop what this block will."""

    def applies(self, *args, **kwargs) -> bool:
        """Only training forwards with grad enabled and active, unmerged adapters are ours."""
        if self.reason is not None or not (self.module.training and self.step.trains):
            return False
        return all([p.refresh(self.step.once) for p in self.projections])

    @property
    def active_store(self) -> Store | None:
        return self.store if self.store is not None and self.store.active else None

    def keeper(self) -> Keeper:
        return Keeper(self.savers, self.step, self.active_store, self.span)

    def input_source(self, x: torch.Tensor) -> Source | None:
        """Where the norm before keeps x_hat, if this block derives its input from it."""
        source, version = getattr(x, SOURCE, (None, None)) if self.derives else (None, None)
        return source if version == x._version else None

    def can_derive(self, x: torch.Tensor) -> bool:
        """Whether x is the norm's output as it came, or is kept by itself; a hook or a loop may give another tensor."""
        if not self.must_derive:
            return True
        # to write to x.data is not counted as a version
        between = self.fed_by is not None and (self.fed_by._forward_hooks or self.module._forward_pre_hooks)
        if getattr(x, SOURCE, (None, None))[1] == x._version and not between:
            return True
        if not self.told:
            self.told = True
            logger.warning(
                f"HyC-LoRA: {self.name} runs stock code, as its input is not the output of the norm before it. To have "
                'it packed keep the input by itself: slot_savers={"attn_in": "quant4", "mlp_in": "quant4"}'
            )
        return False


def is_learned(position_embeddings, attention_mask) -> bool:
    """Whether angles or a mask want a gradient, which blocks do not give them."""
    given = (*(position_embeddings or ()), attention_mask)
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in given)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in, None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class NormBlock(Block):
    """RMSNorm before what it feeds; its output carries the handle from which the next block derives its input.

    Its projections are those of the block that it feeds, so that both run stock code together. Keeps what
    RMSNormFunction does; a slot that is derived from it costs nothing more.
    """

    def __init__(self, module, name, savers, step, fused: bool):
        super().__init__(module, name, savers, step)
        self.fused, self.norms = fused, (module,)

    def run(self, dtype, hidden_states, residual: bool = False):
        """The norm's output; with its input beside it if asked for, as the residual branch."""
        keeper, norm = self.keeper(), self.module
        y = RMSNormFunction.apply(hidden_states, norm.weight, norm.variance_epsilon, keeper, self.fused, residual)
        x = y[0] if residual else y
        setattr(x, SOURCE, (keeper.source("norm_in", norm.weight), x._version))
        return y


class PostNormBlock(NormBlock):
    """LayerNorm after the sum of what a block gives, dropped, and the residual; its output carries the handle too.

    drop: the nn.Dropout before the sum. Keeps what LayerNormFunction does.
    """

    part = True

    def __init__(self, module, name, savers, step, fused: bool, drop: nn.Dropout):
        super().__init__(module, name, savers, step, fused)
        self.drops = (drop,)

    def run(self, dtype, hidden_states, residual):
        """LayerNorm(residual + dropout(hidden_states)), in fp32 under autocast, as torch has it there."""
        keeper, norm, (drop,) = self.keeper(), self.module, self.drops
        x = LayerNormFunction.apply(
            hidden_states, residual, norm.weight, norm.bias, norm.eps, drop.p if drop.training else 0.0, keeper,
            self.fused, None if dtype is None else torch.float32,
        )  # fmt: skip
        setattr(x, SOURCE, (keeper.source("norm_in", norm.weight, norm.bias), x._version))
        return x


class AttentionBlock(Block):
    """LlamaAttention's signature on AttentionFunction, which says what is kept; ValueError for what it cannot do.

    half: the module that has all of it, and where it is called; module: the one with its numbers, often the same.
    """

    def __init__(self, module, name, savers, step, family: Family, attention: str, compensate: bool, fused: bool):
        super().__init__(module.get_submodule(family.core), name, savers, step)
        self.half, self.where, self.part = module, name, family.post_norm
        module = self.module
        qkv = ProjectionGroup([projection(self.half, name, n) for n in family.qkv])
        out = ProjectionGroup([projection(self.half, name, family.out)])
        self.groups, self.projections = (qkv, out), [*qkv.projections, *out.projections]
        self.dropout = attrgetter(family.attention_dropout)
        self.window_of, self.sparse = family.sliding_window, attention == "eager"
        self.settings = implementation, window = self.read_settings()
        # what others give where nothing is seen, and its gradients, differs
        eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        as_usual = getattr(module.config, "is_causal", family.causal) is family.causal
        self.own_flash = attention == "flash" and implementation in ("sdpa", "eager") and as_usual
        core = CORES[attention](module, interface, window, family.attention_dropout)
        self.norms = tuple(getattr(module, norm) for norm in family.head_norms)
        head_dim = getattr(module, family.head_dim)
        fused = fused and fits(head_dim, savers, bool(self.norms), rotary=family.causal)
        norms = dict(zip("qk", self.norms, strict=False))
        self.spec = AttentionSpec(qkv, out, core, compensate, fused, head_dim, norms)

    def read_settings(self) -> tuple[str, int | None]:
        """Which attention is asked for, and how many keys a query sees."""
        window = attrgetter(self.window_of)(self.module) if self.window_of else None
        return self.module.config._attn_implementation, window

    def check_dropout(self) -> None:
        if self.sparse and self.dropout(self.module) > 0:
            raise ValueError(
                f"{self.name}: stock attention cannot drop what attention=eager does, which checkpointing with "
                "use_reentrant=True would run it for; use attention=flash, or layers=input without checkpointing"
            )

    def takes_starts(self, dtype: torch.dtype) -> bool:
        """Whether a GPU can read by itself where runs of such q, k, v begin; a CPU reads what is on it anyhow."""
        weight = self.projections[0].base.weight
        probe = torch.empty(0, self.spec.head_dim, dtype=dtype, device=weight.device)
        return not weight.is_cuda or takes_varlen(probe, self.dropout(self.module))

    def kernel(self) -> str | None:
        """Whose attention kernels run long rows in half precision, None for torch's."""
        device = self.projections[0].base.weight.device
        return flash4.told(device, self.spec.head_dim) if self.own_flash else None

    def takes_bounds(self) -> bool:
        """Whether operators/attention/flash.py can run here, so that bounds may stand in for HF's mask."""
        return self.own_flash and self.module.training

    def applies(
        self, hidden_states=None, position_embeddings=None, attention_mask=None, cache=None, past_key_values=None,
        **kwargs,
    ):  # fmt: skip
        """Without a cache, whose name was another before transformers 5.24."""
        cached = cache is not None or past_key_values is not None
        ours = not cached and not self.step.is_stock_attention(position_embeddings) and super().applies()
        ours = ours and not is_learned(position_embeddings, attention_mask)
        ours = ours and self.step.rotates(position_embeddings)
        return ours and (hidden_states is None or self.can_derive(hidden_states))

    def run(
        self, dtype, hidden_states, position_embeddings=None, attention_mask=None, cache=None, past_key_values=None,
        residual=None, overwrite=False, **kwargs,
    ):  # fmt: skip
        """The attention's output, the residual branch added if given (overwrite: in its memory); and None."""
        source = self.input_source(hidden_states)
        cos, sin = position_embeddings or (None, None)
        y = AttentionFunction.apply(
            hidden_states if dtype is None else hidden_states.to(dtype), residual, overwrite,
            cos, sin, attention_mask, self.spec, kwargs, self.keeper(), source, *self.spec.parameters(),
        )  # fmt: skip
        return y, None

    def run_stock(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        if not tells_runs(attention_mask):
            return super().run_stock(hidden_states, position_embeddings, attention_mask, **kwargs)
        # checkpointing runs a layer first without grad; stock attention could not read the bounds
        heads = [p.module(hidden_states).unflatten(-1, (-1, self.spec.head_dim)) for p in self.spec.qkv.projections]
        q, k, v = heads
        if self.norms:
            q, k = (norm(x) for norm, x in zip(self.norms, (q, k), strict=True))
        if position_embeddings is not None:
            # the kernel is for blocks, whose backward rotates by itself; here autograd goes through
            rotate = reference.rope if torch.is_grad_enabled() else rope
            q, k = (rotate(x, *position_embeddings).to(v.dtype) for x in (q, k))
        o = self.spec.core.run(q, k, v, attention_mask, kwargs)
        return self.spec.out.projections[0].module(o.flatten(2)), None


class MlpBlock(Block):
    """LlamaMLP's signature on MlpFunction, which says what is kept. half, where: as of AttentionBlock.

    An MLP that is not a module of its own is called mlp.
    """

    def __init__(self, module, name, savers, step, family: Family, compensate: bool, fused: bool):
        super().__init__(module, name if family.mlp else f"{name}.mlp", savers, step)
        self.half, self.where, self.part = module, name, family.post_norm
        gate_up = ProjectionGroup([projection(module, name, n) for n in family.gate_up])
        down = ProjectionGroup([projection(module, name, family.down)])
        self.groups, self.projections = (gate_up, down), [*gate_up.projections, *down.projections]
        fused = fused and fused_mlp.fits(savers, family.activation)
        self.spec = MlpSpec(gate_up, down, compensate, fused, family.activation)

    def applies(self, x=None, **kwargs) -> bool:
        return super().applies() and (x is None or self.can_derive(x))

    def run(self, dtype, hidden_states, residual=None, late=False):
        """The MLP's output, added to the residual branch if given: a layer's own tensor, of nobody else.

        late: nobody reads it, so it is not computed.
        """
        source = self.input_source(hidden_states)
        x = hidden_states if dtype is None else hidden_states.to(dtype)
        return MlpFunction.apply(x, residual, self.spec, self.keeper(), source, late, *self.spec.parameters())

    def run_stock(self, x):
        rows = x.reshape(-1, x.shape[-1])
        tiles = token_tiles(len(rows))
        if len(tiles) == 1 or self.step.trains or not self.module.training:
            return super().run_stock(x)
        # checkpointing runs a layer first without grad: in the tiles, and so with the dropout, of the run that follows
        y = None
        for tile in tiles:
            y = place(y, super().run_stock(rows[tile]), tile, len(rows))
        return y.view(*x.shape[:-1], -1)


def projection(parent: nn.Module, parent_name: str, path: str) -> Projection:
    """The Projection of a linear layer in a module."""
    owner = parent.get_submodule(path.rpartition(".")[0])
    return Projection(parent.get_submodule(path), path, owner, f"{parent_name}.{path}")
