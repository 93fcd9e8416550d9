"""Mistral: LLaMA's attribute names, and a sliding window."""

from dataclasses import replace

from models.llama import LLAMA

MISTRAL = replace(LLAMA, sliding_window="sliding_window")
