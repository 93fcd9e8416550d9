"""figures/*.png from the result files; a figure with nothing to show is not drawn."""

from statistics import fmean

import matplotlib

from benchmarks.experiments import EXACT, VARIANTS
from benchmarks.record import RESULTS
from benchmarks.report_experiments import BEFORE, LANGUAGE, lines_of, scores_of, spread
from benchmarks.report_plan_check import SIZES, checks
from benchmarks.rows import CELL, describe_batch, describe_device, describe_model, load, load_7b, memory_cells, name_of
from benchmarks.technique_tables import draw_recorded
from hyclora.models.config import SLOTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, after the backend is chosen
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

FIGURES = RESULTS.parent.parent / "figures"
MIB = 2**20
SHAPE, SPEED_CELLS, BREAKDOWN_CELL = "llama-2-7b", ((4, 512), (1, 8192)), (4, 512)
CARDS = (24, 48, 80)  # GB of 10^9 bytes
LONG = 8192  # tokens: settings that were measured with rows this long are drawn against length
OURS, PEER = "tab:red", "tab:blue"
SIDES = (("left", 7), ("right", -7), ("center", 0))  # of a label: its alignment, and points from what it names


def draw() -> None:
    """All figures that the result files have lines for."""
    for figure in (kept, fidelity, loss_bits, memory_speed, memory_breakdown, memory_length, plan_check):
        drawn = figure()
        if drawn is not None:
            drawn.tight_layout()
            drawn.savefig(FIGURES / f"{figure.__name__}.png", dpi=130, metadata={"Software": None})
            plt.close(drawn)
    draw_recorded()


def kept():
    """Bytes of a 7B layer by slot, plain LoRA first."""
    lines = sorted(load_7b("buffered"), key=lambda line: isinstance(line["setting"], str | None), reverse=True)
    figure, axes = plt.subplots(figsize=(9, 4.2))
    colors = dict(zip(SLOTS, plt.get_cmap("tab20").colors, strict=False))
    for y, line in enumerate(reversed(lines)):
        left = 0.0
        for slot, size in line["slots"].items():
            axes.barh(y, size / MIB, left=left, color=colors[slot], label=slot)
            left += size / MIB
        other = "plain LoRA" if not line["slots"] else "rank-r, statistics, other"
        color = "tab:grey" if not line["slots"] else "lightgrey"
        axes.barh(y, line["layer_bytes"] / MIB - left, left=left, color=color, label=other)
        axes.text(line["layer_bytes"] / MIB + 3, y, f"{line['layer_bytes'] / MIB:.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(lines)), [name_of(line["setting"]) for line in reversed(lines)], fontsize=9)
    axes.margins(x=0.08)
    axes.set_xlabel("MiB")
    axes.set_title("Kept on the GPU for backward by one Llama-2-7B layer, 4 x 512 tokens", fontsize=10)
    _legend(axes, loc="lower right", ncols=2)
    return figure


def fidelity():
    """Gradient error against bits: a line a model and quantizer."""
    figure, axes = plt.subplots(figsize=(9, 4.2))
    lines = [line for line in load("fidelity", "model", "label") if not line["setting"]["slot_savers"]]
    lines = [line for line in lines if line["setting"]["layer_type"].startswith("intra_inter") and "first" not in line]
    lines = [line for line in lines if line["setting"]["layers"] == "slots"]
    for color, model in enumerate(dict.fromkeys(line["model"] for line in lines)):
        for rule, style, said in (("channel_group", "o-", ""), ("paper", "x--", ", published quantizer")):
            points = {
                line["bits"]: 1 - line["cosine"]
                for line in lines
                if line["model"] == model and line["setting"]["scale_rule"] == rule
            }
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), style, color=f"C{color}", label=model + said)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("bits an element kept, scales included")
    axes.set_ylabel("1 - cosine of the LoRA gradients")
    axes.set_title("How far LoRA gradients are from exact ones", fontsize=10)
    axes.legend(fontsize=9)
    return figure


