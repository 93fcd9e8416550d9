"""How wide activations are beside the statistics of a quantizer: what tells that these do not fit any more."""

import torch
from torch import Tensor

from hyclora.operators.reference import LOG_SCALE_STEPS, SCALE_ZERO
from hyclora.operators.savers.base import Step
from hyclora.operators.savers.channel_quant import ChannelQuant, sum_over_ranks

REFERENCE = 0  # the place in widths of what was calibrated on
SAMPLES = 5  # places behind it


class GaugedQuant(ChannelQuant):
    """A ChannelQuant that says, for forwards of which it is asked, how wide its groups are once they are normalised.

    widths: fp32 [1 + SAMPLES], each the log2 of half the range of a group, mean over groups and the real tokens of all
    ranks; nan where there was none. It is read off the scales that are packed anyway, with no look at the activations,
    and stays on their device. scale_rule=paper has no scales. Takes 5 bytes a token for a moment when asked.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.forget()

    def forget(self) -> None:
        """What was measured belongs to other statistics."""
        self.widths = torch.full((1 + SAMPLES,), torch.nan)
        self._asked: int | None = None

    def ask(self, place: int) -> None:
        """Have the forward that begins measured, and the result at this place of widths."""
        self._asked = place

    def prepare(self, x: Tensor, step: Step) -> None:
        super().prepare(x, step)
        self._mask = None if self._asked is None else step.mask(x.shape[0])

    def packed(self, codes: Tensor, scale: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        if self._asked is not None:
            self.widths = self.widths.to(scale.device)
            self.widths[self._asked].copy_(_width(scale, self._mask))
            self._asked = self._mask = None
        return super().packed(codes, scale, kept)


def _width(scale: Tensor, mask: Tensor | None) -> Tensor:
    """Mean log2 of half the ranges that scale [T, n, 2] stands for, of the tokens in mask."""
    sums = scale[:, :, 0].sum(dim=1, dtype=torch.float32)
    mask = torch.ones_like(sums, dtype=torch.bool) if mask is None else mask.to(sums.device)
    found = sum_over_ranks({"bytes": torch.where(mask, sums, 0.0).sum(), "tokens": mask.sum().float()})
    return (found["bytes"] / (found["tokens"] * scale.shape[1]) - SCALE_ZERO) / LOG_SCALE_STEPS


class Readback:
    """Numbers on their way to the host, for which nobody waits who reads them some steps later."""

    def __init__(self, numbers: Tensor):
        self._host, self._event = numbers.detach(), None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()

    def __getstate__(self) -> dict:
        """A copy of a model has the numbers; an event cannot be copied."""
        return {"_host": torch.tensor(self.read()), "_event": None}
