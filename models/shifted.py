"""Shifted sparse attention for the models of transformers, stock and patched ones: by the name of an implementation."""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hyclora.operators.attention.shifted import shifted_sparse_attention


def shifted_sparse(group: int) -> str:
    """Make `model.set_attn_implementation(shifted_sparse(group))` known: groups of so many tokens, in training alone.

    Evaluation and generation see all tokens before, as with sdpa. Rows of training are whole: ValueError for padding,
    documents in a row, and sliding windows shorter than the row, for which transformers makes a mask.
    """

    def shifted_sparse_forward(
        module: torch.nn.Module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
    ):  # fmt: skip
        """q [B, H, S, D], k, v [B, H_kv, S, D] to o [B, S, H, D], as transformers calls it."""
        if not module.training:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if attention_mask is not None:
            raise ValueError(
                "shifted sparse attention trains on whole rows: leave padding, packed documents and sliding windows out"
            )
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return shifted_sparse_attention(q, k, v, group, scaling, dropout), None

    name = f"shifted_sparse_{group}"
    ALL_ATTENTION_FUNCTIONS.register(name, shifted_sparse_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    return name


def is_shifted_sparse(interface) -> bool:
    """Whether an attention function is one of these."""
    return getattr(getattr(interface, "__code__", None), "co_filename", None) == __file__
