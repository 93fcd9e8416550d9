"""parallel=fsdp2 of the drivers: the processes share all weights by torch's fully_shard, each layer a unit.

The model is sharded as soon as it is loaded, so that what comes before the training needs no more memory than that. The
Trainer finds it sharded; accelerate's FSDP2 writes and reads the optimizer's state.
"""

import contextlib
import os

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from hyclora.models.sharding import is_unit
from hyclora.utils.errors import UserError
from hyclora.utils.profiling import undisturbed

# What splits weights among processes, by the Trainer's option, and the variable by which accelerate launch asks for it
SPLIT = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
STORAGE = torch.bfloat16  # that NF4's bytes have as tensors: fully_shard of torch 2.11 takes float ones alone


def ask_for_sharding(training) -> None:
    """Have the Trainer's arguments say what parallel means; UserError for another way to ask, or with one process."""
    for name, variable in SPLIT.items():
        asked = os.environ.get(variable, "false").lower() not in ("false", "0", "")
        if getattr(training, name) or asked and training.parallel != "fsdp2":
            raise UserError(
                f"{name}: the scripts share weights by parallel=fsdp2 and in no other way; drop it and start one "
                "process a GPU with torchrun or num_gpus"
            )
    if training.parallel != "fsdp2":
        return
    if training.num_gpus == 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise UserError("parallel=fsdp2 shares the weights among processes, and this is one: set num_gpus, or drop it")
    training.fsdp, training.fsdp_config = True, {"version": 2, "auto_wrap_policy": "NO_WRAP"}


def take_cpu_too(trainer) -> None:
    """Have a Trainer that asks for FSDP2 do it on the CPU: accelerate has it on GPUs alone, and falls back to DDP.

    To be called when its accelerator has been made.
    """
    if not trainer.args.fsdp or trainer.is_fsdp_enabled:
        return
    state = trainer.accelerator.state
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin, trainer.is_fsdp_enabled = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args), True


def shard(model: nn.Module, device: torch.device) -> None:
    """Leave each process its part of all weights on its device: each layer a unit, and the rest one more.

    device: what the processes compute on, wherever the model is now.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def rest_gathered(model: nn.Module):
    """What is in no layer is whole inside, so that an evaluation may call any part of the model.

    All processes have to call it equally often, as `share_batches` has them do: they gather each layer together.
    """
    if not is_unit(model):
        yield
        return
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with undisturbed(model, train=False), torch.no_grad():
        model(input_ids=token)  # which tells fully_shard what is in what
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def trained_of(model: nn.Module) -> dict[str, Tensor] | None:
    """The trained weights of a sharded model, whole, on the first process, and nothing on others; None of any other.

    All processes have to ask for them.
    """
    if not is_unit(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
