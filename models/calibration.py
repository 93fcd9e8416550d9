"""When calibration ends, by what its forwards have shown, and whether it has to begin again.

A step count says little: the first forwards may be a warm-up on one token id, rows that are empty, or rows unlike all
that follow. So tokens are counted by their context, the ids of a token and the three before it: a std from n of them is
off by 1 / sqrt(2 n). Afterwards the scales of one quantizer tell whether its statistics still fit (savers/gauge.py).
"""

import json
import logging
import statistics

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyclora.operators.savers import ChannelQuant, Derived, GaugedQuant, Readback, Saver, Step
from hyclora.operators.savers.channel_quant import sum_over_ranks
from hyclora.operators.savers.gauge import REFERENCE, SAMPLES

logger = logging.getLogger("hyclora")
# a std off by 12 %: on tiny-llama gradients are as near the exact ones as with 16 times as many, and not with half
ENOUGH = 32
# a forward that says less than one new thing in as many tokens would outweigh others by repetition alone
REPEATS = 16
PATIENCE = 8  # times iteration_threshold forwards without enough
EVERY = 8  # forwards from one look at the gauge to the next
# log2 of how much wider is too wide: errors of gradients double there; training by itself moved it by 0.15
TOO_WIDE = 1.0
USUAL = 1.0  # what the gauge reads at least where many kinds of tokens fit; less where all of them are alike
LENGTH = 4  # of a context
BUCKETS = 2**20  # by which contexts are told apart
MIX = 0x9E3779B97F4A7C15 - 2**64
NUMBERS = ("begun", "counted", "restarts")
STEP_NUMBERS = ("index", "threshold", "since")


