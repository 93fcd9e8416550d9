"""Which modules are what they look like, so that a block may compute in their place.

A block reads tensors and numbers of a module and does what the module's class does; the module's own forward is not
run. So a module must be known by identity: its class, the code of that class's forward, its weights, and nobody's
hooks inside. Whatever else there is runs as it is, and the report says why. Nowhere else is this decided.

All why_not_... give the reason, "name: sentence", or None.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType

import accelerate
import peft
import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from torch import nn
from torch.nn.modules import module as every_module
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from hyclora.models.binding import is_replaced
from hyclora.models.families.family import ACTIVATIONS, LAYER_NORM, Family, Reader
from hyclora.models.sharding import class_of, gathers, is_part, is_unit
from hyclora.models.shifted import is_shifted_sparse
from hyclora.operators.linear.nf4 import bnb, is_4bit, state_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks on all modules: dictionaries, never replaced
GLOBAL_HOOKS = tuple(getattr(every_module, f"_global{name}") for name in HOOKS)
# Whose code is known; a name can be taken over, as functools.wraps does, the file that a code is from cannot
PACKAGES = (torch, transformers, peft, accelerate, *([bnb] if bnb else []))
ROOTS = tuple(f"{Path(package.__file__).parent}{os.sep}" for package in PACKAGES)

LINEAR = "torch.nn.modules.linear.Linear"
FROZEN = (LINEAR, "bitsandbytes.nn.modules.Linear4bit")
ADAPTED = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")
EMBEDDING = "torch.nn.modules.sparse.Embedding"
WRAPPER = "peft.utils.other.ModulesToSaveWrapper"
# of PEFT and torch, and not called
CONTAINERS = (nn.ModuleDict, nn.ParameterDict)
DROPOUTS = ("torch.nn.modules.dropout.Dropout", "torch.nn.modules.linear.Identity")
# of torch.nn.functional, which the modules' forwards call
FUNCTIONS = {
    "attention": ("linear", "dropout", "scaled_dot_product_attention", "softmax"),
    "mlp": ("linear", "dropout", "silu"),
    "post_norm": ("gelu", "layer_norm"),
}
INTERFACES = ("sdpa_attention_forward", "eager_attention_forward", "flash_attention_forward")


def look(hooks: dict) -> bool:
    """Whether some of a module's hooks may look at what passes.

    Hugging Face's stay on the layers after one output_hidden_states=True, and look only while it is asked for again.
    """
    if not hooks:
        return False
    asked = output_capturing._active_collector.get()
    return any(asked or not records(hook) for hook in hooks.values() if not gathers(hook))


def records(hook: Callable) -> bool:
    """Whether a hook is Hugging Face's, for hidden states and attention maps that are asked for."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


def asks_for_gradients(hook: Callable) -> bool:
    """Whether a hook is the one by which gradient checkpointing has embeddings want a gradient, and does no more."""
    return is_known(hook) and hook.__name__.startswith("make_inputs_require_grad")


def is_watched(module: nn.Module) -> bool:
    """Whether some hook of a module may look at what passes."""
    return any(look(module.__dict__[name]) for name in HOOKS)


def is_known(function: Callable) -> bool:
    """Whether a function and all that wraps it are code of the packages."""
    while True:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(ROOTS):
            return False
        if not hasattr(function, "__wrapped__"):
            return True
        function = function.__wrapped__


def is_stock(module: nn.Module) -> bool:
    """Whether a module of transformers runs the forward of its class, as it came."""
    cls = class_of(module)
    return cls.__module__.startswith("transformers.") and why_foreign(module, "", (_path(cls),)) is None


def why_foreign(module: nn.Module, name: str, classes: tuple[str, ...]) -> str | None:
    """Not of one of these classes itself, or with another forward; a block in front of it does not count."""
    cls, kind = class_of(module), type(module)
    if _path(cls) not in classes:
        known = " or ".join(dict.fromkeys(path.rpartition(".")[2] for path in classes))
        return f"{name}: {cls.__name__} is not supported, only {known}"
    forward = kind.forward
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    if not (
        is_known(forward) and is_known(kind.__call__) and innermost(forward).__qualname__ == f"{owner.__name__}.forward"
    ):
        return f"{name}: the forward of {cls.__name__} was replaced by another one"
    # that of a variant, in PEFT's; the module's own is looked at below
    names = [called for called in innermost(forward).__code__.co_names if called != "forward"]
    named = {called: getattr(kind, called, None) for called in names}
    methods = {called: method for called, method in named.items() if isinstance(method, FunctionType)}
    if not all(map(is_known, methods.values())) or methods.keys() & module.__dict__.keys():
        return f"{name}: a method of {cls.__name__} that its forward calls was replaced by another one"
    if is_replaced(module) and not _is_moved(module):
        return f"{name}: its forward was replaced by another one"
    return None


