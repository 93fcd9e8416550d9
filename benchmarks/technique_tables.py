"""The tables and the picture of a technique grid, made of its lines, and where two reports contradict themselves.

Arrows come from pairs of lines that differ in one technique only: the geometric mean of what it multiplies a number
by, and the least and most of it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import RESULTS, read
from benchmarks.seed_reports import ABOUT, DOWN, IN_WORDS, MEMORY, NONE, REPORTS, TECHNIQUES, TIME, UP, Report
from benchmarks.tables import source, table
from benchmarks.technique_peers import UNSLOTH
from benchmarks.workers import NOT_DONE

FIGURES, SHAPE = RESULTS.parent.parent / "figures", "llama-2-7b"
SIGN = {UP: "↑", DOWN: "↓", NONE: "–"}
METHODS = {"all weights": (False, False), "LoRA": (True, False), "HyC-LoRA": (True, True)}
COLUMNS = (*METHODS, UNSLOTH)
# how far a number has to move for an arrow: a time differs from run to run
COUNTED, TIMED = 0.01, 0.05
LATE = (
    "*s is of all rows, with what is compiled, calibrated and recorded for the first ones; ms a row, and the run time "
    "of arrows, is the mean of the second half.*"
)
UNSEEN = "*FLOPs are those that torch sees: kernels of our own, which HyC-LoRA has on a GPU, are not among them.*"
ROWS = {
    "parameters": "parameters",
    "activations": "activations kept",
    "weight_copies": "16-bit copies of weights kept",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
}
OURS = (*TECHNIQUES, "HyC-LoRA")
OFF_VALUES = {"gradient_accumulation": 1, "gradient_checkpointing": "off", "mixed_precision": "off"}


def report(lines: list[dict], picture: Path | None) -> str:
    """All of it in Markdown; the picture is drawn if it has a place."""
    if picture is not None:
        draw(lines, picture)
    counted = any(line.get("counted") for line in lines)
    note = "\n\n*On a CPU the peak is counted: parameters, gradients, optimizer state and what the forward keeps.*"
    said = measured_table(lines) + note * counted
    found = "\n".join(f"- {text}" for text in contradictions())
    return "\n\n".join(
        [
            f"### Peak memory and run time\n\n{said}",
            f"### What each technique changes\n\n{arrows_table(lines)}",
            f"### Where two reports contradict themselves\n\n{ABOUT}\n\n{found}",
            *([f"![memory of every combination]({picture.name})"] if picture else []),
        ]
    )


@dataclass(frozen=True)
class Recorded:
    """A grid of benchmarks/results: the lines of one GPU and of the same settings."""

    lines: list[dict]

    @property
    def asked(self) -> dict:
        return self.lines[0]["arguments"]

    @property
    def base(self) -> str:
        return "NF4" if self.asked["load_in_4bit"] else self.asked["dtype"]

    @property
    def picture(self) -> Path:
        return FIGURES / f"techniques_{self.asked['model_name']}_{self.base}.png"

    def tables(self, folder: str) -> list[str]:
        """What it is, both tables, and the picture if there is one; folder: that of figures for the reader."""
        said = f"{self.lines[0]['device']}, {self.asked['model_name']}, {self.base}, {self.asked['max_train_samples']}"
        drawn = [f"![memory of every combination]({folder}/{self.picture.name})"] if self.picture.exists() else []
        return [f"{said} rows:", measured_table(self.lines), arrows_table(self.lines), *drawn]


def recorded() -> list[Recorded]:
    grids: dict[str, list[dict]] = {}
    for line in read(RESULTS / "technique_grid.jsonl"):
        grids.setdefault(json.dumps([line["device"], line["arguments"]]), []).append(line)
    return [Recorded(lines) for lines in grids.values()]


def draw_recorded() -> None:
    """The picture of each."""
    for grid in recorded():
        draw(grid.lines, grid.picture)


def technique_grid() -> str:
    """All grids that were recorded on a GPU, by GPU and settings, and what the reports say."""
    parts = [part for grid in recorded() for part in grid.tables("../figures")]
    said = "\n".join(f"- {text}" for text in contradictions())
    return "\n\n".join([*parts, f"Where the reports contradict themselves and each other:\n\n{said}"])


def techniques() -> str:
    """The grids of README's shape."""
    parts = [part for grid in recorded() if grid.asked["model_name"] == SHAPE for part in grid.tables("figures")]
    return "\n\n".join(parts)


def latest(lines: list[dict]) -> list[dict]:
    """The last line of each combination, in the order of first appearance."""
    return list({tuple(line["setting"].values()): line for line in lines}.values())


def method_of(line: dict) -> str:
    if peer := line["setting"].get("peer"):
        return peer
    asked = line["setting"]["use_lora"], line["setting"]["use_hyclora"]
    return next(name for name, found in METHODS.items() if found == asked)


