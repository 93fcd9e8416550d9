"""The table of runs that were killed and resumed."""

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
