"""HyC-LoRA's public API: patch a PEFT model so that its buffered activations are kept compressed."""

from models.config import HycloraConfig
from models.patch import PatchReport, apply_hyclora, remove_hyclora

__all__ = ["HycloraConfig", "PatchReport", "apply_hyclora", "remove_hyclora"]