def measured_table(lines: list[dict]) -> str:
    """A row a combination of the other techniques, peak memory and time of each method; x: out of memory.

    With trained weights the average loss of the training too.
    """
    lines = latest(lines)
    methods = [name for name in COLUMNS if any(method_of(line) == name for line in lines)]
    learns = not lines[0]["arguments"].get("random_weights", True)
    titles = ["MiB", "s", "ms a row", *(["loss"] if learns else [])]
    cells: dict[tuple, dict[str, list[str]]] = {}
    for line in sorted(lines, key=techniques_of):
        key = tuple(line["setting"][name] for name in OFF_VALUES)
        cells.setdefault(key, {})[method_of(line)] = columns(line)[: len(titles)]
    rows = [
        [
            "off" if key[0] == 1 else str(key[0]),
            *key[1:],
            *(cell for name in methods for cell in found.get(name, [""] * len(titles))),
        ]
        for key, found in cells.items()
    ]
    head = ["accumulation", "checkpointing", "mixed precision"]
    head += [f"{name}, {title}" if i == 0 else title for name in methods for i, title in enumerate(titles)]
    return "\n\n".join([table(head, rows), source(lines, "sweep=True bash run_alpaca.sh"), *notes(lines)])


def techniques_of(line: dict) -> tuple:
    """Orders lines by what is on beside the method, off first."""
    values = ((name, line["setting"][name]) for name in reversed(OFF_VALUES))
    return tuple((value != OFF_VALUES[name], str(value)) for name, value in values)


def columns(line: dict) -> list[str]:
    """Peak memory, run time, time of a later row, and loss of a line."""
    error = line.get("error")
    if error is None:
        loss = line.get("average_loss")
        numbers = [f"{line['peak_mib']:.0f}", f"{line['seconds']:.1f}", f"{line['row_ms']:.0f}"]
        return [*numbers, "" if loss is None else f"{loss:.4f}"]
    if error.startswith(NOT_DONE):
        return ["", f"> {error.split()[-2]}", "", ""]
    return ["x" if "out of memory" in error else error.replace("|", "/"), "", "", ""]


def notes(lines: list[dict]) -> list[str]:
    """What a reader of the numbers should know."""
    found = []
    if n := max(line.get("gpus", 1) for line in lines) - 1:
        others = "another GPU" if n == 1 else f"{n} other GPUs"
        found.append(f"*Measured while {others} of the host measured other combinations, which slows the host.*")
    if any(method_of(line) == UNSLOTH and "error" not in line for line in lines):
        found.append(f"*{UNSLOTH}, where checkpointing is on, has its own of all layers, in host memory.*")
    return [LATE, *found]


def is_on(line: dict, technique: str) -> bool:
    setting = line["setting"]
    if technique == "HyC-LoRA":
        return setting["use_hyclora"]
    if technique == "LoRA":
        return setting["use_lora"]
    name = technique.replace(" ", "_")
    return setting[name] != OFF_VALUES[name]


def pairs(lines: list[dict], technique: str) -> list[tuple[dict, dict]]:
    """(without, with) of lines that have all other techniques alike; HyC-LoRA is against LoRA."""
    names = [name.replace(" ", "_") for name in TECHNIQUES if name.replace(" ", "_") in OFF_VALUES]

    def others(line: dict) -> tuple:
        values = [line["setting"][name] for name in names if name != technique.replace(" ", "_")]
        return *values, *(is_on(line, name) for name in ("LoRA", "HyC-LoRA") if name != technique)

    measured = [line for line in lines if "error" not in line and method_of(line) in METHODS]
    without = {others(line): line for line in measured if not is_on(line, technique)}
    return [(without[others(line)], line) for line in measured if is_on(line, technique) and others(line) in without]


def arrows_table(lines: list[dict]) -> str:
    """A column a technique: arrow and factor of each resource over all pairs, and what they leave out; a sentence
    without any.
    """
    lines = latest(lines)
    compared = {name: found for name in OURS if (found := pairs(lines, name))}
    if not compared:
        return "*No two combinations that differ in one technique have been measured.*"
    rows = [
        [words, *(arrow([(a["mib"][name], b["mib"][name]) for a, b in found], COUNTED) for found in compared.values())]
        for name, words in ROWS.items()
    ]
    for words, key, least in (
        ("FLOPs", "flops", COUNTED),
        ("peak memory", "peak_mib", COUNTED),
        (TIME, "row_ms", TIMED),
    ):
        rows.append([words, *(arrow([(a[key], b[key]) for a, b in found], least) for found in compared.values())])
    titles = [f"{name} ({len(found)} pairs)" for name, found in compared.items()]
    unseen = "HyC-LoRA" in compared and not lines[0]["device"].startswith("CPU")
    return "\n\n".join([table(["", *titles], rows), *([UNSEEN] if unseen else [])])


