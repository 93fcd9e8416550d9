"""RoBERTa: an encoder whose norms come after the residual. Its MLP is in two modules of the layer itself."""

from hyclora.models.families.family import LAYER_NORM, Family
from hyclora.operators.mlp.activation import GELU

ROBERTA = Family(
    modeling="roberta.modeling_roberta",
    prefix="Roberta",
    layers="encoder.layer",
    final_norm=None,
    attention="attention",
    attention_norm="attention.output.LayerNorm",
    qkv=("self.query", "self.key", "self.value"),
    out="output.dense",
    mlp="",
    mlp_norm="output.LayerNorm",
    gate_up=("intermediate.dense",),
    down="output.dense",
    head=None,
    layer_kind="Layer",
    mlp_kind="Layer",
    inside=(
        ("attention", "self", "SelfAttention"),
        ("attention", "self.dropout", "torch.nn.modules.dropout.Dropout"),
        ("attention", "output", "SelfOutput"),
        ("mlp", "intermediate", "Intermediate"),
        ("mlp", "output", "Output"),
    ),
    norm=LAYER_NORM,
    post_norm=True,
    dropout="output.dropout",
    activation=GELU,
    act="intermediate.intermediate_act_fn",
    causal=False,
    core="self",
    head_dim="attention_head_size",
    attention_dropout="dropout.p",
)
