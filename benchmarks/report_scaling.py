"""The table of training on several GPUs, beside one."""

from benchmarks.real_rows import ACCUMULATE
from benchmarks.rows import CELL, describe_device, describe_model, load, named, on_gpus
from benchmarks.tables import SITTINGS, source, table

HEAD = [
    "real tokens/s a GPU", "of one GPU", "ms a micro-step", "NCCL ms", "held MiB", "host MiB", "losses of ten steps",
]  # fmt: skip
WAYS = {"ddp": "DDP", "fsdp2": "FSDP2"}


def scaling() -> str:
    """A table for each GPU, model and kind of rows; the GPU measured last comes first."""
    lines = on_gpus(load("scaling", *CELL, "rows", "gpus", "parallel"))
    cells: dict[tuple, list[dict]] = {}
    for line in lines:
        cells.setdefault(cell_of(line), []).append(line)
    return "\n\n".join(one_table(cell, found) for cell, found in cells.items())


def cell_of(line: dict) -> tuple:
    values = line["arguments"] | line
    return *(values[key] for key in CELL), "flat" in values["rows"]


def one_table(cell: tuple, lines: list[dict]) -> str:
    """A row for each number of GPUs and way; what one process does on the rows of all is there for its losses alone."""
    alone = {
        (named(line["setting"]), line["arguments"]["rows"]["accumulate"]): line.get("losses")
        for line in lines
        if "accumulate" in line["arguments"]["rows"]
    }
    shown = [line for line in lines if "accumulate" not in line["arguments"]["rows"]]
    one = {
        named(line["setting"]): line.get("real_tokens_per_second")
        for line in shown
        if line["arguments"].get("gpus", 1) == 1
    }
    title = f"{describe_device(cell)}, {describe_model(cell)}: {cell[4]} GSM8K rows"
    if cell[-1]:
        title = f"{describe_device(cell)}, {describe_model(cell)}: GSM8K rows packed to {cell[5]} tokens"
    rows = [[name_of_row(line), *columns(line, one, alone)] for line in shown]
    said = [SITTINGS] if len({line["commit"] for line in shown}) > 1 else []
    return "\n\n".join([table([title, *HEAD], rows), source(shown, "python -m benchmarks.scaling"), *said])


def name_of_row(line: dict) -> str:
    gpus = line["arguments"].get("gpus", 1)
    how = f"{gpus} GPUs, {WAYS[line['arguments'].get('parallel', 'ddp')]}" if gpus > 1 else "1 GPU"
    return f"{how}, {named(line['setting'])}"


def columns(line: dict, one: dict, alone: dict) -> list[str]:
    """alone: losses of one process, by setting and micro-steps before an optimizer step; one: its tokens a second."""
    if "error" in line:
        return [line["error"].replace("|", "/"), *[""] * (len(HEAD) - 1)]
    gpus, name = line["arguments"].get("gpus", 1), named(line["setting"])
    each = line["real_tokens_per_second"] / gpus
    times = f"{each / one[name]:.3f}x" if one.get(name) else ""
    found = [f"{each:.0f}", times, f"{line['ms']:.1f}", f"{line.get('communication_ms', 0):.1f}"]
    found += [f"{line['held_mib']:.0f}", f"{line['host_mib']:.0f}"]
    losses = next((x for (setting, every), x in alone.items() if setting == name and every == ACCUMULATE * gpus), None)
    if losses is None:
        return [*found, ""]
    return [
        *found,
        f"within {max(abs(a - b) for a, b in zip(losses, line['losses'], strict=True)):.4f} of one process's",
    ]
