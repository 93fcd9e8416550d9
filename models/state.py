"""Calibration state beside a checkpoint, so that a resumed run quantizes exactly as the interrupted one did."""

import hashlib
import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hyclora.models.config import LAUNCH, HycloraConfig
from hyclora.models.patch import find_patch
from hyclora.models.report import tell_of_other_savers
from hyclora.operators.savers.difference import SAID

FILE_NAME = "hyclora_calibration.safetensors"
FORMAT = "2"
PROGRESS, KEPT, DIGEST = "calibration", "kept", "digest"


def save_calibration(model: PeftModel, folder: str | Path) -> Path:
    """Write the calibrated statistics of a patched model, and how far calibration is, to folder, atomically.

    12 bytes a channel of each quantized slot, 16 a slot; while calibrating, 8 a context that was seen; and a digest of
    it all. ValueError if the model is not patched.
    """
    patch = find_patch(model)
    tensors = {f"{key}.{name}": t for key, saver in _savers(patch) for name, t in saver.state_dict().items()}
    numbers, progress = patch.calibration.state_dict()
    tensors |= {f"{PROGRESS}.{name}": t for name, t in progress.items()}
    metadata = {"format": FORMAT, PROGRESS: numbers, "config": json.dumps(patch.config.to_dict())}
    metadata[KEPT] = json.dumps({key: str(saver) for key, saver in _savers(patch)})
    metadata[DIGEST] = _digest(tensors, metadata)
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half of it, if the disk is full
    return path


def load_calibration(model: PeftModel, folder: str | Path) -> None:
    """Restore what save_calibration wrote, read on the CPU, to follow the activations when they come.

    ValueError if the model is not patched, or the file is missing, torn, of another setting or model, or has statistics
    that are not finite; then nothing has changed. It is told if another version kept slots otherwise with the same
    settings; if one that is kept as a difference was not, or the other way round, its statistics are left out and
    calibration begins again.
    """
    patch = find_patch(model)
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the checkpoint was not written with HyC-LoRA, so it cannot be resumed with it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        # earlier versions wrote none
        if metadata.pop(DIGEST, None) not in (None, _digest(tensors, metadata)):
            raise ValueError(DIGEST)
        # a setting that is newer than the file was what its default is now
        saved, current = HycloraConfig().to_dict() | json.loads(metadata["config"]), patch.config.to_dict()
    except (SafetensorError, AttributeError, TypeError, KeyError, ValueError):
        raise ValueError(f"{path} is torn, or no calibration of HyC-LoRA: resume from another checkpoint") from None
    changed = [name for name in current if name not in LAUNCH and saved.get(name) != current[name]]
    if metadata["format"] != FORMAT or changed:
        raise ValueError(
            f"{path} was written with other settings of {', '.join(changed) or 'the format'}; use the same"
        )
    known = {key for key, _ in _savers(patch)} | {PROGRESS}
    if foreign := {_owner(name) for name in tensors} - known:
        raise ValueError(f"{path} is of another model, this one has no {min(foreign)}: resume from its own checkpoint")
    # widths alone have a nan where no token was
    if broken := {_owner(name) for name, t in tensors.items() if not t.isfinite().all()} - {PROGRESS}:
        raise ValueError(
            f"{path} has statistics of {min(broken)} that are not finite, so no later step would be: resume from an "
            "earlier checkpoint"
        )
    before, now = _kept_before(patch, metadata), {key: str(saver) for key, saver in _savers(patch)}
    foreign = {key for key, how in now.items() if how.startswith(SAID) != before.get(key, "").startswith(SAID)}
    for key, saver in _savers(patch):
        saver.load_state_dict({} if key in foreign else _under(key, tensors))
    patch.calibration.load_state_dict(metadata[PROGRESS], _under(PROGRESS, tensors))
    if foreign:
        patch.calibrate_again()
    elif patch.graphs is not None:
        patch.graphs.clear()
    tell_of_other_savers(path, {key.rpartition(".")[2] for key, how in now.items() if before.get(key) != how})


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all that a file of calibration says; safetensors itself notices no more than one that is too short."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _kept_before(patch, metadata: dict) -> dict[str, str]:
    """How slots were kept when the metadata were written, as far as that is known."""
    if KEPT in metadata:
        return json.loads(metadata[KEPT])
    # versions that did not write it had groups of one size, and no differences
    now = {key: str(saver) for key, saver in _savers(patch)}
    return {key: how for key, how in now.items() if "groups of" not in how and not how.startswith(SAID)}


def _owner(name: str) -> str:
    """Whose a tensor is: a slot, or the calibration."""
    return name.rpartition(".")[0]


def _under(key: str, tensors: dict) -> dict:
    """The tensors of one owner, by their own names."""
    return {name.removeprefix(f"{key}."): t for name, t in tensors.items() if _owner(name) == key}


def _savers(patch):
    return [
        (f"{block.name}.{slot}", saver)
        for block in [*patch.blocks, *patch.checkpoints]
        for slot, saver in block.savers.items()
    ]
