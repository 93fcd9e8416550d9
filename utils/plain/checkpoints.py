"""A checkpoint of the plain loop: trained weights, optimizer, scaler, random state, calibration, and how far it was.

It is sealed, found and resumed as the Trainer's are (utils/runs/checkpoints.py).
"""

from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hyclora.models.patch import patch_of
from hyclora.models.state import load_calibration, save_calibration
from hyclora.utils.plain.progress import Progress
from hyclora.utils.runs.card import save_trained
from hyclora.utils.runs.checkpoints import ADAPTERS, ALL_WEIGHTS, STATE, prune, seal, state_of

OPTIMIZER = "optimizer.pt"


def save(run: Path, model: nn.Module, optimizer, scaler, progress: Progress, limit: int | None) -> None:
    """Write the checkpoint of a step and delete those that are too many."""
    folder = run / f"{PREFIX_CHECKPOINT_DIR}-{progress.state.global_step}"
    with progress.paused():
        _write(folder, model, optimizer, scaler, progress)
        prune(run, limit)


def _write(folder: Path, model: nn.Module, optimizer, scaler, progress: Progress) -> None:
    save_trained(model, folder)
    if patch_of(model) is not None:
        save_calibration(model, folder)
    on_gpu = torch.cuda.is_initialized()
    kept = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "progress": progress.state_dict()}
    kept["random"] = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]
    torch.save(kept, folder / OPTIMIZER)
    progress.state.save_to_json(str(folder / STATE))
    seal(folder)


def restore(folder: Path, model: nn.Module, optimizer, scaler) -> tuple[TrainerState, dict]:
    """Put everything back as it was; what `Progress.resume` takes."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / ADAPTERS))
    else:
        model.load_state_dict(load_file(folder / ALL_WEIGHTS), strict=False)  # tied weights are there once
    if patch_of(model) is not None:
        load_calibration(model, folder)
    kept = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(kept["optimizer"])
    scaler.load_state_dict(kept["scaler"])
    torch.set_rng_state(kept["random"][0])
    for random in kept["random"][1:]:
        torch.cuda.set_rng_state(random)
    return state_of(folder), kept["progress"]
