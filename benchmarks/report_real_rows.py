"""The tables of training on rows of many lengths, each setting beside the fastest peer of the same rows."""

import itertools

from benchmarks.rows import CELL, describe_device, describe_model, load, named, on_gpus
from benchmarks.tables import SITTINGS, remarks, source, table

HEAD = ["", "real tokens/s", "of the fastest peer", "ms a micro-step", "first 100, s", "dyn MiB", "held MiB"]


def real_rows(name: str = "real_rows") -> str:
    """Lines measured on a GPU, by GPU, model, rows a micro-step and dropout; the GPU measured last is first."""
    lines = sorted_by_cell(on_gpus(load(name, *CELL, "lora_dropout", "gpus", "rows")))
    groups = [(cell, list(found)) for cell, found in itertools.groupby(lines, cell_of)]
    return "\n\n".join(one_table(name, cell, found) for cell, found in groups)


def packed_rows() -> str:
    return real_rows("packed_rows")


def sorted_by_cell(lines: list[dict]) -> list[dict]:
    """Lines of one cell side by side, cells in the order of their first line, the fastest setting first."""
    order = list(dict.fromkeys(map(cell_of, lines)))
    return sorted(lines, key=lambda line: (order.index(cell_of(line)), -line.get("real_tokens_per_second", 0)))


def cell_of(line: dict) -> tuple:
    values = line["arguments"] | line
    rows = "Alpaca" if "alpaca" in (values.get("rows") or {}) else "GSM8K"
    return *(values[key] for key in CELL), rows, values.get("lora_dropout", 0), values.get("gpus", 1)


def one_table(name: str, cell: tuple, lines: list[dict]) -> str:
    """A row a setting; what failed says why."""
    measured = [line for line in lines if "error" not in line]
    peers = [line["real_tokens_per_second"] for line in measured if isinstance(line["setting"], str)]
    dropout = f", dropout {cell[-2]:g}" if cell[-2] else ""
    gpus = f"{cell[-1]} x " if cell[-1] > 1 else ""
    tokens = f", {measured[0]['real_tokens']} real tokens" if measured else ""
    what = f"{cell[4]} {cell[-3]} row{'s' * (cell[4] > 1)}"
    if name == "packed_rows":
        what = f"{cell[4]} x {cell[5]} tokens, packed Alpaca rows"
    each = " each" if cell[-1] > 1 else ""
    title = f"{gpus}{describe_device(cell)}, {describe_model(cell)}: {what}{each}{tokens}{dropout}"
    rows = [[named(line["setting"]), *columns(line, max(peers, default=None))] for line in lines]
    said = remarks([(named(line["setting"]), line) for line in lines])
    if len({line["commit"] for line in measured}) > 1:
        said.append(SITTINGS)
    parts = [table([title, *HEAD[1:]], rows), source(lines, f"python -m benchmarks.{name}"), *said]
    return "\n\n".join(parts)


def columns(line: dict, fastest: int | None) -> list[str]:
    if "error" in line:
        return [line["error"].replace("|", "/"), *[""] * (len(HEAD) - 2)]
    speed = line["real_tokens_per_second"]
    times = f"{speed / fastest:.2f}x" if fastest else ""
    numbers = [f"{line[key]:.{digits}f}" if key in line else "" for key, digits in (("ms", 0), ("first_100_s", 1))]
    return [str(speed), times, *numbers, *(f"{line[k]:.0f}" if k in line else "" for k in ("dyn_mib", "held_mib"))]
