"""Measured times in a JSON file that the user names: of a device, versions, a model with adapters, and rows.

A list of entries, one for each of these: {"device", "versions", "of", "ms"}; ms of a mode's name is a number, or why
there is none.
"""

import importlib.metadata
import json
import math
import os
import platform
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hyclora.operators.attention import flash4
from hyclora.utils.args import LoraArguments
from hyclora.utils.errors import UserError
from hyclora.utils.planning.recorded import SIZES
from hyclora.utils.planning.shape import Shape
from hyclora.utils.planning.times import Batch, Time
from hyclora.utils.results import write_json

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", flash4.PACKAGE)
FIELDS = {"device": str, "versions": dict, "of": dict, "ms": dict}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"


def versions() -> dict[str, str]:
    """Of what a time depends on, as far as it is installed."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def entries(file: Path) -> list[dict]:
    """The content of a file, none if it is not there; UserError if it is no such file."""
    if not os.path.exists(file):
        return []
    if not file.is_file():
        raise UserError(f"{file} is no file: name one, for --measure to write times to")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, list) or not all(map(_is_entry, found)):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file} cannot be read as times that --measure wrote: remove it, or name another") from None
    return found


def _is_entry(entry) -> bool:
    if not isinstance(entry, dict) or entry.keys() != FIELDS.keys():
        return False
    known = all(isinstance(entry[name], kind) for name, kind in FIELDS.items())
    return known and all(map(_is_time, entry["ms"].values()))


def _is_time(ms) -> bool:
    number = isinstance(ms, float | int) and not isinstance(ms, bool)
    return isinstance(ms, str) or number and math.isfinite(ms) and ms > 0


def check_place(file: Path) -> None:
    """UserError if times cannot be put into a file."""
    if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise UserError(f"{file} cannot be written: name a file in a folder that is there and may be written to")
    entries(file)


@dataclass(frozen=True)
class KeptTimes:
    """Times of a model with adapters on such rows and on a device, in a file, or in none."""

    shape: Shape
    lora: LoraArguments
    batch: Batch
    where: torch.device
    file: Path | None = None

    @property
    def device(self) -> str:
        return device_name(self.where)

    @cached_property
    def of(self) -> dict:
        """What tells them from others."""
        sizes = {name: getattr(self.shape.config, name, None) for name in (*SIZES, "head_dim", "attention_dropout")}
        sizes["windows"] = {str(window): n for window, n in Counter(self.shape.windows).items()}  # of so many layers
        adapters = {name: getattr(self.lora, name) for name in ("lora_rank", "lora_dropout", "target_modules")}
        return sizes | {"base": self.shape.base} | adapters | vars(self.batch)

    def read(self) -> dict[str, Time]:
        """By mode's name; none without a file, and if these rows of this model were not measured.

        UserError, one sentence, for a file that is not there or was not written to its end, and for times of another
        device or other versions alone.
        """
        if self.file is None:
            return {}
        found, here = entries(self.file), versions()
        if not found:
            raise UserError(f"{self.file} has no times: --measure writes them, on the machine that they are for")
        found_here = [entry for entry in found if entry["device"] == self.device]
        if not found_here:
            others = ", ".join(sorted({entry["device"] for entry in found}))
            raise UserError(
                f"{self.file} has times of {others}, and this machine has {self.device}: measure here, with --measure"
            )
        current = [entry for entry in found_here if entry["versions"] == here]
        if not current:
            then = found_here[-1]["versions"]
            name = next(name for name in [*PACKAGES, *then] if then.get(name, "") != here.get(name, ""))
            raise UserError(
                f"{self.file} has times of {name} {then.get(name, '(none)')}, and here is {here.get(name, 'none')}: "
                "measure again, with --measure"
            )
        ms = next((entry["ms"] for entry in current if entry["of"] == self.of), {})
        return {name: Time(why=one) if isinstance(one, str) else Time(one) for name, one in ms.items()}

    def write(self, times: dict[str, Time]) -> str:
        """Put times in the place of those of the same modes, device, versions and rows; others stay.

        Why they are not there, "" if they are: a full disk is no reason not to tell what was measured.
        """
        if self.file is None:
            return ""
        key = {"device": self.device, "versions": versions(), "of": self.of}
        ms = {name: time.why if time.ms is None else round(time.ms, 3) for name, time in times.items()}
        others = []
        for entry in entries(self.file):
            if {name: entry[name] for name in key} == key:
                ms = entry["ms"] | ms
            else:
                others.append(entry)
        try:
            write_json(self.file, [*others, key | {"ms": ms}])
        except OSError as error:
            return f"times could not be written to {self.file} ({error.strerror}): make room there or name another file"
        return ""
