"""The tables of runs that were killed or broken, and went on."""

from collections import defaultdict

from benchmarks.rows import load
from benchmarks.tables import source, table

HEAD = ["died in", "kills", "calibration was under way", "torn checkpoints passed over", "resumed runs bit-equal"]
BY_DEFAULT = "*By default: graphs and attention as ever, whose backward adds in any order on a GPU.*"


def kills() -> str:
    """A row a device, driver and phase that a process died in; between: in none.

    Bit-equal: every loss, the scores, the predictions and the file of adapters. Calibration: as of the checkpoint.
    """
    lines, places = load("kills", "device", "model", "driver", "kill", "processes", "exact"), defaultdict(list)
    for line in lines:
        asked = line.get("arguments", {})
        several = f" of {asked['processes']} processes" if asked.get("processes", 1) > 1 else ""
        how = {True: ", deterministic", False: ", by default"}.get(asked.get("exact"), "")
        places[line["device"] + how, line["driver"] + ".py", several, line["killed_in"]].append(line)
    rows = []
    for (device, driver, several, place), found in sorted(places.items()):
        calibrating, torn = (sum(line[key] or 0 for line in found) for key in ("calibrating", "torn"))
        cells = [str(len(found)), str(calibrating), str(torn), equal(found)]
        rows.append([f"{device}, `{driver}`{several}, {place}", *cells])
    notes = [BY_DEFAULT] if any(", by default" in device for device, *_ in places) else []
    notes += costs(lines)
    return "\n\n".join([table(HEAD, rows), source(lines, "python -m benchmarks.kills"), *notes]) if rows else ""


def equal(lines: list[dict]) -> str:
    """How many resumed runs were, or were as near to unbroken ones as these are to each other, and how near that is."""
    told = f"{sum('error' not in line and not line['differ'] for line in lines)} of {len(lines)}"
    near = [line for line in lines if "apart" in line]
    if not near:
        return told
    apart, own = (max(line[key] for line in near) for key in ("apart", "spread"))
    return f"{told} within twice the spread: adapters {apart:.1e} apart, unbroken ones {own:.1e}"


def costs(lines: list[dict]) -> list[str]:
    """What a micro-batch takes with deterministic algorithms, and by default."""
    times = {(line["device"], line["driver"]): line for line in lines if "default_ms" in line}
    return [
        f"*{device}, `{driver}.py`: {line['ms']:.0f} ms a micro-batch of these runs side by side where they are "
        f"deterministic, {line['default_ms']:.0f} by default.*"
        for (device, driver), line in times.items()
    ]


BROKEN = ["what happens", "exit code", "told", "goes on from step", "then all is as if nothing had happened"]


def faults() -> str:
    """A row a device and fault. A run that goes on by itself has no step to go on from."""
    lines = load("faults", "device", "model", "fault")
    rows = [[f"{line['device']}, {line['fault']}", str(line["exit_code"]), told(line), *end_of(line)] for line in lines]
    return table(BROKEN, rows) + "\n\n" + source(lines, "python -m benchmarks.faults") if rows else ""


def told(line: dict) -> str:
    """What the user reads of it."""
    if line["traceback"]:
        return "a traceback"
    if "finite" in line:
        return "a warning"
    return {0: "nothing", 1: "one sentence"}.get(line["sentences"], f"{line['sentences']} sentences")


def end_of(line: dict) -> list[str]:
    """From where it went on, and whether losses, scores, predictions and adapters are those of the unbroken run."""
    if "finite" in line:
        return ["", f"{line['skipped']} step skipped, adapters {'finite' if line['finite'] else 'NOT finite'}"]
    if "error" in line:
        return [str(line["resumed_from"]), line["error"].replace("|", "/")]
    passed = f", {line['torn']} torn passed over" if line["torn"] else ""
    differs = f"no: {', '.join(line['differ'])}" if line["differ"] else "yes, bit by bit"
    return [f"{line['resumed_from']}{passed}", differs]
