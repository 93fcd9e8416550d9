"""What may be changed of a layer between its forward and a backward that runs it again, and who looks inside.

A walk through a layer's modules takes the host longer than to launch some of its kernels. So what is to be read is
listed once, and found anew when modules were replaced (models/watch.py).
"""

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hyclora.models.sharding import is_part, is_sharded
from hyclora.models.trust import HOOKS, look


class Switches:
    """What is set of a layer's adapters, of copies that PEFT trains whole, of dropout, and its weights.

    Weights of a layer that is sharded come and go, and are not compared.
    """

    def __init__(self, layer: nn.Module):
        modules = list(layer.modules())
        self._layer = layer
        self._adapted = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        self._drops = [(m, "p") for m in modules if isinstance(m, nn.Dropout)]
        self._drops += [(m, "attention_dropout") for m in modules if "attention_dropout" in vars(m)]
        places = [(m._parameters, name) for m in modules for name in m._parameters]
        self._hooks = [m.__dict__[name] for m in modules if m is not layer for name in HOOKS]
        self._sharded = [m for m in modules if is_sharded(m)]
        self._places = None if self._sharded else list(zip(*places, strict=True))

    def read(self) -> tuple:
        """All of it, as it is now, to be compared."""
        drops = [m.__dict__[name] if m.training else 0.0 for m, name in self._drops]
        weights = [] if self._places is None else [(id(p), p._version) for p in self._parameters()]
        return list(map(_adapter, self._adapted)), drops, weights

    def trained(self) -> list[nn.Parameter]:
        """Parameters of the layer that may get a gradient."""
        parameters = self._layer.parameters() if self._places is None else self._parameters()
        return [p for p in parameters if p.requires_grad]

    def is_hooked(self) -> bool:
        """Whether hooks of somebody on what is inside of the layer may look at what passes."""
        return any(self._hooks) and any(map(look, self._hooks))

    def are_gathered_later(self) -> bool:
        """Whether some weight is a part, in whose place fully_shard gathers the whole where the layer's modules run."""
        return any(is_part(m, p) for m in self._sharded for p in m.parameters(recurse=False))

    def _parameters(self) -> list[nn.Parameter]:
        """Those that are shared once; a recording has another tensor in each place of one."""
        return list({id(p): p for p in map(dict.get, *self._places) if p is not None}.values())


def _adapter(module: nn.Module) -> tuple:
    """Which adapters of one of PEFT's layers are merged and which are active, and how strongly; its properties cost."""
    active, scaling = module._active_adapter, module.__dict__.get("scaling", {})
    names = [active] if isinstance(active, str) else active
    return module._disable_adapters, *module.merged_adapters, *[(name, scaling.get(name)) for name in names]
