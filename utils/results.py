"""What a run leaves behind, in one folder for all runs of a task: `<run>.log`, `<run>.json` and the folder `<run>/`.

A run is named after its settings and its start, so that no run writes over another; the folder holds the checkpoints
and the trained adapters.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
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

from hyclora.utils.args import ROOT
from hyclora.utils.errors import UserError
from hyclora.utils.ranks import of_first
from hyclora.utils.runs.identity import in_effect
from hyclora.utils.training_arguments import TrainingArguments

SETTINGS = "settings.json"
CORE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "seed",
    "output_dir",
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "flash-attn-4")
_MEMORY = {
    "peak_bytes": "MiB at the peak of GPU memory",
    "held_bytes": "MiB that torch held of the GPU",
    "host_bytes": "MiB of offloaded activations on the host",
}
KEPT_BY = {
    "hyclora": "HyC-LoRA",
    "lora": "plain LoRA",
    "lora_checkpointing": "plain LoRA with checkpointing",
    "full": "training of all weights",
}
_PEERS = ("liger-kernel", "unsloth", "unsloth_zoo", "cut-cross-entropy")


def start_run(root: Path, tag: str, content: dict) -> Path:
    """Make the folder of a new run, with its settings (`content`) in it.

    Its name is the tag and the time, made unique and the same on every rank.
    """
    return of_first(lambda: _fresh_folder(root, tag, content))


def _fresh_folder(root: Path, tag: str, content: dict) -> Path:
    start = f"{tag}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in itertools.count(1):
        folder = root / (start if attempt == 1 else f"{start}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            write_json(folder / SETTINGS, content)
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
        _claim(log)
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


def _claim(log) -> None:
    """Keep a second process from going on with the run of this log while the first one still lives."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{log.name} is in use: another process trains this run, wait for it or end it") from None
    except OSError:
        return  # a file system without locks


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
    """The settings of argument groups, and others by name, one a line, in green; not those that have no effect."""
    values = {name: value for group in (*map(vars, groups), more or {}) for name, value in group.items()}
    for name, value in values.items():
        if in_effect(name, values):
            print(_green(f"{name}: {value}"))


def _green(text: str) -> str:
    """The same as a terminal shows it in green, if it is one that shows colors and they are wanted."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[32m{text}\x1b[0m" if wanted else text


def steps_of(training: TrainingArguments, n_rows: int) -> int:
    """The number of steps that the Trainer's arguments mean; UserError if no row is left to train on."""
    batch = training.per_device_train_batch_size * training.world_size
    n_batches = n_rows // batch if getattr(training, "dataloader_drop_last", False) else math.ceil(n_rows / batch)
    if not n_batches:
        raise UserError(
            f"dataloader_drop_last=True leaves none of the {n_rows} rows, which fill no batch of {batch}: drop it, or "
            "lower per_device_train_batch_size"
        )
    per_epoch = math.ceil(n_batches / training.gradient_accumulation_steps)
    return training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)


def core_of(training: TrainingArguments, n_rows: int) -> dict:
    """What of the Trainer's arguments a reader of results asks for first, and the number of steps that they mean."""
    values = next(iter(settings(training).values()))
    names = getattr(training, "CORE", CORE)
    return {name: values[name] for name in names if in_effect(name, values)} | {"steps": steps_of(training, n_rows)}


def once(file: Path, settings: dict, compute):
    """compute(), or what an earlier session of the run has kept of it in `file` with the same settings.

    All processes of a run compute it, or none does: the file is the first one's.
    """
    kept = of_first(lambda: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
    if kept.get("settings") != settings:
        kept = {"settings": settings, "value": compute()}
        of_first(lambda: write_json(file, kept))
    return kept["value"]


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


def line_by_line(shown: dict[str, dict[str, str]]) -> dict[str, str]:
    """What `Task.shown` gives, each number with its name and time in one line."""
    return {f"{name} {when} training": text for name, found in shown.items() for when, text in found.items()}


def _side_by_side(shown: dict[str, dict[str, str]]) -> str:
    """The same as a table with a column a time."""
    times = list(next(iter(shown.values())))
    return table([("", *times), *((name, *(found[when] for when in times)) for name, found in shown.items())])


def texts_of(texts: dict[str, dict]) -> str:
    """What the model wrote to each prompt, before and after training; texts: what `Task.write` gives, by time."""
    lines = []
    for time_, found in texts.items():
        lines += [f"{time_} training: {row['prompt']}\n> {row['text']}" for row in found["texts"]]
        lines.append(f"{time_} training, greedy: {_cache_told(found['cache'])}")
    return "\n\n".join(lines)


def _cache_told(cache: dict) -> str:
    """What `generate.compare_cache` found, in words."""
    kept, without = cache["with"], cache["without"]
    told = (
        f"{cache['alike']} of {cache['tokens']} tokens alike with and without a cache of {kept['cache_mib']} MiB, "
        f"{kept['seconds']} and {without['seconds']} s"
    )
    return told if kept["peak_mib"] is None else f"{told}, {kept['peak_mib']} and {without['peak_mib']} MiB at the peak"


def closing_table(found: dict) -> str:
    """What a run found out, at a glance; found: the content of its results file. Several scores get their own table."""
    train, buffered, shown = found["train"], found["buffered_bytes"], found["shown"]
    many = len(shown) > 1 and any(shown.values())
    rows = [*({} if many else line_by_line(shown)).items(), ("final loss", f"{found['final_loss']:.4f}")]
    rows += [("batches without a target, skipped", str(n))] if (n := train["masked_batches"]) else []
    rows += [("steps that were not finite, skipped", str(n))] if (n := train["skipped_steps"]) else []
    for name, size in buffered.items():
        factor = f" ({size / buffered['hyclora']:.2f}x)" if "hyclora" in buffered and name != "hyclora" else ""
        rows.append((f"MiB kept for backward, {KEPT_BY[name]}{factor}", f"{size / 2**20:.2f}"))
    rows += [(label, f"{train[name] / 2**20:.0f}") for name, label in _MEMORY.items() if train[name]]
    rows.append(("real tokens a second in training", f"{train['tokens_per_second']:.0f}"))
    return f"{_side_by_side(shown)}\n{table(rows)}" if many else table(rows)
