"""The tables of attention by flash-attn-4 beside torch's: kernels alone, and whole steps."""

import json

from benchmarks import rows
from benchmarks.attention import NAME, Cell
from benchmarks.record import read
from benchmarks.rows import CELL, describe_device, describe_model, named
from benchmarks.tables import source, table
from hyclora.operators.attention.flash4 import PACKAGE

KERNELS = "forward / forward and backward, ms, bf16, heads of 128"


def attention() -> str:
    """A row a cell, a column a kernel, and what flash-attn-4 takes of the time of torch's fastest; then steps."""
    latest = {json.dumps(line["cell"]): line for line in read(rows.RESULTS / f"{NAME}.jsonl")}
    lines = list(latest.values())
    if not lines:
        return ""
    names = [name for name in dict.fromkeys(name for line in lines for name in line["kernels"]) if name != PACKAGE]
    told = []
    for line in lines:
        found = line["kernels"]
        fastest = min((found[n]["both_ms"] for n in names if "both_ms" in found.get(n, {})), default=None)
        own = found[PACKAGE].get("both_ms")
        share = "" if None in (fastest, own) else f"{own / fastest:.2f}x"
        told.append([str(Cell(**line["cell"])), *(_times(found.get(n, {})) for n in (*names, PACKAGE)), share])
    parts = [
        table([KERNELS, *names, PACKAGE, "of torch's fastest"], told),
        source(lines, f"python -m benchmarks.{NAME}"),
    ]
    return "\n\n".join([*parts, *steps()])


def _times(found: dict) -> str:
    if "error" in found:
        return found["error"].replace("|", "/")
    return f"{found['forward_ms']:.3g} / {found['both_ms']:.3g}" if found else ""


def steps() -> list[str]:
    """Micro-steps of memory_throughput that ran by flash-attn-4, each under the last without it of that commit."""
    told, used = [], []
    lines = read(rows.RESULTS / "memory_throughput.jsonl")
    for i, line in enumerate(lines):
        if PACKAGE not in line["versions"] or "error" in line:
            continue
        same = [
            other
            for other in lines[:i]
            if PACKAGE not in other["versions"]
            and all(other[key] == line[key] for key in ("commit", "device", "setting", "arguments"))
        ]
        used += [*same[-1:], line]
        for one, kernel in (*((other, "torch's") for other in same[-1:]), (line, PACKAGE)):
            cell = tuple((one["arguments"] | one)[key] for key in CELL)
            of = f"{describe_device(cell)}, {describe_model(cell)}, {cell[4]} x {cell[5]} tokens"
            numbers = [f"{one[key]:.0f}" for key in ("dyn_mib", "held_mib", "host_mib")]
            told.append([of, named(one["setting"]), kernel, *numbers, f"{one['ms']:.1f}"])
    head = ["a micro-step", "", "attention", "dyn MiB", "held MiB", "host MiB", "ms"]
    return [table(head, told), source(used, "python -m benchmarks.memory_throughput")] if told else []
