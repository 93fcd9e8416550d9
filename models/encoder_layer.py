"""A layer whose norms come after the residual, as a whole: attention, norm, MLP, norm."""

from functools import partial

import torch
from torch import nn

from hyclora.models.blocks import AttentionBlock, MlpBlock, PostNormBlock, is_learned
from hyclora.models.families.family import Family
from hyclora.models.layers import CALL_IS_CHECKPOINTED, WholeLayer
from hyclora.models.trust import acting
from hyclora.operators.attention.flash import tells_runs
from hyclora.operators.savers import Step
from hyclora.operators.token_tiles import place, token_tiles


class EncoderLayerBlock(WholeLayer):
    """RobertaLayer's signature on the blocks of its parts, in whose place no module's own forward is called.

    A norm's output is the residual too, and what attention of the next layer is fed by: that may be derived, but not
    under gradient checkpointing, where a layer is run again without the one before.
    """

    def __init__(
        self, module: nn.Module, name: str, step: Step,
        blocks: tuple[AttentionBlock, PostNormBlock, MlpBlock, PostNormBlock], family: Family,
    ):  # fmt: skip
        super().__init__(module, name, {}, step)
        self.blocks = blocks
        self.parts = {path: module.get_submodule(path) for path in family.structure()}
        self.read_norms = {family.attention_norm: blocks[1], family.mlp_norm: blocks[3]}
        self.groups = tuple(group for block in blocks for group in block.groups)
        self.drops = tuple(drop for block in blocks for drop in block.drops)
        self.projections = [p for group in self.groups for p in group.projections]

    def find_replaced(self) -> str | None:
        """The path of a module in the layer that is not the one that the blocks read."""
        current = dict(self.module.named_modules())
        return next((path for path, part in self.parts.items() if current.get(path) is not part), None)

    def why_not_norms(self) -> str | None:
        """Why the norms that the blocks read do not run, where PEFT trains them whole: those of another adapter do."""
        others = (norm for path, norm in self.read_norms.items() if acting(self.parts[path]) is not norm.module)
        return next((f"{norm.name}: another copy of it runs, of another adapter or of none" for norm in others), None)

    def check_dropout(self) -> None:
        self.blocks[0].check_dropout()

    def run_layer(self, hidden_states, *args, **kwargs):
        """This layer by itself, checkpointed as the forward in whose place this is would be."""
        checkpointed = self.checkpointed and not CALL_IS_CHECKPOINTED and not self.step.recording
        if not checkpointed or not self.module.training or not torch.is_grad_enabled():
            return super().run_layer(hidden_states, *args, **kwargs)
        return self.module._gradient_checkpointing_func(partial(self.run_once, **kwargs), hidden_states, *args)

    def applies(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, cache=None,
        past_key_values=None, **kwargs,
    ) -> bool:  # fmt: skip
        """Nobody asks for maps of the attention, and no other sequence is looked at."""
        given = (encoder_hidden_states, encoder_attention_mask, cache, past_key_values)
        ours = all(value is None for value in given) and super().applies()
        return ours and not self.step.is_stock_attention(None) and not is_learned(None, attention_mask)

    def run(
        self, dtype, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
        cache=None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [B, S, C] of the next layer."""
        attention, attention_norm, mlp, mlp_norm = self.blocks
        # run again, it gets another tensor, of nobody's norm
        x = hidden_states.view_as(hidden_states) if self.keeps_input else hidden_states
        y, _ = attention.run(dtype, x, attention_mask=attention_mask, **kwargs)
        x = attention_norm.run(dtype, y, x)
        return mlp_norm.run(dtype, mlp.run(dtype, x), x)

    def run_stock(self, hidden_states, attention_mask=None, *args, **kwargs):
        attention, norm, *_ = self.blocks
        if tells_runs(attention_mask):
            # as in AttentionBlock: where checkpointing runs a layer first
            y, _ = attention.run_stock(hidden_states, attention_mask=attention_mask, **kwargs)
            return self._feed_forward(norm.module(norm.drops[0](y) + hidden_states))
        if not self._runs_first(hidden_states, attention_mask, *args, **kwargs):
            return super().run_stock(hidden_states, attention_mask, *args, **kwargs)
        return self._feed_forward(attention.half(hidden_states, attention_mask, **kwargs)[0])

    def _runs_first(self, hidden_states, *args, **kwargs) -> bool:
        """Whether checkpointing runs the layer without grad, before run(), and that has its MLP in several tiles."""
        if not self.module.training or self.step.trains or len(token_tiles(hidden_states[..., 0].numel())) == 1:
            return False
        with self.step.layer(passing=True, holds_input=True, draws=None, whole=None):
            return self.applies(hidden_states, *args, **kwargs)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """MLP and norm, in the tiles, and so with the dropout, of run()."""
        _, _, mlp, norm = self.blocks
        rows, y = x.flatten(0, -2), None
        (up,), (down,) = mlp.spec.gate_up.projections, mlp.spec.down.projections
        for tile in token_tiles(len(rows)):
            y = place(y, down.module(mlp.spec.activation.fwd(up.module(rows[tile]))), tile, len(rows))
        return norm.module(norm.drops[0](y.view(*x.shape[:-1], -1)) + x)
