"""LLaMA: the names of one family."""

from hyclora.models.families.family import Family, Reader

LLAMA = Family(
    modeling="llama.modeling_llama",
    prefix="Llama",
    layers="layers",
    final_norm="norm",
    attention="self_attn",
    attention_norm="input_layernorm",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
    gate_up=("gate_proj", "up_proj"),
    down="down_proj",
    head="lm_head",
    readers=(Reader("ForSequenceClassification", reads="last"),),
)
