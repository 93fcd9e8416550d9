"""A decoder layer as a whole: how its blocks are put together, and how gradient checkpointing keeps its input."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hyclora.models.binding import BoundForward
from hyclora.models.blocks import AttentionBlock, Block, MlpBlock, NormBlock
from hyclora.models.sharding import is_sharded
from hyclora.models.switches import Switches
from hyclora.models.trust import is_watched
from hyclora.operators.checkpoint import CheckpointFunction
from hyclora.operators.savers import Exact, InputKeeper, Saver, Step
from hyclora.operators.savers.base import taken_off
from hyclora.operators.store import UNITS_A_LAYER

# on the output of a layer that nobody else looks at: the next layer may overwrite it
OURS = "_hyclora_ours"
# in releases before 5.24, where it is not the layer's forward that gradient checkpointing runs again
CALL_IS_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)


class WholeLayer(Block):
    """The block of a layer as a whole.

    graphs: a LayerGraphs that may replay the layer, and all others with it. together: whether the layer is as it came,
    so that its blocks may be run without its own forward (models/watch.py). checkpoint: what keeps its input alone
    where it is to.
    """

    graphs = None
    together = False
    checkpoint: "CheckpointBlock | None" = None

    @property
    def checkpointed(self) -> bool:
        """Whether Hugging Face's gradient checkpointing is on for it."""
        return getattr(self.module, "gradient_checkpointing", False)

    @property
    def keeps_input(self) -> bool:
        """Whether it keeps its input alone, by our settings or by gradient checkpointing."""
        return self.checkpointed or self.checkpoint is not None and self.checkpoint.own

    @property
    def can_be_recorded(self) -> bool:
        """Whether a graph may do all that the layer does: not what somebody has asked of gradient checkpointing."""
        return not self.checkpointed or self.checkpoint is not None and self.checkpoint.usual

    def forward(self, hidden_states, *args, **kwargs):
        asked = CALL_IS_CHECKPOINTED and self.checkpointed  # around the checkpoint that this runs in
        output = None if asked else self.replay(hidden_states, *args, **kwargs)
        return self.run_layer(hidden_states, *args, **kwargs) if output is None else output

    def replay(self, hidden_states, *args, **kwargs):
        """What this layer returns if a graph of all layers does their work; None if it has to run by itself."""
        return None if self.graphs is None else self.graphs.replay(self, hidden_states, args, kwargs)

    def run_layer(self, hidden_states, *args, **kwargs):
        """This layer by itself, to be run again in backward if it keeps its input alone."""
        if self.checkpoint is None or not self.checkpoint.applies(*args, **kwargs):
            return self.run_once(hidden_states, *args, **kwargs)
        given = _given(args, kwargs)
        return self.checkpoint.keep_input(lambda x: self.run_once(x, *args, **kwargs), hidden_states, given, whole=True)

    def run_once(self, hidden_states, *args, **kwargs):
        """This layer by itself."""
        return super().forward(hidden_states, *args, **kwargs)

    def dropout(self) -> tuple[float, ...]:
        """Probabilities of the model's own dropout in it."""
        return tuple(drop.p if drop.training else 0.0 for drop in self.drops)


class LayerBlock(WholeLayer):
    """A decoder layer's forward, whose residual branches go through the blocks at their sides.

    A branch leaves from the norm, whose backward adds its gradient on the way, and is added where the attention or
    the MLP ends: in its own memory, so that all layers have one residual stream. Where the layer is run again, its
    output and so the MLP's are not read, and the MLP is late (mlp.py). first: of the decoder's layers.
    """

    def __init__(
        self, module: nn.Module, name: str, step: Step, blocks: tuple[NormBlock, AttentionBlock, NormBlock, MlpBlock],
        first: bool,
    ):  # fmt: skip
        super().__init__(module, name, {}, step)
        self.blocks, self.first = blocks, first

    def run_once(self, hidden_states, *args, **kwargs):
        """This layer by itself. Autocast stays on: each block looks at it."""
        run = self.run if self.applies(*args, **kwargs) else self.run_stock
        return run(hidden_states, *args, **kwargs)

    def applies(self, *args, cache=None, past_key_values=None, **kwargs) -> bool:
        """Nobody looks between the blocks, and all four are at work."""
        given = {name: kwargs.get(name) for name in ("position_embeddings", "attention_mask")}
        return (
            self.together
            and not args
            # which torch does, unless the layer is all that runs twice
            and (self.step.whole is self.module or not self.checkpointed)
            and not any(is_watched(block.module) for block in self.blocks)
            and all(block.applies(cache=cache, past_key_values=past_key_values, **given) for block in self.blocks)
        )

    def run(self, hidden_states, **kwargs):
        """Hidden states [B, S, C] through norm, attention, norm, MLP, which add the residual branches themselves."""
        *_, mlp_norm, mlp = (block.module for block in self.blocks)
        # hooks may keep what goes in and comes out, or have autograd start from it
        watched = is_watched(self.module) or is_sharded(self.module)
        again = self.step.whole is self.module and not self.step.passing
        ours = self.step.private and getattr(hidden_states, OURS, False) or self.first and self.step.embeds
        ours = (again or ours) and not self.step.holds_input
        late = again and not watched
        hidden_states = self._attend(hidden_states, overwrite=ours and not watched, **kwargs)
        x, residual = mlp_norm(hidden_states, residual=True)
        hidden_states = mlp(x, residual=residual, late=late)
        if not watched:
            setattr(hidden_states, OURS, True)
        return hidden_states

    def _attend(self, hidden_states, **kwargs):
        """Norm and attention, whose input is gone before the other norm has an output."""
        norm, attention = (block.module for block in self.blocks[:2])
        x, residual = norm(hidden_states, residual=True)
        return attention(hidden_states=x, residual=residual, **kwargs)[0]


