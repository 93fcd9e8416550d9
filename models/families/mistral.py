"""Mistral: LLaMA's attribute names, and a sliding window."""

from dataclasses import replace

from hyclora.models.families.llama import LLAMA

MISTRAL = replace(LLAMA, sliding_window="sliding_window")
