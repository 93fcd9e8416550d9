"""The table of what keeping keys and values is worth while a model writes."""

from benchmarks.rows import load, on_gpus
from benchmarks.tables import NOT_YET, source, table

HEAD = ["tokens alike", "s with", "s without", "times as fast", "cache MiB", "peak MiB with", "without"]


def generation() -> str:
    """A row a model, dtype and number of rows, of lines from a GPU; a sentence without lines."""
    lines = on_gpus(load("generation", "model", "dtype", "rows", "new"))
    if not lines:
        return NOT_YET
    rows = []
    for line in lines:
        kept, again = line["with"], line["without"]
        asked = line["arguments"]
        what = f"{asked['model']}, {asked['dtype']}, {asked['rows']} x {asked['new']} tokens"
        numbers = [f"{kept['seconds']:.2f}", f"{again['seconds']:.2f}", f"{again['seconds'] / kept['seconds']:.2f}x"]
        memory = [f"{size:.1f}" for size in (kept["cache_mib"], kept["peak_mib"], again["peak_mib"])]
        rows.append([what, f"{line['alike']} of {line['tokens']}", *numbers, *memory])
    return f"{table(['a cache of keys and values', *HEAD], rows)}\n\n{source(lines, 'python -m benchmarks.generation')}"
