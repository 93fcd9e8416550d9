"""The tables of the paper's experiments on a small model: mean and spread over seeds, and what differs from exact LoRA.

A difference is the mean over seeds of what the same seed gives with exact LoRA, better or worse as the metric goes; in
brackets it is in units of the standard deviation that exact LoRA has over seeds.
"""

import html
import re
import statistics
from dataclasses import dataclass

from benchmarks.experiments import EXACT, LONG_EVALUATED, TESTED, VARIANTS
from benchmarks.record import RESULTS
from benchmarks.rows import load
from benchmarks.tables import remarks, source, table

BEFORE = "not trained"
PICTURE = RESULTS.parent.parent / "figures" / "loss_bits.png"
NOTE = (
    "*Against exact* is the mean over seeds of what differs from exact LoRA of the same seed, and in brackets that in "
    "units of exact LoRA's standard deviation over seeds. What follows ± is the deviation of each."
)


@dataclass(frozen=True)
class Column:
    """A metric of a task as a reader sees it. form: of a value times `scale`; compared: beside it the difference."""

    task: str
    metric: str
    title: str
    form: str = ".2f"
    scale: float = 100.0
    compared: bool = False


LANGUAGE = [
    Column("gsm8k", "test_loss", "GSM8K answer loss", ".4f", 1, compared=True),
    Column("gsm8k", "accuracy", "GSM8K accuracy, %"),
    Column("wikitext2", "perplexity_per_token", "WikiText-2 perplexity", ".3f", 1, compared=True),
    Column("wikitext2", "sliding_perplexity_per_token", "sliding", ".3f", 1),
]
ARITHMETIC = [Column("arithmetic", name, f"{name}, %") for name in ("gsm8k", "SVAMP", "mawps", "AQuA")]
ARITHMETIC.append(Column("arithmetic", "mean", "mean, %", compared=True))
LONG = [
    Column("longtext", f"perplexity_of_{name}_at_{length}_per_token", f"{title}, {length} tokens", ".3f", 1, compared)
    for name, title in zip(LONG_EVALUATED, ("Frankenstein", "a chapter of the HoTT book"), strict=True)
    for length, compared in ((2048, False), (8192, True))
]
ALPACA = [Column("alpaca", "held-out_loss", "Alpaca held-out loss", ".4f", 1, compared=True)]
GLUE = [
    Column("sst2", "accuracy", "SST-2, accuracy %"),
    Column("rte", "accuracy", "RTE, accuracy %"),
    Column("mrpc", "F1", "MRPC, F1 %"),
    Column("cola", "Matthews_correlation", "CoLA, Matthews %"),
    Column("stsb", "Pearson_correlation", "STS-B, Pearson %"),
]

Scores = dict[str, dict[int, float]]  # by variant and seed


def lines_of(columns: list[Column]) -> list[dict]:
    """The lines of the columns' tasks on a GPU or, if there are none, on a CPU; with their failures.

    Without those of variants that there are no more.
    """
    tasks = {column.task for column in columns}
    lines = load("experiments", "model", "task", "variant", "seed")
    lines = [line for line in lines if line["task"] in tasks and line["variant"] in VARIANTS]
    on_gpu = [line for line in lines if not line["device"].startswith("CPU")]
    return on_gpu or lines


def scores_of(lines: list[dict], column: Column) -> Scores:
    """What each variant came to with each seed, in the variants' order; first what the model could do before."""
    found: Scores = {BEFORE: {}, **{variant: {} for variant in VARIANTS}}
    for line in lines:
        if line["task"] == column.task and (scores := line.get("metrics", {}).get(column.metric)):
            found[line["variant"]][line["seed"]] = scores["after"] * column.scale
            if "before" in scores:
                found[BEFORE][line["seed"]] = scores["before"] * column.scale
    return {variant: values for variant, values in found.items() if values}


def spread(values: dict[int, float]) -> float:
    """The standard deviation over seeds; 0 of one."""
    return statistics.stdev(values.values()) if len(values) > 1 else 0.0


def difference(scores: Scores, variant: str) -> float | None:
    """The mean difference to exact LoRA over the seeds that both have; None without any."""
    exact = scores.get(EXACT, {})
    found = [value - exact[seed] for seed, value in scores.get(variant, {}).items() if seed in exact]
    return statistics.fmean(found) if found else None


def cells(scores: Scores, variant: str, column: Column, seeds: int) -> list[str]:
    """Mean and spread of a variant, how many of the seeds it has if not all, and beside it the difference if asked."""
    values = scores.get(variant, {})
    mean = f"{statistics.fmean(values.values()):{column.form}}" if values else ""
    if len(values) > 1:
        mean += f" ± {spread(values):{column.form}}"
    if variant != BEFORE and 0 < len(values) < seeds:
        mean += f" ({len(values)} of {seeds} seeds)"
    if not column.compared:
        return [mean]
    gap, unit = difference(scores, variant), spread(scores.get(EXACT, {}))
    if variant in (EXACT, BEFORE) or gap is None:
        return [mean, ""]
    return [mean, f"{gap:+{column.form}}" + (f" ({gap / unit:+.1f})" if unit else "")]


