"""Times of modes on the device at hand: micro-steps of a few layers with random weights, calibrated, then timed.

A mode is measured as it runs, CUDA graphs recorded and kernels compiled before. Two depths tell what a layer adds; both
keep the device longer than the host takes beside it, as at full depth. Long rows are measured at three lengths.
"""

import gc
import itertools
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from hyclora.models.patch import apply_hyclora, remove_hyclora
from hyclora.utils.args import LoraArguments, ModelArguments
from hyclora.utils.checkpointing import checkpointed
from hyclora.utils.errors import is_out_of_memory
from hyclora.utils.loading import load_model
from hyclora.utils.planning.modes import Mode
from hyclora.utils.planning.shape import HALF, Shape
from hyclora.utils.planning.times import Batch, Time, Work, expected
from hyclora.utils.profiling import MicroStep, random_batch

SECONDS = 2.0  # that a mode may take, but for kernels that are compiled first: there are some thirty
SHORT, FAR = 2048, 8  # tokens that are tried first; times as many are measured whatever they take
# weights x tokens of the deeper model: estimated at 80 ms on an H200, beside which the host's part is hidden
BUSY = 8e12
LEAST, PROBED = 2, (2, 4)  # layers: the last one runs unlike the others
WARM_UP, TIMED = 4, 3  # micro-steps, and more of those that are timed where they are short
WINDOW, MOST = 0.4, 20  # seconds of them, and how many at most
NO_ROOM, NO_GPU = "out of memory while it was measured", "runs on a GPU alone"
OF_FILES = ("quantization_config", "auto_map")  # of a config.json: weights and code that are not read
logger = logging.getLogger("hyclora")


def batch_of(batch: Batch, vocab: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens; positions tell where packed documents begin."""
    found = random_batch(vocab, batch.rows, batch.tokens, device)
    if batch.documents is not None:
        del found["attention_mask"]
        rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in batch.lengths]
        found["position_ids"] = torch.stack(rows).to(device)
    return found


def seconds_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The median time of a micro-step, warmed up."""
    step = MicroStep(model, batch)
    first = step.seconds(1)
    return statistics.median(first + step.seconds(min(MOST, max(TIMED - 1, math.ceil(WINDOW / first[0])))))


@contextmanager
def without_advice():
    """What is told to whoever trains is not told."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def in_mode(model: nn.Module, mode: Mode):
    """The model runs in a mode inside, and is stock PEFT without gradients afterwards.

    It calibrates in one forward, as it is time that is measured.
    """
    apply_hyclora(model, replace(mode.config, iteration_threshold=1))
    try:
        with checkpointed(model, mode.checkpointing):
            yield
    finally:
        model.disable_input_require_grads()  # which checkpointing enables
        remove_hyclora(model)
        model.zero_grad(set_to_none=True)


def free_memory() -> None:
    """Give back what nobody has any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Bench:
    """Micro-steps of a shape at any depth, on a device."""

    shape: Shape
    lora: LoraArguments
    device: torch.device

    def __post_init__(self):
        self._layers, self._model = 0, None

    @property
    def n(self) -> int:
        return len(self.shape.layers)

    @cached_property
    def weights(self) -> int:
        """Of a layer's linear layers."""
        return sum(linear.weight.numel() for group in self.shape.groups.values() for linear in group.linears)

    def work(self, layers: int, batch: Batch) -> Work:
        return Work.of(batch, self.shape.windows[:layers])

    def flops(self, layers: int, batch: Batch) -> float:
        """Of a forward and a backward, roughly: in what relation times are."""
        work = self.work(layers, batch)
        return 6 * self.weights * layers * work.tokens + 14 * self.shape.q * 1e6 * work.pairs

    def model(self, layers: int) -> nn.Module:
        """One of so many layers; the one before is gone."""
        if self._layers != layers:
            self.clear()
            self._model = self._build(layers)
            self._layers = layers
        return self._model

    def clear(self) -> None:
        """Keep no model."""
        self._layers, self._model = 0, None
        free_memory()

    def _build(self, layers: int) -> nn.Module:
        values = self.shape.config.to_dict() | {"num_hidden_layers": layers}
        values = {name: value for name, value in values.items() if name not in OF_FILES}
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][:layers]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(values, default=str), encoding="utf-8")
            arguments = ModelArguments(
                Path(folder).name,
                str(Path(folder).parent),
                load_in_4bit=self.shape.base == "nf4",
                random_weights=True,
            )
            return load_model(arguments, self.lora, folder, self.device, seed=0, tell=lambda line: None)

    def seconds(self, mode: Mode, layers: int, batch: Batch) -> float | None:
        """The time of a micro-step; None where there is no memory for it."""
        try:
            model = self.model(layers)
            with without_advice(), in_mode(model, mode):
                return seconds_of(model, batch_of(batch, self.shape.vocab, self.device))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            free_memory()
        return None


