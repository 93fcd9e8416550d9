"""Mistral: LLaMA's attribute names, and one sliding window for all layers."""

from dataclasses import replace

from hyclora.models.families.llama import LLAMA

MISTRAL = replace(LLAMA, modeling="mistral.modeling_mistral", prefix="Mistral", sliding_window="config.sliding_window")
