"""What happens around a decoder's forward in training: the step is counted, masks are told in a few numbers."""

from functools import partial
from inspect import signature

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hyclora.models.blocks import AttentionBlock
from hyclora.models.graphs.foresight import foretell, is_last, is_lookup
from hyclora.models.masks import causal_bounds
from hyclora.models.no_cache import NO_CACHE
from hyclora.models.report import tell_of_checkpointing
from hyclora.models.trust import is_stock, look

CACHE = ("cache", "past_key_values")  # its name from transformers 5.24 on, and before


class StepHook:
    """Runs before a decoder forward: counts and weighs it, binds checkpoints, keeps the cache and S x S masks off.

    And after it, when what held for this forward holds no more.
    """

    def __init__(self, patch, attention: list[AttentionBlock], adapted: list):
        self.patch, self.step, self.attention, self.adapted = patch, patch.step, attention, adapted
        self.told = self.without_cache = False

    def register(self, decoder: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Handles of what runs before and after the decoder's forward, if that fails too."""
        before = decoder.register_forward_pre_hook(self, with_kwargs=True)
        return before, decoder.register_forward_hook(self.end, always_call=True)

    def end(self, decoder: nn.Module, args: tuple, output):
        """Nobody runs any more; the output has NO_CACHE in the place of a cache that was kept off."""
        self.step.running, self.step.private, self.step.embeds = None, False, False
        without_cache, self.without_cache = self.without_cache, False
        if output is None or not without_cache:
            return None
        if isinstance(output, tuple):
            return output[0], NO_CACHE, *output[1:]
        output[next(name for name in CACHE if name in output.__dataclass_fields__)] = NO_CACHE
        return output

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict):
        if not (decoder.training and torch.is_grad_enabled()):
            return None
        if not self.told:
            self.told = True
            tell_of_checkpointing([checkpoint.module for checkpoint in self.patch.checkpoints])
        # a loop over the layers that is not Hugging Face's own may keep what it likes, and takes what it likes
        stock = is_stock(decoder)
        if stock and len(args) > 1:
            names = list(signature(type(decoder).forward).parameters)[2 : 1 + len(args)]
            args, kwargs = args[:1], kwargs | dict(zip(names, args[1:], strict=True))
        for checkpoint in self.patch.checkpoints:
            checkpoint.bind()
        mask = kwargs.get("attention_mask")
        self.step.token_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        self.without_cache = False
        if not self.step.again:
            self.step.index += 1
            if self.patch.calibration.follow(_tokens(args, kwargs)) and self.patch.graphs is not None:
                self.patch.graphs.clear()
        self.step.running = self.step.index
        given = self._begin(decoder, stock, args, dict(kwargs), early=True)
        # a replay may have been started meanwhile, which comes to nothing then
        if self.patch.watch.changed():
            self.patch.watch.look()
            given = self._begin(decoder, stock, args, dict(kwargs), early=False)
        return given

    def _begin(self, decoder: nn.Module, stock: bool, args: tuple, kwargs: dict, early: bool) -> tuple[tuple, dict]:
        """The decoder's arguments, with what the layers get in place of HF's mask; early: a replay may be started."""
        embedding = decoder.get_input_embeddings()
        self.step.private = stock and self.patch.watch.stock
        self.step.embeds = stock and kwargs.get("inputs_embeds") is None and is_lookup(embedding, decoder.rotary_emb)
        causal = kwargs.get("is_causal", getattr(decoder.config, "is_causal", True))
        maps = _asks_for("attentions", decoder, kwargs)
        self.step.stock_attention = maps or causal is False or _has_cache(decoder, kwargs)
        self.step.padding_differs = False
        if stock:
            self._tell_masks(decoder, args, kwargs)
        if early and self.patch.graphs is not None:
            asked = foretell(decoder, self.patch.hooks[0].id, *args, **kwargs) if self.step.embeds else None
            self.patch.graphs.foresee(asked, embedding, args[0] if args else kwargs.get("input_ids"))
        return args, kwargs

    def _tell_masks(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep the cache off, and have each token see what it sees in HF; bounds do that at the least cost."""
        tokens = _tokens(args, kwargs)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if tokens is None or _has_cache(decoder, kwargs):
            return
        if self.step.token_mask is not None and mask.shape != tokens.shape[:2]:
            return  # without a cache HF takes the number of keys from the mask
        if kwargs.get("use_cache") is None:
            # config.use_cache is True by default; a cache is of no use in training and would hold every k and v
            kwargs["use_cache"] = False
            # but HF looks for packed rows only without one
            if _has_cache(decoder, {"use_cache": decoder.config.use_cache}):
                positions, self.without_cache = None, True
        if self._take_bounds(decoder):
            unread = partial(self._unread, decoder, kwargs)
            zero = decoder.config._attn_implementation == "sdpa"  # where it masks all keys; eager takes their mean
            bounds = causal_bounds(mask, positions, *tokens.shape[:2], unread, zero)
            if bounds is not None:
                kwargs["attention_mask"] = bounds
                return
        if mask is None and positions is None and kwargs.get("position_ids") is not None:
            kwargs["attention_mask"] = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)

    def _take_bounds(self, decoder: nn.Module) -> bool:
        """Whether the layers know what bounds are; or HF shall make a mask."""
        if self.step.stock_attention or not self.patch.watch.bounded:
            return False
        if not is_last(decoder, self.patch.hooks[0].id):  # another one may change the mask
            return False
        if not all(p.refresh() for p in self.adapted):  # each layer reads its own, where FSDP has put them by then
            return False
        return all(block.takes_bounds() for block in self.attention)

    def _unread(self, decoder: nn.Module, kwargs: dict, padding: torch.Tensor) -> bool:
        """Whether nobody reads what comes out at padding, bool [B, S] on the host."""
        unread = self.step.unread
        others = {i: hook for i, hook in decoder._forward_hooks.items() if i != self.patch.hooks[1].id}
        hooked = self.patch.watch.is_hooked() or look(others)
        if unread is None or hooked or _asks_for("hidden_states", decoder, kwargs):
            return False
        self.step.padding_differs = unread(padding)
        return self.step.padding_differs


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
