"""Where results go: found out before anything is spent, not after hours."""

import argparse
import shutil
import tempfile
from pathlib import Path

from hyclora.utils.errors import UserError


def to_path(text: str) -> Path:
    """A path of a command line; ArgumentTypeError for an empty one, which pathlib takes for the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no path (. is the current folder)")
    return Path(text)


def check_output(root: Path, needed: int = 2**26) -> None:
    """Make a folder for results; UserError if it cannot be written or has less than `needed` bytes free."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as probe:
            probe.write(b"0")
    except OSError as error:
        raise UserError(f"output folder {root} cannot be written ({error.strerror}): set --output_dir") from None
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(
            f"output folder {root} has {free / 2**20:.0f} MiB free, the results need {needed / 2**20:.0f}: "
            "free some space or set --output_dir"
        )


def checkpoint_bytes(model, kept: int | None) -> int:
    """Room for the checkpoints that are kept at once: adapters and two Adam moments each, and one being written."""
    adapters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 2**26 + 3 * adapters * ((kept or 1) + 1)
