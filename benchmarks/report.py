"""Tables and figures from the result files: nothing in them is typed.

python -m benchmarks.report            # write the generated parts of README.md and benchmarks/README.md, figures/*.png
python -m benchmarks.report --check    # exit 1 if a file is not what the result files say
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.report_attention import attention
from benchmarks.report_combinations import combinations
from benchmarks.report_experiments import alpaca_texts, experiments, other_experiments
from benchmarks.report_generation import generation
from benchmarks.report_kills import faults, kills
from benchmarks.report_longest_rows import longest_rows
from benchmarks.report_plan import planned, planned_peers
from benchmarks.report_plan_check import every_case, of_kinds
from benchmarks.report_plan_times import plan_times
from benchmarks.report_real_rows import packed_rows, real_rows
from benchmarks.report_scaling import scaling
from benchmarks.report_steady import steady
from benchmarks.rows import (
    LSE_KEPT,
    describe_batch,
    describe_device,
    describe_model,
    load,
    load_7b,
    memory_cells,
    name_of,
    presets_of,
)
from benchmarks.tables import SITTINGS, remarks, source, table
from benchmarks.technique_tables import technique_grid, techniques
from hyclora.models.config import BITS, PRESETS, SLOTS, HycloraConfig
from hyclora.models.patch import FAMILIES
from hyclora.utils.errors import entry_point

ROOT = RESULTS.parent.parent
FIGURES = ROOT / "figures"
MIB = 2**20
SHAPE = "llama-2-7b"  # of the README's first tables: all peers were measured there
FEW = 4  # rows that make no table of their own
PLAIN, CHECKPOINTING = "PEFT LoRA", "PEFT LoRA, checkpointing"
CARDS, RESERVE = (8, 12, 16, 24, 48, 80), 1  # GB of 10^9 bytes, and what is left for the driver and CUDA


def families() -> str:
    """Model families by Hugging Face's model_type."""
    return f"Models: {', '.join(f'`{name}`' for name in FAMILIES)} (the `model_type` in a model's `config.json`)."


def parameters() -> str:
    """Every option of HycloraConfig."""
    rows = [["`use_hyclora`", "Keep the activations compressed; False trains stock PEFT LoRA.", "`True`"]]
    for name, default in HycloraConfig().to_dict().items():
        help = HycloraConfig.__dataclass_fields__[name].metadata["help"]
        rows.append([f"`{name}`", help, f"`{default}`"])
    return table(["parameter", "meaning", "default"], rows)


def slots() -> str:
    """What each layer type does with each slot."""
    rows = []
    for slot, names in itertools.groupby(SLOTS, SLOTS.get):
        rows.append([", ".join(f"`{name}`" for name in names), slot.block, "exact", slot.intra, slot.inter, slot.again])
    return table(["slot", "block", "baseline", "intra", "intra_inter, full_fuse", "while run again"], rows)


def cost(line: dict) -> str:
    """What a setting takes: dyn, held if it was measured, time."""
    held = f" (held {line['held_mib']:.0f})" if "held_mib" in line else ""
    return f"{line['dyn_mib']:.0f} MiB{held}, {line['ms']:.0f} ms"


def presets() -> str:
    """The settings that have a name, what each changes, and what it takes where peers and several were measured."""
    cells = [
        (cell, lines)
        for cell, lines in latest_cells()
        if any(isinstance(line["setting"], str) for line in lines)
        and sum(bool(presets_of(line["setting"])) for line in lines) > 1
    ]
    rows = []
    for name, preset in PRESETS.items():
        changed = ", ".join(f"`{field}={value}`" for field, value in preset.settings.items()) or "none"
        found = [next((x for x in lines if name in presets_of(x["setting"])), None) for _, lines in cells]
        costs = ["" if line is None else cost(line) for line in found]
        rows.append([f"`{name}`", preset.meaning, changed, *costs])
    return table(["preset", "what it does", "changes", *(describe_batch(cell) for cell, _ in cells)], rows)


