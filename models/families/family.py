"""What a model family is: where its modules are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Attribute names of a family: of its decoder (layers, final_norm), its causal LM (head), one layer (the rest).

    head_norms: RMSNorms over each head of q and of k, before RoPE, in a family that has them. sliding_window: where an
    attention module says how many keys a query sees (None: all before it), in a family that has such windows.
    """

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
