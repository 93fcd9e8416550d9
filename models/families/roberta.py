"""RoBERTa: an encoder whose norms come after the residual. Its MLP is in two modules of the layer itself."""

from torch import Tensor, nn

from hyclora.models.families.family import LAYER_NORM, Family, Reader
from hyclora.operators.mlp.activation import GELU


def positions(encoder: nn.Module, tokens: Tensor) -> Tensor:
    """As transformers' own code counts them: from after the padding's id on, and no token that is padding by its id."""
    embeddings = encoder.embeddings
    ids = tokens.dim() == 2
    count = embeddings.create_position_ids_from_input_ids if ids else embeddings.create_position_ids_from_inputs_embeds
    return count(tokens, embeddings.padding_idx)


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
    embeddings="embeddings",
    positions=positions,
    readers=(
        Reader("ForSequenceClassification", head="ClassificationHead", reads="first"),
        Reader("ForTokenClassification"),
        Reader("ForMaskedLM", head="LMHead"),
    ),
)