def acting(module: nn.Module) -> nn.Module:
    """What runs in a module's place: of PEFT's modules_to_save the copy that is trained, while nobody is around it."""
    if not is_whole(module) or module.disable_adapters or is_replaced(module) or not is_known(type(module).forward):
        return module
    active = [module.modules_to_save[name] for name in module.active_adapters if name in module.modules_to_save]
    return active[0] if len(active) == 1 and not any(module.__dict__[name] for name in HOOKS) else module


def is_whole(module: nn.Module) -> bool:
    """Whether a module is PEFT's around one of modules_to_save."""
    return _path(class_of(module)) == WRAPPER


def why_not_layer(family: Family, layer: nn.Module, name: str) -> str | None:
    """A decoder layer as a whole; what is in it is another question."""
    return why_foreign(layer, name, family.classes(family.layer_kind))


def makes_known_masks(decoder: nn.Module) -> bool:
    """Whether a decoder's masks are made by transformers' own code, so that bounds may stand in for them."""
    interface = ALL_MASK_ATTENTION_FUNCTIONS.get(decoder.config._attn_implementation)
    makers = (called for function in own_code(decoder) for called in calls(function))
    inside = (called for maker in mask_makers(decoder) for called in calls(maker))
    return all(maker is None or is_known(maker) for maker in (*makers, interface, *inside))


def mask_makers(decoder: nn.Module) -> list[FunctionType]:
    """Functions of other files that a decoder's code names, which make its masks."""
    made = [maker for function in own_code(decoder) for maker in calls(function) if "mask" in maker.__name__]
    return [function for maker in made for function in (innermost(maker), *map(innermost, calls(innermost(maker))))]


def own_code(module: nn.Module) -> list[FunctionType]:
    """A module's forward, and the methods that it calls."""
    forward = innermost(type(module).forward)
    methods = (getattr(type(module), name, None) for name in forward.__code__.co_names)
    return [forward, *(innermost(method) for method in methods if isinstance(method, FunctionType))]


def why_not_half(
    family: Family, half: str, norm: nn.Module, norm_name: str, module: nn.Module, name: str
) -> str | None:
    """Half a layer: "attention" or "mlp", and the norm before it."""
    for function in FUNCTIONS[half] + (FUNCTIONS["post_norm"] if family.post_norm else ()):
        called = getattr(nn.functional, function)
        if not (isinstance(called, BuiltinFunctionType) or is_known(called)):
            return f"{name}: torch.nn.functional.{function} was replaced by another one"
    is_layer = half == "mlp" and family.mlp_kind == family.layer_kind  # as in encoders
    parts = ((norm, norm_name), *(() if is_layer else ((module, name),)))
    if unit := next((name for part, name in parts if is_unit(part)), None):
        return f"{unit}: fully_shard was given a part of a layer; give it whole layers"
    why_not, kind = {
        "attention": (_why_not_attention, family.attention_kind),
        "mlp": (_why_not_mlp, family.mlp_kind),
    }[half]
    return (
        why_not_norm(family, norm, norm_name)
        or why_foreign(module, name, family.classes(kind))
        or _why_not_parts(family, half, module, name)
        or why_not(family, module, name)
    )


def _why_not_parts(family: Family, half: str, module: nn.Module, name: str) -> str | None:
    """Modules that the family has inside of half a layer, beside linear layers."""
    parts = [(path, family.classes(kind)) for own, path, kind in family.inside if own == half]
    parts += [(family.dropout, DROPOUTS[:1])] if family.dropout else []
    reasons = (why_foreign(module.get_submodule(path), f"{name}.{path}", known) for path, known in parts)
    return next(filter(None, reasons), None)


def why_not_norm(family: Family, norm: nn.Module, name: str) -> str | None:
    kind = family.norm
    return why_foreign(norm, name, family.classes(kind.kind)) or _why_not_tensor(norm, name, *kind.tensors)


