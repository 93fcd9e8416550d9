"""Input embeddings that wait in host memory: rows are looked up there, and sent to where the tokens are.

In the module's place a parameter without rows stays where the weight was. So the model has its device and dtype as
ever, and where that goes, and what becomes of its dtype, is what rows and the weight follow; module.weight and the
state dict are the weight itself, and a copy of the module alone is stock. The weight is not pinned: the GPU reads
copies of its rows alone, and torch would round it up to a power of two. What would take the weight to the device, or a
part of it (tying, fully_shard), is refused.
"""

from functools import partial

import torch
from torch import Tensor, nn

from hyclora.models import trust
from hyclora.models.binding import BOUND
from hyclora.models.blocks import Block
from hyclora.models.sharding import DTensor, is_sharded
from hyclora.operators.savers import Step

PIECE = 2**25  # bytes of rows that are pinned at a time
WEIGHT, PARAMETERS, REDUCE = "weight", "_parameters", "__reduce_ex__"  # the last is what copy and pickle ask for
SETTING = "offload_embeddings=True"
NOT_SHARDED = "is in host memory, and fully_shard needs it on the device; shard without that setting"
LEAVE_OUT = "leave it out of modules_to_save, target_modules and trainable_token_indices"


class Parameters(dict):
    """A module's, none of which fully_shard may put a part of in its place: it would look for that in module.weight."""

    def __init__(self, name: str, parameters: dict):
        super().__init__(parameters)
        self.name = name

    def __setitem__(self, key: str, value) -> None:
        if isinstance(value, DTensor):
            raise ValueError(f"{SETTING}: {self.name} {NOT_SHARDED}")
        super().__setitem__(key, value)


