"""A model's forward that runs as it is, and of which is known what it reads of the last hidden states."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hyclora.models.blocks import Block
from hyclora.models.families.family import Family
from hyclora.models.graphs.recording import free_workspaces
from hyclora.models.trust import find_reader
from hyclora.operators.cross_entropy import Targets
from hyclora.operators.savers import Step


def is_known(family: Family, model: nn.Module, decoder: nn.Module) -> bool:
    """Whether it is of a family's readers, or one of TRL's."""
    return reads_labelled_positions(model) or find_reader(family, model, decoder) is not None


def reads_labelled_positions(module: nn.Module) -> bool:
    """Whether its forward is that of TRL's trainers, which scores the positions that have a label, in pieces.

    Not while a block is in front of it.
    """
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    home = getattr(function, "__globals__", {}).get("__name__")
    return home == "trl.trainer.utils" and function.__code__.co_name == "_fused_forward"


class ForeignHead(Block):
    """Runs that forward as it is, and tells the decoder which positions are read: other padding may be left out.

    Its backward, in which logits may be the step's peak, does not find the forward's GEMM workspace beside its own.
    """

    def __init__(self, module: nn.Module, name: str, step: Step, family: Family, decoder: nn.Module):
        super().__init__(module, name, {}, step)
        self.family, self.decoder = family, decoder

    def forward(self, *args, **kwargs):
        if self.module.training and torch.is_grad_enabled():
            self.step.unread = self._unread(*args[:1], **kwargs)
        try:
            return self.run_stock(*args, **kwargs)
        finally:
            self.step.unread = None
            if torch.is_grad_enabled() and next(self.module.parameters()).is_cuda:
                free_workspaces()

    def _unread(
        self, input_ids: Tensor | None = None, fused_lm_head=False, labels: Tensor | None = None,
        shift_labels: Tensor | None = None, **kwargs,
    ) -> Callable[[Tensor], bool] | None:  # fmt: skip
        """What tells of positions, bool [B, S] on the host, whether nobody reads them; None if that is not known."""
        if fused_lm_head:
            return (Targets(labels, ahead=1) if shift_labels is None else Targets(shift_labels)).miss
        reader = find_reader(self.family, self.module, self.decoder)
        if reader is None:
            return None
        if reader.reads == "labels":
            return None if labels is None else Targets(labels).miss
        if reader.reads == "first":
            return _miss_first
        padding = self.module.config.get_text_config().pad_token_id
        return partial(_miss_last, None if padding is None or input_ids is None else input_ids != padding)


def _miss_first(rows: Tensor) -> bool:
    return not rows[:, 0].any()


def _miss_last(tokens: Tensor | None, rows: Tensor) -> bool:
    """tokens: bool [B, S], those that are not padding by their id; None: the last place of each row is read."""
    if tokens is None:
        return not rows[:, -1].any()
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = (tokens * places).argmax(1, keepdim=True).cpu()  # where there is none, the first place
    return not rows.gather(1, last).any()
