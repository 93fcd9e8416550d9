"""The folder of a base model: what is wrong with it is told before anything of it is loaded."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from hyclora.models.families import FAMILIES
from hyclora.utils.data.files import read_text
from hyclora.utils.errors import UserError
from hyclora.utils.tokenizer import SETTINGS, SUFFICIENT
from hyclora.utils.weights import INDEX, weight_files

CONFIG, GENERATION = "config.json", "generation_config.json"
CODE = "auto_map"  # where a file names Python code beside it
# of a model at most: what is more is no such size, and to make so much takes for ever, or all memory
MOST = {
    "num_hidden_layers": 2000,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**30,
}


def check_family(family: str, place) -> None:
    """UserError for a model that is of no family."""
    if family not in FAMILIES:
        raise UserError(f"{place} is a {family} model: supported are {', '.join(sorted(FAMILIES))}")


def check_sizes(config: PretrainedConfig, place) -> None:
    """UserError for a size that no model has, and for heads that cannot share keys and values."""
    sizes = {name: size for name in MOST if (size := getattr(config, name, None)) is not None}
    for name, size in sizes.items():
        if not 1 <= size <= MOST[name]:
            raise UserError(f"{place} cannot work: {name} is {size}: copy the file again")
    heads = sizes.get("num_attention_heads", 1)
    if heads % (groups := sizes.get("num_key_value_heads", 1)):
        raise UserError(
            f"{place} cannot work: num_attention_heads is {heads}, no multiple of num_key_value_heads, {groups}: copy "
            "the file again"
        )


def check_settings_of(folder: Path) -> None:
    """UserError if a folder holds no model of a family, or its configuration cannot be read or cannot work."""
    file = folder / CONFIG
    if not file.exists():
        raise UserError(f"{folder} has no {CONFIG}: it is not a Hugging Face checkpoint")
    family = _object(file, "the configuration of a model").get("model_type")
    if not isinstance(family, str):
        raise UserError(f"{file} is not the configuration of a model: copy the file again")
    check_family(family, folder)
    if (folder / GENERATION).exists():
        _object(folder / GENERATION, "a configuration of writing")
    read_config(str(folder))


def check_code_of(folders: list[Path], ignored: bool) -> None:
    """UserError for a folder that asks for Python code of its own; ignored: it is loaded without that."""
    for file in (folder / name for folder in folders for name in (CONFIG, SETTINGS)):
        if not ignored and file.is_file() and _object(file, "a JSON object").get(CODE):
            raise UserError(
                f"{file} asks for Python code of its own ({CODE}), which is never run: --ignore_remote_code True loads "
                "the folder by transformers' own classes"
            )


def check_tokenizer_of(folder: Path) -> None:
    """UserError if a folder has not the files of a tokenizer."""
    if not any(all((folder / name).is_file() for name in names) for names in SUFFICIENT):
        needed = ", or ".join(map(" with ".join, SUFFICIENT))
        raise UserError(f"{folder} has no tokenizer: it needs {needed}")


def check_weights_of(folder: Path) -> None:
    """UserError if a folder has no weights that are no pickle, or one of their files is missing or torn."""
    if (folder / INDEX).exists():
        shards = _object(folder / INDEX, "an index").get("weight_map")
        if not (isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values())):
            raise UserError(f"{folder / INDEX} names no files of weights: copy the file again")
    files = weight_files(folder)
    if not files:
        if list(folder.glob("*.bin")):
            raise UserError(f"{folder} has only PyTorch .bin weights: convert them to safetensors")
        raise UserError(f"{folder} has no weights: it needs *.safetensors (or --random_weights True for a benchmark)")
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which {INDEX} names: copy the file again")
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is torn, or no safetensors file ({error}): copy the file again") from None


def read_config(source: str, **changes) -> PretrainedConfig:
    """The configuration of a folder, file or hub id with some changes; UserError if one that is here cannot work."""
    place = Path(source) / CONFIG if Path(source).is_dir() else Path(source)
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False, **changes)
    except Exception as error:  # transformers checks some values, and fails over others in its own ways
        if not place.exists():
            raise
        reason = error.__cause__ or error if isinstance(error, StrictDataclassError) else error
        raise UserError(f"{place} cannot work: {reason}") from error
    check_sizes(found, place)
    return found


def bare_model(source: str, config: PretrainedConfig, auto: type, **options) -> PreTrainedModel:
    """The model without memory for its weights; UserError if the configuration cannot work. options: of from_config."""
    try:
        with torch.device("meta"):
            return auto.from_config(config, **options)
    except Exception as error:  # of any value, by torch or transformers
        raise UserError(f"{source}: a model of its {CONFIG} cannot be made ({error}): copy the file again") from error


def _object(file: Path, kind: str) -> dict:
    """The JSON object in a file; UserError, by what it should be, if there is none."""
    text = read_text(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is not {kind}: copy the file again")
    return found
