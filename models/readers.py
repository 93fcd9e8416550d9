"""Who, beside the head, looks at what a decoder's forward computes: whoever asks for it, and other people's hooks."""

from torch import nn

from hyclora.models.trust import look


def asks_for(name: str, decoder: nn.Module, kwargs: dict) -> bool:
    """Whether a forward shall return its hidden_states or its attentions, by Hugging Face's rules."""
    return bool(kwargs.get(f"output_{name}", getattr(decoder.config, f"output_{name}", False)))


class Watchers:
    """The hooks that see hidden states of a decoder: on its output, on its layers, and in them."""

    def __init__(self, decoder: nn.Module, layers: list[nn.Module], norm: nn.Module):
        modules = [norm, *(m for layer in layers for m in layer.modules())]
        # the dictionaries themselves, which modules fill later
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks.append(decoder._forward_hooks)

    def there(self) -> bool:
        """Whether somebody's hook may look; Hugging Face's own look at what is asked for."""
        return any(self._hooks) and any(look(hooks) for hooks in self._hooks)
