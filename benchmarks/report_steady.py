"""The table of memory over many steps."""

from benchmarks.rows import CELL, describe_device, describe_model, load, named
from benchmarks.tables import NOT_YET, source, table

HEAD = ["allocated MiB", "held MiB", "tensors alive", "MiB of them", "host RSS MiB"]
KEYS = ("allocated_mib", "held_mib", "tensors", "tensor_mib", "rss_mib")


def steady() -> str:
    """A row a device, model, kind of rows and setting: first sample, last one, and the largest if that is more.

    A sentence without lines.
    """
    lines = load("steady", *CELL, "rows")
    if not lines:
        return NOT_YET
    rows = []
    for line in lines:
        cell = tuple((line["arguments"] | line)[key] for key in CELL)
        of = f"{describe_device(cell)}, {describe_model(cell)}, {cell[4]} {line['arguments']['rows']['steady']} rows"
        name = f"{of}, {named(line['setting'])}"
        if "error" in line:
            rows.append([name, line["error"].replace("|", "/"), *[""] * len(HEAD)])
            continue
        samples = line["samples"]
        steps = f"{samples[0]['step']} to {samples[-1]['step']}"
        rows.append([name, steps, *(course([s[key] for s in samples if key in s]) for key in KEYS)])
    return table(["memory", "steps", *HEAD], rows) + "\n\n" + source(lines, "python -m benchmarks.steady")


def course(numbers: list[float]) -> str:
    """From the first to the last, and what was more in between."""
    if not numbers:
        return ""
    ends = f"{numbers[0]:.0f} to {numbers[-1]:.0f}"
    return ends if round(max(numbers)) <= round(max(numbers[0], numbers[-1])) else f"{ends}, most {max(numbers):.0f}"
