"""figures/*.png from the result files; a figure with nothing to show is not drawn."""

import matplotlib

from benchmarks.record import RESULTS
from benchmarks.rows import CELL, describe_batch, describe_device, describe_model, load, load_7b, memory_cells, name_of
from hyclora.models.config import SLOTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, after the backend is chosen
from matplotlib.ticker import NullFormatter  # noqa: E402

FIGURES = RESULTS.parent.parent / "figures"
MIB = 2**20
SHAPE, SPEED_CELLS, BREAKDOWN_CELL = "llama-2-7b", ((4, 512), (1, 8192)), (4, 512)


def draw() -> None:
    """All figures that the result files have lines for."""
    for figure in (kept, fidelity, memory_speed, memory_breakdown, memory_length):
        drawn = figure()
        if drawn is not None:
            drawn.tight_layout()
            drawn.savefig(FIGURES / f"{figure.__name__}.png", dpi=130, metadata={"Software": None})
            plt.close(drawn)


def kept():
    """Bytes of a 7B layer by slot."""
    lines = load_7b("buffered")
    figure, axes = plt.subplots(figsize=(9, 3.8))
    colors = dict(zip(SLOTS, plt.get_cmap("tab20").colors, strict=False))
    for y, line in enumerate(reversed(lines)):
        left = 0.0
        for slot, size in line["slots"].items():
            axes.barh(y, size / MIB, left=left, color=colors[slot], label=slot)
            left += size / MIB
        axes.barh(y, line["layer_bytes"] / MIB - left, left=left, color="lightgrey", label="rank-r, statistics, other")
        axes.text(line["layer_bytes"] / MIB + 3, y, f"{line['layer_bytes'] / MIB:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(lines)), [name_of(line["setting"]) for line in reversed(lines)], fontsize=8)
    axes.set_xlabel("MiB kept for backward by one Llama-2-7B layer, 4 x 512 tokens")
    _legend(axes, loc="lower right", ncols=2)
    return figure


def fidelity():
    """Gradient cosine against bits."""
    figure, axes = plt.subplots(figsize=(6, 3.8))
    lines = [line for line in load("fidelity", "model", "label") if "slot_savers" not in line["setting"]]
    lines = [line for line in lines if line["setting"].get("layer_type", "intra_inter") == "intra_inter"]
    for model in dict.fromkeys(line["model"] for line in lines):
        for rule, style in (("channel_group", "o-"), ("paper", "x--")):
            points = sorted(
                (line["bits"], 1 - line["cosine"])
                for line in lines
                if line["model"] == model and line["setting"].get("scale_rule", "channel_group") == rule
            )
            label = model + (", published quantizer" if rule == "paper" else "")
            axes.semilogy(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("bits an element kept, scales included")
    axes.set_ylabel("1 - cosine of the LoRA gradients")
    axes.legend(fontsize=8)
    return figure


def memory_speed():
    """Memory over the static part against tokens a second, and the settings that none beats in both."""
    cells = {cell[-2:]: (cell, lines) for cell, lines in _whole_cells("dyn_mib", "tokens_per_second")}
    panels = [cells[size] for size in SPEED_CELLS if size in cells]
    if not panels:
        return None
    figure, all_axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.6), squeeze=False)
    for axes, (cell, lines) in zip(all_axes[0], panels, strict=True):
        points = sorted((line["dyn_mib"], line["tokens_per_second"], name_of(line["setting"])) for line in lines)
        peers = {line["setting"] for line in lines if isinstance(line["setting"], str)}
        for number, (dyn, speed, name) in enumerate(points, 1):
            style, color, label = ("s", "tab:blue", "peers") if name in peers else ("o", "tab:red", "HyC-LoRA")
            axes.plot(dyn, speed, style, color=color, label=label)
            axes.annotate(number, (dyn, speed), textcoords="offset points", fontsize=7, xytext=(4, 4))
        names = "\n".join(f"{number}  {name}" for number, (*_, name) in enumerate(points, 1))
        axes.text(1.02, 1, names, transform=axes.transAxes, va="top", fontsize=7, linespacing=1.4)
        axes.step(*zip(*pareto(points), strict=True), where="post", color="grey", linewidth=1, label="Pareto front")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{describe_model(cell)}, {describe_batch(cell)}", fontsize=9)
        axes.set_xlabel("dyn: peak over static memory, MiB")
        axes.set_ylabel("tokens a second")
        axes.margins(x=0.15)
        _legend(axes)
    return figure