def loss_bits():
    """What training comes to against bits kept: a panel a metric, a line a way of keeping activations."""
    panels = [column for column in LANGUAGE if column.compared and scores_of(lines_of([column]), column).get(EXACT)]
    if not panels:
        return None
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    for axes, column in zip(all_axes[0], panels, strict=True):
        lines = lines_of([column])
        scores = scores_of(lines, column)
        exact = fmean(scores[EXACT].values())
        axes.axhline(exact, color="grey", linewidth=1, label=f"{EXACT}, and its spread over seeds")
        axes.axhspan(exact - spread(scores[EXACT]), exact + spread(scores[EXACT]), color="grey", alpha=0.25)
        for color, way in enumerate(dict.fromkeys(name.partition(",")[0] for name in VARIANTS if name != EXACT)):
            points = []
            for name, values in scores.items():
                bits = [line["kept_bits"] for line in lines if line["variant"] == name and line.get("kept_bits")]
                if name.partition(",")[0] == way and name != BEFORE and bits:
                    points.append((fmean(bits), fmean(values.values()), spread(values)))
            if points:
                bits, means, spreads = zip(*sorted(points), strict=True)
                axes.errorbar(bits, means, spreads, fmt="o-", capsize=3, color=f"C{color}", label=way)
        axes.set_xlabel("bits an element kept, scales included")
        axes.set_ylabel(column.title)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0][0].legend(fontsize=9)
    return figure


