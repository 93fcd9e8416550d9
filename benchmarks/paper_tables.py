"""The paper's tables from the results of runs: ours beside what was published, and the losses of the trainings.

    python -m benchmarks.paper_tables                                    # of all exp_results_*/ of this checkout
    python -m benchmarks.paper_tables exp_results_gsm8k --figures out    # and out/loss_gsm8k.png

A table is of a driver and a model, a row of a method and its bits. Runs that differ in their seed alone are one row:
mean, standard deviation, number of runs. Settings that differ otherwise are named. What is missing is empty.
"""

import argparse
import csv
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import table
from hyclora.utils.args import ROOT
from hyclora.utils.disk import to_path
from hyclora.utils.errors import UserError, entry_point
from hyclora.utils.runs.identity import identity, in_effect

PUBLISHED = Path(__file__).with_name("published.tsv")
PREFIX, UNTRAINED = "exp_results_", "not trained"
NAMES = {"intra_inter_full_fuse": "intra_inter"}  # the paper has one name for both
FIRST = (UNTRAINED, "LoRA", "baseline")
# What `identity` leaves out, since it changes no training, and does change what is found.
EVALUATION = ("max_eval_samples", "greedy", "temperature", "top_k", "top_p", "max_new_tokens", "train_file")
BASE = ("load_in_4bit", "dtype", "random_weights")
OWN = {"model_name", "data_name", "seed", "use_hyclora", "layer_type", "q_bit", "average_bits", "scale_rule"}
_SUFFIX = re.compile(r"-(hf|v0\.\d|intermediate.*)$")


@dataclass(frozen=True)
class Score:
    """A number of one run, as it is written, and whether there is a remark about it."""

    text: str
    remarked: bool

    @property
    def value(self) -> float:
        return float(self.text.rstrip("%"))


@dataclass(frozen=True)
class Run:
    """What a run found: scores by metric. others: its settings that neither the row nor the column names."""

    driver: str
    model: str
    data: str
    method: str
    bit: str
    others: dict
    scores: dict[str, Score]
    losses: list[tuple[int, float]]

    @property
    def place(self) -> tuple[str, str, str]:
        return self.driver, self.model, self.data


def model_of(name: str) -> str:
    """A model as published.tsv calls it: its folder's name without endings that say nothing of its weights."""
    return _SUFFIX.sub("", Path(name).name.lower())


def method_of(values: dict) -> tuple[str, str]:
    """Method and bits as the paper names them."""
    method = NAMES.get(values["layer_type"], values["layer_type"]) if values["use_hyclora"] else "LoRA"
    if method in FIRST:
        return method, "16"
    bit = f"auto {values['average_bits']}" if values["q_bit"] == "auto" else str(values["q_bit"])
    return method + (", published quantizer" if values["scale_rule"] == "paper" else ""), bit


