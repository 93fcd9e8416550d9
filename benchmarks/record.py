"""One JSON line a run: the result with the commit, machine and versions it was measured on."""

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def record(name: str, result: dict, folder: Path = RESULTS) -> dict:
    """Append result to folder/name.jsonl and return the whole line."""
    line = {
        "benchmark": name,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **environment(),
        **result,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def environment() -> dict:
    """Commit, device and package versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"commit": _commit(), "device": device, "versions": {p: _version(p) for p in PACKAGES}}


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
