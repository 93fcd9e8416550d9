"""What a run leaves behind, in one folder for all runs of a task: `<run>.log`, `<run>.json` and the folder `<run>/`.

A run is named after its settings and its start, so that no run writes over another; the folder holds the checkpoints
and the trained adapters.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers
from accelerate.utils import broadcast_object_list
from termcolor import colored

from hyclora.utils.args import ROOT, TrainingArguments

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
_PEERS = ("liger-kernel", "unsloth", "unsloth_zoo", "cut-cross-entropy")


def start_run(root: Path, tag: str, training: TrainingArguments) -> Path:
    """Make the folder of a new run; its name is the tag and the time, made unique and the same on every rank."""
    folder = [_fresh_folder(root, tag) if training.process_index == 0 else None]
    if training.world_size > 1:
        broadcast_object_list(folder)
    return folder[0]


def _fresh_folder(root: Path, tag: str) -> Path:
    start = f"{tag}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in itertools.count(1):
        folder = root / (start if attempt == 1 else f"{start}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


class _Tee:
    """A text stream that also writes to the log, without colors."""

    def __init__(self, stream, log):
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        self.log.write(_COLOR.sub("", text))
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()
        self.log.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def logged(file: Path, training: TrainingArguments):
    """Append everything that is printed, the libraries' log lines and the traceback of a failure to `file`.

    In a run of several processes only the first one prints and logs.
    """
    if training.process_index != 0:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
        return
    with open(file, "a", encoding="utf-8") as log:
        handler = logging.StreamHandler(log)
        transformers.utils.logging.add_handler(handler)
        try:
            with contextlib.redirect_stdout(_Tee(sys.stdout, log)):
                yield
        except BaseException:
            traceback.print_exc(file=log)
            raise
        finally:
            transformers.utils.logging.remove_handler(handler)


class Clock:
    """Seconds of each stage of a run."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str):
        now = time.perf_counter()
        self.seconds[stage], self._last = round(now - self._last, 2), now


def environment() -> dict:
    """Versions, device and commit: what a number needs to be compared with another.

    A copy of the tree without its history takes the commit from the environment variable COMMIT.
    """
    versions = {}
    for package in (*_PACKAGES, *_PEERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "commit": os.environ.get("COMMIT") or _commit(),
    }


def _commit() -> str | None:
    """HEAD, with a digest of what tracked code differs from it; None without a history."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False).stdout

    head = git("rev-parse", "--verify", "HEAD").strip()
    change = git("diff", "HEAD", "--", "*.py", "*.sh", "*.txt") if head else ""
    return f"{head}-{hashlib.sha1(change.encode()).hexdigest()[:8]}" if change else head or None


def settings(*groups) -> dict:
    """All settings of a run by group name, as JSON."""
    return {
        type(group).__name__: group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
        for group in groups
    }


def print_settings(groups, more: dict | None = None) -> None:
    """The settings of a run, one a line, in green: those of argument groups, and others by name."""
    for group in (*map(vars, groups), more or {}):
        for name, value in group.items():
            print(colored(f"{name}: {value}", "green"))


def write_json(file: Path, content: dict | list):
    """Write at once or not at all: a reader never sees half a file."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(part, file)


def table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns between rules; the first one is of words."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([f"{name:<{first}}", *map(str.rjust, cells, widths)]) for name, *cells in rows]
    rule = "-" * len(lines[0])
    return "\n".join([rule, *lines, rule])