class Calibration:
    """Moves step.threshold, the last forward that calibrates.

    It lasts iteration_threshold forwards, and longer, up to PATIENCE times as many, until ENOUGH contexts were seen.
    Forwards add up, but what repetition alone gave is replaced by the first that is novel, from which it lasts as long
    anew; one that has all that was seen replaces it; one without news adds nothing once there is enough.
    It begins again if no token of a slot was finite, and if the gauge (None: nobody looks) reads more than TOO_WIDE in
    most of SAMPLES forwards: after EVERY * SAMPLES, then twice as many each time. The ranks of a distributed run decide
    together. Allocates 3 BUCKETS bytes while calibrating, and waits for the device then and once behind; no more
    afterwards.
    savers: by the names that slots are told by; told: those that were, as nothing in them was finite. counted: tokens
    in the statistics. lost: why a resumed run has no calibration to go on with, if that is known.
    """

    def __init__(self, step: Step, savers: dict[str, Saver]):
        self.step, self.length = step, step.threshold
        own = {name: saver.own if isinstance(saver, Derived) else saver for name, saver in savers.items()}
        self.quantizers = {name: saver for name, saver in own.items() if isinstance(saver, ChannelQuant)}
        self.gauge = next((saver for saver in savers.values() if isinstance(saver, GaugedQuant)), None)
        self.begun, self.counted, self.restarts = 0, 0, 0
        self.told: set[str] = set()
        self.lost: str | None = None
        self.seen: Tensor | None = None
        self._readback: Readback | None = None

    @torch.compiler.disable
    def follow(self, tokens: Tensor | None) -> bool:
        """Weigh the forward that begins, by its ids [B, S] or embeddings [B, S, C]; whether calibration begins anew."""
        if not self.quantizers or tokens is None:
            return False
        again = not self.step.calibrating and (self._is_of_nothing() or self.gauge is not None and self._contradicted())
        if again:
            self.begin_again(self.step.index - 1)
        if self.step.calibrating:
            self._weigh(tokens)
        elif self.seen is not None:
            self.seen = None
            for quantizer in self.quantizers.values():
                quantizer.rest()
        return again

    @torch.no_grad()
    def _weigh(self, tokens: Tensor) -> None:
        step = self.step
        n_before, n_own, n_seen, n_tokens = self._count(tokens)
        n_new = n_seen - n_before
        novel = n_new >= ENOUGH or n_new * REPEATS >= n_tokens > 0
        repetitive = n_before < ENOUGH and n_before * REPEATS < self.counted
        if novel and (repetitive or not n_before):
            step.since, step.threshold = step.index, step.index + self.length - 1
        elif n_own == n_seen:
            # it has all that was seen, with parameters as they are now
            step.since = step.index
        step.informative = novel or n_own == n_seen or n_seen < ENOUGH
        if step.informative:
            self.counted = n_tokens + (self.counted if step.since < step.index else 0)
            if self.gauge is not None:
                self.gauge.ask(REFERENCE)
        if step.index < step.threshold or n_seen >= ENOUGH:
            return
        if step.index - self.begun < PATIENCE * self.length:
            step.threshold += 1
            return
        logger.warning(
            f"HyC-LoRA: {step.index - self.begun} training forwards had only {n_seen} different tokens in context to "
            "calibrate on (empty, dummy or repeated rows?); gradients of other rows may be far off: let training begin "
            "with usual rows"
        )

    def _count(self, tokens: Tensor) -> list[int]:
        """Contexts seen before, those of this forward, all of them, and its real tokens; of all ranks."""
        mask = self.step.mask(tokens.shape[:2].numel())
        keys = _contexts(tokens, mask)
        own = torch.zeros(BUCKETS, dtype=torch.uint8, device=keys.device).index_fill_(0, keys, 1)
        found = sum_over_ranks({"high": own, "tokens": torch.tensor(keys.numel(), device=keys.device)})
        before = torch.zeros_like(own) if self.seen is None else self.seen.to(own.device)
        self.seen = before | found["high"]
        return torch.stack((before.sum(), found["high"].sum(), self.seen.sum(), found["tokens"])).tolist()

    def _is_of_nothing(self) -> bool:
        """Whether calibration has just ended, and a quantizer has seen no token that is finite in it."""
        if self.seen is None or not self.counted:
            return False
        device = self.seen.device
        counts = {name: q.statistics["count"].to(device) for name, q in self.quantizers.items() if q.is_of(self.step)}
        found = torch.stack(list(counts.values())).tolist() if counts else []
        empty = [name for name, count in zip(counts, found, strict=True) if not count]
        if news := [name for name in empty if name not in self.told]:
            self.told.update(news)
            more = f" (and {len(news) - 1} more)" if len(news) > 1 else ""
            logger.warning(
                f"HyC-LoRA: no activation of {news[0]}{more} was finite while calibrating: calibrating again, until "
                "one is. The model itself overflows there: use bfloat16 in place of fp16, or a smaller learning rate, "
                "and have FiniteGradients (--non_finite of the scripts) name what is not finite first"
            )
        return bool(empty)

    def _contradicted(self) -> bool:
        """Whether the gauge says so; has it look at this forward, or its numbers fetched, if it is time for that."""
        every = EVERY << self.restarts
        age, window = self.step.index - self.step.threshold, every * SAMPLES
        if age > window and age % window == 1:
            self._readback = Readback(self.gauge.widths)
        if age % every:
            return False
        if age > window and age % window == every and self._too_wide():
            self.restarts += 1
            return True
        self.gauge.ask(1 + (age // every - 1) % SAMPLES)
        return False

    def _too_wide(self) -> bool:
        reference, *widths = (self._readback or Readback(self.gauge.widths)).read()
        self._readback = None
        widths = [width for width in widths if width == width]  # nan where no token was
        wider = statistics.median(widths) - max(reference, USUAL) if widths else 0.0
        if wider > TOO_WIDE:
            logger.warning(
                f"HyC-LoRA: activations are {2**wider:.1f} times as wide as those that calibration saw (rows sorted by "
                f"length or kind?): calibrating again for {self.length} forwards; shuffle the rows to need it once"
            )
        return wider > TOO_WIDE

    def begin_again(self, after: int) -> None:
        """Have the forwards behind this one calibrate, in the place of all before."""
        self.begun, self.counted, self.seen = after, 0, None
        self.step.threshold = self.begun + self.length
        if self.gauge is not None:
            self.gauge.forget()

    def state_dict(self) -> tuple[str, dict[str, Tensor]]:
        """All that decides, for a run that goes on: numbers as text, and tensors by name."""
        numbers = {name: getattr(self, name) for name in NUMBERS} | {n: getattr(self.step, n) for n in STEP_NUMBERS}
        tensors = {} if self.gauge is None else {"widths": self.gauge.widths}
        if self.seen is not None and self.step.calibrating:
            tensors["seen"] = self.seen.nonzero().flatten()
        return json.dumps(numbers), tensors

    def load_state_dict(self, numbers: str, tensors: dict[str, Tensor]) -> None:
        numbers = json.loads(numbers)
        for owner, names in ((self, NUMBERS), (self.step, STEP_NUMBERS)):
            for name in names:
                setattr(owner, name, numbers[name])
        self.seen = self._readback = None
        if "seen" in tensors:
            self.seen = torch.zeros(BUCKETS, dtype=torch.uint8).index_fill_(0, tensors["seen"], 1)
        if self.gauge is not None:
            self.gauge.forget()
            self.gauge.widths = tensors["widths"]


def _contexts(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """A bucket for each real token, int64 [T]: the same for the same last LENGTH tokens of a row."""
    # equal embeddings have equal sums
    ids = tokens if tokens.dim() == 2 else tokens.sum(dim=-1, dtype=torch.float32).view(torch.int32)
    ids = ids.long()
    if mask is not None:
        mask = mask.to(ids.device)
        ids = ids.masked_fill(~mask.view(ids.shape), -1)
    keys = ids
    for i in range(1, LENGTH):
        keys = keys * MIX + pad(ids, (i, 0), value=-1)[:, : ids.shape[1]]
    keys = (keys * MIX >> 44) & (BUCKETS - 1)
    return keys.flatten() if mask is None else keys.view(-1)[mask]
