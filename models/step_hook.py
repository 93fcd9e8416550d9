"""What happens around a decoder's forward in training: the step is counted, masks are told in a few numbers."""

from functools import partial
from inspect import signature

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hyclora.models.blocks import AttentionBlock, autocast_dtype
from hyclora.models.foreign_head import reads_labelled_positions
from hyclora.models.graphs.foresight import foretell, is_last, is_lookup, is_tokenwise
from hyclora.models.graphs.recording import free_workspaces
from hyclora.models.masks import causal_bounds, row_bounds
from hyclora.models.no_cache import NO_CACHE
from hyclora.models.report import (
    tell_of_checkpointing,
    tell_of_frozen_adapters,
    tell_of_hooks_that_run_twice,
    tell_of_larger_batch,
    tell_of_late_trainer,
    tell_of_new_calibration,
    tell_of_one_unit,
    tell_of_sharding,
    tell_of_unused_input,
)
from hyclora.models.sharding import is_one_unit, is_sharded
from hyclora.models.stream import Stream
from hyclora.models.trust import GLOBAL_HOOKS, is_stock, is_watched, look

# a decoder's arguments that a stream has in another shape
TOKENWISE = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}
CACHE = ("cache", "past_key_values")  # its name from transformers 5.24 on, and before


class StepHook:
    """Runs before a decoder forward: counts and weighs it, binds checkpoints, keeps the cache and S x S masks off.

    And after it, when what held for this forward holds no more.
    """

    def __init__(self, patch, attention: list[AttentionBlock], adapted: list):
        self.patch, self.step, self.attention, self.adapted = patch, patch.step, attention, adapted
        self.family = patch.watch.family
        self.told = self.without_cache = self.counted = False
        self.hooked: set[str] = set()  # layers that were told to have hooks inside
        self.load = None  # the largest micro-step that memory was planned for, until a larger one was told of

    def register(self, decoder: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Handles of what runs before and after the decoder's forward, if that fails too."""
        before = decoder.register_forward_pre_hook(self, with_kwargs=True)
        return before, decoder.register_forward_hook(self.end, always_call=True)

    def end(self, decoder: nn.Module, args: tuple, output):
        """Nobody runs any more; the output has NO_CACHE in the place of a cache that was kept off, and all rows."""
        self.step.running, self.step.private, self.step.embeds, self.step.restored = None, False, False, None
        without_cache, self.without_cache = self.without_cache, False
        if output is None:  # it failed: nothing was learned of this forward
            self.step.index -= self.counted
            self.step.stream = None
            return None
        if self.step.stream is not None and not self.step.in_stream:
            hidden, self.step.stream = self.step.stream.scatter(output[0]), None
            if isinstance(output, tuple):
                output = hidden, *output[1:]
            else:
                output["last_hidden_state"] = hidden
        if without_cache and isinstance(output, tuple):
            output = output[0], NO_CACHE, *output[1:]
        elif without_cache:
            output[next(name for name in CACHE if name in output.__dataclass_fields__)] = NO_CACHE
        return output

    @torch.compiler.disable  # what is asked of modules here has other answers while it is traced
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict):
        self.counted, self.step.stream = False, None  # of a forward that was interrupted
        self.step.running, self.step.private, self.step.embeds, self.step.restored = None, False, False, None
        if self.patch.graphs is not None:
            self.patch.graphs.forget_start()
        if self.patch.embedding is not None:
            self.patch.embedding.check(decoder)
        if not torch.is_grad_enabled():
            return None
        tokens = _tokens(args, kwargs)
        if tokens is not None and tokens.is_cuda:
            free_workspaces()  # that of the backward before
        if tokens is not None and not tokens.numel():
            raise ValueError(f"a batch of shape {list(tokens.shape)} has no token: leave it out")
        if not decoder.training:
            if self.patch.watch.changed() and any(m.training for m in decoder.modules()):  # layers by themselves
                self.patch.watch.look()
            return None
        self.patch.watch.open()
        if not self.told:
            self.told = True
            if not any(p.requires_grad for p in decoder.parameters()):
                tell_of_frozen_adapters()
            if self.patch.graphs is not None and any(map(is_sharded, decoder.modules())):
                tell_of_sharding()
            if is_one_unit(decoder, [c.module for c in self.patch.checkpoints]):
                tell_of_one_unit()
            if any(reads_labelled_positions(block.module) for block in self.patch.blocks):
                tell_of_late_trainer()
            tell_of_checkpointing([c.module for c in self.patch.checkpoints if not (c.better or c.own)])
            checkpointed = any(getattr(c.module, "gradient_checkpointing", False) for c in self.patch.checkpoints)
            if "layer_in" in self.patch.config.slot_savers and not checkpointed:
                tell_of_unused_input()
            if self.step.index == 0 and self.patch.calibration.quantizers:
                tell_of_new_calibration(self.patch.calibration.lost, self.adapted if self.patch.starts_at_zero else [])
        # a loop over the layers that is not Hugging Face's own may keep what it likes, and takes what it likes
        stock = is_stock(decoder) and is_stock(decoder.get_submodule(self.family.caller))
        if stock and len(args) > 1:
            names = list(signature(type(decoder).forward).parameters)[2 : 1 + len(args)]
            args, kwargs = args[:1], kwargs | dict(zip(names, args[1:], strict=True))
        for checkpoint in self.patch.checkpoints:
            checkpoint.bind()
        self.step.token_mask = _token_mask(kwargs)
        self.without_cache, self.counted = False, not self.step.again
        self._weigh(_tokens(args, kwargs))
        if self.counted:
            self.step.index += 1
            if self.patch.calibration.follow(_tokens(args, kwargs)) and self.patch.graphs is not None:
                self.patch.graphs.clear()
        self.step.running = self.step.index
        given = self._begin(decoder, stock, args, dict(kwargs), early=True)
        # a replay may have been started meanwhile, which comes to nothing then
        if self.patch.watch.changed():
            self.patch.watch.look()
            given = self._begin(decoder, stock, args, dict(kwargs), early=False)
        if self.patch.watch.is_hooked():
            self._tell_of_hooks()
        return given

    def _tell_of_hooks(self) -> None:
        """Tell of hooks whose gradients are lost, whenever they, or checkpointing, came."""
        hidden = [c.name for c in self.patch.checkpoints if c.name not in self.hooked and c.hides_from_hooks]
        if hidden:
            self.hooked.update(hidden)
            tell_of_hooks_that_run_twice(hidden[0])

    def _weigh(self, given: torch.Tensor | None) -> None:
        """Tell of the first micro-step that is larger than planned."""
        if self.load is None or given is None:
            return
        rows, tokens = given.shape[:2]
        if rows * tokens > self.load.rows * self.load.tokens:
            tell_of_larger_batch(rows, tokens, self.load)
            self.load = None

    def _begin(self, decoder: nn.Module, stock: bool, args: tuple, kwargs: dict, early: bool) -> tuple[tuple, dict]:
        """The decoder's arguments, with what the layers get in place of HF's mask; early: a replay may be started."""
        embedding = decoder.get_input_embeddings()
        private = self.step.private = stock and self.patch.watch.stock
        angles = getattr(decoder, "rotary_emb", None) if private else None
        known = angles is not None
        self.step.embeds = known and kwargs.get("inputs_embeds") is None and is_lookup(embedding, angles)
        turned = known and not is_watched(angles) and is_stock(angles)
        unseen = private and not self.patch.watch.sees_arguments()
        self.step.known_angles = unseen and (turned or not self.family.causal)
        causal = kwargs.get("is_causal", getattr(decoder.config, "is_causal", self.family.causal))
        maps = _asks_for("attentions", decoder, kwargs)
        other = causal not in (None, self.family.causal)
        self.step.stock_attention = maps or other or _has_cache(decoder, kwargs)
        self.step.padding_differs, self.step.stream, self.step.token_mask = False, None, _token_mask(kwargs)
        if stock:
            kwargs.pop("num_items_in_batch", None)  # the loss's; heads hand on to layers whatever they are called with
            args = self._tell_masks(decoder, args, kwargs)
        if early and self.patch.graphs is not None:
            asked = foretell(decoder, self.patch.hooks[0].id, *args, **kwargs) if self.step.embeds else None
            self.patch.graphs.foresee(asked, decoder, args[0] if args else kwargs.get("input_ids"))
        return args, kwargs

    def _tell_masks(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Keep the cache off, and have each token see what it sees in HF; bounds do that at the least cost.

        The arguments by position, of which ids may become a stream.
        """
        tokens = _tokens(args, kwargs)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if tokens is None or _has_cache(decoder, kwargs):
            return args
        if self.step.token_mask is not None and mask.shape != tokens.shape[:2]:
            return args  # without a cache HF takes the number of keys from the mask
        if self.family.causal and kwargs.get("use_cache") is None:
            # config.use_cache is True by default; a cache is of no use in training and would hold every k and v
            kwargs["use_cache"] = False
            # but HF looks for packed rows only without one
            if _has_cache(decoder, {"use_cache": decoder.config.use_cache}):
                positions, self.without_cache = None, True
        if self._take_bounds(decoder):
            real = mask.bool().cpu() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else mask
            if self.family.causal:
                unread = partial(self._unread, decoder, kwargs)
                zero = decoder.config._attn_implementation == "sdpa"  # where it masks all keys; eager takes their mean
                bounds = causal_bounds(real, positions, *tokens.shape[:2], unread, zero)
            else:
                bounds = row_bounds(real, *tokens.shape[:2])
            if bounds is not None and self._can_stream(decoder, args, kwargs, bounds, real):
                return self._be_stream(decoder, args, kwargs, bounds, real, tokens)
            if bounds is not None and self.family.causal:
                kwargs["attention_mask"] = bounds
                return args
        if mask is None and positions is None and kwargs.get("position_ids") is not None:
            kwargs["attention_mask"] = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        return args

    def _can_stream(self, decoder: nn.Module, args: tuple, kwargs: dict, bounds: torch.Tensor, real) -> bool:
        """Whether a batch gains from being one row of its real tokens, and nobody sees the difference.

        Padding is left out where it is not read. Where graphs are recorded packed rows gain, as graphs of bounds would
        fit one batch alone, and so do whole rows of many lengths.
        """
        if not (self.patch.config.stream and self.step.private) or self._is_watched(decoder, kwargs):
            return False
        embedded = kwargs.get("inputs_embeds") is not None
        if not is_tokenwise(decoder, self.family.embeddings, embedded) or any(GLOBAL_HOOKS):
            return False
        if getattr(decoder, "pooler", None) is not None:  # which reads first tokens of rows
            return False
        if any(isinstance(kwargs[name], torch.Tensor) for name in kwargs.keys() - TOKENWISE):
            return False
        dtype = autocast_dtype(_tokens(args, kwargs).device.type) or decoder.get_input_embeddings().weight.dtype
        # they are of one kind, but for their dropout
        if not all(block.takes_starts(dtype) for block in self.attention[: None if self.patch.watch.drops else 1]):
            return False
        if real is None or real.all():
            shape = tuple(_tokens(args, kwargs).shape[:2])
            packed = bounds.shape[-1] - 1 > shape[0]
            return self._recorded() and (packed or not self.patch.graphs.sizes.is_usual(shape))
        # causal_bounds has asked for all of it, unless some is in front; the GPU is waited for at each question
        asked = self.step.padding_differs and bool(bounds[0, 0, 1, :-1].all())
        return bool(real.any() and (asked or self._unread(decoder, kwargs, ~real)))

    def _be_stream(
        self, decoder: nn.Module, args: tuple, kwargs: dict, bounds: torch.Tensor, real, tokens: torch.Tensor
    ) -> tuple:  # fmt: skip
        """Give the layers one row in place of the batch."""
        if real is None:
            real = torch.ones(tokens.shape[:2], dtype=torch.bool)
        fill = self.patch.graphs.fill if self._recorded() else None
        stream = self.step.stream = Stream(bounds, real, tokens.device, fill)
        self.step.token_mask = stream.mask
        positions = kwargs.get("position_ids")
        kwargs["position_ids"] = stream.rows_of(
            self.family.positions(decoder, tokens) if positions is None else positions
        )
        kwargs["attention_mask"] = stream.starts
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = stream.rows_of(kwargs["token_type_ids"])
        for name in ("input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                kwargs[name] = stream.gather(kwargs[name])
        return tuple(None if t is None else stream.gather(t) for t in args)

    def _is_watched(self, decoder: nn.Module, kwargs: dict) -> bool:
        """Whether code of somebody's, hooks or modules, gets hidden states on their way, or the caller all of them."""
        if _asks_for("hidden_states", decoder, kwargs):
            return True
        others = {i: hook for i, hook in decoder._forward_hooks.items() if i != self.patch.hooks[1].id}
        caller = decoder.get_submodule(self.family.caller)
        watched = look(others) or caller is not decoder and is_watched(caller)
        return watched or not self.patch.watch.own or self.patch.watch.is_hooked()

    def _recorded(self) -> bool:
        """Whether graphs may be recorded or replayed."""
        return self.patch.graphs is not None and self.patch.graphs.able

    def _take_bounds(self, decoder: nn.Module) -> bool:
        """Whether the layers know what bounds are; or HF shall make a mask."""
        if self.step.stock_attention or not (self.patch.watch.bounded and self.step.known_angles):
            return False
        if not (self.family.causal or self.patch.config.stream):
            return False
        if not is_last(decoder, self.patch.hooks[0].id):  # another one may change the mask
            return False
        if not all(p.refresh() for p in self.adapted):  # each layer reads its own, where FSDP has put them by then
            return False
        return all(block.takes_bounds() for block in self.attention)

    def _unread(self, decoder: nn.Module, kwargs: dict, padding: torch.Tensor) -> bool:
        """Whether nobody reads what comes out at padding, bool [B, S] on the host."""
        if self.step.unread is None or self._is_watched(decoder, kwargs) or not self.step.unread(padding):
            return False
        self.step.padding_differs = True
        return True


def _token_mask(kwargs: dict) -> torch.Tensor | None:
    """The batch's mask of real tokens, [B, S], if it brings one."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _tokens(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """What the decoder is called with: ids [B, S], or embeddings [B, S, C]."""
    return next((t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None)


def _asks_for(name: str, decoder: nn.Module, kwargs: dict) -> bool:
    """Whether a forward shall return its hidden_states or its attentions, by Hugging Face's rules."""
    return bool(kwargs.get(f"output_{name}", getattr(decoder.config, f"output_{name}", False)))


def _has_cache(decoder: nn.Module, kwargs: dict) -> bool:
    """Whether a forward is given a cache or makes one."""
    given = any(kwargs.get(name) is not None for name in CACHE)
    return given or bool(kwargs.get("use_cache")) and not getattr(decoder, "gradient_checkpointing", False)
