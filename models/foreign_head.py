"""A causal LM's forward that somebody else has replaced, of which is known what it reads."""

from torch import nn

from hyclora.models.blocks import Block
from hyclora.operators.cross_entropy import Targets
from hyclora.operators.savers import Step


def reads_labelled_positions(module: nn.Module) -> bool:
    """Whether its forward is that of TRL's trainers, which scores the positions that have a label, in pieces."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    home = getattr(function, "__globals__", {}).get("__name__")
    return home == "trl.trainer.utils" and function.__code__.co_name == "_fused_forward"


class ForeignHead(Block):
    """Runs that forward as it is, and tells the decoder which positions are read: so padding may be told in bounds."""

    def __init__(self, module: nn.Module, name: str, step: Step):
        super().__init__(module, name, {}, step)

    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return self.run_stock(*args, **kwargs)
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        self.step.unread = (Targets(labels, ahead=1) if shifted is None else Targets(shifted)).miss
        try:
            return self.run_stock(*args, fused_lm_head=True, **kwargs)
        finally:
            self.step.unread = None