@dataclass(frozen=True)
class Rate:
    """Seconds that the device takes for a FLOP of a micro-step, about."""

    flop: float

    @classmethod
    def of(cls, bench: Bench, modes: Iterable[Mode], batch: Batch) -> "Rate | None":
        """Found out with the first mode that has room; None if none has."""
        few, more = (min(layers, bench.n) for layers in PROBED)
        for mode in modes:
            first, second = (bench.seconds(mode, layers, batch) for layers in (few, more))
            if first is not None and second is not None:
                # short rows: the host may have had more to do than the device
                layer = max((second - first) / max(1, more - few), second / more / 4)
                return cls(layer * more / bench.flops(more, batch))
        return None

    def allows(self, bench: Bench, layers: int, batch: Batch) -> bool:
        """Whether there is time to measure so many layers."""
        return self.flop * bench.flops(layers, batch) * (WARM_UP + TIMED) <= SECONDS


def depths(bench: Bench, batch: Batch, rate: Rate) -> list[int]:
    """Layers of two models whose times tell those of all; one, if that is all layers."""
    room = torch.cuda.mem_get_info()[0] / 2 if bench.device.type == "cuda" else math.inf
    deep = min(math.ceil(BUSY / (bench.weights * batch.size)), room // (HALF.itemsize * bench.weights), bench.n)
    deep = int(max(deep, min(2 * LEAST, bench.n)))
    while deep > 2 * LEAST and not rate.allows(bench, deep + deep // 2, batch):
        deep -= 1
    return [deep] if deep == bench.n else [max(LEAST, deep // 2), deep]


def lengths(bench: Bench, batch: Batch, first: Batch, rate: Rate) -> list[Batch]:
    """The batch itself where there is time for it, else three that are shorter, the first one among them."""
    fewest, allowed = min(3 * LEAST, bench.n), batch.tokens
    while allowed > FAR * first.tokens and not rate.allows(bench, fewest, batch.shorter(allowed)):
        allowed //= 2
    allowed = max(allowed, FAR * first.tokens)
    if allowed >= batch.tokens:
        return [batch]
    return [first, batch.shorter(round(math.sqrt(first.tokens * allowed))), batch.shorter(allowed)]


def measure_modes(
    bench: Bench, modes: list[Mode], batch: Batch, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Time]:
    """The time of each mode at full depth, by its name; tell gets what is being measured.

    Allocates what so few layers take, and gives it back; what has no room is unknown.
    """
    on_gpu = bench.device.type == "cuda"
    able = [mode for mode in modes if on_gpu or not mode.needs_gpu]
    found = {mode.name: Time(why=NO_GPU) for mode in modes if mode not in able}
    first = batch if batch.size <= SHORT else batch.shorter(max(2, SHORT // batch.rows))
    tell(f"probing {min(PROBED[-1], bench.n)} layers")
    rate = Rate.of(bench, able, first)
    if rate is None:
        return found | {mode.name: Time(why=NO_ROOM) for mode in able}
    by_depth: dict[int, list[Batch]] = {}
    for one in lengths(bench, batch, first, rate):
        for layers in depths(bench, one, rate):
            by_depth.setdefault(layers, []).append(one)
    measured: dict[str, list[tuple[Work, float]]] = {mode.name: [] for mode in able}
    for layers, batches in sorted(by_depth.items()):
        for mode, one in itertools.product(able, batches):
            if mode.name in found:
                continue
            tell(f"{mode.name}: {layers} layers, {one.rows} x {one.tokens} tokens")
            seconds = bench.seconds(mode, layers, one)
            if seconds is None:
                found[mode.name] = Time(why=NO_ROOM)
            else:
                measured[mode.name].append((bench.work(layers, one), seconds))
    bench.clear()
    wanted = bench.work(bench.n, batch)
    told = {name: Time(1e3 * expected(pairs, wanted)) for name, pairs in measured.items() if name not in found}
    return found | told
