"""Channel-normalised quantization with outlier channels split off.

Activations of a transformer have a mean and a spread a channel; a scale a token or a rotation destroys that structure.
So the first training forwards calibrate mean and std of each channel, which are then frozen; a token's group of
channels is moved and scaled into [-1, 1], and a code book rounds it (packing/codebook.py). The range of the group is
what decides, not its rms: MLP activations have lone spikes that carry much of the gradient, and clipping them costs
more than coarser steps elsewhere. The channels of largest energy are kept exactly beside the codes.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from hyclora.operators.packing.codebook import CODEBOOKS, GROUP
from hyclora.operators.packing.quantize import dequantize, dequantize_rows, quantize
from hyclora.operators.savers.base import Step, StoringSaver
from hyclora.operators.savers.measure import measure

LAST_STEP = "last_step"


class ChannelQuant(StoringSaver):
    """x [T, C] as codes of b bits, scales of groups of G channels, and ceil(outlier_ratio * C) exact channels.

    scale_rule channel_group: mean, std over all calibration tokens (padding skipped). paper: mean 0, "std" is the
    published scale (max - min) / (2^b - 1), averaged over the calibration steps. Source: paper section 4.1, seeds.
    Keeps G b / 8 bytes a group for codes, 2 for its scale (paper: none), 2 for an exact channel, of each token; and for
    itself, once, 12 bytes a channel (20 with exact channels), and 12 more while it calibrates and where rest() has put
    them. G is 64 or that times a power of two; the last group is kept whole.
    RuntimeError to pack before any calibration.
    """

    n_state = 3

    def __init__(self, bits: int, scale_rule: str, outlier_ratio: float, group: int = GROUP):
        self.book = replace(CODEBOOKS[scale_rule][bits], group=group)
        self.scale_rule = scale_rule
        self.outlier_ratio = outlier_ratio
        self.statistics: dict[str, Tensor] = {}
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        self.outliers: Tensor | None = None
        self._last_step = -1  # a layer may be called before the model ever was

    def __str__(self) -> str:
        said = [f"groups of {self.book.group}"] if self.book.group != GROUP else []
        said += [f"exact channels {self.outlier_ratio:g}"] if self.outlier_ratio else []
        return f"{self.book.bits} bit" + (f" ({', '.join(said)})" if said else "")

    @property
    def n_outliers(self) -> int:
        return math.ceil(self.outlier_ratio * self.statistics["total"].numel())

    def due(self, step: Step) -> bool:
        return step.calibrating and self._last_step < (step.index if step.informative else step.since)

    def is_of(self, step: Step) -> bool:
        """Whether there are statistics of the calibration that is going on, or was the last one."""
        return bool(self.statistics) and self._last_step >= step.since

    def prepare(self, x: Tensor, step: Step) -> None:
        """Calibrate on x if this is a calibration forward not counted yet, or the first time that there is an x."""
        self.follow(x.device)
        if self.due(step) or self.mean is None:
            self.calibrate(measure(x, step.mask(x.shape[0])), step)

    def pack(self, x: Tensor, step: Step) -> tuple[Tensor, ...]:
        self.prepare(x, step)
        codes, scale = quantize(x, self.mean, self.inv_std, self.book)
        return self.packed(codes, scale, x.index_select(1, self.outliers) if self.n_outliers else None)

    def packed(self, codes: Tensor, scale: Tensor, kept: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is kept of a slot: codes uint8 [T, n, G/8, b], scale uint8 [T, n, 2], kept [T, k] (empty if k = 0), then
        mean and std (fp32 [C], 0 at the exact channels) and the exact channels int64 [k].

        The statistics belong to it, because they still move while calibrating.
        """
        kept = self.mean.new_empty(0) if kept is None else kept
        return codes, scale, kept, *self.restoring, self.outliers

    def unpack(
        self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype, weight: Tensor | None = None
    ) -> Tensor:
        codes, scale, kept, mean, std, outliers = packed
        if kept.numel():
            return dequantize_rows(codes, scale, kept, mean, std, outliers, self.book, dtype, weight)
        if weight is not None:
            mean, std = mean * weight, std * weight
        return dequantize(codes, scale, mean, std, self.book, dtype)

    @torch.no_grad()
    def calibrate(self, batch: dict[str, Tensor], step: Step) -> None:
        """Add what was measured of a forward to the statistics since step.since; mean, std, outlier channels follow."""
        self.follow(batch["count"].device)
        batch = sum_over_ranks(batch)
        batch["steps"] = torch.ones_like(batch["count"])
        batch["range"] = (batch.pop("high") - batch.pop("low")).nan_to_num(neginf=0.0)
        old = self.statistics if self.is_of(step) else {}
        # measures are views of one tensor, of which not all are kept
        self.statistics = {name: old[name].to(t.device) + t if old else t.clone() for name, t in batch.items()}
        self._last_step = step.index
        self._set_scales(batch["count"].device)

    def rest(self) -> None:
        """Have the statistics on the host, where they wait for the next calibration."""
        self.statistics = {name: t.cpu() for name, t in self.statistics.items()}

    def follow(self, device: torch.device) -> None:
        """Have what they mean where the activations are: they are loaded on the CPU, and models move."""
        if self.statistics and self.mean.device != device:
            self._set_scales(device)

    def _set_scales(self, device: torch.device) -> None:
        s = {name: t.to(device) for name, t in self.statistics.items()}
        count = s["count"].clamp_min(1.0)
        mean = s["total"] / count
        energy = s["total_square"] / count
        if self.scale_rule == "paper":
            self.mean = torch.zeros_like(mean)
            std = s["range"] / s["steps"] / (2**self.book.bits - 1)
        else:
            self.mean = mean
            std = (energy - mean.square()).clamp_min(0.0).sqrt()
        self.std = std.clamp_min(1e-6)
        self.inv_std = 1 / self.std
        self.outliers = energy.topk(self.n_outliers).indices.sort().values
        self.restoring = (self.mean, self.std)
        if self.n_outliers:
            self.restoring = tuple(t.index_fill(0, self.outliers, 0.0) for t in self.restoring)

    def bits(self, n_cols: int) -> float:
        n_groups = math.ceil(n_cols / self.book.group)
        per_group = self.book.group * self.book.bits + 16 * self.book.grouped
        return n_groups * per_group + 16.0 * math.ceil(self.outlier_ratio * n_cols)

    def state_dict(self) -> dict[str, Tensor]:
        return self.statistics | {LAST_STEP: torch.tensor(self._last_step)} if self.statistics else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.statistics = {name: t for name, t in state.items() if name != LAST_STEP}
        self._last_step = int(state.get(LAST_STEP, 0))
        if state:
            self._set_scales(self.statistics["count"].device)


def sum_over_ranks(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same statistics on every rank of a distributed run, so that all ranks quantize alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        operations = {"low": torch.distributed.ReduceOp.MIN, "high": torch.distributed.ReduceOp.MAX}
        for name, t in batch.items():
            torch.distributed.all_reduce(t, op=operations.get(name, torch.distributed.ReduceOp.SUM))
    return batch
