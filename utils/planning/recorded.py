"""What was measured of a model's shape: result lines of a checkout, which an installed package has not."""

import json
from collections.abc import Callable
from pathlib import Path

from hyclora.models.config import CHAINED
from hyclora.operators.attention.flash4 import PACKAGE
from hyclora.utils.args import ROOT
from hyclora.utils.planning.modes import mode_of
from hyclora.utils.planning.shape import SHAPES, Shape

SIZES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
# lines before this are of inputs that were kept by themselves where they are differences now (savers/difference.py)
DIFFERENCES = "2026-11-30T22:16"
LINES = ROOT / "benchmarks" / "results" / "memory_throughput.jsonl"


def measured(file: Path = LINES, of: Callable = mode_of, timed: bool = False) -> list[tuple]:
    """The last line of each mode, model and batch that has memory, with its mode; of: that of a setting, or None.

    timed: of lines whose time is that of most installations; a package that few have makes attention faster.
    """
    latest = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        line = json.loads(text)
        mode, arguments = None if _was_former(line) else of(line["setting"]), line["arguments"]
        if timed and PACKAGE in line["versions"]:
            continue
        if mode is not None and "dyn_mib" in line and arguments.get("device") == "cuda":
            latest[(mode.name, *_cell(arguments))] = mode, line
    return list(latest.values())


def _was_former(line: dict) -> bool:
    """Whether inputs were kept as they are no more."""
    setting = line["setting"]  # a peer's is its name
    return isinstance(setting, dict) and setting.get("layers") in CHAINED and line["time"] < DIFFERENCES


def _cell(arguments: dict) -> tuple:
    return tuple(arguments[name] for name in ("shape", "base", "lora_rank", "batch_size", "seq_len"))


def times(shape: Shape, batch: int, length: int, file: Path = LINES, of: Callable = mode_of) -> dict[str, str]:
    """Time of a micro-step by mode's name, with the GPU: recorded of this shape, base, rank and batch."""
    found = {}
    for mode, line in measured(file, of, timed=True):
        name, *rest = _cell(line["arguments"])
        if rest == [shape.base, shape.rank, batch, length] and is_shape(shape, name) and "ms" in line:
            found[mode.name] = f"{line['ms']:.0f} ms ({line['device'].removeprefix('NVIDIA ').split()[0]})"
    return found


def is_shape(shape: Shape, name: str) -> bool:
    """Whether a recorded shape has this one's numbers."""
    file = SHAPES / name / "config.json"
    if not file.is_file():
        return False
    given = json.loads(file.read_text(encoding="utf-8"))
    return all(getattr(shape.config, field, None) == value for field, value in given.items() if field in SIZES)
