"""The table of what hyclora.plan counts beside what was measured, and how far a mode's counts are off.

python -m benchmarks.report_plan       # prints MEASURED of utils/planning/modes.py, as the result files have it
"""

import statistics
from dataclasses import dataclass

from benchmarks import rows
from benchmarks.plan_check import Case
from benchmarks.record import read
from benchmarks.tables import source, table
from hyclora.utils.planning import Mode, Need, Savers, Shape, count
from hyclora.utils.planning.recorded import measured

MIB = 2**20
# lines before this are of builds in which more was alive at the peak (benchmarks/NOTES.md)
PRESENT = "2026-11-28T15:30"
EXPANDABLE = "expandable_segments:True"  # what a plan is for
SIZES = ("static", "dyn", "held")
JUDGED = (("dyn", ("dyn",)), ("held", ("held",)), ("static and held", ("static", "held")))
HEAD = [
    "",
    *(part for name in SIZES for part in (f"{name} MiB", "measured")),
    "dyn",
    "held",
    "all",
    "host MiB",
    "measured",
]
HEAD += ["of"]


@dataclass(frozen=True)
class Compared:
    """A measured line and what is counted for it."""

    mode: Mode
    line: dict
    need: Need

    @property
    def earlier(self) -> bool:
        return self.line["time"] < PRESENT

    def off(self, *names: str) -> float | None:
        """By how many percent the count of static, dyn, held, host, or of a sum of them, is above what was measured."""
        if any(f"{name}_mib" not in self.line for name in names):
            return None
        return 100 * (sum(map(self.mib, names)) / sum(self.line[f"{name}_mib"] for name in names) - 1)

    def mib(self, name: str) -> float:
        found = getattr(self.need, name)
        return (sum(found.values()) if isinstance(found, dict) else found) / MIB


def compared() -> list[Compared]:
    """The last line of each mode, model and batch, those of the present build first."""
    shapes: dict[tuple, Shape] = {}
    found = []
    for mode, line in measured(rows.RESULTS / "memory_throughput.jsonl"):
        arguments = line["arguments"]
        key = arguments["shape"], arguments["base"], arguments["lora_rank"]
        if key not in shapes:
            shapes[key] = Shape(*key)
        # a micro-step is measured without the optimizer's
        need = count(Savers(shapes[key], mode.config), arguments["batch_size"], arguments["seq_len"], steps=False)
        found.append(Compared(mode, line, need))
    return sorted(found, key=lambda one: (one.earlier, one.line["arguments"]["shape"], one.line["dyn_mib"]))


def accuracy() -> dict[str, tuple[int, float, bool]]:
    """Of each measured mode: lines, the largest difference of dyn in percent, whether all are of earlier builds."""
    found = {}
    for one in compared():
        found.setdefault(one.mode.name, []).append(one)
    told = {}
    for name, lines in found.items():
        present = [one for one in lines if not one.earlier]
        used = present or lines
        told[name] = len(used), round(max(abs(one.off("dyn")) for one in used), 1), not present
    return dict(sorted(told.items()))


def planned() -> str:
    """Counted beside measured, a row a line, and how far apart they are."""
    lines, found = compared(), []
    for one in lines:
        a = one.line["arguments"]
        what = f"{a['shape']}, {a['base'].upper()}, {a['batch_size']} x {a['seq_len']}: {one.mode.name}"
        host = [f"{one.mib('host'):.0f}", f"{one.line['host_mib']:.0f}"] if one.line.get("host_mib") else ["", ""]
        numbers = []
        for name in SIZES:
            measured_mib = one.line.get(f"{name}_mib")
            numbers += [f"{one.mib(name):.0f}", "" if measured_mib is None else f"{measured_mib:.0f}"]
        apart = [one.off(*names) for _, names in JUDGED]
        apart = ["" if off is None else f"{off:+.1f} %" for off in apart]
        build = "an earlier build" if one.earlier else "the present one"
        found.append([what, *numbers, *apart, *host, build])
    if not lines:
        return ""
    told = source([one.line for one in lines], "python -m benchmarks.memory_throughput")
    return "\n\n".join([table(HEAD, found), *summaries(lines), told])


def summaries(lines: list[Compared]) -> list[str]:
    """How far counts of the present build are off, in a sentence; none if there is no line."""
    present = [one for one in lines if not one.earlier and one.line.get("allocator") == EXPANDABLE]
    return _in_median([[one.off(*names) for _, names in JUDGED] for one in present], "lines of the present build")


def _in_median(offs: list[list[float]], of: str) -> list[str]:
    """offs: percents of a line for each of JUDGED."""
    parts = []
    for (said, _), off in zip(JUDGED, zip(*offs, strict=True), strict=False):
        median = statistics.median(map(abs, off))
        parts.append(f"{said} by {median:.1f} % (from {min(off):+.1f} to {max(off):+.1f} %)")
    return [f"*Off in the median of {len(offs)} {of}: {', '.join(parts)}.*"] if offs else []


def checked() -> str:
    """The last line of each case of benchmarks.plan_check, counted beside measured; failures have none."""
    latest = {str(Case(**line["arguments"])): line for line in read(rows.RESULTS / "plan_check.jsonl")}
    lines = {case: line for case, line in latest.items() if "dyn_mib" in line["measured"]}
    if not lines:
        return ""
    found, offs = [], []
    for case, line in lines.items():
        pairs = [(line["predicted"][f"{name}_mib"], line["measured"][f"{name}_mib"]) for name in SIZES]
        sums = {name: pair for name, pair in zip(SIZES, pairs, strict=True)}
        off = []
        for _, names in JUDGED:
            counted, measured_mib = (sum(sums[name][i] for name in names) for i in (0, 1))
            off.append(100 * (counted / measured_mib - 1))
        offs.append(off)
        numbers = [f"{n:.0f}" for pair in pairs for n in pair]
        hosts = [line[kind].get("host_mib") for kind in ("predicted", "measured")]
        host = [f"{n:.0f}" for n in hosts] if all(hosts) else ["", ""]
        found.append([f"{case}, {line['predicted']['layers']} layers", *numbers, *(f"{n:+.1f} %" for n in off), *host])
    told = source(list(lines.values()), "python -m benchmarks.plan_check")
    return "\n\n".join([table(HEAD[:-1], found), *_in_median(offs, "lines"), told])


if __name__ == "__main__":
    for name, of in accuracy().items():
        print(f"    {name!r}: {of},".replace("'", '"'))