def pareto(points: list[tuple]) -> list[tuple[float, float]]:
    """(memory, speed) of the points that are faster than every point with less memory, by memory."""
    front: list[tuple[float, float]] = []
    for memory, speed, *_ in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    return front


def memory_breakdown():
    """What the peak of a micro-step is made of."""
    cells = [lines for cell, lines in _whole_cells("trained_mib", "buffered_mib") if cell[-2:] == BREAKDOWN_CELL]
    if not cells:
        return None
    lines = sorted(cells[0], key=lambda line: -line["peak_mib"])
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(lines)))
    for y, line in enumerate(lines):
        parts = {
            "frozen weights": line["static_mib"] - line["trained_mib"],
            "adapters, gradients, optimizer": line["trained_mib"],
            "buffered after the forward": line["buffered_mib"],
            "rest of the peak": line["dyn_mib"] - line["buffered_mib"],
        }
        left = 0.0
        for color, (label, size) in enumerate(parts.items()):
            axes.barh(y, size, left=left, color=f"C{color}", label=label)
            left += size
    axes.set_yticks(range(len(lines)), [name_of(line["setting"]) for line in lines], fontsize=8)
    axes.set_xlabel("MiB at the peak of a micro-step")
    _legend(axes, loc="upper right")
    return figure


def memory_length():
    """Memory over the static part, and its share of a token, against the tokens of a micro-step.

    Of every GPU; where two cells have as many tokens, that of the longer sequences counts.
    """
    lengths: dict[str, dict[int, float]] = {}
    for cell, lines in _whole_cells("dyn_mib", latest=False):
        for line in lines:
            name = f"{describe_device(cell)}: {name_of(line['setting'])}"
            lengths.setdefault(name, {})[cell[-2] * cell[-1]] = line["dyn_mib"]
    # settings with two points only would hide those with more
    enough = max(2, min(3, max(map(len, lengths.values()), default=0)))
    lengths = {name: sizes for name, sizes in lengths.items() if len(sizes) >= enough}
    if not lengths:
        return None
    figure, (whole, share) = plt.subplots(1, 2, figsize=(12, 4.6))
    for i, (name, sizes) in enumerate(lengths.items()):
        tokens, dyn = zip(*sorted(sizes.items()), strict=True)
        style = {"marker": "os^v"[i // 10 % 4], "markersize": 4, "label": name}
        whole.loglog(tokens, dyn, **style)
        share.semilogx(tokens, [1024 * size / n for n, size in zip(tokens, dyn, strict=True)], **style)
    whole.set_ylabel("dyn: peak over static memory, MiB")
    share.set_ylabel("dyn a token, KiB")
    share.set_ylim(bottom=0)
    ticks = sorted({n for sizes in lengths.values() for n in sizes})
    for axes in (whole, share):
        axes.set_xlabel("tokens of a micro-step")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ticks, ticks, rotation=90, fontsize=7)
    _legend(share, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _whole_cells(*fields: str, latest: bool = True):
    """Cells of the shape that is drawn, of the GPU measured last or of all, with their lines that have all fields."""
    cells = memory_cells()
    for cell, lines in cells.items():
        named = dict(zip(CELL, cell, strict=True))
        whole = [line for line in lines if all(field in line for field in fields)]
        drawn = (next(iter(cells))[0] if latest else cell[0], SHAPE, "nf4", 16)
        if whole and tuple(named[key] for key in ("device", "shape", "base", "lora_rank")) == drawn:
            yield cell, whole


def _legend(axes, **where) -> None:
    """Each label once."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        *reversed(list(zip(*dict(zip(labels, handles, strict=True)).items(), strict=True))), fontsize=7, **where
    )
