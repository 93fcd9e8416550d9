"""The table of what was combined with what, and on which machines."""

from benchmarks.rows import load
from benchmarks.tables import source, table


def combinations() -> str:
    """A row a combination, a column a machine: tests that passed of those that ran, and inputs that were drawn."""
    lines = load("combinations", "device", "setting")
    devices = list(dict.fromkeys(line["device"] for line in lines))
    found = {(line["setting"], line["device"]): line for line in lines}
    rows = [
        [setting, *(cell(found.get((setting, device))) for device in devices)]
        for setting in dict.fromkeys(line["setting"] for line in lines)
    ]
    head = ["what is combined", *devices]
    return table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.combinations") if rows else ""


def cell(line: dict | None) -> str:
    if line is None:
        return ""
    ran = line["passed"] + line["failed"]
    drawn = f", {line['drawn']} inputs drawn" if "drawn" in line else ""
    skipped = f", {line['skipped']} not for it" if line["skipped"] else ""
    return f"{line['passed']} of {ran} tests{drawn}{skipped}"
