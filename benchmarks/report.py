"""README tables and figures from the result files: nothing in them is typed.

python -m benchmarks.report            # write README.md's generated parts and figures/*.png
python -m benchmarks.report --check    # exit 1 if README.md is not what the result files say
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable

from benchmarks.record import RESULTS
from models.config import SLOTS, HycloraConfig

ROOT = RESULTS.parent.parent
README, FIGURES = ROOT / "README.md", ROOT / "figures"
MIB = 2**20


def load(name: str) -> list[dict]:
    """The last run of each setting, in the order of first appearance."""
    file = RESULTS / f"{name}.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    latest = {}
    for line in lines:
        steps = line.get("arguments", {}).get("steps")
        key = json.dumps([line.get("model"), line.get("label"), line["setting"], steps])
        latest[key] = line
    return list(latest.values())


def name_of(setting) -> str:
    """A setting as a reader would say it."""
    if setting is None:
        return "PEFT LoRA"
    if isinstance(setting, str):
        return f"PEFT LoRA, {setting}"
    bits = setting.get("q_bit", 4)
    width = f"auto, {setting.get('average_bits', 3.0):g} bits on average" if bits == "auto" else f"{bits} bit"
    rule = ", published quantizer" if setting.get("scale_rule") == "paper" else ""
    kind = setting.get("layer_type", "intra_inter")
    return "baseline (exact)" if kind == "baseline" else f"{kind}, {width}{rule}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(lines: list[dict], command: str) -> str:
    """Where the numbers of a table come from."""
    devices = sorted({line["device"] for line in lines})
    commits = sorted({(line["commit"] or "unknown")[:8] for line in lines})
    versions = lines[-1]["versions"]
    stack = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "peft"))
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
    lines = load("buffered")
    rows = [[name_of(line["setting"]), f"{line['layer_bytes'] / MIB:.1f}", f"{line['ratio']:.2f}x"] for line in lines]
    head = ["7B layer, 4 x 512 tokens", "MiB kept for backward", "less than PEFT + SDPA"]
    return table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.buffered")


def fidelity() -> str:
    lines = [line for line in load("fidelity") if "slot_savers" not in line["setting"]]
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
    lines = [line for line in load("finetune") if line["arguments"]["steps"] == 300]
    lines.sort(key=lambda line: line["gap"])
    rows = [[name_of(line["setting"]), f"{line['test_loss']:.4f}", f"{line['gap']:+.4f}"] for line in lines]
    head = ["300 steps of 16 on GSM8K, 27M LLaMA", "test loss, nats", "against exact LoRA"]
    return (
        table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.finetune --model FOLDER --data FOLDER --paper")
    )


def step() -> str:
    lines = load("step")
    rows = []
    for line in lines:
        if "error" in line:
            rows.append([name_of(line["setting"]), line["error"], "", ""])
            continue
        low, high = line["ms_range"]
        speed = f"{line['ms']:.0f} ({low:.0f} to {high:.0f})"
        rows.append([name_of(line["setting"]), f"{line['dyn_mib']:.0f}", speed, str(line["tokens_per_second"])])
    head = ["7B, 4 x 512 tokens, NF4", "dyn MiB", "ms a micro-step", "tokens/s"]
    return table(head, rows) + "\n\n" + source(lines, "python -m benchmarks.step")


PARTS: dict[str, Callable[[], str]] = {
    "parameters": parameters,
    "slots": slots,
    "buffered": buffered,
    "fidelity": fidelity,
    "finetune": finetune,
    "step": step,
}


def render(text: str) -> str:
    """README.md with every part between <!-- name --> and <!-- end name --> made anew."""
    for name, make in PARTS.items():
        before, after = text.split(f"<!-- {name} -->\n")[0], text.split(f"<!-- end {name} -->")[1]
        text = f"{before}<!-- {name} -->\n{make()}\n<!-- end {name} -->{after}"
    return text


def draw() -> None:
    """figures/kept.png: bytes of a 7B layer by slot; figures/fidelity.png: gradient cosine against bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = load("buffered")
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
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=7, ncols=2, loc="lower right")
    _save(figure, "kept.png")

    figure, axes = plt.subplots(figsize=(6, 3.8))
    lines = [line for line in load("fidelity") if "slot_savers" not in line["setting"]]
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
    _save(figure, "fidelity.png")


def _save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FIGURES / name, dpi=130, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if args.check:
        sys.exit("README.md is stale: python -m benchmarks.report" if fresh != text else 0)
    README.write_text(fresh, encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
