"""How a block is put in front of a module's forward: so that wrappers, copies and pickles of the module go on working.

A model is copied with all that hangs on its modules. A copy of the whole has blocks of its own, as the Patch brings
them (patch.py); a copy of one module, say of a layer, has none, and is stock.
"""

import inspect
from types import CellType, MethodType

import torch
from torch import nn

from hyclora.operators.savers.base import taken_off

BOUND = "_hyclora_forward"
REPLICATE = "_replicate_for_data_parallel"  # what torch.nn.parallel.replicate calls
INSIDE = ("__wrapped__", "__func__", "func")  # where wrappers, methods and partials have what they call


class BoundForward:
    """A patched module's forward: its block's, or the one that it had before (former; None: its class's) without one.

    To others it is the bound method that was there: it has its signature, and a __func__ that takes the module, which
    Accelerate wraps and binds again. Whatever is put around it stays when the block goes, and calls the former forward.
    left: the name of a block that went, until the forward runs again; None behind that.
    """

    # without a __dict__, functools.wraps copies no reference
    __slots__ = ("module", "former", "block", "left", "__weakref__")
    __name__ = "forward"

    def __init__(self, module: nn.Module, former, block=None):
        self.module, self.former, self.block = module, former, block
        self.left: str | None = None

    @torch.compiler.disable  # to trace what a block does took dynamo a minute, for six tiny layers
    def __call__(self, *args, **kwargs):
        block = self.block
        if block is not None:
            return block.forward(*args, **kwargs)
        if self.left is not None:
            if torch._C._current_graph_task_id() != -1:  # in a backward what ran before runs again
                raise taken_off(self.left)
            self.left = None
        return self.run_stock(*args, **kwargs)

    def run_stock(self, *args, **kwargs):
        if self.former is not None:
            return self.former(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __func__(self) -> "UnboundForward":
        return UnboundForward(type(self.module))

    @property
    def __signature__(self) -> inspect.Signature:
        """HF's Trainer and generate read off it which inputs a model takes."""
        return inspect.signature(self.former or MethodType(type(self.module).forward, self.module))

    def __getstate__(self):
        return self.module, self.former

    def __setstate__(self, state):
        self.module, self.former = state
        self.left = None
        self.block = getattr(self, "block", None)  # the Patch may have come first

    def replicate(self) -> nn.Module:
        """What DataParallel gets for the module on another GPU: its forward would be that of the first one's."""
        if self.block is not None:
            raise ValueError(
                "DataParallel copies a model for each GPU in a way that a patched one cannot follow; start one process "
                "a GPU with torchrun --nproc_per_node N, or show one GPU alone with CUDA_VISIBLE_DEVICES=0"
            )
        replica = getattr(type(self.module), REPLICATE)(self.module)
        if self.former is None and replica.__dict__["forward"] is self:
            replica.forward = MethodType(self.__func__, replica)
        return replica


class UnboundForward:
    """BoundForward as a function of the module, so that what is made of it can be bound to a copy."""

    __slots__ = ("kind",)
    __name__ = "forward"

    def __init__(self, kind: type[nn.Module]):
        self.kind = kind

    def __call__(self, module: nn.Module, *args, **kwargs):
        bound = module.__dict__.get(BOUND)
        if bound is None or bound.module is not module:
            return self.kind.forward(module, *args, **kwargs)
        return bound(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.kind.forward)


def bind(module: nn.Module, block) -> BoundForward:
    """Put a block in front of a module's forward, or inside of what is still around an earlier one's."""
    bound = module.__dict__.get(BOUND)
    if bound is None:
        bound = BoundForward(module, module.__dict__.get("forward"))
        setattr(module, BOUND, bound)
        module.forward = bound
    bound.block, bound.left = block, None
    setattr(module, REPLICATE, bound.replicate)
    return bound


def unbind(bound: BoundForward) -> None:
    """Give a module its former forward back; what was put around it since stays, without the block inside."""
    own = bound.module.__dict__
    if bound.block is not None:
        bound.block, bound.left = None, bound.block.name
    own.pop(REPLICATE, None)
    if _is_ours(own.get("forward")):
        del own["forward"], own[BOUND]
        if bound.former is not None:
            bound.module.forward = bound.former


def is_replaced(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that is not known to call a BoundForward."""
    forward = module.__dict__.get("forward")
    return forward is not None and not _reaches(forward, module, set())


def runs_own(module: nn.Module) -> bool:
    """Whether a module has its class's forward, with nothing but a block in front of it."""
    forward = module.__dict__.get("forward")
    return forward is None or isinstance(forward, BoundForward) and forward.module is module and forward.former is None


def _is_ours(forward) -> bool:
    """Whether this is nothing but a BoundForward: Accelerate leaves one bound again when it takes its wrapper off."""
    return isinstance(forward, BoundForward) or isinstance(getattr(forward, "__func__", None), UnboundForward)


def _reaches(function, module: nn.Module, seen: set[int]) -> bool:
    """Whether a callable is made of the module's BoundForward, as far as one can look into it."""
    if isinstance(function, BoundForward):
        return function.module is module
    if isinstance(function, UnboundForward):
        return BOUND in module.__dict__
    if not callable(function) or isinstance(function, (nn.Module, type)) or id(function) in seen:
        return False
    seen.add(id(function))
    inside = [getattr(function, name, None) for name in INSIDE]
    inside += [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    return any(_reaches(other, module, seen) for other in inside)


def _content(cell: CellType):
    """What a closure has in a cell; None if that is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
