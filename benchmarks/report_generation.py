"""The table of what keeping keys and values is worth while a model writes."""

from benchmarks.rows import load, on_gpus
from benchmarks.tables import remarks, source, table

HEAD = ["tokens alike", "s with", "s without", "times as fast", "cache MiB", "peak MiB with", "without"]


def generation() -> str:
    """A row a model, dtype and number of rows, of lines from a GPU; "" without any."""
    lines = on_gpus(load("generation", "model", "dtype", "rows", "new"))
    if not lines:
        return ""
    rows, named = [], []
    for line in lines:
        kept, again = line["with"], line["without"]
        asked = line["arguments"]
        what = f"{asked['model']}, {asked['dtype']}, {asked['rows']} x {asked['new']} tokens"
        numbers = [f"{kept['seconds']:.2f}", f"{again['seconds']:.2f}", f"{again['seconds'] / kept['seconds']:.2f}x"]
        memory = [f"{size:.1f}" for size in (kept["cache_mib"], kept["peak_mib"], again["peak_mib"])]
        named.append((what, line))
        rows.append([what, f"{line['alike']} of {line['tokens']}", *numbers, *memory])
    parts = [table(["a cache of keys and values", *HEAD], rows), source(lines, "python -m benchmarks.generation")]
    return "\n\n".join([*parts, *remarks(named)])