def _why_not_attention(family: Family, module: nn.Module, name: str) -> str | None:
    half, module = module, module.get_submodule(family.core)
    if reason := _why_not_interface(module, name):
        return reason
    if family.sliding_window == "sliding_window":
        slides = module.config.layer_types[module.layer_idx] == "sliding_attention"
        if module.sliding_window != (module.config.sliding_window if slides else None):
            return f"{name}: its sliding window is not the one in the configuration, by which masks are made"
    if not isinstance(module.scaling, (int, float)):
        return f"{name}: a scaling of type {type(module.scaling).__name__} is not supported, only a number"
    if module.is_causal is not family.causal:
        seen = "do not see" if module.is_causal else "see"
        return f"{name}: is_causal={module.is_causal}, so that tokens {seen} later ones"
    for attribute in family.head_norms:
        norm, norm_name = getattr(module, attribute), f"{name}.{attribute}"
        if reason := why_not_norm(family, norm, norm_name):
            return reason
        if norm.weight.requires_grad:
            return f"{norm_name}: the weight is trainable; a norm of heads must be frozen"
    return _why_not_inside(half, name, *family.qkv, family.out)


def _why_not_mlp(family: Family, module: nn.Module, name: str) -> str | None:
    act = _why_not_act(family, module.get_submodule(family.act), f"{name}.{family.act}")
    return act or _why_not_inside(module, name, *family.gate_up, family.down)


def _why_not_act(family: Family, act: nn.Module, name: str) -> str | None:
    """The activation of an MLP, which may hold the function that it calls: torch's own."""
    if reason := why_foreign(act, name, ACTIVATIONS[family.activation]):
        return reason
    function = getattr(act, "act", None)
    if function is None or isinstance(function, BuiltinFunctionType):
        return None
    return f"{name}: {getattr(function, '__name__', function)} is not torch's own function"


def why_not_head(family: Family, model: nn.Module, name: str) -> str | None:
    """The causal LM with its head: that of transformers, with its loss."""
    head, head_name = getattr(model, family.head), f"{name}.{family.head}"
    if reason := why_foreign(model, head_name, family.classes("ForCausalLM")):
        return reason
    if model.loss_function is not ForCausalLMLoss:
        return f"{head_name}: the loss is not ForCausalLMLoss"
    for called in (*calls(ForCausalLMLoss), nn.functional.cross_entropy):
        if not is_known(called):
            return f"{head_name}: {called.__name__}, which the loss calls, was replaced by another one"
    return why_not_linear(head, head_name) or _why_not_hooks(head.named_modules(prefix=head_name), head)


def find_reader(family: Family, model: nn.Module, decoder: nn.Module) -> Reader | None:
    """The reader that a model is, if all beside its decoder is what it looks like, and nobody looks there."""
    known = (reader for reader in family.readers if why_foreign(model, "", family.classes(reader.kind)) is None)
    if (reader := next(known, None)) is None:
        return None
    inside = set(decoder.modules()) | {model}
    beside = [m for m in model.modules() if m not in inside and type(m) not in CONTAINERS]
    heads = family.classes(reader.head) if reader.head else ()
    classes = (*heads, *FROZEN, *ADAPTED, *DROPOUTS, *family.classes(LAYER_NORM.kind))
    foreign = (why_foreign(m, "", classes) for m in beside if not is_whole(m) or is_replaced(m))
    return None if any(foreign) or any(map(is_watched, beside)) else reader


def why_not_embedding(module: nn.Module, name: str) -> str | None:
    """A lookup of rows that changes nothing."""
    if reason := why_foreign(module, name, (EMBEDDING,)) or _why_not_tensor(module, name, "weight"):
        return reason
    return f"{name}: max_norm changes the weight as it is read" if module.max_norm is not None else None


def why_not_linear(module: nn.Module, name: str) -> str | None:
    """A linear layer, with LoRA or without."""
    base = getattr(module, "base_layer", module)
    if base is not module:
        if reason := why_foreign(module, name, ADAPTED) or _why_not_adapter(module, name):
            return reason
    if reason := why_foreign(base, name, FROZEN) or _why_not_tensor(base, name, "weight", "bias"):
        return reason
    weight, packed = base.weight, is_4bit(base)
    if packed != (_path(class_of(base)) != LINEAR) or not (packed or weight.is_floating_point()):
        return f"{name}: base weights of {type(base).__name__} are not supported; use NF4 or floating point"
    if packed and state_of(base) is None:
        return f"{name}: the base weight is not quantized yet; move the model to its device first"
    if weight.requires_grad:
        return f"{name}: the base weight is trainable; only LoRA adapters and biases may be"
    return None


