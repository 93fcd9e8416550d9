"""Qwen: LLaMA's attribute names, and a sliding window in some layers or none."""

from dataclasses import replace

from hyclora.models.families.llama import LLAMA

QWEN2 = replace(LLAMA, sliding_window="sliding_window")
