"""README tables and figures from the result files: nothing in them is typed.

python -m benchmarks.report            # write README.md's generated parts and figures/*.png
python -m benchmarks.report --check    # exit 1 if README.md is not what the result files say
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable

from benchmarks.record import RESULTS
from benchmarks.rows import (
    LSE_KEPT,
    describe_batch,
    describe_device,
    describe_model,
    load,
    load_7b,
    memory_cells,
    name_of,
)
from hyclora.models.config import SLOTS, HycloraConfig

ROOT = RESULTS.parent.parent
README, FIGURES = ROOT / "README.md", ROOT / "figures"
MIB = 2**20
FEW = 4  # rows that make no table of their own


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(lines: list[dict], command: str) -> str:
    """Where the numbers of a table come from."""
    devices = sorted({line["device"] for line in lines})
    commits = sorted({(line["commit"] or "unknown")[:8] for line in lines})
    names = ("torch", "triton", "transformers", "peft")
    stacks = dict.fromkeys(", ".join(f"{name} {line['versions'][name]}" for name in names) for line in lines)
    stack = " or ".join(stacks)
    return f"*{', '.join(devices)}; {stack}; commit {', '.join(commits)}; `{command}`.*"


def parameters() -> str:
    """Every option of HycloraConfig."""
    rows = [["`use_hyclora`", "Keep the activations compressed; False trains stock PEFT LoRA.", "`True`"]]
    for f in dataclasses.fields(HycloraConfig):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        rows.append([f"`{f.name}`", f.metadata["help"], f"`{default}`"])
    return table(["parameter", "meaning", "default"], rows)


def slots() -> str:
    """What each layer type does with each slot."""
    rows = [[f"`{name}`", slot.block, "exact", slot.intra, slot.inter] for name, slot in SLOTS.items()]
    return table(["slot", "block", "baseline", "intra", "intra_inter, full_fuse"], rows)


def buffered() -> str:
    lines = load_7b("buffered")
    rows = [[name_of(line["setting"]), f"{line['layer_bytes'] / MIB:.1f}", f"{line['ratio']:.2f}x"] for line in lines]
    head = ["7B layer, 4 x 512 tokens", "MiB kept for backward", "less than PEFT + SDPA"]
    return table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.buffered")


def fidelity() -> str:
    lines = load("fidelity", "model", "label")
    lines = [line for line in lines if line["setting"].get("slot_savers", LSE_KEPT) == LSE_KEPT]
    models = list(dict.fromkeys(line["model"] for line in lines))
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        cell = f"{line['cosine']:.4f} ({line['smallest']:.2f}), {line['bits']:.2f}"
        cells.setdefault(name_of(line["setting"]), {})[line["model"]] = cell
    rows = [[name, *(found.get(model, "") for model in models)] for name, found in cells.items()]
    head = ["cosine of LoRA gradients (smallest), bits an element"]
    return (
        table([*head, *models], rows)
        + "\n\n"
        + source(lines, "python -m benchmarks.fidelity --model FOLDER --data DATA")
    )


def finetune() -> str:
    lines = [line for line in load("finetune", "label", "steps") if line["arguments"]["steps"] == 300]
    lines.sort(key=lambda line: line["gap"])
    rows = [[name_of(line["setting"]), f"{line['test_loss']:.4f}", f"{line['gap']:+.4f}"] for line in lines]
    head = ["300 steps of 16 on GSM8K, 27M LLaMA", "test loss, nats", "against exact LoRA"]
    return (
        table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.finetune --model FOLDER --data FOLDER --paper")
    )


def headline() -> str:
    """On the GPU measured last, a row a batch: the most frugal peer, the fastest one, and ours.

    Ours is the fastest setting that needs no more memory than the most frugal peer.
    """
    rows, used = [], []
    cells = memory_cells()
    for cell, lines in cells.items():
        lines = [line for line in lines if "dyn_mib" in line and "ms" in line]
        peers = [line for line in lines if isinstance(line["setting"], str)]
        if cell[0] != next(iter(cells))[0] or not peers:
            continue
        frugal = min(peers, key=lambda line: line["dyn_mib"])
        ours = [line for line in lines if line not in peers and line["dyn_mib"] <= frugal["dyn_mib"]]
        if not ours:
            continue
        found = [frugal, min(peers, key=lambda line: line["ms"]), min(ours, key=lambda line: line["ms"])]
        cost = [f"{name_of(line['setting'])}: {line['dyn_mib']:.0f} MiB, {line['ms']:.0f} ms" for line in found]
        rows.append([f"{describe_model(cell)}, {describe_batch(cell)}", *cost])
        used += found
    if not rows:
        return ""
    head = ["memory over the static part, time of a micro-step", "most frugal peer", "fastest peer", "HyC-LoRA"]
    return table(head, rows) + "\n\n" + source(used, "python -m benchmarks.memory_throughput")


def memory_throughput() -> str:
    """A table a GPU, model and batch, by memory, failures with their cause last; batches with few rows share one."""
    parts = []
    for _, cells in itertools.groupby(memory_cells().items(), lambda item: item[0][0]):
        shared = {}
        for cell, lines in cells:
            lines.sort(key=lambda line: line.get("dyn_mib", math.inf))
            title = f"{describe_device(cell)}, {describe_model(cell)}"
            if len(lines) > FEW:
                named = [(name_of(line["setting"]), line) for line in lines]
                parts += memory_table(f"{title}, {describe_batch(cell)}", named)
            else:
                named = [(f"{describe_batch(cell)}: {name_of(line['setting'])}", line) for line in lines]
                shared.setdefault(title, []).extend(named)
        for title, named in shared.items():
            parts += memory_table(title, named)
    drawn = {
        "memory_breakdown": "what the peak is made of",
        "memory_length": "memory against tokens",
    }
    parts += [f"![{alt}](figures/{name}.png)" for name, alt in drawn.items() if (FIGURES / f"{name}.png").exists()]
    return "\n\n".join(parts)


def memory_table(title: str, named: list[tuple[str, dict]]) -> list[str]:
    """Named lines as a table and what is said below it."""
    lines = [line for _, line in named]
    head = [title, "static MiB", "dyn MiB", "held MiB", "buffered MiB (host)", "ms a micro-step", "tokens/s"]
    found = table(head, [[name, *memory_columns(line)] for name, line in named])
    notes = [source(lines, "python -m benchmarks.memory_throughput")]
    if any(line["benchmark"] == "step" for line in lines):
        notes.append("*Rows without buffered: by the predecessor, which ran all settings in one process.*")
    for remark in dict.fromkeys(line["remark"] for line in lines if "remark" in line):
        these = [name for name, line in named if line.get("remark") == remark]
        notes.append(f"*{remark[0].upper()}{remark[1:]}: {'; '.join(these)}.*")
    return [found, *notes]


def memory_columns(line: dict) -> list[str]:
    if "error" in line:
        return ["", line["error"].replace("|", "/"), "", "", "", ""]
    buffered, host = (f"{line[key]:.0f}" if key in line else "" for key in ("buffered_mib", "host_mib"))
    columns = [f"{line[key]:.0f}" if key in line else "" for key in ("static_mib", "dyn_mib", "held_mib")]
    columns.append(f"{buffered} ({host})" if line.get("host_mib") else buffered)
    if "ms" not in line:
        return [*columns, "", ""]
    low, high = line["ms_range"]
    return [*columns, f"{line['ms']:.0f} ({low:.0f} to {high:.0f})", str(line["tokens_per_second"])]


def kernels() -> str:
    lines = load_7b("kernels")
    rows = [
        [
            line["setting"],
            f"{1e3 * line['ms']:.0f}",
            f"{line['gb_s']:.0f}",
            f"{line['share']:.0%}",
            f"{line['same_bytes']:.0%}",
        ]
        for line in lines
    ]
    head = ["kernel, 7B widths, 2048 tokens", "us", "GB/s", "of the copy rate", "of a copy of as many bytes"]
    return table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.kernels")


PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "parameters": parameters,
    "slots": slots,
    "buffered": buffered,
    "fidelity": fidelity,
    "finetune": finetune,
    "memory_throughput": memory_throughput,
    "kernels": kernels,
}


def render(text: str) -> str:
    """README.md with every part between <!-- name --> and <!-- end name --> made anew."""
    for name, make in PARTS.items():
        before, after = text.split(f"<!-- {name} -->\n")[0], text.split(f"<!-- end {name} -->")[1]
        text = f"{before}<!-- {name} -->\n{make()}\n<!-- end {name} -->{after}"
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    if args.check:
        sys.exit("README.md is stale: python -m benchmarks.report" if render(text) != text else 0)
    from benchmarks.figures import draw

    draw()  # first, as README.md shows the figures that are there
    README.write_text(render(text), encoding="utf-8")


if __name__ == "__main__":
    main()
