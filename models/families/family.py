"""What a model family is: where its modules are, and what they compute."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hyclora.operators.mlp.activation import GELU, SILU_MUL, Activation


@dataclass(frozen=True)
class Norm:
    """A kind of norm: its class (a name of the family's own, or a path), the attribute with its eps, its parameters."""

    kind: str
    eps: str
    tensors: tuple[str, ...]


RMS_NORM = Norm("RMSNorm", "variance_epsilon", ("weight",))
LAYER_NORM = Norm("torch.nn.modules.normalization.LayerNorm", "eps", ("weight", "bias"))

# what the modules of an activation may be
ACTIVATIONS = {
    SILU_MUL: ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"),
    GELU: ("transformers.activations.GELUActivation",),
}


@dataclass(frozen=True)
class Reader:
    """A model whose head is not ours, and of which is known what it reads of the last hidden states.

    kind: its class, head: that of its head, if it is no linear layer; each token's output is of that token alone.
    reads: of each row the "first" token, or the "last" that is not the padding's id; or those with a label, of "labels"
    [B, S].
    """

    kind: str
    head: str | None = None
    reads: Literal["first", "last", "labels"] = "labels"


def by_place(decoder: nn.Module, tokens: Tensor) -> Tensor:
    """Position ids [1, S] of tokens: ids [B, S], or embeddings [B, S, C]."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


@dataclass(frozen=True)
class Family:
    """What a family's classes and modules are called, and how its layers are built.

    modeling, prefix: the file of transformers with its classes, and what their names begin with. The rest are names of
    attributes, or paths of them: of its decoder (layers, final_norm), its causal LM (head), one layer (all others;
    those of linear layers, activation and dropout begin at attention or mlp). None: there is none that is patched.
    head_norms: RMSNorms over each head of q and of k, before RoPE, in a family that has them. sliding_window: where an
    attention module says how many keys a query sees (None: all before it), in a family that has such windows.
    post_norm: a norm comes after the sum of a block's output, dropped by dropout, and the residual, and not before the
    block; such layers run as a whole or not at all. causal: a token sees those before it, by RoPE, and not all.
    inside: other modules inside of attention and mlp, by what their classes are called. core: of attention, the one
    that has scaling, configuration, and at the paths head_dim and attention_dropout their numbers. embeddings: the
    module that makes all that goes into the first layer, if that is more than a lookup. positions: position ids of
    tokens that come without, [B or 1, S]. readers: what reads the last hidden states, beside the causal LM's head.
    """

    modeling: str
    prefix: str
    layers: str
    final_norm: str | None
    attention: str
    attention_norm: str
    qkv: tuple[str, str, str]
    out: str
    mlp: str
    mlp_norm: str
    gate_up: tuple[str, ...]
    down: str
    head: str | None
    head_norms: tuple[str, ...] = ()
    sliding_window: str | None = None
    layer_kind: str = "DecoderLayer"
    attention_kind: str = "Attention"
    mlp_kind: str = "MLP"
    inside: tuple[tuple[str, str, str], ...] = ()
    norm: Norm = RMS_NORM
    post_norm: bool = False
    dropout: str | None = None
    activation: Activation = SILU_MUL
    act: str = "act_fn"
    causal: bool = True
    core: str = ""
    head_dim: str = "head_dim"
    attention_dropout: str = "attention_dropout"
    embeddings: str | None = None
    positions: Callable[[nn.Module, Tensor], Tensor] = by_place
    readers: tuple[Reader, ...] = ()

    @property
    def caller(self) -> str:
        """Where in a decoder the module is that calls the layers, "" for the decoder itself."""
        return self.layers.rpartition(".")[0]

    def structure(self) -> list[str]:
        """Paths in a layer of all that is not a linear layer or below one."""
        halves = {"attention": self.attention, "mlp": self.mlp}
        inside = [(half, path) for half, path, _ in self.inside] + [("mlp", self.act)]
        inside += [(half, self.dropout) for half in halves if self.dropout]
        paths = [*halves.values(), *(f"{halves[half]}.{path}".lstrip(".") for half, path in inside)]
        return [self.attention_norm, self.mlp_norm, *filter(None, paths)]

    def classes(self, kind: str) -> tuple[str]:
        """Where the family's class of a kind is: RMSNorm, Model, ForCausalLM, and those that fields call kind."""
        return (kind if "." in kind else f"transformers.models.{self.modeling}.{self.prefix}{kind}",)
