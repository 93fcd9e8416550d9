"""How far off the times are that hyclora.plan --measure predicts from a few layers."""

from benchmarks import rows
from benchmarks.plan_times import NAME, Case
from benchmarks.record import read
from benchmarks.report_plan_check import spread
from benchmarks.tables import source, table

HEADING = """### Times as they are predicted

`plan --measure` runs a few layers of each mode and tells the time of all. Beside micro-steps of all layers:"""


def lines() -> list[dict]:
    """The last line of each device, mode, model and batch that has both times."""
    latest = {}
    for line in read(rows.RESULTS / f"{NAME}.jsonl"):
        latest[line["device"], line["mode"], Case(**line["arguments"])] = line
    return [line for line in latest.values() if "measured_ms" in line]


def off(line: dict) -> float:
    """By how many percent the prediction is above what was measured."""
    return 100 * (line["predicted_ms"] / line["measured_ms"] - 1)


def plan_times() -> str:
    """Predicted beside measured, a row a line, and how far apart they are; "" without a line."""
    found = lines()
    if not found:
        return ""
    body = []
    for one in found:
        times = [f"{one[name]:.1f}" for name in ("predicted_ms", "measured_ms")]
        body.append([f"{Case(**one['arguments'])}: {one['mode']}", *times, f"{off(one):+.1f} %"])
    said = f"*Off in the median of {len(found)} lines by {spread([off(one) for one in found])}.*"
    head = ["a micro-step", "predicted ms", "measured ms", "off"]
    return "\n\n".join([HEADING, table(head, body), said, source(found, f"python -m benchmarks.{NAME}")])
