"""Checkpoints that are whole: all files that were written are there as they were, in the folder of their run.

The last file that is written, `checksums.json`, has the digest of every other one and of the run's `settings.json`.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hyclora.utils.results import SETTINGS, write_json

SUMS = "checksums.json"
STATE = "trainer_state.json"
ADAPTERS, ALL_WEIGHTS = "adapter_model.safetensors", "model.safetensors"
OPTIMIZER, SHARDED = "optimizer.pt", ("optimizer.bin", "pytorch_model_fsdp.bin")  # of DDP, and of FSDP2
_CHUNK = 2**22


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Declare a checkpoint whole."""
    files = [file for file in (*folder.iterdir(), *folder.parent.glob(SETTINGS)) if file.is_file()]
    write_json(folder / SUMS, {os.path.relpath(f, folder): _digest(f) for f in sorted(files) if f.name != SUMS})


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None for a whole one."""
    try:
        sums = dict(json.loads((folder / SUMS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return f"it has no {SUMS}, so it was not written to its end"
    except (ValueError, TypeError):
        return f"{SUMS} is broken"
    weights = ALL_WEIGHTS if ALL_WEIGHTS in sums else ADAPTERS
    resumed = SHARDED if SHARDED[0] in sums else (OPTIMIZER,)
    for name in (weights, STATE, *resumed, *sums):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != sums.get(name):
            changed = f"{name} is not the file that was written"
            return "it was written by a run of other settings" if name.endswith(SETTINGS) else changed
    return None


def is_checkpoint(folder: Path) -> bool:
    return folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")


def _by_step(run: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, the newest first."""
    found = [c for c in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if c.is_dir() and c.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda c: int(c.name.rpartition("-")[2]), reverse=True)


def prune(run: Path, limit: int | None) -> None:
    """Delete the checkpoints that are older than the `limit` newest sealed ones; None: keep all."""
    found = _by_step(run)
    sealed = [n for n, checkpoint in enumerate(found) if (checkpoint / SUMS).is_file()]
    if limit is not None and len(sealed) > limit:
        for checkpoint in found[sealed[limit - 1] + 1 :]:
            shutil.rmtree(checkpoint)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a sentence for each newer one that is not whole."""
    passed = []
    for checkpoint in _by_step(run):
        if (fault := fault_of(checkpoint)) is None:
            return checkpoint, passed
        passed.append(f"{checkpoint} is passed over: {fault}")
    return None, passed


def state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / STATE))
