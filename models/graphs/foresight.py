"""What a decoder's first layer is going to get, told from the decoder's own arguments.

Between the two Hugging Face's code looks embeddings up and makes position ids, cos and sin, at the host's pace. Graphs
(layer_graphs.py) start before that where nobody can come in between and all of it follows from what is looked at here.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from hyclora.models.binding import runs_own
from hyclora.models.sharding import class_of, gathers
from hyclora.models.trust import GLOBAL_HOOKS, asks_for_gradients, is_stock, is_watched
from hyclora.operators.attention.flash import is_bounds, is_starts

FIXED_ANGLES = ("default", "linear", "llama3", "yarn")  # of others inv_freq changes with the lengths that were seen


@dataclass(frozen=True)
class Foretold:
    """What decides what the first layer gets, beside the token ids: alike twice, it is the same.

    row: of a stream, the tensors that are new in each step, by the names under which layers get them.
    """

    settings: tuple
    row: dict[str, Tensor] | None = field(default=None, compare=False)

    def arguments(self, decoder: nn.Module, embeddings: Tensor) -> dict:
        """What a layer's forward gets of a row, by name."""
        return self.row | {"position_embeddings": decoder.rotary_emb(embeddings, self.row["position_ids"])}


def foretell(
    decoder: nn.Module, hook: int, input_ids=None, *args, attention_mask=None, position_ids=None, **kwargs
) -> Foretold | None:
    """What is known of the decoder's arguments before it runs; None if that is not enough.

    hook: id of the decoder's pre-hook that asks, with the arguments that it returns.
    """
    embedding, angles = decoder.get_input_embeddings(), getattr(decoder, "rotary_emb", None)
    if not is_last(decoder, hook) or not isinstance(input_ids, Tensor) or args or angles is None or any(GLOBAL_HOOKS):
        return None
    row = None
    if is_starts(attention_mask) and isinstance(position_ids, Tensor):
        row = {"attention_mask": attention_mask, "position_ids": position_ids}
    elif not (attention_mask is None or is_bounds(attention_mask)) or position_ids is not None:
        return None
    if not all(value is None or isinstance(value, (bool, int, float, str)) for value in kwargs.values()):
        return None
    frozen = embedding.max_norm is None and not (embedding._forward_pre_hooks or embedding.weight.requires_grad)
    if not (is_lookup(embedding, angles) and frozen and is_stock(angles) and angles.rope_type in FIXED_ANGLES):
        return None
    if row is not None:
        rest = attention_mask.shape
    else:
        bounds = None if attention_mask is None else tuple(attention_mask.flatten().tolist())
        rest = bounds, angles.inv_freq.data_ptr(), angles.inv_freq._version, angles.attention_scaling
    return Foretold((input_ids.shape, rest, frozenset(kwargs.items())), row)


def is_last(decoder: nn.Module, hook: int) -> bool:
    """Whether no other pre-hook of a decoder runs after this one, and sees or changes what it returns."""
    return next(reversed(decoder._forward_pre_hooks)) == hook


def is_tokenwise(decoder: nn.Module, embeddings: str | None, embedded: bool) -> bool:
    """Whether what a decoder makes of tokens (embedded: they are already) before its layers is nothing of the batch.

    embeddings: the module that makes it, or None for a lookup and angles.
    """
    lookup, first = decoder.get_input_embeddings(), decoder.get_submodule(embeddings or "rotary_emb")
    if not is_stock(first) or is_watched(first) or getattr(first, "rope_type", "default") not in FIXED_ANGLES:
        return False
    parts = list(first.children()) if embeddings else [lookup]
    return all(is_plain(part) for part in parts if not (embedded and part is lookup))


def is_plain(part: nn.Module) -> bool:
    """Whether a module is torch's own, of each token by itself, and nobody looks."""
    own = class_of(part) in (nn.Embedding, nn.LayerNorm, nn.Dropout) and runs_own(part)
    before = all(map(gathers, part._forward_pre_hooks.values()))
    seen = not before or part._backward_hooks or part._backward_pre_hooks
    own = own and not seen and not getattr(part, "scale_grad_by_freq", False)
    return own and all(asks_for_gradients(hook) or gathers(hook) for hook in part._forward_hooks.values())


def is_lookup(embedding: nn.Module, angles: nn.Module) -> bool:
    """Whether an embedding makes a tensor of its own that nobody else has seen when the first layer gets it."""
    own = type(embedding) is nn.Embedding and runs_own(embedding)
    return own and not (embedding._forward_hooks or angles._forward_hooks or angles._forward_pre_hooks)