def _why_not_adapter(module: nn.Module, name: str) -> str | None:
    """What a LoRA layer adds to its base layer's output."""
    if module.fan_in_fan_out:
        return f"{name}: fan_in_fan_out is not supported"
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) > 1:
        return f"{name}: several active adapters, {', '.join(active)}; activate one"
    for adapter in active:
        if not isinstance(module.scaling[adapter], (int, float)):
            kind = type(module.scaling[adapter]).__name__
            return f"{name}: a scaling of type {kind} is not supported, only a number"
        if variant := getattr(module, "lora_variant", {}).get(adapter):
            return f"{name}: LoRA variant {type(variant).__name__} is not supported; use plain LoRA or rsLoRA"
        for part in ("lora_A", "lora_B"):
            linear, part_name = getattr(module, part)[adapter], f"{name}.{part}.{adapter}"
            if reason := why_foreign(linear, part_name, (LINEAR,)) or _why_not_tensor(
                linear, part_name, "weight", "bias"
            ):
                return reason
        if module.lora_A[adapter].bias is not None:
            return f"{name}.lora_A.{adapter}: a bias is not supported"
        if reason := why_foreign(module.lora_dropout[adapter], f"{name}.lora_dropout.{adapter}", DROPOUTS):
            return reason
    return None


def _why_not_inside(module: nn.Module, name: str, *linears: str) -> str | None:
    """The linear layers of a module, and hooks on whatever is in it."""
    for attribute in linears:
        if reason := why_not_linear(module.get_submodule(attribute), f"{name}.{attribute}"):
            return reason
    return _why_not_hooks((below, m) for below, m in module.named_modules(prefix=name) if m is not module)


def _why_not_hooks(modules: Iterable[tuple[str, nn.Module]], called: nn.Module | None = None) -> str | None:
    """Hooks on modules that nobody would call; called: the one that is called all the same, to have it gathered."""
    for name, module in modules:
        if any(GLOBAL_HOOKS):
            return f"{name}: there are hooks on all modules, which would not be called"
        hooks = [hook for kind in HOOKS for hook in module.__dict__[kind].values()]
        if module is not called and any(map(gathers, hooks)):
            return f"{name}: fully_shard was given a part of a layer; give it whole layers"
        # those that record are of maps, for which layers run stock code
        if not all(records(hook) or gathers(hook) for hook in hooks):
            return f"{name}: it has hooks, which would not be called"
    return None


def _why_not_tensor(module: nn.Module, name: str, *attributes: str) -> str | None:
    """A parameter that is a tensor like any other: not a subclass that computes in its own way, and in memory."""
    for attribute in attributes:
        tensor = module._parameters.get(attribute, getattr(module, attribute))
        if tensor is None:
            continue
        if hasattr(tensor, "ds_id"):
            return f"{name}: DeepSpeed ZeRO-3 has its {attribute} in parts; use ZeRO-2, DDP, or FSDP2 (fully_shard)"
        plain = type(tensor) is nn.Parameter or bnb is not None and isinstance(tensor, bnb.nn.Params4bit)
        if not (plain or is_part(module, tensor)) or tensor.layout is not torch.strided:
            return f"{name}: a {attribute} of type {type(tensor).__name__} is not supported"
        if tensor.is_meta:
            return f"{name}: its {attribute} is not in memory (offloaded, or not loaded)"
    return None


def _why_not_interface(module: nn.Module, name: str) -> str | None:
    """The attention function that is asked for, and whatever else an attention's forward calls by name."""
    forward = innermost(type(module).forward)
    for called in calls(forward):
        if not is_known(called):
            return f"{name}: {called.__name__}, which its forward calls, was replaced by another one"
    implementation = module.config._attn_implementation
    eager = forward.__globals__.get("eager_attention_forward")
    interface = eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS.get(implementation)
    stock = isinstance(interface, FunctionType) and is_known(interface) and interface.__name__ in INTERFACES
    if not (stock or is_shifted_sparse(interface)):
        return f"{name}: attention {implementation!r} is not one of transformers' sdpa, eager and flash attention"
    return None


def calls(function: FunctionType, seen: set | None = None) -> Iterator[FunctionType]:
    """Functions that a function's code names, and theirs in the same file."""
    seen = {function} if seen is None else seen
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if isinstance(called, FunctionType) and called not in seen:
            seen.add(called)
            yield called
            if called.__globals__ is function.__globals__:
                yield from calls(called, seen)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def innermost(function: Callable) -> Callable:
    """The function inside of all wrappers."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _is_moved(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward by one that moves inputs to the module's device, and does no more."""
    hook, former = module.__dict__.get("_hf_hook"), module.__dict__.get("_old_forward")
    own = getattr(former, "__func__", None) is type(module).forward
    return type(hook) is AlignDevicesHook and not hook.offload and own and former.__self__ is module
