"""What torch's fully_shard (FSDP2) makes of modules: the same ones, whose weights are there only while they run.

Between two uses each process has its part of a weight, a DTensor, as the module's parameter. Hooks around the forward
of a sharded module, and around its backward, put the gathered weight in that place, of all that is in it; afterwards
its memory is freed. So blocks read weights off the modules in forward and again in backward, as they do anyhow. The
module's class is a new one of the same code.
"""

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
else:
    FSDPModule = FullyShardedDataParallel = DTensor = ()

MANAGED = "_is_fsdp_managed_module"  # torch tells its compiler so of all that is in a sharded module
HOOKS = "torch.distributed.fsdp._fully_shard"


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is sharded, or in one that is; by the first FSDP too."""
    return module.__dict__.get(MANAGED, False)


def is_unit(module: nn.Module) -> bool:
    """Whether fully_shard was given this very module: its hooks are what gathers its weights."""
    return isinstance(module, FSDPModule)


def is_one_unit(decoder: nn.Module, layers: list[nn.Module]) -> bool:
    """Whether layers are sharded, but none by itself: so that the weights of all are gathered at once."""
    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in decoder.modules())
    return all(map(is_sharded, layers)) and not wrapped and not any(map(is_unit, layers))


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or that which it had before it was sharded."""
    bases = type(module).__bases__
    return bases[1] if len(bases) == 2 and bases[0] is FSDPModule else type(module)


def gathers(hook) -> bool:
    """Whether a hook is torch's that gathers weights, and looks at nothing."""
    return str(getattr(hook, "__module__", "")).startswith(HOOKS)


def is_part(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a module's parameter is a part, in whose place there will be the whole when it runs."""
    return isinstance(tensor, DTensor) and is_sharded(module)


def local(tensor: Tensor) -> Tensor:
    """Of a part what this process has, any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
