"""HyC-LoRA's public API: patch a PEFT model so that its buffered activations are kept compressed."""

import logging

# PEFT imports bitsandbytes, which warns on every CPU machine that an optional kernel package is missing
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from models.config import HycloraConfig  # noqa: E402
from models.patch import PatchReport, apply_hyclora, remove_hyclora  # noqa: E402

__all__ = ["HycloraConfig", "PatchReport", "apply_hyclora", "remove_hyclora"]