def kept() -> str:
    """Bytes of a layer: plain LoRA without and with checkpointing, and each number of bits."""
    names = [PLAIN, CHECKPOINTING, *(f"intra_inter, {bits} bit" for bits in BITS)]
    return buffered_table([line for line in kept_lines() if name_of(line["setting"]) in names])


def buffered() -> str:
    return buffered_table(kept_lines())


def kept_lines() -> list[dict]:
    """The lines of a 7B layer, plain LoRA first."""
    lines = load_7b("buffered")
    return sorted(lines, key=lambda line: isinstance(line["setting"], dict))


def buffered_table(lines: list[dict]) -> str:
    plain = next((line["layer_bytes"] for line in lines if name_of(line["setting"]) == PLAIN), math.nan)
    rows = [
        [name_of(line["setting"]), f"{line['layer_bytes'] / MIB:.1f}", f"{plain / line['layer_bytes']:.1f}x"]
        for line in lines
    ]
    head = ["a Llama-2-7B layer, 4 x 512 tokens", "MiB kept for backward", "less than plain LoRA"]
    return table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.buffered")


def accuracy() -> str:
    """Gradients and test loss of the 27M LLaMA, by bits."""
    tuned = finetune_lines()
    lines = [line for line in load("fidelity", "model", "later") if line["model"] == "small-llama"]
    cosines = {name_of(line["setting"]): line for line in lines if "first" not in line}
    rows, used = [], []
    for line in sorted(tuned, key=lambda line: line["setting"]["scale_rule"] if line["setting"] else ""):
        found = cosines.get(name_of(line["setting"]))
        if found and line["setting"]["q_bit"] != "auto":
            used += [line, found]
            rows.append([name_of(line["setting"]), f"{found['cosine']:.4f}", f"{line['gap']:+.4f}"])
    head = ["27M LLaMA on GSM8K", "cosine of gradients with exact ones", "test loss after 300 steps over exact, nats"]
    commands = "python -m benchmarks.fidelity` and `python -m benchmarks.finetune"
    return table(head, rows) + "\n\n" + source(used, commands)


def fidelity() -> str:
    measured = load("fidelity", "model", "label")
    lines = [line for line in measured if line["setting"]["slot_savers"] in ({}, LSE_KEPT) and "first" not in line]
    models = list(dict.fromkeys(line["model"] for line in lines))
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        cell = f"{line['cosine']:.4f} ({line['smallest']:.2f}), {line['bits']:.2f}"
        cells.setdefault(name_of(line["setting"]), {})[line["model"]] = cell
    rows = [[name, *(found.get(model, "") for model in models)] for name, found in cells.items()]
    head = ["cosine of LoRA gradients (smallest), bits an element"]
    command = "python -m benchmarks.fidelity --model FOLDER --data DATA"
    parts = [table([*head, *models], rows), source(lines, command)]
    return "\n\n".join([*parts, *poor_rows_first([line for line in measured if "first" in line])])


def poor_rows_first(lines: list[dict]) -> list[str]:
    """A row a kind of first rows, for each model and setting at once and so many usual forwards later."""
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        later = f"{line['later']} usual forwards later" if line["later"] else "at once"
        column = f"{line['model']}, {name_of(line['setting'])}, {later}"
        cells.setdefault(line["first"], {})[column] = f"{line['cosine']:.4f} ({line['smallest']:.2f})"
    columns = list(dict.fromkeys(column for found in cells.values() for column in found))
    rows = [[f"`{first}`", *(found.get(column, "") for column in columns)] for first, found in cells.items()]
    command = "python -m benchmarks.fidelity --first usual empty one_id short code"
    return [table(["what calibration saw first", *columns], rows), source(lines, command)] if lines else []


