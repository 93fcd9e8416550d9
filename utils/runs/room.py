"""Which batch had no room, and which settings would have it by the plan (hyclora/plan.py)."""

import contextlib
import json
import shlex
from dataclasses import dataclass

import torch

from hyclora.models.config import LAUNCH
from hyclora.utils.errors import UserError, is_out_of_memory
from hyclora.utils.planning.budget import available_host
from hyclora.utils.planning.kept import Savers
from hyclora.utils.planning.live import count
from hyclora.utils.planning.modes import MODES, TOLD_BY, Mode
from hyclora.utils.planning.shape import Shape
from hyclora.utils.planning.units import say_size

TOLD = 3  # how many settings are told


class NoRoom(RuntimeError):
    """A batch of so many rows and tokens ran out of memory."""

    def __init__(self, rows: int, tokens: int):
        super().__init__(f"out of memory at a batch of {rows} x {tokens} tokens")
        self.rows, self.tokens = rows, tokens


@contextlib.contextmanager
def telling(batch: dict[str, torch.Tensor]):
    """Whatever runs out of memory inside is a NoRoom of this batch."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise NoRoom(*batch["input_ids"].shape) from error


@dataclass(frozen=True)
class Setting:
    """A setting that fits. options: what the command line gets; keeps_numbers: whether the run may go on with it."""

    options: tuple[str, ...]
    gpu: int
    keeps_numbers: bool

    def __str__(self) -> str:
        return f"{shlex.join(self.options)} ({say_size(self.gpu)})"


def available(device: torch.device) -> tuple[int, int] | None:
    """Bytes of the GPU that this process has or could have, and of host memory; None on a CPU, which has no plan."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device), available_host()


def what_fits(source: str, values: dict, batch: tuple[int, int], gpu: int, host: int) -> list[Setting]:
    """At most TOLD settings with room for a batch (rows, tokens) by the plan, first those that leave a run's numbers.

    Those with embeddings in host memory are told where no other fits, or the run has them there.

    source: where the base model lies; values: all settings of the run, which had no room: none that takes more is told.
    Empty where nothing fits, and for what cannot be planned: another model, dtype or device, and training weights
    beside adapters.
    """
    if values.get("trainable_params") or not values.get("use_lora", True):
        return []
    if not values["load_in_4bit"] and values["dtype"] == "float32":
        return []
    base, targets = "nf4" if values["load_in_4bit"] else "bf16", values["target_modules"]
    try:
        shape = Shape(source, base, values["lora_rank"], targets, values["lora_dropout"] > 0)
    except UserError:
        return []
    hosted = [] if shape.tied else [mode.with_embeddings_on_host for mode in MODES]
    kinds = [hosted] if values["offload_embeddings"] else [MODES, hosted]
    found = (_fitting(shape, modes, values, batch, gpu, host) for modes in kinds)
    return next(filter(None, found), [])


def _fitting(
    shape: Shape, modes: list[Mode], values: dict, batch: tuple[int, int], gpu: int, host: int
) -> list[Setting]:  # fmt: skip
    """what_fits among some modes."""
    needs = {mode: count(Savers(shape, mode.config), *batch, mode.checkpointing) for mode in modes}
    options = {mode: _options(mode, values) for mode in modes}
    most = min([gpu, *(need.gpu - 1 for mode, need in needs.items() if not options[mode])])
    found = [
        Setting(options[mode], need.gpu, keeps_numbers={name[2:] for name in options[mode][::2]} <= set(LAUNCH))
        for mode, need in needs.items()
        if need.gpu <= most and need.on_host <= host and options[mode]
    ]
    return sorted(found, key=lambda setting: (not setting.keeps_numbers, setting.gpu))[:TOLD]


def _options(mode: Mode, values: dict) -> tuple[str, ...]:
    """What the command line needs to have a mode in place of the run's settings."""
    wanted = {"use_hyclora": True} | {name: getattr(mode.config, name) for name in (*TOLD_BY, "cuda_graphs")}
    now = values["gradient_checkpointing"]
    off, on = ("off", "all") if isinstance(now, str) else (False, True)  # the plain loop's words
    wanted["gradient_checkpointing"] = (now if now != off else on) if mode.checkpointing else off
    values = values | ({"cuda_graphs": True} if values["cuda_graphs"] == "auto" else {})
    changed = {name: value for name, value in wanted.items() if value != values[name]}
    texts = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in changed.items()}
    return tuple(word for name, text in texts.items() for word in (f"--{name}", text))