def memory_speed():
    """Memory over the static part against tokens a second, and the settings that none beats in both."""
    cells = {cell[-2:]: (cell, lines) for cell, lines in _whole_cells("dyn_mib", "tokens_per_second")}
    panels = [cells[size] for size in SPEED_CELLS if size in cells]
    if not panels:
        return None
    figure, all_axes = plt.subplots(len(panels), 1, figsize=(9, 4.3 * len(panels)), squeeze=False)
    for axes, (cell, lines) in zip(all_axes[:, 0], panels, strict=True):
        points = sorted((line["dyn_mib"], line["tokens_per_second"], name_of(line["setting"])) for line in lines)
        peers = {line["setting"] for line in lines if isinstance(line["setting"], str)}
        for dyn, speed, name in points:
            axes.plot(dyn, speed, marker="s" if name in peers else "o", color=PEER if name in peers else OURS)
        axes.step(*zip(*pareto(points), strict=True), where="post", color="lightgrey", linewidth=1.5, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        title = f"{describe_device(cell)}, {describe_model(cell)}, {describe_batch(cell)}"
        axes.set_title(f"{title}: HyC-LoRA red, peers blue, grey line: none is better in both", fontsize=10)
        axes.set_xlabel("dyn: peak over static memory, MiB (less is better)")
        axes.set_ylabel("tokens a second")
        axes.margins(x=0.25, y=0.12)
        _label(axes, [(dyn, speed, name, PEER if name in peers else OURS) for dyn, speed, name in points])
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
    cells = [item for item in _whole_cells("trained_mib", "buffered_mib") if item[0][-2:] == BREAKDOWN_CELL]
    if not cells:
        return None
    cell, lines = cells[0]
    lines = sorted(lines, key=lambda line: -line["peak_mib"])
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.3 * len(lines)))
    for y, line in enumerate(lines):
        parts = {
            "frozen weights": line["static_mib"] - line["trained_mib"],
            "adapters, gradients, optimizer": line["trained_mib"],
            "kept after the forward": line["buffered_mib"],
            "rest of the peak": line["dyn_mib"] - line["buffered_mib"],
        }
        left = 0.0
        for color, (label, size) in enumerate(parts.items()):
            axes.barh(y, size, left=left, color=f"C{color}", label=label)
            left += size
        axes.text(left + 100, y, f"{left:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(lines)), [name_of(line["setting"]) for line in lines], fontsize=9)
    axes.set_xlabel("MiB at the peak of a micro-step")
    axes.set_title(f"{describe_device(cell)}, {describe_model(cell)}, {describe_batch(cell)}", fontsize=10)
    axes.margins(x=0.1)
    _legend(axes, loc="upper right")
    return figure


def memory_length():
    """GPU memory in all against the tokens of a micro-step, and how much cards have.

    Where two cells have as many tokens, that of the longer rows counts.
    """
    lengths: dict[str, dict[int, float]] = {}
    cells = list(_whole_cells("held_mib"))
    for cell, lines in cells:
        for line in lines:
            if isinstance(line["setting"], dict) and line["setting"]["slot_savers"]:
                continue
            total = (line["static_mib"] + line["held_mib"]) * MIB / 1e9
            lengths.setdefault(name_of(line["setting"]), {})[cell[-2] * cell[-1]] = total
    lengths = {name: sizes for name, sizes in lengths.items() if max(sizes) >= LONG}
    if not lengths:
        return None
    peers = {line["setting"] for _, lines in cells for line in lines if isinstance(line["setting"], str)}
    figure, axes = plt.subplots(figsize=(9, 5))
    ends = []
    for i, (name, sizes) in enumerate(lengths.items()):
        tokens, totals = zip(*sorted(sizes.items()), strict=True)
        color = PEER if name in peers else OURS
        axes.plot(tokens, totals, marker="so^vDP*X"[i % 8], markersize=5, color=color, linewidth=1.2)
        ends.append((tokens[-1], totals[-1], name, color))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for card in CARDS:
        axes.axhline(card, color="grey", linewidth=0.8, linestyle="--")
        axes.text(0.005, card, f"{card} GB card", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
    ticks = sorted({n for sizes in lengths.values() for n in sizes})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of a micro-step")
    axes.set_ylabel("GB taken of the GPU: static and held")
    cell = cells[0][0]
    axes.set_title(f"{describe_device(cell)}, {describe_model(cell)}: HyC-LoRA red, peers blue", fontsize=10)
    axes.margins(x=0.3, y=0.08)
    _label(axes, ends)
    return figure


def plan_check():
    """What the plan counts against what was measured, and how far off all of it is at full depth, case by case."""
    found = checks()
    if not found:
        return None
    figure, (sizes, offs) = plt.subplots(1, 2, figsize=(11, 4.6))
    for marker, name in zip("so^v", SIZES, strict=True):
        if pairs := [pair for one in found if (pair := one.pair(name))]:
            counted, measured = zip(*pairs, strict=True)
            sizes.plot(measured, counted, marker, markersize=4, alpha=0.6, label=name)
    ends = sizes.get_xlim()
    sizes.plot(ends, ends, color="grey", linewidth=0.8, zorder=0)
    sizes.set(xscale="log", yscale="log", xlabel="MiB measured, few layers", ylabel="MiB counted")
    for axis in (sizes.xaxis, sizes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    sizes.legend(fontsize=9)
    kinds = list(dict.fromkeys(one.kind for one in found))
    for one in found:
        gib, color = one.pair("all")[1] / 1024, f"C{kinds.index(one.kind)}"
        offs.plot(gib, one.off("all"), "o", markersize=4, color=color, label=one.kind)
    offs.axhline(0, color="grey", linewidth=0.8)
    offs.set(xscale="log", xlabel="GiB of static and held, all layers", ylabel="counted over measured, %")
    offs.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    offs.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    offs.xaxis.set_minor_formatter(NullFormatter())
    _legend(offs, loc="upper right")
    return figure


def _whole_cells(*fields: str):
    """Cells of the shape that is drawn, of the GPU measured last, with their lines that have all fields."""
    cells = memory_cells()
    for cell, lines in cells.items():
        named = dict(zip(CELL, cell, strict=True))
        whole = [line for line in lines if all(field in line for field in fields)]
        drawn = (next(iter(cells))[0], SHAPE, "nf4", 16)
        if whole and tuple(named[key] for key in ("device", "shape", "base", "lora_rank")) == drawn:
            yield cell, whole


def _label(axes, points: list[tuple[float, float, str, str]]) -> None:
    """The names of (x, y, name, color) beside the points: inside, and over neither a point nor each other."""
    axes.figure.tight_layout()
    inside = axes.get_window_extent()
    spots = [axes.transData.transform((x, y)) for x, y, *_ in points]
    taken = []
    places = [(up, *side) for up in sorted(range(-60, 61, 3), key=abs) for side in SIDES]
    for x, y, name, color in points:
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=color)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5})
        for up, alignment, shift in places:
            text.set(ha=alignment, va="center", position=(shift, up))
            box = text.get_window_extent()
            covered = any(map(box.overlaps, taken)) or any(box.padded(4).contains(*spot) for spot in spots)
            if inside.contains(*box.min) and inside.contains(*box.max) and not covered:
                break
        taken.append(box)
        if abs(up) > 3:
            line = {"arrowstyle": "-", "color": color, "lw": 0.5}
            axes.annotate("", (x, y), (0.8 * shift, up), textcoords="offset points", arrowprops=line)


def _legend(axes, **where) -> None:
    """Each label once."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        *reversed(list(zip(*dict(zip(labels, handles, strict=True)).items(), strict=True))), fontsize=8, **where
    )
