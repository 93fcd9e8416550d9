"""How a plan is told: in tables that a terminal has room for, or with all that is known of each mode."""

import textwrap
from collections.abc import Callable

from hyclora.utils.planning.fitting import STEP
from hyclora.utils.planning.modes import EMBEDDINGS
from hyclora.utils.planning.need import RESERVE
from hyclora.utils.planning.times import ALIKE
from hyclora.utils.planning.units import say_size
from hyclora.utils.results import table

STANDINGS = ("yes", "outdone", "no")
OUTDONE = (
    "outdone: it fits, but another has as many bits, is no slower by its kind, or as measured, takes no more of both "
    "memories, and has rows as long"
)
ALL = (
    f"GPU: static, dyn, an allowance for gaps between tensors, and {RESERVE / 2**30:.2f} GiB for the driver and CUDA; "
    "longest: tokens of a single row that fits"
)
WIDTH = 120


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f}"


def _static(row) -> int:
    return sum(row.need.static.values())


def _tokens(count: int | None, or_more: bool = False) -> str:
    return "" if count is None else f"{count}{'+' * or_more}" if count else "none"


def _sized(count: int | None, or_more: bool = False) -> str:
    return "" if count is None else f"{count} tokens{' or more' * or_more}" if count else "none"


def _speed(row) -> str:
    return "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"


# heading and cell of each column; a cell is of a row and of how that stands among all rows
Column = tuple[str, Callable]
SHORT: list[Column] = [
    ("mode", lambda row, stands: row.mode.name.removesuffix(EMBEDDINGS)),
    ("fits", lambda row, stands: stands),
    ("GPU GiB", lambda row, stands: _gib(row.need.gpu)),
    ("static", lambda row, stands: _gib(_static(row))),
    ("dyn", lambda row, stands: _gib(row.need.dyn)),
    ("host GiB", lambda row, stands: _gib(row.need.on_host)),
    ("longest", lambda row, stands: _tokens(row.longest, row.or_more)),
    ("micro-step", lambda row, stands: row.time.short),
    ("tokens/s", lambda row, stands: _speed(row)),
]
DETAILS: list[Column] = [
    ("mode", lambda row, stands: row.mode.name),
    ("static", lambda row, stands: say_size(_static(row))),
    ("dyn", lambda row, stands: say_size(row.need.dyn)),
    ("GPU in all", lambda row, stands: say_size(row.need.gpu)),
    ("host", lambda row, stands: say_size(row.need.on_host)),
    ("fits", lambda row, stands: stands),
    ("longest row", lambda row, stands: _sized(row.longest, row.or_more)),
    ("longest, embeddings on host", lambda row, stands: _sized(row.hosted)),
    ("a micro-step", lambda row, stands: str(row.time)),
    ("real tokens/s", lambda row, stands: _speed(row)),
    ("count of dyn, where measured", lambda row, stands: row.near),
]


def told(plan, columns: list[Column]) -> str:
    """A Plan for a person: its tables, what they are of, and what is chosen, which is last.

    Rows are in the order of STANDINGS, and else of the plan. A column that no row has anything for is left out.
    """
    size = f"{plan.batch[0]} x {plan.batch[1]} tokens"
    hosted = [row for row in plan.rows if row.mode.name.endswith(EMBEDDINGS)]
    ordinary = plan.rows[: len(plan.rows) - len(hosted)]
    lines = [f"{size}, {say_size(plan.gpu)} of GPU and {say_size(plan.host)} of host memory"]
    lines += [_table(ordinary, plan.rows, columns)]
    if hosted:
        lines += ["with embeddings in host memory:", _table(hosted, plan.rows, columns)]
    if plan.peers:
        lines += ["for comparison, counted, and never chosen:", _table(plan.peers, [], columns)]
    if any(standing(row, plan.rows) == STANDINGS[1] for row in plan.rows):
        lines += [_wrapped(OUTDONE)]
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in plan.rows[0].need.static.items())
    lines += map(_wrapped, [ALL, f"static of {plan.rows[0].mode.name}, in GiB: {parts}", plan.timed, *_verdict(plan)])
    return "\n".join(lines)


def standing(row, rows: list) -> str:
    """Whether a row fits, and among those that do whether another is better in something and in nothing worse."""
    if not row.fits:
        return STANDINGS[2]
    return STANDINGS[any(_outdoes(other, row) for other in rows if other is not row and other.fits)]


def _outdoes(other, row) -> bool:
    """Times are compared where both are known, as far as they can be told apart, else what slows a step on any GPU."""
    timed = None not in (other.time.ms, row.time.ms)
    if timed and other.time.ms > row.time.ms * (1 + ALIKE):
        return False
    ours, theirs = (
        (one.need.gpu, one.need.on_host, -one.longest, -one.mode.bits, *(() if timed else one.mode.slowed_by))
        for one in (other, row)
    )
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _table(rows: list, among: list, columns: list[Column]) -> str:
    standings = [standing(row, among) for row in rows]
    ordered = sorted(zip(rows, standings, strict=True), key=lambda pair: STANDINGS.index(pair[1]))
    cells = [(head, *(cell(row, stands) for row, stands in ordered)) for head, cell in columns]
    return table(list(zip(*(column for column in cells if any(column[1:])), strict=True)))


def _verdict(plan) -> list[str]:
    found = [(row.longest, row.mode) for row in plan.rows]
    found += [(row.hosted, row.mode.with_embeddings_on_host) for row in plan.rows if row.hosted is not None]
    tokens, mode = max(found, key=lambda pair: pair[0])
    longest = f"the longest single row is {tokens} tokens ({mode.name})"
    longest = longest if tokens else f"not even a row of {STEP} tokens fits"
    if plan.least is None:
        return [f"no mode fits; {longest}"]
    lines = [longest]
    if row := plan.fastest:
        lines += [f"fastest: {_said(row)}; {row.time}, {row.tokens_per_second:.0f} real tokens/s"]
    lines += [f"least memory: {_said(plan.least)}; the peak is in {plan.least.need.peak}"]
    return lines if plan.budget is None else [*lines, f"memory_budget={say_size(plan.gpu)!r} takes {plan.budget}"]


def _said(row) -> str:
    """A mode and how it is set."""
    settings = ", ".join(f"{name}={value!r}" for name, value in row.mode.config_arguments.items())
    checkpointing = " and gradient checkpointing" if row.mode.checkpointing else ""
    return f"{row.mode.name}, HycloraConfig({settings}){checkpointing}"
