"""What a model family is: where its modules are, and what they compute."""

from dataclasses import dataclass

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
    that has scaling, configuration, and at the paths head_dim and attention_dropout their numbers.
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
