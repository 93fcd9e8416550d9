"""Unsloth beside the techniques of a grid: its own model and checkpointing on the rows that ours are trained on.

It takes part where LoRA is on frozen weights in bfloat16 or NF4, which is what it has; its checkpointing waits in host
memory and is of all layers, whatever share of them ours leaves out. Weights are random ones of the model's shape.
"""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.jobs import Job
from benchmarks.peers import run
from hyclora.utils.errors import UserError
from hyclora.utils.plain.arguments import OFF

UNSLOTH = "Unsloth"
CHECKPOINTS = "ckpt"  # where its random weights are written


def check(groups: tuple) -> None:
    """UserError if the settings of a sweep are none that Unsloth can have."""
    model, data, lora, *_, training = groups
    for right, sentence in (
        (lora.use_lora, "it is for LoRA: set use_lora=True"),
        (training.mixed_precision == "bf16", "it computes in bfloat16: set mixed_precision=bf16"),
        (model.load_in_4bit or model.dtype == "bfloat16", "its frozen weights are bfloat16 or NF4: set dtype=bfloat16"),
        (model.model_dir, "its weights are random ones of a shape on disk: set model_dir"),
        (data.data_name == "alpaca" and data.data_dir, "it reads rows of a file: set data_name=alpaca and data_dir"),
        (training.num_train_epochs == 1, "it takes each row once: set num_train_epochs=1"),
    ):
        if not right:
            raise UserError(f"sweep_peers measures Unsloth, and {sentence}")


def job_of(groups: tuple, accumulation: int, checkpointing: str, n_rows: int) -> Job:
    """What Unsloth is to be measured on, for a combination of a sweep that trains on so many rows."""
    model, data, lora, *_, training = groups
    folder, size = Path(model.model_dir, model.model_name).resolve(), training.per_device_train_batch_size
    rows = {"alpaca": str(Path(data.data_dir).resolve()), "first": n_rows, "accumulate": accumulation}
    rows["tokenizer"] = str(Path(model.tokenizer_dir or folder).resolve())
    steps = n_rows // size
    if training.max_steps > 0:
        steps = min(steps, training.max_steps * accumulation)
    rows["warm_up"] = steps // 2
    return Job(
        UNSLOTH if checkpointing == OFF else f"{UNSLOTH}, offloaded checkpointing",
        str(folder),
        base="nf4" if model.load_in_4bit else "bf16",
        lora_rank=lora.lora_rank,
        batch_size=size,
        seq_len=data.seq_len,
        steps=steps - steps // 2,
        warm_up_seq_len=None,
        device=training.device.type,
        checkpoints=CHECKPOINTS,
        lora_dropout=lora.lora_dropout,
        rows=rows,
        target_modules=lora.target_modules,
    )


def options(job: Job, timeout: float) -> list[str]:
    """Of DRIVER."""
    return [json.dumps(asdict(job)), str(timeout)]


def measured(found: dict, batch_size: int) -> dict:
    """What a grid's line keeps: peak_mib and held_mib in all, seconds of all rows, row_ms of the second half."""
    peak, held = (round(found["static_mib"] + found[name], 2) for name in ("dyn_mib", "held_mib"))
    row_ms = round(found["ms"] / batch_size, 2)
    return {"peak_mib": peak, "held_mib": held, "seconds": found["seconds"], "row_ms": row_ms, "loss": found["loss"]}


class Driver:
    """What benchmarks.workers runs; Unsloth itself is in a process below, as it patches what is imported after it."""

    @staticmethod
    def parse(argv: list[str]) -> tuple[Job, float]:
        text, timeout = argv
        return Job(**json.loads(text)), float(timeout)

    @staticmethod
    def run(asked: tuple[Job, float], argv: list[str]) -> dict:
        job, timeout = asked
        found = run(job, timeout)
        return found if "error" in found else measured(found, job.batch_size)


DRIVER = Driver()
