"""The table of what hyclora.plan counts beside what was measured, and how far a mode's counts are off.

python -m benchmarks.report_plan       # prints MEASURED of utils/planning/modes.py, as the result files have it
"""

from dataclasses import dataclass

from benchmarks import rows
from benchmarks.tables import source, table
from hyclora.utils.planning import Mode, Need, Savers, Shape, count
from hyclora.utils.planning.recorded import measured

MIB = 2**20
# lines before this are of builds in which more was alive at the peak (benchmarks/NOTES.md)
PRESENT = "2026-11-28T15:30"
HEAD = ["", "static MiB", "measured", "dyn MiB", "measured", "off", "host MiB", "measured", "of"]


@dataclass(frozen=True)
class Compared:
    """A measured line and what is counted for it."""

    mode: Mode
    line: dict
    need: Need

    @property
    def earlier(self) -> bool:
        return self.line["time"] < PRESENT

    def off(self, name: str) -> float:
        """By how many percent the count of static, dyn or host is above what was measured."""
        return 100 * (self.mib(name) / self.line[f"{name}_mib"] - 1)

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
    """Counted beside measured, a row a line."""
    lines, found = compared(), []
    for one in lines:
        a = one.line["arguments"]
        what = f"{a['shape']}, {a['base'].upper()}, {a['batch_size']} x {a['seq_len']}: {one.mode.name}"
        host = [f"{one.mib('host'):.0f}", f"{one.line['host_mib']:.0f}"] if one.line.get("host_mib") else ["", ""]
        numbers = [f"{n:.0f}" for name in ("static", "dyn") for n in (one.mib(name), one.line[f"{name}_mib"])]
        build = "an earlier build" if one.earlier else "the present one"
        found.append([what, *numbers, f"{one.off('dyn'):+.1f} %", *host, build])
    if not lines:
        return ""
    return table(HEAD, found) + "\n\n" + source([one.line for one in lines], "python -m benchmarks.memory_throughput")


if __name__ == "__main__":
    for name, of in accuracy().items():
        print(f"    {name!r}: {of},".replace("'", '"'))
