"""Qwen: LLaMA's attribute names, a sliding window in some layers or none; and from the third on norms of heads."""

from dataclasses import replace

from hyclora.models.families.llama import LLAMA

QWEN2 = replace(LLAMA, modeling="qwen2.modeling_qwen2", prefix="Qwen2", sliding_window="sliding_window")
QWEN3 = replace(QWEN2, modeling="qwen3.modeling_qwen3", prefix="Qwen3", head_norms=("q_norm", "k_norm"))
