"""Notices when a module is no longer what it was: hooks, other forwards, other weights, other adapters.

Users, callbacks and trainers change a model while it trains. What models/trust.py finds of the layers holds as long as
nothing that it read has changed, which is looked at before each training forward.
"""

import logging
from itertools import repeat
from operator import attrgetter, getitem, is_
from types import FunctionType
from weakref import ref

from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hyclora.models import trust
from hyclora.models.blocks import AttentionBlock, Block, MlpBlock, NormBlock
from hyclora.models.encoder_layer import EncoderLayerBlock
from hyclora.models.families.family import Family
from hyclora.models.layers import CheckpointBlock, WholeLayer
from hyclora.models.sharding import gathers, is_sharded

AGAIN = "call remove_hyclora and apply it again"
logger = logging.getLogger("hyclora")

# of an attention
SETTINGS = ("config", "is_causal", "config._attn_implementation", "scaling")


class Watch:
    """What may be relied on in the layers of a patched decoder.

    A norm and the block that it feeds, or that it follows, half a layer, get the same `reason` when they may not run;
    so do both halves of an encoder's layer, and that. stock: each layer of
    the decoder is transformers' own, whatever runs in it; bounded: and each attention a block at work; own: and each
    norm, the last one too, and each MLP; whole: and each layer a WholeLayer at work, none added, moved or taken away,
    with weights that stay where they are.
    told: where reasons found later are added. numbers: what blocks read of modules, beside tensors; drops: whether
    attention drops. checkpoints: which list what is in their layers.
    """

    def __init__(
        self, family: Family, decoder: nn.Module, blocks: list[Block], checkpoints: list[CheckpointBlock],
        told: list[str],
    ):  # fmt: skip
        self.family, self.decoder, self.checkpoints, self.told = family, decoder, checkpoints, told
        self.layers = [block for block in blocks if isinstance(block, WholeLayer)]
        self.encoders = [layer for layer in self.layers if isinstance(layer, EncoderLayerBlock)]
        fed = [block for block in blocks if isinstance(block, (AttentionBlock, MlpBlock))]
        norms = [block for block in blocks if isinstance(block, NormBlock)]
        self.halves = list(zip(norms, fed, strict=False))
        self.last_norms = norms[len(fed) :]  # which feed the head
        self.look()

    def open(self) -> None:
        """Before anything else is asked: a copy has to look for itself."""
        if self._seen is None:
            self.look()

    def changed(self) -> bool:
        """Whether anything may be otherwise than at the last look; no loop over modules is in Python."""
        if self._seen is None:
            return True
        try:
            same = all(map(is_, map(getitem, self._owners, self._keys), self._owned))
            same = same and all(map(is_, map(ref, map(getitem, self._holders, self._names_of)), self._tensors))
        except (KeyError, TypeError):  # gone, or None
            return True
        return not (same and all(map(is_, map(type, self._modules), self._types)) and self._state() == self._seen)

    def __getstate__(self) -> dict:
        """A copy has nothing of what is looked at, which open() finds."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")} | {"_seen": None}

    def look(self) -> None:
        """Find all reasons anew and tell of new ones; ValueError if blocks may run nowhere in the layers."""
        around = {id(block): layer for layer in self.encoders for block in layer.blocks}
        for norm, block in self.halves:
            for p in block.projections:
                p.find_adapters()
            norm.reason = block.reason = self._why_not(norm, block, around.get(id(block)))
        for layer in self.encoders:
            reason = next((block.reason for block in layer.blocks if block.reason), None)
            for block in (layer, *layer.blocks):
                block.reason = reason
            layer.reason = reason or layer.why_not_norms()
        for norm in self.last_norms:
            norm.reason = trust.why_not_norm(self.family, norm.module, norm.name)
        for layer in self.layers:
            layer.together = self._fits_together(layer)
        for checkpoint in self.checkpoints:
            checkpoint.switches = None
        modules = list(self._list())
        blocks = [block for half in self.halves for block in half] + self.last_norms
        at_work = {id(block.module) for block in blocks if block.reason is None and block.alone}
        self.stock = not any(trust.why_not_layer(self.family, m, "") for m in modules)
        n_layers = self.decoder.config.num_hidden_layers  # the decoder runs as many
        self.whole = n_layers == len(modules) == len(self.layers) and self.stock
        self.whole = self.whole and not any(map(is_sharded, modules))
        self.whole = self.whole and modules == [layer.module for layer in self.layers if layer.together]
        known = self.stock and trust.makes_known_masks(self.decoder)
        attentions = [getattr(m, self.family.attention, None) for m in modules]
        at_work |= {id(m) for layer in self.encoders if layer.together for m in layer.module.modules()}
        self.bounded = known and all(id(m) in at_work for m in attentions)
        if self.family.sliding_window:  # masks are made by place
            self.bounded = self.bounded and all(m.layer_idx == i for i, m in enumerate(attentions))
        parts = [(m, name) for m in modules for name in self._names]
        parts += [(self.decoder, self.family.final_norm)] if self._final_norms() else []
        named = (owner.get_submodule(name) for owner, name in parts)
        self.own = self.bounded and all(id(trust.acting(m)) in at_work for m in named)
        self._remember(modules)
        reasons = self._reasons()
        if all(block.reason for _, block in self.halves):
            first = next((reason for reason in reasons if AGAIN in reason), reasons[0])
            self._seen = None  # whoever tries again is told again
            raise ValueError(f"{first}; so no layer of this model can be patched")
        # a part may go to and fro, as where layers are unfrozen in turn, and is told of once
        if new := [reason for reason in reasons if reason not in self.told]:
            self.told += new
            logger.warning(f"HyC-LoRA: {len(new)} parts of layers run stock code from now on. The first is {new[0]}")

    def is_hooked(self) -> bool:
        """Whether hooks of somebody may look at what passes in the layers, or at the last norm."""
        return any(self._hooks) and any(map(trust.look, self._hooks))

    def sees_arguments(self) -> bool:
        """Whether hooks of somebody get, and may change, what a layer or an attention is called with: masks, angles."""
        return any(ids.keys() - {i for i, hook in hooks.items() if gathers(hook)} for ids, hooks in self._with_kwargs)

    def _reasons(self) -> list[str]:
        blocks = [*self.encoders, *(block for _, block in self.halves if not block.part), *self.last_norms]
        return [block.reason for block in blocks if block.reason]

    def _list(self) -> nn.ModuleList:
        """The decoder's layers."""
        return attrgetter(self.family.layers)(self.decoder)

    def _final_norms(self) -> list[nn.Module]:
        """The decoder's last norm, if it has one, with what PEFT may have put around it."""
        return [getattr(self.decoder, self.family.final_norm)] if self.family.final_norm else []

    def _why_not(
        self, norm: NormBlock, block: AttentionBlock | MlpBlock, layer: EncoderLayerBlock | None
    ) -> str | None:  # fmt: skip
        if layer is not None and (path := layer.find_replaced()) is not None:
            return f"{layer.name}.{path} was replaced after apply_hyclora; {AGAIN}"
        for p in block.projections:
            own = p.owner._modules.get(p.name.rpartition(".")[2])
            if own is not p.module or getattr(p.module, "base_layer", p.module) is not p.base:
                return f"{p.where} was replaced after apply_hyclora; {AGAIN}"
        if isinstance(block, AttentionBlock):
            if block.settings != block.read_settings():
                return f"{block.name}: attention or its window were changed after apply_hyclora; {AGAIN}"
            if any(getattr(block.module, n) is not m for n, m in zip(self.family.head_norms, block.norms, strict=True)):
                return f"{block.name}: a norm of heads was replaced after apply_hyclora; {AGAIN}"
        half = "attention" if isinstance(block, AttentionBlock) else "mlp"
        return trust.why_not_half(self.family, half, norm.module, norm.name, block.half, block.where)

    @property
    def _names(self) -> tuple[str, str, str, str]:
        """What a layer's parts are called, in order."""
        return self.family.attention_norm, self.family.attention, self.family.mlp_norm, self.family.mlp

    def _parts(self, layer: nn.Module) -> list[nn.Module | None]:
        return [layer._modules.get(name) for name in self._names]

    def _fits_together(self, layer: WholeLayer) -> bool:
        """Whether a layer's blocks may be run one after the other without its own forward."""
        if trust.why_not_layer(self.family, layer.module, layer.name) is not None or not layer.alone:
            return False
        if isinstance(layer, EncoderLayerBlock):
            return layer.reason is None
        return (
            all(trust.acting(m) is b.module for m, b in zip(self._parts(layer.module), layer.blocks, strict=True))
            and all(b.reason is None and b.alone for b in layer.blocks)
        )  # fmt: skip

    def _remember(self, modules: list[nn.Module]) -> None:
        """List what changed() looks at, as it is now."""
        inside = [m for module in modules for m in module.modules()]
        inside += [norm for _, block in self.halves for norm in block.norms]
        inside += [m for norm in self._final_norms() for m in norm.modules()]
        self._modules = [m for m in inside if m._modules or m._parameters or not isinstance(m, trust.CONTAINERS)]
        self._types = list(map(type, self._modules))
        self._dicts = [m.__dict__ for m in self._modules]
        self._hooks = [m.__dict__[name] for m in self._modules for name in trust.HOOKS]
        holders = (self.decoder, self._list(), *inside)
        parameters = [(m._parameters, name) for m in holders for name in m._parameters]
        held = [place for place in parameters if getitem(*place) is not None]
        # not kept alive: whoever shards a model replaces them, to be rid of the whole ones
        self._holders, self._names_of = zip(*held, strict=True)
        self._tensors = [ref(getitem(*place)) for place in held]
        places = [(m._modules, name) for m in holders for name in m._modules]
        places += [place for place in parameters if getitem(*place) is None]
        places += [(d, "forward") for d in self._dicts if "forward" in d]
        # which some replace to be rid of hooks
        places += [(d, name) for d in self._dicts for name in trust.HOOKS[:2]]
        self._owners, self._keys = zip(*places, strict=True)
        self._owned = list(map(getitem, self._owners, self._keys))
        projections = [p for _, block in self.halves for p in block.projections]
        bases = [*(p.base for p in projections), *(norm for _, block in self.halves for norm in block.norms)]
        self._frozen = [m._parameters for m in bases if "weight" in m._parameters]
        self._adapted = [p.module for p in projections if p.module is not p.base]
        self._whole = [m for m in inside if trust.is_whole(m)]
        self._attention = [block.module for _, block in self.halves if isinstance(block, AttentionBlock)]
        windows = (self.family.sliding_window, "config.sliding_window") if self.family.sliding_window else ()
        self._settings = attrgetter(*SETTINGS, self.family.attention_dropout, *windows)
        self._eps_of = attrgetter(self.family.norm.eps)
        self._eps = [*(norm.module for norm, _ in self.halves), *(m for _, block in self.halves for m in block.norms)]
        called = [m.__dict__ for m in (*modules, *self._attention)]
        self._with_kwargs = [(d[f"{name}_with_kwargs"], d[name]) for d in called for name in trust.HOOKS[:2]]
        self._classes = list(set(self._types))
        forwards = {function for m in (self.decoder, *self._attention) for function in trust.own_code(m)}
        own = [f for g in forwards for f in (g, *trust.calls(g)) if f.__globals__ is g.__globals__]
        own += trust.mask_makers(self.decoder)
        named = [(f.__globals__, name) for f in own for name in f.__code__.co_names]
        self._called = [(g, name) for g, name in named if isinstance(g.get(name), FunctionType)]
        self._called += [(vars(functional), name) for names in trust.FUNCTIONS.values() for name in names]
        self._latest, self._counts = -1, []
        self._seen = self._state()
        attention = list(map(attrgetter("scaling", self.family.attention_dropout), self._attention))
        self.numbers = tuple(attention), tuple(map(self._eps_of, self._eps))
        self.drops = any(dropout > 0 for _, dropout in attention)

    def _state(self) -> tuple:
        """What is compared by value."""
        implementations = set(map(attrgetter("config._attn_implementation"), self._attention))
        return (
            (len(self._list()), self.decoder.config.num_hidden_layers),
            list(map(self._eps_of, self._eps)),
            self._count_hooks(),
            list(map(len, self._dicts)),
            list(map(attrgetter("forward", "__call__"), self._classes)),
            [functions.get(name) for functions, name in self._called],
            list(map(attrgetter("requires_grad"), map(getitem, self._frozen, repeat("weight")))),
            list(map(attrgetter("_active_adapter"), self._adapted)),
            list(map(attrgetter("_active_adapter", "_disable_adapters"), self._whole)),
            list(map(self._settings, self._attention)),
            tuple(getattr(self.decoder.config, "layer_types", None) or ()),
            [(ALL_ATTENTION_FUNCTIONS.get(n), ALL_MASK_ATTENTION_FUNCTIONS.get(n)) for n in implementations],
        )

    def _count_hooks(self) -> tuple:
        """Hooks on all modules, and on each: counted again only if any was added anywhere, or some are there."""
        if self._latest != RemovableHandle.next_id or any(self._counts):
            self._latest, self._counts = RemovableHandle.next_id, list(map(len, self._hooks))
        return list(map(len, trust.GLOBAL_HOOKS)), self._counts
