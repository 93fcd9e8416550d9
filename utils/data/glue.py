"""GLUE (Wang et al., 2018): nine tasks on a sentence or a pair of them, and a generated one in their form.

A task is a row of GLUE, the rest is read off it. Rows {"texts", "label"} come from the hub or from the official tsv
files in a folder a task; the published test rows have no labels, so the development rows are what is evaluated on.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hyclora.utils.args import DataArguments
from hyclora.utils.data.files import read_text
from hyclora.utils.data.hub import download
from hyclora.utils.data.reviews import reviews
from hyclora.utils.errors import UserError

HUB_ID = "nyu-mll/glue"
HIGHEST_SCORE = 5.0
DEMO_ROWS = {"train": 3200, "dev": 400}
DEMO_SEED = 0


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE.

    folder: of its tsv files. texts: the columns of its sentence or pair. label: the column of what is to be told.
    labels: its values, in the order of the hub's numbers; none where it is a score from 0 to HIGHEST_SCORE. metrics:
    names of METRICS (utils/classification.py). rows: how many the published files have, the training file first.
    tests: the files that are evaluated on, with what tells their numbers apart. columns: of files without a header.
    hub_texts: the columns on the hub where they are called otherwise. torn: rows of the published training file that
    end before their label, which the hub's copy leaves out too.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[int, ...]
    tests: dict[str, str] = field(default_factory=lambda: {"dev": ""})
    columns: tuple[str, ...] = ()
    hub_texts: tuple[str, ...] = ()
    torn: int = 0

    @property
    def n_outputs(self) -> int:
        """Of a model: a logit a label, or a score."""
        return len(self.labels) or 1


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "demo": GlueTask("", ("sentence",), "label", ("bad", "good"), ("accuracy",), tuple(DEMO_ROWS.values())),
    "rte": GlueTask("RTE", PAIR, "label", ENTAILMENT, ("accuracy",), (2490, 277)),
    "cola": GlueTask(
        "CoLA", ("sentence",), "label", ("0", "1"), ("Matthews correlation",), (8551, 1043),
        columns=("source", "label", "author's mark", "sentence"),
    ),
    "mrpc": GlueTask(
        "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "F1"), (3668, 408), hub_texts=PAIR
    ),
    "stsb": GlueTask("STS-B", PAIR, "score", (), ("Pearson correlation", "Spearman correlation"), (5749, 1500)),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",), (67349, 872)),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",), (104743, 5463)),
    "mnli": GlueTask(
        "MNLI", PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",), (392702, 9815, 9832),
        tests={"dev_matched": "matched", "dev_mismatched": "mismatched"}, hub_texts=("premise", "hypothesis"),
    ),
    "qqp": GlueTask(
        "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("accuracy", "F1"), (363846, 40430), torn=3
    ),
    "wnli": GlueTask("WNLI", PAIR, "label", ("0", "1"), ("accuracy",), (635, 71)),
}  # fmt: skip


def load_rows(args: DataArguments, split: str) -> list[dict]:
    """The rows {"texts": list[str], "label": int or float} of a split: "train" or one of the task's `tests`."""
    task = GLUE[args.data_name]
    if args.data_name == "demo":
        rows = [{"texts": [text], "label": int(good)} for text, good in reviews(DEMO_ROWS[split], split, DEMO_SEED)]
    elif args.data_dir:
        rows = read_tsv(Path(args.data_dir) / task.folder / f"{split}.tsv", task)
    else:
        rows = _from_hub(args.data_name, task, split)
    return rows[: args.max_train_samples if split == "train" else args.max_eval_samples]


def read_tsv(file: Path, task: GlueTask) -> list[dict]:
    """The rows of an official file: a row a line, cells apart by tabs, quotes as they stand; found by their header.

    UserError for a missing file, column or cell and for a label that is not of the task.
    """
    if not file.is_file():
        given = f"data_dir {file.parent.parent}: {file.parent.name}/{file.name}"
        raise UserError(f"{given} does not exist: --data_dir is the folder of the official folders CoLA, MRPC, ...")
    # a quote may open and never close again, so csv's own rules would join rows; so would other ends of lines
    every = [line.rstrip("\r") for line in read_text(file).split("\n")]
    lines = [(n, line.split("\t")) for n, line in enumerate(every, 1) if line]
    header = list(task.columns) or (lines.pop(0)[1] if lines else [])
    if not lines:
        raise UserError(f"{file} is empty: it needs a row a line" + ("" if task.columns else " after the header"))
    for name in (*task.texts, task.label):
        if name not in header:
            raise UserError(f'{file}: the column "{name}" is missing, found {", ".join(header)}')
    places = [header.index(name) for name in (*task.texts, task.label)]
    torn = [(n, cells) for n, cells in lines if len(cells) != len(header)]
    if len(torn) > task.torn:
        n, cells = torn[0]
        raise UserError(f"{file}:{n}: {len(cells)} cells, and {len(header)} are expected: copy the file again")
    rows = []
    for n, cells in lines:
        if len(cells) == len(header):
            *texts, label = (cells[place] for place in places)
            rows.append({"texts": texts, "label": _label(label, task, f"{file}:{n}")})
    return rows


def _label(text: str, task: GlueTask, place: str) -> int | float:
    """A label's number, or the score: 3.8, 3.80 and 3.800 are one."""
    if task.labels:
        if text not in task.labels:
            raise UserError(f'{place}: the label "{text[:40]}" is not one of {", ".join(task.labels)}')
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= HIGHEST_SCORE:
        raise UserError(f'{place}: the score "{text[:40]}" is not a number from 0 to {HIGHEST_SCORE:.0f}')
    return score


def _from_hub(name: str, task: GlueTask, split: str) -> list[dict]:
    columns = task.hub_texts or task.texts
    kind = {"train": "train", **{test: f"validation_{part}".rstrip("_") for test, part in task.tests.items()}}[split]
    by_hand = f"put the official folder {task.folder} with train.tsv into a folder and give that with --data_dir"
    found = download(HUB_ID, name, kind, by_hand)
    return [{"texts": [row[column] for column in columns], "label": row["label"]} for row in found]


def described(rows: list[dict], task: GlueTask, split: str) -> str:
    """How many rows there are, whether these are all of the published ones, and what guessing the same would give."""
    published = dict(zip(("train", *task.tests), task.rows, strict=True))[split]
    text = f"{split}: {len(rows)} rows" + (f" (of {published})" if len(rows) != published else "")
    if not task.labels:
        return text
    ((label, n),) = Counter(row["label"] for row in rows).most_common(1)
    return f"{text}, {n / len(rows):.1%} of them {task.labels[label]}"
