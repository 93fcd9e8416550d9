"""The dtypes that a checkpoint's tensors are stored in, read off the headers of its files."""

import json
import math
from pathlib import Path

_WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTED = 3


def stored_dtypes(folder: Path) -> str:
    """In words: "bfloat16", or "lm_head in float32, the rest in bfloat16"; empty without safetensors files."""
    tensors = {name: header for file in weight_files(folder) for name, header in _header(file).items()}
    names, sizes = {}, {}
    for name, header in sorted(tensors.items()):
        dtype = _NAMES.get(header["dtype"], header["dtype"])
        names.setdefault(dtype, []).append(name.removesuffix(".weight"))
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(header["shape"])
    if len(names) < 2:
        return "".join(names)
    most = max(sizes, key=sizes.get)
    others = [f"{_listed(found)} in {dtype}" for dtype, found in names.items() if dtype != most]
    return f"{', '.join(others)}, the rest in {most}"


def weight_files(folder: Path) -> list[Path]:
    """What transformers would read, whether it is there or not; nothing without an index and a single file."""
    if (folder / _WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [file for file in (folder / _WEIGHTS,) if file.is_file()]
    shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / shard for shard in sorted(set(shards))]


def _header(file: Path) -> dict[str, dict]:
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= _LISTED else f"{names[0]} and {len(names) - 1} more"