def finetune_lines() -> list[dict]:
    """Those of 300 steps, by test loss."""
    lines = [line for line in load("finetune", "label", "steps") if line["arguments"]["steps"] == 300]
    return sorted(lines, key=lambda line: line["gap"])


def finetune() -> str:
    lines = finetune_lines()
    rows = [[name_of(line["setting"]), f"{line['test_loss']:.4f}", f"{line['gap']:+.4f}"] for line in lines]
    head = ["300 steps of 16 on GSM8K, 27M LLaMA", "test loss, nats", "against exact LoRA"]
    return (
        table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.finetune --model FOLDER --data FOLDER --paper")
    )


def latest_cells() -> list[tuple[tuple, list[dict]]]:
    """The cells of SHAPE on the GPU measured last, with the lines that have memory and time."""
    cells = memory_cells()
    return [
        (cell, [line for line in lines if "dyn_mib" in line and "ms" in line])
        for cell, lines in cells.items()
        if cell[:2] == (next(iter(cells))[0], SHAPE)
    ]


def headline() -> str:
    """On the GPU measured last, for each batch: ours, the most frugal peer, the fastest one, plain LoRA checkpointing.

    Ours is the fastest preset that needs no more memory than the most frugal peer.
    """
    rows, used, title = [], [], ""
    for cell, lines in latest_cells():
        peers = [line for line in lines if isinstance(line["setting"], str)]
        frugal = min(peers, key=lambda line: line["dyn_mib"], default={"dyn_mib": -1})
        ours = [line for line in lines if presets_of(line["setting"]) and line["dyn_mib"] <= frugal["dyn_mib"]]
        if not ours:
            continue
        found = [(min(ours, key=lambda line: line["ms"]), "")]
        fastest = min(peers, key=lambda line: line["ms"])
        for line in sorted(peers, key=lambda line: (line is not frugal, line is not fastest)):
            roles = ["the most frugal peer"] * (line is frugal) + ["the fastest peer"] * (line is fastest)
            if roles or line["setting"] == CHECKPOINTING:
                found.append((line, " and ".join(roles) if len(peers) > 1 else "the only peer measured"))
        title = f"{describe_device(cell)}, {describe_model(cell)}"
        for line, role in found:
            name = name_of(line["setting"]) + (f" ({role})" if role else "")
            name = name if line in peers else f"**{name}**"
            memory = [f"{line[key]:.0f}" if key in line else "" for key in ("dyn_mib", "held_mib", "host_mib")]
            rows.append([describe_batch(cell), name, *memory, f"{line['ms']:.0f}"])
        used += [line for line, _ in found]
    if not rows:
        return ""
    head = [title, "", "dyn MiB", "held MiB", "host MiB", "ms"]
    note = f"{SITTINGS}\n\n"
    mixed = note if len({line["commit"] for line in used}) > 1 else ""
    named = [(name_of(line["setting"]), line) for line in used]
    parts = [mixed + source(used, "python -m benchmarks.memory_throughput"), *remarks(named)]
    return "\n\n".join([table(head, rows), *parts])


def fits() -> str:
    """GPU memory in all of every batch that was measured, and the smallest card that has as much."""
    rows, used = {}, []
    for cell, lines in memory_cells().items():
        lines = sorted((line for line in lines if "held_mib" in line), key=total_gb)
        peers = [line for line in lines if isinstance(line["setting"], str)]
        ours = [line for line in lines if isinstance(line["setting"], dict)]
        columns = [ours, [x for x in peers if x["setting"] not in (PLAIN, CHECKPOINTING)]]
        columns += [[x for x in peers if x["setting"] == name] for name in (CHECKPOINTING, PLAIN)]
        key = (describe_model(cell), cell[4] * cell[5], describe_batch(cell))
        if ours and key not in rows:
            rows[key] = [told(found[0], i < 2) if found else "" for i, found in enumerate(columns)]
            used += [found[0] for found in columns if found]
    head = ["model", "batch", "HyC-LoRA", "most frugal other peer", CHECKPOINTING, PLAIN]
    named = [[model, batch, *columns] for (model, _, batch), columns in sorted(rows.items())]
    return table(head, named) + "\n\n" + source(used, "python -m benchmarks.memory_throughput") if rows else ""


