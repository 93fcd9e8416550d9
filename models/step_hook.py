"""What happens before a decoder's forward in training: the step is counted, masks are told in a few numbers."""

import torch
from torch import nn

from hyclora.models.blocks import AttentionBlock
from hyclora.models.graphs.foresight import foretell, is_stock
from hyclora.models.masks import causal_bounds
from hyclora.models.report import tell_of_checkpointing


class StepHook:
    """Runs before a decoder forward: counts and weighs it, notes padding, binds checkpoints, keeps cache, masks off."""

    def __init__(self, patch, attention: list[AttentionBlock], adapted: list):
        self.patch, self.step, self.attention, self.adapted = patch, patch.step, attention, adapted
        self.told = False

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict):
        if not (decoder.training and torch.is_grad_enabled()):
            return None
        if not self.told:
            self.told = True
            tell_of_checkpointing([checkpoint.module for checkpoint in self.patch.checkpoints])
        self.step.index += 1
        for checkpoint in self.patch.checkpoints:
            checkpoint.bind()
        mask = kwargs.get("attention_mask")
        self.step.token_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        if self.patch.calibration.follow(_tokens(args, kwargs)) and self.patch.graphs is not None:
            self.patch.graphs.clear()
        # a loop over the layers that is not Hugging Face's own may keep what it likes
        stock = is_stock(decoder)
        given = len(args) > 1 or kwargs.get("inputs_embeds") is not None
        embedding = decoder.get_input_embeddings()
        self.step.private = stock
        self.step.embeds = stock and not given and not embedding._forward_hooks
        if kwargs.get("use_cache") is None and kwargs.get("past_key_values") is None:
            # config.use_cache is True by default; a cache is of no use in training and would hold every k and v
            kwargs["use_cache"] = False
        bounds = self._bounds(args, kwargs)
        if bounds is not None:
            kwargs["attention_mask"] = bounds
        if self.patch.graphs is not None:
            asked = foretell(decoder, self.patch.hook.id, *args, **kwargs) if self.step.embeds else None
            self.patch.graphs.foresee(asked, embedding, args[0] if args else kwargs.get("input_ids"))
        return args, kwargs

    def _bounds(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """What the layers get for HF's mask; None if HF shall make one, as some would not know what bounds are."""
        tokens = _tokens(args, kwargs)
        cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache")
        if tokens is None or len(args) > 1 or cached or not all(p.refresh(self.step.index) for p in self.adapted):
            return None
        if not all(block.takes_bounds() for block in self.attention):
            return None
        return causal_bounds(kwargs.get("attention_mask"), kwargs.get("position_ids"), *tokens.shape[:2])


def _tokens(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """What the decoder is called with: ids [B, S], or embeddings [B, S, C]."""
    return next((t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None)
