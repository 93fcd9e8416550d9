"""What a model family is: where its modules are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a family's classes and modules are called.

    modeling, prefix: the file of transformers with its classes, and what their names begin with. The rest are names of
    attributes: of its decoder (layers, final_norm), its causal LM (head), one layer (all others). head_norms: RMSNorms
    over each head of q and of k, before RoPE, in a family that has them. sliding_window: where an attention module says
    how many keys a query sees (None: all before it), in a family that has such windows.
    """

    modeling: str
    prefix: str
    layers: str
    final_norm: str
    attention: str
    attention_norm: str
    qkv: tuple[str, str, str]
    out: str
    mlp: str
    mlp_norm: str
    gate_up: tuple[str, str]
    down: str
    head: str
    head_norms: tuple[str, ...] = ()
    sliding_window: str | None = None

    def classes(self, kind: str) -> tuple[str]:
        """Where the family's class of a kind is: Attention, RMSNorm, MLP, DecoderLayer, Model, ForCausalLM."""
        return (f"transformers.models.{self.modeling}.{self.prefix}{kind}",)