def total_gb(line: dict) -> float:
    """All that a line takes of the GPU, in 10^9 bytes."""
    return (line["static_mib"] + line["held_mib"]) * MIB / 1e9


def told(line: dict, named: bool) -> str:
    """What a line takes of the GPU, and the smallest of CARDS that has it."""
    size, host = total_gb(line), line.get("host_mib", 0) * MIB / 1e9
    card = next((f"{card} GB card" for card in CARDS if size + RESERVE <= card), f"more than {CARDS[-1]} GB")
    words = [f"{size:.1f} GB", card, *([f"{host:.1f} GB of host memory"] if host >= 0.1 else [])]
    return (f"{name_of(line['setting']).removeprefix('HyC-LoRA ')}: " if named else "") + ", ".join(words)


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
    parts += [f"![{alt}](../figures/{name}.png)" for name, alt in drawn.items() if (FIGURES / f"{name}.png").exists()]
    return "\n\n".join(parts)


def memory_table(title: str, named: list[tuple[str, dict]]) -> list[str]:
    """Named lines as a table and what is said below it."""
    lines = [line for _, line in named]
    head = [title, "static MiB", "dyn MiB", "held MiB", "buffered MiB (host)", "ms a micro-step", "tokens/s"]
    found = table(head, [[name, *memory_columns(line)] for name, line in named])
    notes = [source(lines, "python -m benchmarks.memory_throughput")]
    if any(line["benchmark"] == "step" for line in lines):
        notes.append("*Rows without buffered: by the predecessor, which ran all settings in one process.*")
    return [found, *notes, *remarks(named)]


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


NOTHING = "*Not measured on a GPU yet.*"
PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {
        "real_rows": real_rows,
        "headline": headline,
        "presets": presets,
        "families": families,
        "fits": fits,
        "plan_check": of_kinds,
        "longest_rows": longest_rows,
        "kept": kept,
        "accuracy": accuracy,
        "experiments": experiments,
        "techniques": techniques,
        "scaling": scaling,
        "parameters": parameters,
        "slots": slots,
        "kills": kills,
        "faults": faults,
        "steady": steady,
        "combinations": combinations,
    },
    ROOT / "benchmarks" / "README.md": {
        "memory_throughput": memory_throughput,
        "planned": planned,
        "planned_peers": planned_peers,
        "plan_check": every_case,
        "plan_times": plan_times,
        "packed_rows": packed_rows,
        "technique_grid": technique_grid,
        "alpaca_texts": alpaca_texts,
        "generation": generation,
        "buffered": buffered,
        "fidelity": fidelity,
        "other_experiments": other_experiments,
        "finetune": finetune,
        "kernels": kernels,
        "attention": attention,
    },
}


def render(file: Path) -> str:
    """The file with every part between <!-- name --> and <!-- end name --> made anew."""
    text = file.read_text(encoding="utf-8")
    for name, make in PARTS[file].items():
        before, after = text.split(f"<!-- {name} -->\n")[0], text.split(f"<!-- end {name} -->")[1]
        text = f"{before}<!-- {name} -->\n{make() or NOTHING}\n<!-- end {name} -->{after}"
    return text


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    if args.check:
        stale = [file.relative_to(ROOT) for file in PARTS if render(file) != file.read_text(encoding="utf-8")]
        sys.exit(f"{', '.join(map(str, stale))}: stale, run python -m benchmarks.report" if stale else 0)
    from benchmarks.figures import draw

    draw()  # first, as the texts show the figures that are there
    for file in PARTS:
        file.write_text(render(file), encoding="utf-8")


if __name__ == "__main__":
    main()
