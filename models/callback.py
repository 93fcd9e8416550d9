"""Calibration inside the checkpoints of Hugging Face's Trainer, and of the trainers that are made of it, as TRL's."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hyclora.models.patch import find_patch
from hyclora.models.report import tell_of_dtype
from hyclora.models.state import FILE_NAME, load_calibration, save_calibration

STATE, ADAPTERS = "trainer_state.json", "adapter_model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
# what a checkpoint's state keeps through a resume, and tells two checkpoints apart
_SAME = ("global_step", "log_history", "total_flos", "best_metric")


class CalibrationCallback(TrainerCallback):
    """Saves the calibration of a patched model into each checkpoint, and loads it before the first resumed step.

        trainer.add_callback(CalibrationCallback())
        trainer.train(resume_from_checkpoint=True)

    checkpoint: the folder that is resumed; needed only if it is neither in output_dir nor args.resume_from_checkpoint,
    as the Trainer tells nobody. Takes what save_calibration takes, on disk.

    PEFT makes adapters of 16 bit float32 as it loads them (0.21.2), TRL's of a 4-bit base for instance, and then a run
    is another one from there on: they get the dtype of the checkpoint again, as does what the optimizer has of them. It
    is told, and where several processes train they stay float32.

    A checkpoint that has no calibration is resumed with a warning: calibration begins anew. ValueError as training
    begins if the model is not patched, if the resumed checkpoint is not found, if its calibration is torn or of other
    settings, and for a hyper-parameter search, whose trials have folders of their own.
    """

    def __init__(self, checkpoint: str | Path | None = None):
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state: TrainerState, control, model=None, optimizer=None, **kwargs):
        patch = find_patch(model)
        if state.is_hyper_param_search:
            raise ValueError("CalibrationCallback cannot follow a hyper-parameter search: leave it out there")
        if not state.global_step:
            return
        folder = self._resumed(args, state)
        cast = _saved_otherwise(model, folder)
        tell_of_dtype(set(cast.values()), restored=args.world_size == 1)
        if args.world_size == 1:  # DDP has its buffers for them by now
            _restore_dtypes(cast, {} if optimizer is None else optimizer.state)
        if (folder / FILE_NAME).is_file():
            load_calibration(model, folder)
        else:
            patch.calibration.lost = f"{folder} has no {FILE_NAME}"

    def on_save(self, args, state: TrainerState, control, model=None, **kwargs):
        if args.should_save:
            save_calibration(model, _folder(args, state))

    def _resumed(self, args, state: TrainerState) -> Path:
        """The folder of the checkpoint that the Trainer has just read."""
        places = [self.checkpoint] if self.checkpoint else [args.resume_from_checkpoint, _folder(args, state)]
        folders = [Path(place) for place in places if place]
        for folder in folders:
            if (folder / STATE).is_file() and _told(TrainerState.load_from_json(str(folder / STATE))) == _told(state):
                return folder
        raise ValueError(
            f"the checkpoint of step {state.global_step} that is resumed is not {' or '.join(map(str, folders))}: "
            "say where it is with CalibrationCallback(checkpoint=FOLDER)"
        )


def _saved_otherwise(model: nn.Module, folder: Path) -> dict[nn.Parameter, torch.dtype]:
    """Float32 adapters that were saved in 16 bit, and in which."""
    found = {}
    for adapter in getattr(model, "peft_config", ()):
        file = folder / ADAPTERS if adapter == "default" else folder / adapter / ADAPTERS
        if not file.is_file():
            continue
        with safe_open(file, "pt") as saved:
            names = saved.keys()
            dtypes = {name: DTYPES.get(saved.get_slice(name).get_dtype()) for name in names}
        told = ((p, dtypes.get(name.replace(f".{adapter}", ""))) for name, p in model.named_parameters())
        found |= {p: dtype for p, dtype in told if dtype is not None and p.dtype == torch.float32}
    return found


def _restore_dtypes(cast: dict[nn.Parameter, torch.dtype], of_optimizer: dict) -> None:
    """Adapters are as they were saved, and so are the optimizer's tensors of their shape.

    Unless these have values that do not fit: then they are float32 for adapters of 16 bit too.
    """
    kept = []
    for p, dtype in cast.items():
        p.data = p.data.to(dtype)
        state = of_optimizer.get(p, {})
        kept += [(state, key, value.to(dtype)) for key, value in state.items() if _is_of(value, p)]
    if all(torch.equal(state[key], value.float()) for state, key, value in kept):
        for state, key, value in kept:
            state[key] = value


def _is_of(value, p: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape == p.shape


def _folder(args, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _told(state: TrainerState) -> str:
    return json.dumps([getattr(state, name) for name in _SAME])
