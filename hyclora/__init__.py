"""HyC-LoRA: patch a PEFT model so that the activations buffered for backward are kept compressed.

    from hyclora import HycloraConfig, apply_hyclora, remove_hyclora, verify

The parts of the package are the folders models, operators and utils. In a checkout they lie beside this one, in an
installed package inside it; they are hyclora.models, hyclora.operators and hyclora.utils in both. Beside them are
fidelity.py: verify() on a checkpoint (python -m hyclora.fidelity), and plan.py: what a run needs of GPU and host
memory, the longest row that fits, and with --measure what is fastest (python -m hyclora.plan).
"""

import logging
import time
from importlib import import_module
from pathlib import Path

BEGUN = time.perf_counter()  # before a command of this package imports torch and others

# PEFT imports bitsandbytes, which warns on every CPU machine that an optional kernel package is missing
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if not (Path(__file__).parent / "models").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_PUBLIC = {
    "CalibrationCallback": "hyclora.models.callback",
    "FiniteGradients": "hyclora.models.finite",
    "HycloraConfig": "hyclora.models.config",
    "NonFiniteCallback": "hyclora.models.finite",
    "PatchReport": "hyclora.models.patch",
    "apply_hyclora": "hyclora.models.patch",
    "remove_hyclora": "hyclora.models.patch",
    "Verification": "hyclora.models.verification",
    "verify": "hyclora.models.verify",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """The public names, imported when they are asked for: a part that needs no torch does not load it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
