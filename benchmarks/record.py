"""One JSON line a run: the result with the commit, machine and versions it was measured on."""

import json
from datetime import datetime, timezone
from pathlib import Path

from hyclora.utils.errors import UserError

RESULTS = Path(__file__).parent / "results"


def read(file: Path) -> list[dict]:
    """The lines of a result file, none if it is not there; UserError for one that was not written to its end."""
    lines = []
    for i, text in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            raise UserError(f"{file}, line {i} is not JSON, perhaps cut off while it was written: remove it") from None
    return lines


def is_alike(line: dict, now: dict) -> bool:
    """Whether a line is of the commit, the device and the attention of environment(), so that it need not be again.

    A package that takes over where it is installed makes another line.
    """
    from hyclora.operators.attention.flash4 import PACKAGE

    mine, here = ((one["commit"], one["device"], one.get("versions", {}).get(PACKAGE)) for one in (line, now))
    return mine == here


def record(name: str, result: dict, folder: Path = RESULTS) -> dict:
    """Append result to folder/name.jsonl and return the whole line."""
    from hyclora.utils.results import environment  # it imports Transformers, which some peers have to patch first

    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = {"benchmark": name, "time": now, **environment(), **result}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line