def kept_bits(lines: list[dict], variant: str) -> str:
    """Bits that a variant keeps of an element, scales included; 16 where nothing is compressed."""
    found = [line["kept_bits"] or 16 for line in lines if line["variant"] == variant and "error" not in line]
    return f"{statistics.fmean(found):.2f}" if found else ""


def one_table(columns: list[Column]) -> str:
    """A row a variant; "" without lines."""
    lines = lines_of(columns)
    scores = {column: scores_of(lines, column) for column in columns}
    names = list(dict.fromkeys(variant for found in scores.values() for variant in found))
    if not names:
        return ""
    names.sort(key=[BEFORE, *VARIANTS].index)
    models = ", ".join(dict.fromkeys(line["model"] for line in lines))
    seeds = len({line["seed"] for line in lines})
    head = [f"{models}, {seeds} seeds", "bits kept"]
    for column in columns:
        head += [column.title] + ["against exact (in spreads)"] * column.compared
    rows = []
    for name in names:
        found = [cell for column in columns for cell in cells(scores[column], name, column, seeds)]
        rows.append([name, kept_bits(lines, name), *found])
    parts = [table(head, rows), source(lines, "python -m benchmarks.experiments"), *failures(lines)]
    return "\n\n".join([*parts, *remarks([(line["variant"], line) for line in lines])])


def failures(lines: list[dict]) -> list[str]:
    """A sentence on runs that failed, with the cause."""
    failed = [
        f"{x['task']}, {x['variant']}, seed {x['seed']}: {x['error'].partition(';')[0]}" for x in lines if "error" in x
    ]
    return [f"*Failed: {'; '.join(failed)}.*".replace("\n", " ")] if failed else []


def experiments() -> str:
    """What training of language models comes to, for README: a table and the picture; "" without lines."""
    told = (
        "The paper's Tables 1 and 2 in small: 300 steps with LoRA of rank 16 on all linear layers, judged by the test "
        "rows. The picture shows the same against bits."
    )
    parts = _told_tables([(told, LANGUAGE)])
    if parts and PICTURE.exists():
        parts.append(f"![loss against bits](figures/{PICTURE.name})")
    return "\n\n".join(parts)


def other_experiments() -> str:
    """The other tasks, a sentence and a table each; "" without lines."""
    kinds = [
        (
            "Arithmetic, trained on GSM8K's questions alone, which none of the tests shares, and judged by the first "
            f"{TESTED} rows of each:",
            ARITHMETIC,
        ),
        (
            "Perplexity of a book and of mathematics after 300 rows of 8192 tokens of other books and proofs, none of "
            "them PG-19's or proof-pile's own split, by sliding windows of two lengths:",
            LONG,
        ),
        (
            "Alpaca's instructions in the plain loop of `run_alpaca.py`, LoRA on q and v, judged by the responses of "
            "rows that were held out; what is written after the test prompts is above:",
            ALPACA,
        ),
        (
            "GLUE's development rows, by a RoBERTa that `ckpt/pretrain_roberta.py` pre-trained for 5.5 minutes "
            "(`--vocabulary 8192 --row-tokens 128 --batch-tokens 16384 --lr 5e-4`), so far below the published one; "
            "*without outliers* no channel is kept exactly:",
            GLUE,
        ),
    ]
    return "\n\n".join(_told_tables(kinds))


def _told_tables(kinds: list[tuple[str, list[Column]]]) -> list[str]:
    """The sentences and tables of those that have lines, and behind the first sentence what the columns mean."""
    parts = [text for told, columns in kinds if (found := one_table(columns)) for text in (told, found)]
    return [*parts[:1], NOTE, *parts[1:]] if parts else []


def alpaca_texts() -> str:
    """What was written after the test prompts before training, and after it by each variant; "" without lines."""
    lines = [line for line in lines_of(ALPACA) if "texts" in line]
    lines.sort(key=lambda line: list(VARIANTS).index(line["variant"]))
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        for when, name in (("before", BEFORE), ("after", line["variant"])):
            for row in line["texts"][when]["texts"]:
                cells.setdefault(row["prompt"], {}).setdefault(name, row["text"])
    if not cells:
        return ""
    names = list(dict.fromkeys([BEFORE, *(line["variant"] for line in lines)]))
    rows = [[in_cell(prompt), *(in_cell(found.get(name, "")) for name in names)] for prompt, found in cells.items()]
    said = source(lines, "python -m benchmarks.experiments --tasks alpaca")
    head = [f"what {lines[0]['model']} writes after", *names]
    return f"{table(head, rows)}\n\n{said}"


def in_cell(text: str) -> str:
    """A text of any kind in a cell of a table."""
    escaped = html.escape(text.strip(), quote=False).replace("|", "&#124;")
    return re.sub(r"([\\`*_\[\]~])", r"\\\1", escaped).replace("\n", "<br>")
