"""What a training forward returns: outputs whose logits exist from when somebody looks at them.

Whoever keeps the loss alone, as trainers do, never has them. `outputs.logits`, `outputs["logits"]`, an index, a tuple,
a copy or a pickle have them; items() and values() have a Deferred until then, which Accelerate's conversion to fp32 and
torch's pytrees hand on as it is. So has the attribute for those who walk over outputs in torch.distributed, as
fully_shard does for a loss to follow the backward from.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.modeling_outputs import CausalLMOutputWithPast


class Deferred:
    """A tensor of that dtype, made when somebody does more with it than convert it.

    isinstance says that it is none, as it must: torch's C++ takes whatever claims to be a Tensor for the memory of one.
    """

    def __init__(self, make: Callable[[], Tensor], dtype: torch.dtype):
        self._make, self._made, self.dtype = make, None, dtype

    def look(self) -> Tensor:
        """The tensor, always the same one."""
        if self._made is None:
            self._made = self._make()
            self._make = None  # what it was made of may go
        return self._made

    def to(self, *args, **kwargs) -> "Deferred":
        """As a tensor's, deferred too."""
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), self.dtype)
        return Deferred(lambda: self.look().to(*args, **kwargs), dtype)

    def float(self) -> "Deferred":
        return self.to(torch.float32)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.look(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda leaf: leaf.look() if isinstance(leaf, cls) else leaf, (args, kwargs or {}))
        return func(*args, **kwargs)


def _looked_at(name: str) -> Callable:
    return lambda self, *args: getattr(self.look(), name)(*args)


# Python looks for these in the class alone
for _name in (
    *("getitem", "setitem", "len", "iter", "bool", "format", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge"),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "matmul", "rmatmul"),
):
    setattr(Deferred, f"__{_name}__", _looked_at(f"__{_name}__"))


def _is_walk(frame) -> bool:
    """Whether the code of a frame is torch.distributed's, which looks for tensors that there are."""
    while frame.f_globals is vars(dataclasses):  # a copy with other fields
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").startswith("torch.distributed.")


class Late:
    """An attribute that is looked at when it is read, if what was set is a Deferred."""

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, output, owner: type):
        if output is None:
            return self
        value = output.__dict__.get(self.name)
        if isinstance(value, Deferred) and not _is_walk(sys._getframe(1)):
            value = output[self.name] = value.look()
        return value

    def __set__(self, output, value) -> None:
        output.__dict__[self.name] = value


@dataclass
class LateCausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast, of which logits may be set to a Deferred."""

    logits = Late()

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.logits if key == "logits" and key in self else super().__getitem__(key)
        keys = list(self.keys())[key]  # of the first item, usually the loss: not a look at the others
        return self[keys] if isinstance(keys, str) else tuple(self[k] for k in keys)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def __reduce__(self):
        self.logits  # noqa: B018  a copy or a pickle has them
        return super().__reduce__()
