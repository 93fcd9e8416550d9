"""What was found of a model's gradients: by weight, by layer and by slot, as numbers and as a table to read."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

# below the worst weight of the worst line of benchmarks/results/fidelity.jsonl: 0.40, scale_rule=paper at 2 bit
THRESHOLD = 0.3
# notes on a gradient that says nothing, and is as it has to be
AT_START = "0, as lora_B is 0 at the start"
UNUSED = "none, with exact LoRA neither: the loss does not depend on it"
ALWAYS_ZERO = "0, with exact LoRA too"
ROUNDING = "nothing but rounding: others are far larger"
# and on one that is wrong
MISSING = "missing, exact LoRA has one"
ZERO = "0, with exact LoRA it is not"
NOT_FINITE = "not finite, with exact LoRA it is"
EXTRA = "there, and should not be: exact LoRA has none"
WRONG = (MISSING, ZERO, NOT_FINITE, EXTRA)


@dataclass(frozen=True)
class Gradient:
    """The gradient of one trained weight: its cosine with the exact one, and |difference| / |exact one|.

    layer: None outside of the layers. note: what else there is to say, one of the above. Both numbers are None where
    there is nothing to compare; a gradient that is wrong has cosine 0 and error 1.
    """

    name: str
    layer: int | None
    cosine: float | None
    error: float | None
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """Means of cosine and error of gradients, and the one with the smallest cosine."""

    cosine: float
    error: float
    worst: Gradient

    @classmethod
    def of(cls, gradients: Iterable[Gradient]) -> "Summary | None":
        """None of gradients without numbers."""
        told = [gradient for gradient in gradients if gradient.cosine is not None]
        if not told:
            return None
        means = (fmean(getattr(gradient, name) for gradient in told) for name in ("cosine", "error"))
        return cls(*means, min(told, key=lambda gradient: gradient.cosine))


@dataclass(frozen=True)
class SlotFidelity:
    """A slot that is not kept exactly: the gradients where it alone is not, and what it takes.

    kept_as: its savers. n_bytes: of a token, all layers together; better: how many more another saver would take, by
    its name in slot_savers. n_bytes is None, and better empty, where that depends on the length of rows.
    """

    slot: str
    kept_as: str
    n_bytes: float | None
    better: dict[str, float]
    gradients: list[Gradient]

    @property
    def summary(self) -> Summary | None:
        return Summary.of(self.gradients)


@dataclass(frozen=True)
class Verification:
    """What verify() found; print() it. gradients: of every trained weight; slots: those that hurt most first.

    exact: what they are compared with. rounding: the gradients where all slots are kept exactly, None if these are what
    the others are compared with. loss, exact_loss: of the n_batches that were measured, equal but for rounding.
    n_calibrating: batches that calibrated the slots; 0 where training had done so. apart: those that were measured are
    other ones.
    """

    gradients: list[Gradient]
    slots: list[SlotFidelity]
    exact: str
    rounding: list[Gradient] | None
    loss: float
    exact_loss: float
    n_batches: int
    n_calibrating: int
    apart: bool

    @property
    def summary(self) -> Summary | None:
        return Summary.of(self.gradients)

    @property
    def wrong(self) -> list[Gradient]:
        """Gradients that are missing, zero or not finite, where exact LoRA's are not."""
        return [gradient for gradient in self.gradients if gradient.note in WRONG]

    def check(self, threshold: float) -> None:
        """ValueError if any cosine is below the threshold; the message says which, and what would help."""
        low = [g for g in self.gradients if g.cosine is not None and g.cosine < threshold]
        if not low:
            return
        worst = min(low, key=lambda gradient: gradient.cosine)
        said = f"is {worst.note}" if worst.note else f"has cosine {worst.cosine:.3f} with that of exact LoRA"
        others = f", and {len(low) - 1} more are below it" if len(low) > 1 else ""
        raise ValueError(
            f"verify: the gradient of {short(worst.name)} {said}, less than the threshold {threshold:g}{others}; "
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        first = next((slot for slot in self.slots if slot.summary and slot.better), None)
        if first is None:
            return "use more bits (q_bit), or a lower threshold if that is meant"
        saver, more = next(iter(first.better.items()))
        return (
            f'slot {first.slot} hurts most: slot_savers={{"{first.slot}": "{saver}"}} takes {more:.0f} bytes a token '
            "more; or use more bits (q_bit), or a lower threshold if that is meant"
        )

    def __str__(self) -> str:
        return "\n".join([*self._heading(), "", *self._by_layer(), "", *self._by_slot(), *self._notes()])

    def _heading(self) -> list[str]:
        found = self.summary
        calibrating = f"{self.n_calibrating} other ones" if self.apart else f"{self.n_calibrating}, this one among them"
        source = calibrating if self.n_calibrating else "what was trained on"
        return [
            f"verify: gradients of {len(self.gradients)} trained weights beside those of {self.exact}",
            f"  batches measured: {self.n_batches}, calibrated on: {source}; loss {self.loss:.6g}, there "
            f"{self.exact_loss:.6g}",
            f"  cosine {found.cosine:.5f} and error {found.error:.4f} on average; smallest cosine "
            f"{found.worst.cosine:.4f}: {short(found.worst.name)}",
        ]

    def _by_layer(self) -> list[str]:
        """A row a layer: all slots as they are kept, then the error of each slot alone."""
        layers = sorted({g.layer for g in self.gradients}, key=lambda layer: (layer is None, layer))
        alone = [(slot.slot, slot.gradients) for slot in self.slots]
        rows = [["layer", "cosine", "smallest", "error", *(f"{name} alone" for name, _ in alone)]]
        for layer in layers:
            found = Summary.of(g for g in self.gradients if g.layer == layer)
            if found is None:
                continue
            errors = [Summary.of(g for g in gradients if g.layer == layer) for _, gradients in alone]
            numbers = [f"{found.cosine:.5f}", f"{found.worst.cosine:.4f}", f"{found.error:.4f}"]
            numbers += ["" if error is None else f"{error.error:.4f}" for error in errors]
            rows.append(["others" if layer is None else str(layer), *numbers])
        return _table(rows)

    def _by_slot(self) -> list[str]:
        if not self.slots:
            return ["  all slots are kept exactly"]
        savers = list(dict.fromkeys(name for slot in self.slots for name in slot.better))
        rows = [["slot alone", "cosine", "smallest", "error", "bytes a token", *(f"as {s}" for s in savers), "kept as"]]
        for slot in self.slots:
            found = slot.summary
            numbers = [f"{found.cosine:.5f}", f"{found.worst.cosine:.4f}", f"{found.error:.4f}"] if found else [""] * 3
            numbers.append("" if slot.n_bytes is None else f"{slot.n_bytes:.0f}")
            numbers += [f"+{slot.better[s]:.0f}" if s in slot.better else "" for s in savers]
            rows.append([slot.slot, *numbers, slot.kept_as])
        if self.rounding is not None and (found := Summary.of(self.rounding)):
            numbers = [f"{found.cosine:.5f}", f"{found.worst.cosine:.4f}", f"{found.error:.4f}"]
            rows.append(["none", *numbers, *[""] * (len(savers) + 1), "all exact: rounding"])
        first = self.slots[0]
        lines = [f"  {first.slot} hurts most" + (f", then {self.slots[1].slot}" if self.slots[1:] else "")]
        if first.better:
            saver, more = next(iter(first.better.items()))
            lines[0] += f': slot_savers={{"{first.slot}": "{saver}"}} takes {more:.0f} bytes a token more'
        return [*_table(rows, text=1), *lines]

    def _notes(self) -> list[str]:
        """What is wrong, weight by weight; what has to be so, in numbers."""
        lines = [f"  WRONG: the gradient of {short(gradient.name)} is {gradient.note}" for gradient in self.wrong]
        for note in (AT_START, UNUSED, ALWAYS_ZERO, ROUNDING):
            names = [short(gradient.name) for gradient in self.gradients if gradient.note == note]
            if names:
                lines.append(f"  {len(names)} weights, as {names[0]}: the gradient is {note}")
        return lines


def short(name: str) -> str:
    """A weight's name without what all of them have."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


def _table(rows: list[list[str]], text: int = 0) -> list[str]:
    """Rows in columns; numbers on the right, the first column and so many of the last, which are text, on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, *range(len(widths) - text, len(widths))}
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        cells = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