class HostEmbedding(Block):
    """The block of an embedding, in training and out of it: ids [...] give rows [..., C] of a frozen weight [V, C].

    Bits are those of torch's own lookup. A forward waits for the device that has the ids. On the host it takes the
    weight's bytes, and some pieces; on the device what is returned. model: the transformers model that it is in.
    """

    def __init__(self, module: nn.Module, name: str, step: Step, model: nn.Module):
        super().__init__(module, name, {}, step)
        self.model = model
        self.hooks: tuple[torch.utils.hooks.RemovableHandle, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the weight, in host memory."""
        weight = held(self.module)
        return 0 if weight is None else weight.numel() * weight.element_size()

    def bind(self) -> None:
        super().bind()
        self.hold()

    def hold(self) -> None:
        """Have the module's weight in host memory, and what holds its place in its stead."""
        own, weight = vars(self.module), self.module.weight
        place = nn.Parameter(weight.data.new_empty(0, weight.shape[1]), requires_grad=False)
        weight.data = weight.data.cpu()
        own[PARAMETERS] = Parameters(self.name, own[PARAMETERS] | {WEIGHT: place})
        self.hooks = (
            self.module.register_state_dict_post_hook(save),
            self.module.register_load_state_dict_pre_hook(load),
        )
        own[WEIGHT], own[REDUCE] = weight, partial(reduced, self.module, self.hooks)

    def unbind(self) -> None:
        """The same Parameter in its place again, on the device and in the dtype that the model has by now."""
        super().unbind()
        for hook in self.hooks:
            hook.remove()
        vars(self.module).pop(REDUCE, None)
        weight, place = vars(self.module).pop(WEIGHT, None), self.module._parameters[WEIGHT]
        vars(self.module)[PARAMETERS] = {**self.module._parameters}
        if weight is not None:
            self.module._parameters[WEIGHT] = moved(weight, place)

    def forward(self, input: Tensor) -> Tensor:
        weight, place = self._weight(), self.module._parameters[WEIGHT]
        if is_sharded(self.module):
            raise ValueError(f"{SETTING}: {self.name} {NOT_SHARDED}")
        if torch.is_grad_enabled() and (weight.requires_grad or place.requires_grad):
            raise ValueError(f"{SETTING} is for frozen embeddings, and {self.name} is trained now: drop that setting")
        ids, (_, width) = input.flatten().cpu(), weight.shape
        rows = place.new_empty(len(ids), width, device=input.device)
        n = max(1, PIECE // (width * weight.element_size()))
        for piece, target in zip(ids.split(n), rows.split(n), strict=True):
            pinned = torch.empty(target.shape, dtype=weight.dtype, pin_memory=input.is_cuda)
            target.copy_(torch.index_select(weight, 0, piece, out=pinned), non_blocking=True)
        return rows.view(*input.shape, width)

    def check(self, decoder: nn.Module) -> None:
        """ValueError if a decoder has other embeddings by now, or the head has their weight."""
        weight, head = self._weight(decoder.get_input_embeddings()), self.model.get_output_embeddings()
        if getattr(head, WEIGHT, None) is weight:  # of a head with adapters too
            raise ValueError(
                f"{SETTING}: {self.name} was tied to the head since, which needs it on the device: tie weights before "
                "apply_hyclora, without that setting"
            )

    def _weight(self, module: nn.Module | None = None) -> nn.Parameter:
        """The weight in host memory; ValueError if it was replaced, or the module by this one."""
        weight = held(self.module)
        if weight is None or module not in (None, self.module):
            raise ValueError(
                f"{SETTING}: {self.name} was replaced since, and what it was is in host memory: replace or wrap "
                "embeddings before apply_hyclora, and train them without that setting"
            )
        return weight


def held(module: nn.Module) -> nn.Parameter | None:
    """The weight of a module that is in host memory, None without one."""
    return module.__dict__.get(WEIGHT)


def moved(weight: nn.Parameter, place: nn.Parameter) -> nn.Parameter:
    """The same Parameter where the model is by now; without memory (meta) it takes another one."""
    if place.is_meta:
        return nn.Parameter(weight.to(place.device, place.dtype), weight.requires_grad)
    weight.data = weight.data.to(place.device, place.dtype)
    return weight


def reduced(module: nn.Module, hooks: tuple[torch.utils.hooks.RemovableHandle, ...], protocol: int) -> tuple:
    """What copy and pickle make another module of: a stock one, which a copy of the whole model sends away again."""
    make, kind, state, *rest = object.__reduce_ex__(module, protocol)
    ours = {hook.id for hook in hooks}
    state = {name: value for name, value in state.items() if name not in (WEIGHT, REDUCE)}
    for name in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
        state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if key not in ours)
    if (weight := held(module)) is not None:
        place = module._parameters[WEIGHT]
        given = nn.Parameter(weight.data.to(place.device, place.dtype), place.requires_grad)
        state[PARAMETERS] = {**module._parameters, WEIGHT: given}
    return make, kind, state, *rest


def save(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """Have the weight itself in a state dict."""
    state[prefix + WEIGHT] = module.weight.detach()


def load(module: nn.Module, state: dict, prefix: str, metadata: dict, *found) -> None:
    """Copy the weight of a state dict; ValueError if it is to be assigned, which would leave the one that is held."""
    weight, given = held(module), state.get(prefix + WEIGHT)
    if weight is None or given is None or given.shape != weight.shape:
        return
    if metadata.get("assign_to_params_buffers"):
        raise ValueError(f"{SETTING}: {prefix}{WEIGHT} is in host memory and cannot be assigned; load without assign")
    weight.data.copy_(given)
    state[prefix + WEIGHT] = module._parameters[WEIGHT].detach()


def why_not(model: nn.Module, decoder: nn.Module, names: dict[int, str]) -> str | None:
    """Why a decoder's input embeddings cannot wait in host memory, None if they can; names: of the model's modules."""
    module = decoder.get_input_embeddings()
    name = names[id(module)]
    if any(map(is_sharded, model.modules())):
        return "the model is sharded by fully_shard, and each process has its part of the embeddings"
    if any(p.requires_grad for p in module.parameters()) or module.__module__.startswith("peft."):
        return f"{name} is trained, on the device: {LEAVE_OUT}, or do not train it"
    if reason := trust.why_not_embedding(module, name):
        return reason
    bound = module.__dict__.get(BOUND)
    if bound is not None and bound.block is not None:
        return f"{name} is in host memory for another patched model that shares it: call remove_hyclora on that first"
    others = ((n, m) for n, m in model.named_modules() if m is not module)
    if other := next((n for n, m in others if any(p is module.weight for p in m._parameters.values())), None):
        return f"{other} shares its weight with {name} (tie_word_embeddings), and needs it on the device"
    return None
