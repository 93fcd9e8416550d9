"""The tables of runs that were killed or broken, and went on."""

from collections import defaultdict

from benchmarks.rows import load
from benchmarks.tables import source, table

HEAD = ["died in", "kills", "calibration was under way", "torn checkpoints passed over", "resumed runs bit-equal"]


def kills() -> str:
    """A row a device, driver and phase that a process died in; between: in none.

    Bit-equal: every loss, the scores, the predictions and the file of adapters. Calibration: as of the checkpoint.
    """
    lines, places = load("kills", "device", "model", "driver", "kill", "processes"), defaultdict(list)
    for line in lines:
        n = line.get("arguments", {}).get("processes", 1)
        places[line["device"], line["driver"] + ".py", f" of {n} processes" if n > 1 else "", line["killed_in"]].append(
            line
        )
    rows = []
    for (device, driver, several, place), found in sorted(places.items()):
        equal = sum("error" not in line and not line["differ"] for line in found)
        calibrating, torn = (sum(line[key] or 0 for line in found) for key in ("calibrating", "torn"))
        cells = [str(len(found)), str(calibrating), str(torn), f"{equal} of {len(found)}"]
        rows.append([f"{device}, `{driver}`{several}, {place}", *cells])
    return table(HEAD, rows) + "\n\n" + source(lines, "python -m benchmarks.kills") if rows else ""


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