def arrow(found: list[tuple[float, float]], least: float) -> str:
    """An arrow and its figure: the factor, or the MiB where there is nothing to multiply."""
    if all(a == b for a, b in found):
        return f"{SIGN[NONE]} 1.00x"
    if any(a == 0 or b == 0 for a, b in found):
        a, b = (sum(values) / len(found) for values in zip(*found, strict=True))
        return f"{SIGN[direction(b - a, least * max(a, b))]} {a:.1f} to {b:.1f} MiB"
    mean, low, high = spread(found)
    inside = f" ({low:.2f} to {high:.2f})" if high - low > 0.01 else ""
    return f"{SIGN[direction(mean - 1, least)]} {mean:.2f}x{inside}"


def direction(change: float, least: float) -> str:
    return UP if change > least else DOWN if change < -least else NONE


def spread(found: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Geometric mean, least and most of b / a."""
    factors = [b / a for a, b in found]
    return math.exp(sum(map(math.log, factors)) / len(factors)), min(factors), max(factors)


def contradictions() -> list[str]:
    """A sentence each, with the cells: an arrow against the report's measurements, report against report, words."""
    found = [text for one in REPORTS for i in range(len(TECHNIQUES)) for text in against_measured(one, i)]
    first, second = REPORTS
    for row in (*MEMORY, TIME):
        for name, a, b in zip(TECHNIQUES, first.arrows[row], second.arrows[row], strict=True):
            if a != b:
                found.append(f"{row} with {name}: {SIGN[a]} in the {first.name}, {SIGN[b]} in the {second.name}")
    return [*found, *IN_WORDS]


def against_measured(one: Report, i: int) -> list[str]:
    """What a report measured with technique i off and on, where its arrows say something else.

    Peak memory rises or falls only if one of the four kinds of memory does.
    """
    cells = [
        (off, one.measured[(*key[:i], True, *key[i + 1 :])])
        for key, off in one.measured.items()
        if not key[i] and (*key[:i], True, *key[i + 1 :]) in one.measured
    ]
    peaks = [(a[0], b[0]) for a, b in cells if a[0] and b[0]]
    times = [(a[1], b[1]) for a, b in cells if a[1] and b[1]]
    memory = {one.arrows[row][i] for row in MEMORY}
    found = []
    if peaks:
        went = direction(spread(peaks)[0] - 1, TIMED)
        if went != NONE and went not in memory:
            told = "/".join(SIGN[one.arrows[row][i]] for row in MEMORY)
            found.append(f"{start(one, i)} {', '.join(MEMORY)} are {told}, the peak went {cells_of(peaks, 'MB')}")
    if times:
        went, told = direction(spread(times)[0] - 1, TIMED), one.arrows[TIME][i]
        if went != told:
            found.append(f"{start(one, i)} {TIME} is {SIGN[told]}, measured {SIGN[went]}: {cells_of(times, 's')}")
    return found


def start(one: Report, i: int) -> str:
    return f"{one.name}, {TECHNIQUES[i]}:"


def cells_of(found: list[tuple[float, float]], unit: str) -> str:
    return ", ".join(f"{a:.2f} to {b:.2f} {unit} ({b / a - 1:+.0%})" for a, b in found)


def draw(lines: list[dict], file: Path) -> None:
    """A bar a combination: what its memory is made of, its peak, and its time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = latest(lines)[::-1]
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.3 * len(lines)))
    for y, line in enumerate(lines):
        left = 0.0
        for color, (name, words) in enumerate(ROWS.items()):
            size = line.get("mib", {}).get(name, 0)
            axes.barh(y, size, left=left, color=f"C{color}", label=words if y == 0 else None)
            left += size
        if "error" not in line:
            axes.plot(line["peak_mib"], y, "k|", markersize=10, label="peak" if y == 0 else None)
        text = "x" if "error" in line else f" {line['peak_mib']:.0f} MiB, {line['seconds']:.0f} s"
        axes.text(max(left, line.get("peak_mib", 0)), y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(lines)), [label(line) for line in lines], fontsize=8)
    axes.margins(x=0.2)
    axes.set_xlabel("MiB")
    model = lines[0]["arguments"].get("model_name", "")
    axes.set_title(f"{model}, {lines[0]['device']}: memory and run time of every combination", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3)
    figure.tight_layout()
    figure.savefig(file, dpi=130, metadata={"Software": None})
    plt.close(figure)


def label(line: dict) -> str:
    """The techniques that are on."""
    setting = line["setting"]
    words = [method_of(line)]
    words += [f"accumulation {setting['gradient_accumulation']}"] * is_on(line, "gradient accumulation")
    words += [f"checkpointing {setting['gradient_checkpointing']}"] * is_on(line, "gradient checkpointing")
    return ", ".join([*words, *([setting["mixed_precision"]] * is_on(line, "mixed precision"))])