def runs_of(file: Path) -> list[Run]:
    """The finished run of a results file, and the model before it as a run without training, if that was evaluated."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        settings, metrics, shown = found["settings"], found["metrics"], found["shown"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no results file of a run ({type(error).__name__}): move it elsewhere") from None
    known = settings | {"content": found.get("content", {})}
    values = {name: value for group in settings.values() for name, value in group.items()}
    judged = {name: values[name] for name in EVALUATION if name in values and in_effect(name, values)}
    base = {name: values[name] for name in BASE} | judged
    trained = {name: value for name, value in identity(known).items() if name not in OWN} | judged
    place = (file.parent.name.removeprefix(PREFIX), model_of(values["model_name"]), values["data_name"])
    losses = [(entry["step"], entry["loss"]) for entry in found["log_history"] if "loss" in entry]
    runs = []
    for when, row, others in ("before", (UNTRAINED, ""), base), ("after", method_of(values), trained):
        scores = {
            name: Score(texts[when], remarked=len(label) > len(name))
            for name, (label, texts) in zip(metrics, shown.items(), strict=True)
            if when in texts
        }
        if scores:
            runs.append(Run(*place, *row, others, scores, losses if when == "after" else []))
    return runs


def labels_of(runs: list[Run]) -> list[str]:
    """The method of each run, with its settings that others of the same driver, model and data have otherwise."""
    labels = []
    for run in runs:
        untrained = run.method == UNTRAINED
        peers = [r.others for r in runs if r.place == run.place and (r.method == UNTRAINED) == untrained]
        differing = {name for peer in peers for name, value in run.others.items() if peer.get(name, value) != value}
        labels.append(", ".join([run.method, *(f"{name}={run.others[name]}" for name in sorted(differing))]))
    return labels


def summary(scores: list[Score]) -> str:
    """Mean, deviation and number of several runs, as many digits as one has; a star for a remark."""
    digits = len(scores[0].text.rstrip("%").partition(".")[2])
    values = [score.value for score in scores]
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(set(values)) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f} ({len(values)})"
    return text + ("*" if any(score.remarked for score in scores) else "")


def published() -> dict[tuple[str, ...], str]:
    """Value by driver, model, data, metric, method and bit."""
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {
        tuple(row[name] for name in ("driver", "model", "data", "metric", "method", "bit")): row["value"]
        for row in rows
    }


def tables(runs: list[Run]) -> str:
    """All tables, in Markdown."""
    parts, paper = [], published()
    found: dict[tuple, list[Score]] = {}
    for run, label in zip(runs, labels_of(runs), strict=True):
        for metric, score in run.scores.items():
            found.setdefault((*run.place, metric, label, run.bit), []).append(score)
    for driver, model in dict.fromkeys(key[:2] for key in found):
        ours = [key for key in found if key[:2] == (driver, model)]
        columns = list(dict.fromkeys(key[2:4] for key in ours))
        theirs = [key for key in paper if key[:2] == (driver, model) and key[2:4] in columns]
        done = {_published_as(key[4:]) for key in ours}
        rows = dict.fromkeys([*(key[4:] for key in ours), *(key[4:] for key in theirs if key[4:] not in done)])
        rows = sorted(rows, key=_order)
        head, body = ["method", "bit"], [[*row] for row in rows]
        several = len({data for data, _ in columns}) > 1
        for data, metric in columns:
            place = (driver, model, data, metric)
            head.append(f"{data} {metric}" if several else metric)
            for row, cells in zip(rows, body, strict=True):
                cells.append(summary(found[(*place, *row)]) if (*place, *row) in found else "")
            if any(key[:4] == place for key in theirs):
                head.append("published")
                for row, cells in zip(rows, body, strict=True):
                    cells.append(paper.get((*place, *_published_as(row)), ""))
        parts.append(f"## {driver}, {model}\n\n{table(head, body)}")
    if any(score.remarked for scores in found.values() for score in scores):
        parts.append("\\* with a remark in the results file: test questions were trained on")
    return "\n\n".join(parts)


def _published_as(row: tuple[str, str]) -> tuple[str, str]:
    """Method and bit in published.tsv, which has one setting of each."""
    return row[0].partition(",")[0], row[1]


def _order(row: tuple[str, str]) -> tuple:
    """First what is not compressed, then the most bits."""
    method, bit = _published_as(row)
    first = FIRST.index(method) if method in FIRST else len(FIRST)
    return first, -float(bit.split()[-1]) if bit else 0.0, row[0]


def draw(runs: list[Run], folder: Path) -> list[Path]:
    """loss_<driver>.png: the training loss of every run of a driver, a panel a model and data, a colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    named = [(run, f"{label}, {run.bit} bit") for run, label in zip(runs, labels_of(runs), strict=True) if run.losses]
    for driver in dict.fromkeys(run.driver for run, _ in named):
        places = list(dict.fromkeys(run.place for run, _ in named if run.driver == driver))
        figure, panels = plt.subplots(1, len(places), figsize=(6 * len(places), 4), squeeze=False)
        for place, axes in zip(places, panels[0], strict=True):
            colors = {}
            for run, label in named:
                if run.place == place:
                    color = colors.setdefault(label, f"C{len(colors)}")
                    axes.plot(*zip(*run.losses, strict=True), color=color, linewidth=1, label=label)
            axes.set(title=" on ".join(place[1:]), xlabel="step", ylabel="training loss")
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            axes.legend(handles.values(), handles.keys(), fontsize=8)
        files.append(folder / f"loss_{driver}.png")
        figure.tight_layout()
        figure.savefig(files[-1], dpi=130, metadata={"Software": None})
        plt.close(figure)
    return files


@entry_point
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=to_path, help="folders of results; default: exp_results_*/")
    parser.add_argument("--figures", type=to_path, help="draw the losses into this folder")
    args = parser.parse_args(argv)
    folders = args.folders or sorted(path for path in ROOT.glob(f"{PREFIX}*") if path.is_dir())
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"folder {folder} does not exist: name folders of results, such as {PREFIX}gsm8k")
    runs = [run for folder in folders for file in sorted(folder.glob("*.json")) for run in runs_of(file)]
    if not runs:
        raise UserError(
            f"no finished run with an evaluation in {', '.join(map(str, folders)) or ROOT}: run a driver first"
        )
    print(tables(runs))
    if args.figures:
        print("", *draw(runs, args.figures), sep="\n")


if __name__ == "__main__":
    main()
