"""Trained adapters as something to give away: a README.md that says what they are, and no path of this machine."""

import json
from pathlib import Path

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hyclora.utils.heads import NEXT_TOKEN, Head
from hyclora.utils.results import KEPT_BY, line_by_line
from hyclora.utils.runs.identity import identity

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
README = "README.md"
_TEXT = """---
base_model: {base}
library_name: peft
pipeline_tag: {pipeline}
tags:
- lora
- hyclora
---

# LoRA adapters for {base}

Trained on {rows} rows of {data} in {steps} steps with {method}.

| result | |
| --- | --- |
{results}

| setting | |
| --- | --- |
{settings}

## How to load them

```python
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained("{base}"{config})  # or the folder where {base} lies
model = PeftModel.from_pretrained(base, "the folder of this file")
tokenizer = AutoTokenizer.from_pretrained("the folder of this file")
```
"""


def name_of(base: str) -> str:
    """A base model's name: a hub id as it is, of a folder the last part."""
    return Path(base).name if Path(base).is_dir() else base


def tidy(folder: Path) -> None:
    """Take out of saved adapters what PEFT wrote of this machine: the base is named, and whoever loads it gives it.

    PEFT itself is not told the name: it would look for it on the hub whenever it saves.
    """
    (folder / README).unlink(missing_ok=True)
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name_of(config["base_model_name_or_path"])
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_trained(
    model: PeftModel | PreTrainedModel, folder: Path, initial: Path | None = None, trained: dict | None = None
) -> None:
    """Write the trained adapters, or all weights if all were trained.

    initial: see `keep_initial_adapters`; trained: of a sharded model, see `trained_of`.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, max_shard_size="1TB")  # one file, which a checkpoint is restored from
        return
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial, state_dict=trained)
    if initial is not None:
        _add_whole_modules(model, folder / WEIGHTS)
    tidy(folder)


def _add_whole_modules(model: PeftModel, file: Path) -> None:
    """Put a trained head beside the adapters, of which PEFT's conversion writes nothing else."""
    tensors = load_file(file)
    trained = get_peft_model_state_dict(model)
    missing = {name: t.contiguous().cpu() for name, t in trained.items() if name not in tensors and "lora_" not in name}
    save_file({**tensors, **missing}, file, {"format": "pt"})


def write_card(folder: Path, found: dict, n_rows: int, head: Head = NEXT_TOKEN) -> None:
    """README.md of the adapters in `folder`; found: the content of the run's results file, head: of the model."""
    settings = found["settings"]
    base = settings["ModelArguments"]["model_name"]
    if settings["ModelArguments"]["model_dir"] or Path(base).is_dir():
        base = Path(base).name
    own = {group: values for group, values in settings.items() if group != "TrainingArguments"}
    shown = {name: value for name, value in identity(own).items() if value not in (None, "", {})}
    shown["model_name"] = base
    shown |= {name: value for name, value in found["core"].items() if name != "output_dir"}
    results = line_by_line(found["shown"]) | {"final loss": f"{found['final_loss']:.4f}"}
    results |= {
        f"MiB kept for backward, {KEPT_BY[name]}": f"{n / 2**20:.2f}" for name, n in found["buffered_bytes"].items()
    }
    text = _TEXT.format(
        base=base,
        pipeline=head.pipeline,
        auto=head.auto.__name__,
        config="".join(f", {name}={value!r}" for name, value in head.config.items()),
        rows=n_rows,
        data=shown["data_name"],
        steps=found["core"]["steps"],
        method="HyC-LoRA" if settings["HycloraArguments"]["use_hyclora"] else "stock PEFT LoRA",
        results=_rows(results),
        settings=_rows(shown),
    )
    (folder / README).write_text(text, encoding="utf-8")


def _rows(values: dict) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items())
