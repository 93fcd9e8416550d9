"""The table of what hyclora.plan counts beside what was measured, and how far a mode's counts are off.

python -m benchmarks.report_plan       # prints what the result files have for MEASURED of utils/planning/modes.py, and
                                       # for the lines of PEERS of peers.py there
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks import rows
from benchmarks.plan_check import LATE, kept_x_a
from benchmarks.report_plan_check import checks, spread
from benchmarks.tables import source, table
from hyclora.utils.planning import MODES, Mode, Need, Savers, Shape, count, mode_of
from hyclora.utils.planning.peers import PEERS, Peer, peer_of
from hyclora.utils.planning.recorded import measured

MIB = 2**20
# lines before this, and before LATE those of layers that are run again, are of builds in which more was alive at the
# peak (benchmarks/NOTES.md)
PRESENT = "2026-11-28T15:30"
# and before this slots of rows longer than LONG, as the rotation back of q and k had memory of its own
IN_PLACE, LONG = "2026-12-01T06:20", 65536
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


@dataclass(frozen=True)
class Compared:
    """A measured line and what is counted for it."""

    mode: Mode | Peer
    line: dict
    need: Need

    @property
    def earlier(self) -> bool:
        if kept_x_a(self.line, self.mode.config.to_dict()):
            return True
        of_slots = IN_PLACE if self.line["arguments"]["seq_len"] > LONG else PRESENT
        return self.line["time"] < (of_slots if self.mode.config.layers == "slots" else LATE)

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
    # a micro-step is measured without the optimizer's
    found = _lines(mode_of, lambda mode, shape, *batch: count(Savers(shape, mode.config), *batch, steps=False))
    return sorted(found, key=lambda one: (one.earlier, one.line["arguments"]["shape"], one.line["dyn_mib"]))


def compared_peers() -> list[Compared]:
    """The last line of each peer, model and batch."""
    found = map(_grown, _lines(peer_of, lambda peer, *of: peer.need(*of, steps=False)))
    return sorted(found, key=lambda one: (PEERS.index(one.mode), one.line["arguments"]["shape"], one.line["dyn_mib"]))


def _grown(one: Compared) -> Compared:
    """Staging buffers are live memory and not static where the steps before had shorter rows: then they grow."""
    staging = one.need.static["staging buffers"]
    arguments = one.line["arguments"]
    if not staging or arguments.get("warm_up_seq_len") in (None, arguments["seq_len"]):
        return one
    static = one.need.static | {"staging buffers": 0}
    moments = {name: size + staging for name, size in one.need.moments.items()}
    return replace(one, need=replace(one.need, static=static, moments=moments))


def _lines(of: Callable, need: Callable[..., Need]) -> list[Compared]:
    """The last lines of each mode that `of` knows, and its need of a shape, rows and their tokens."""
    shapes: dict[tuple, Shape] = {}
    found = []
    for mode, line in measured(rows.RESULTS / "memory_throughput.jsonl", of):
        arguments = line["arguments"]
        key = arguments["shape"], arguments["base"], arguments["lora_rank"]
        if key not in shapes:
            shapes[key] = Shape(*key)
        counted = need(mode, shapes[key], arguments["batch_size"], arguments["seq_len"])
        found.append(Compared(mode, line, counted))
    return found


def accuracy() -> dict[str, tuple[int, float, bool]]:
    """Of each measured mode: lines, the largest difference of dyn in percent, whether all are of earlier builds.

    Those of benchmarks.plan_check are lines too, of whatever rows and ranks.
    """
    lines = [(one.mode.name, one) for one in compared()]
    present = [(name, one) for name, one in lines if not one.earlier]
    present += [(one.mode, one) for one in checks() if one.mode in {mode.name for mode in MODES}]
    found: dict[str, list[float]] = {}
    earlier = {name for name, _ in lines} - {name for name, _ in present}
    for name, one in [*present, *(pair for pair in lines if pair[0] in earlier)]:
        found.setdefault(name, []).append(abs(one.off("dyn")))
    return {name: (len(offs), round(max(offs), 1), name in earlier) for name, offs in sorted(found.items())}


def accuracy_of_peers() -> dict[str, dict[str, tuple[int, float]]]:
    """Of each peer and shape: lines, and the largest difference of dyn in percent."""
    found: dict[str, dict[str, list[float]]] = {peer.name: {} for peer in PEERS}
    for one in compared_peers():
        found[one.mode.name].setdefault(one.line["arguments"]["shape"], []).append(abs(one.off("dyn")))
    return {name: {shape: (len(offs), round(max(offs), 1)) for shape, offs in of.items()} for name, of in found.items()}


def planned() -> str:
    """Counted beside measured, a row a line, and how far apart they are."""
    lines = compared()
    if not lines:
        return ""
    builds = ["an earlier build" if one.earlier else "the present one" for one in lines]
    cells = [[*row, build] for row, build in zip(_cells(lines), builds, strict=True)]
    return "\n\n".join([table([*HEAD, "of"], cells), *summaries(lines), _source(lines)])


def planned_peers() -> str:
    """That of the peers."""
    lines = compared_peers()
    return f"{table(HEAD, _cells(lines))}\n\n{_source(lines)}" if lines else ""


def _source(lines: list[Compared]) -> str:
    return source([one.line for one in lines], "python -m benchmarks.memory_throughput")


def _cells(lines: list[Compared]) -> list[list[str]]:
    found = []
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
        found.append([what, *numbers, *apart, *host])
    return found


def summaries(lines: list[Compared]) -> list[str]:
    """How far counts of the present build are off, in a sentence; none if there is no line."""
    present = [one for one in lines if not one.earlier and one.line.get("allocator") == EXPANDABLE]
    parts = [f"{said} by {spread([one.off(*names) for one in present])}" for said, names in JUDGED]
    return [f"*Off in the median of {len(present)} lines of the present build: {', '.join(parts)}.*"] if present else []


if __name__ == "__main__":
    for name, of in accuracy().items():
        print(f"    {name!r}: {of},".replace("'", '"'))
    for name, of in accuracy_of_peers().items():
        print(f"    {name!r}: {of},".replace("'", '"'))
