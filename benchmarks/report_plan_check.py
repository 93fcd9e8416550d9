"""What hyclora.plan counts today beside the cases of benchmarks.plan_check: all of them, and how far off each kind is.

Measured are few layers of each model. `all` is static and held at full depth: what was measured, and what is counted
for the other layers.
"""

import statistics
from dataclasses import dataclass

from benchmarks import rows
from benchmarks.plan_check import NAME, Case, is_of_earlier_build, predict
from benchmarks.record import read
from benchmarks.tables import source, table
from hyclora.models.config import HycloraConfig
from hyclora.utils.planning.modes import describe

SIZES = ("static", "dyn", "held", "host")
COMMAND = f"python -m benchmarks.{NAME}"


@dataclass(frozen=True)
class Checked:
    """A case with its line, and what is counted in MiB: for the layers that were measured, and for all."""

    case: Case
    line: dict
    counted: dict
    full: dict

    @property
    def mode(self) -> str:
        """What a person calls the setting."""
        return describe(HycloraConfig(**self.case.setting), self.case.checkpointing)

    @property
    def kind(self) -> str:
        """What of a setting has counts of its own."""
        config = HycloraConfig(**self.case.setting)
        if self.case.checkpointing:
            return "gradient checkpointing"
        if "input" in config.layers:
            return "layer inputs"
        if config.attention == "eager":
            return "maps of attention"
        return "CUDA graphs" if config.cuda_graphs else "layer by layer"

    def pair(self, name: str) -> tuple[float, float] | None:
        """MiB counted and measured of one of SIZES or of all; None for host memory where none is used."""
        if name == "all":
            here, full = (found["static_mib"] + found["held_mib"] for found in (self.counted, self.full))
            return full, self.line["measured"]["static_mib"] + self.line["measured"]["held_mib"] + full - here
        measured = self.line["measured"].get(f"{name}_mib")
        return (self.counted[f"{name}_mib"], measured) if measured else None

    def off(self, name: str) -> float | None:
        """By how many percent the count is above what was measured."""
        found = self.pair(name)
        return found and 100 * (found[0] / found[1] - 1)


def checks() -> list[Checked]:
    """The last line of each case that was measured, of builds that took as much as today's; failures have none."""
    latest = {}
    for line in read(rows.RESULTS / f"{NAME}.jsonl"):
        case = Case(**line["arguments"])
        latest[str(case)] = case, line
    measured = [
        (case, line)
        for case, line in latest.values()
        if "held_mib" in line["measured"] and not is_of_earlier_build(line)
    ]
    return [Checked(case, line, predict(case, case.layers), predict(case, 0)) for case, line in measured]


def of_kinds() -> str:
    """How far off counts are, a row a kind."""
    found = checks()
    kinds = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    parts = [*sorted(kinds.items(), key=lambda item: -len(item[1])), ("**all of them**", found)]
    body = [
        [kind, str(len(ones)), *(spread([one.off(name) for one in ones]) for name in (*SIZES, "all"))]
        for kind, ones in parts
    ]
    head = ["", "cases", *SIZES, "static and held, all layers"]
    told = source([one.line for one in found], COMMAND)
    return f"{table(head, body)}\n\n{told}" if found else ""


def spread(offs: list[float | None]) -> str:
    """The median of percents without their sign, then the lowest and the highest of them."""
    known = [off for off in offs if off is not None]
    if not known:
        return ""
    return f"{statistics.median(map(abs, known)):.1f} % ({min(known):+.1f} to {max(known):+.1f})"


def every_case() -> str:
    """Counted beside measured, a row a case, and how far apart they are."""
    found = checks()
    head, body = [""], []
    for name in SIZES:
        head += [f"{name} MiB", "measured"]
    for one in found:
        pairs = [one.pair(name) for name in SIZES]
        numbers = [f"{n:.0f}" for pair in pairs for n in pair or ()]
        numbers += [""] * (2 * len(SIZES) - len(numbers))
        offs = [f"{one.off(name):+.1f} %" for name in ("dyn", "held", "all")]
        body.append([f"{one.case}, {one.counted['layers']} layers", *numbers, *offs])
    told = source([one.line for one in found], COMMAND)
    return f"{table([*head, 'dyn', 'held', 'all'], body)}\n\n{told}" if found else ""