# without a meaning for ours; the last, of torch 2.14 on, is of what a context_fn has it keep
OPTIONS = {"use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "respect_saved_tensors_hooks"}


class CheckpointBlock(Block):
    """Keeps a decoder layer's input: in place of its slots where config.layers says so, and for gradient checkpointing.

    There it takes the place of torch's where it runs the layer as a whole, without hooks, which is more exact (mlp.py)
    and can be recorded, or keeps the input better: with a store, or if layer_in is not exact. Else torch's runs inside.
    HF calls it as it calls torch's, while gradient checkpointing is on; a trainer may switch that at any time, so
    bind() is called before every training forward. Keeps what CheckpointFunction does.
    own: whether the layer keeps its input without HF's checkpointing too; usual: whether that is nothing but keeping
    inputs, so that a graph of all layers may do it as layers do that keep their own; leads: whether the next one keeps
    its own as the difference to this one; layer: its block, if it has one. switches: what backward has to find as it
    was; a Watch drops it where modules are others.
    """

    span = UNITS_A_LAYER
    bound = None
    usual = False
    layer: WholeLayer | None = None
    switches: Switches | None = None

    def __init__(
        self, module: nn.Module, name: str, savers: dict[str, Saver], step: Step, own: bool = False, leads: bool = False
    ):  # fmt: skip
        super().__init__(module, name, savers, step)
        self.own, self.leads = own, leads

    @property
    def used(self) -> bool:
        """Whether it keeps anything."""
        return self.own or self.better and self.bound is not None

    @property
    def hides_from_hooks(self) -> bool:
        """Whether hooks run inside of a layer whose input is kept by ours whatever they do."""
        checkpointed = getattr(self.module, "gradient_checkpointing", False)
        return (self.better if checkpointed else self.own) and self._is_watched()

    def keeper(self) -> InputKeeper:
        return InputKeeper(self.savers, self.step, self.active_store, self.span, self.leads)

    def applies(self, *args, cache=None, past_key_values=None, **kwargs) -> bool:
        """A training forward that is to be run again and that HF, which does not see a recording, does not checkpoint.

        It must add to no cache, and give gradients to the hidden states and to parameters alone.
        """
        checkpointed = getattr(self.module, "gradient_checkpointing", False)
        wanted = self.step.recording if checkpointed else self.own
        trains = self.module.training and torch.is_grad_enabled() and cache is None and past_key_values is None
        return trains and wanted and not _want_gradients(args, kwargs)

    def keep_input(self, run, hidden_states, given: list[torch.Tensor], whole: bool):
        """run(hidden_states), of which nothing is kept but that; whole: it is the layer, and no more.

        given: what else run reads, as masks, by reference. ValueError if backward would run what is set, or read what
        was given, otherwise by then.
        """
        switches, whole, before = self._list_switches(), self.module if whole else None, None
        versions = [t._version for t in given]

        def run_as_set(x):
            nonlocal before
            if not self.step.passing:
                self._check_unchanged(switches.read() == before, versions == [t._version for t in given])
                return run(x)
            y = run(x)
            before = switches.read()  # a layer of PEFT's whose adapters are switched off unmerges them by itself
            return y

        return CheckpointFunction.apply(hidden_states, run_as_set, self.keeper(), whole, *switches.trained())

    def _list_switches(self) -> Switches:
        if self.switches is None or self.step.running is None:  # outside of the decoder's forward nobody has looked
            self.switches = Switches(self.module)
        return self.switches

    def _check_unchanged(self, same: bool, same_given: bool) -> None:
        if not self.step.patched:
            raise taken_off(self.name)
        if not same_given:
            raise ValueError(
                f"{self.name}: its mask was overwritten between a forward and its backward, which runs this layer "
                "again; run the backward first, or give the forward a copy"
            )
        if not same:
            raise ValueError(
                f"{self.name}: adapter, scaling, dropout or weights were changed between a forward and its backward, "
                "which runs this layer again; run the backward first"
            )

    @property
    def better(self) -> bool:
        """Whether the input is kept otherwise than torch does."""
        return self.store is not None or not isinstance(self.savers["layer_in"], Exact)

    def bind(self) -> None:
        installed = getattr(self.module, "_gradient_checkpointing_func", None)
        if installed is None or not getattr(self.module, "gradient_checkpointing", False):
            return  # without a function Hugging Face's code says so
        if installed is not self.bound:
            if isinstance(installed, BoundForward):  # a copied layer's, which has no block any more
                installed = installed.former
            self.usual = self._is_usual(installed)
            if self.better and not self.usual:
                raise ValueError(
                    f"{self.name}: gradient checkpointing is offloaded or has options of its own, which offload=True "
                    "and a quantized layer_in would drop; enable it without, and offload with "
                    "HycloraConfig(offload=True)"
                )
            self.module._gradient_checkpointing_func = self.bound = BoundForward(self.module, installed, self)

    def _is_usual(self, installed) -> bool:
        """Whether nothing that somebody asked of checkpointing is dropped; a store takes the place of HF's own."""
        function, options = getattr(installed, "func", installed), getattr(installed, "keywords", {})
        ours = function is checkpoint or self.store is not None and function.__module__ == "transformers.modeling_utils"
        return ours and options.keys() <= OPTIONS

    def unbind(self) -> None:
        if self.bound is not None and getattr(self.module, "_gradient_checkpointing_func", None) is self.bound:
            self.module._gradient_checkpointing_func = self.bound.former

    def forward(self, function, hidden_states, *args):
        if CALL_IS_CHECKPOINTED and self._calls_layer(function):
            output = self.layer.replay(hidden_states, *args, **function.keywords)
            if output is not None:
                return output
        if not torch.is_grad_enabled() or self.step.whole is self.module:  # it is in one of its runs
            return function(hidden_states, *args)
        run, gathers = self._run_of(function), self._list_switches().are_gathered_later()
        keywords = getattr(function, "keywords", {})
        other = _want_gradients(args, keywords)
        if other or not self.better and (run is None or gathers or not self.usual or self._is_watched()):
            return self.bound.run_stock(self._guarded(function), hidden_states, *args)
        if gathers:
            raise ValueError(
                f"{self.name}: fully_shard gathers weights inside of a checkpoint, where offload=True or a quantized "
                "layer_in would leave them without gradients; give it whole layers, and install transformers 5.24 or "
                "newer, or train without gradient checkpointing"
            )
        given = _given(args, keywords)
        return self.keep_input(lambda x: (run or function)(x, *args), hidden_states, given, whole=run is not None)

    def _is_watched(self) -> bool:
        """Whether hooks of somebody run inside: torch's gives gradients to what they add, and by what they take."""
        return self._list_switches().is_hooked() or CALL_IS_CHECKPOINTED and is_watched(self.module)

    def _guarded(self, function) -> Callable:
        """A function that torch's checkpointing may not run again for another model than it ran for."""

        def run(*args):
            if not self.step.patched:
                raise taken_off(self.name)
            return function(*args)

        return run

    def _run_of(self, function) -> Callable | None:
        """What runs the layer by itself in the place of a function that is HF's to do so; None for any other one.

        HF gives the forward that it has wrapped, or before transformers 5.24 the call, whose hooks run again as well.
        """
        if not (isinstance(function, partial) and self.layer is not None and self.layer.together):
            return None
        wrapped = getattr(type(self.module).forward, "__wrapped__", None)
        if function.func is wrapped and function.args == (self.module,):
            return partial(self.layer.run_once, **function.keywords)
        return function if function.func == self.layer.run_once or self._calls_layer(function) else None

    def _calls_layer(self, function) -> bool:
        """Whether a function is the call of the layer, which has a block, with its keywords."""
        called = getattr(function, "func", None)
        its = getattr(called, "__func__", None) is nn.Module.__call__ and called.__self__ is self.module
        return self.layer is not None and its and not function.args


def _want_gradients(args: tuple, kwargs: dict) -> bool:
    """Whether a tensor beside the hidden states is to get a gradient, as a mask that is trained."""
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))


def _given(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Tensors that a layer reads beside the hidden states: its mask, and angles. Position ids have become these."""
    tensors = (t for t in tree_leaves((args, kwargs | {"position_ids": None})) if isinstance(t, torch.Tensor))
    return [t for t in tensors if not t.is_inference()]  # torch counts no changes of those
