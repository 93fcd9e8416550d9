"""One way of LoRA fine-tuning in one process: memory and time of a micro-step at a model shape.

    python -m benchmarks.peers JOB        # JOB: the JSON that benchmarks.memory_throughput writes

The weights are random, NF4 with double quantization unless the peer says otherwise, with LoRA on all seven linears.
Packages are imported as late as possible: Unsloth patches only what is imported after it.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.jobs import Job
from benchmarks.ranks import PARENT, end_rank_0, end_with_parent, rank, together
from benchmarks.workers import NOT_DONE, visible_gpus
from hyclora.utils.errors import UserError, is_out_of_memory

ROOT = Path(__file__).resolve().parent.parent
MARK = "RESULT "
NOT_INSTALLED = "not installed"
OUT_OF_MEMORY = "out of memory"
# as the scripts set it, for every peer alike (Unsloth does so itself)
ALLOCATOR = {"PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
}


def lora(job: Job, *, base: str | None = None, checkpointing: dict | None = None):
    """Stock PEFT on a model with random weights; checkpointing: options of Hugging Face's, None for none."""
    import torch

    from hyclora.utils.args import LINEARS, LoraArguments, ModelArguments
    from hyclora.utils.checkpointing import checkpoint_layers
    from hyclora.utils.loading import load_model

    folder = job.folder.resolve()
    in_4bit = (base or job.base) == "nf4"
    arguments = ModelArguments(folder.name, str(folder.parent), load_in_4bit=in_4bit, random_weights=True)
    adapters = LoraArguments(
        lora_rank=job.lora_rank,
        lora_alpha=job.lora_rank,
        lora_dropout=job.lora_dropout,
        target_modules=job.target_modules or LINEARS,
    )
    storage = torch.bfloat16 if job.parallel == "fsdp2" else torch.uint8
    model = load_model(arguments, adapters, str(folder), torch.device(job.device), seed=0, storage=storage)
    if checkpointing is not None:
        checkpoint_layers(model, **checkpointing)
        model.enable_input_require_grads()
    return model


def liger(job: Job, **options):
    """Liger's fused kernels in the model's classes, among them its loss that never holds whole logits."""
    import liger_kernel.transformers as kernels

    family = json.loads((job.folder / "config.json").read_text())["model_type"]
    getattr(kernels, f"apply_liger_kernel_to_{family}")()
    return lora(job, **options)


def compiled(job: Job, budget: float):
    """torch.compile choosing what to keep within a share of the activations; NF4 would break its graphs."""
    import torch
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = budget
    return torch.compile(lora(job, base="bf16"))


def random_weights(job: Job) -> Path:
    """The job's shape as a checkpoint with random weights, which is written once, by a process of its own.

    Others that want it meanwhile wait.
    """
    folder = Path(job.checkpoints) / f"random-{job.folder.name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            words = [str(job.folder.resolve()), str(folder.resolve())]
            write = [sys.executable, "-m", "benchmarks.random_checkpoint", *words]
            subprocess.run(write, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        config = json.loads((folder / "config.json").read_text())
        # Past the longest position of the config Unsloth would stretch its rotary embedding.
        if config["max_position_embeddings"] < job.seq_len:
            config["max_position_embeddings"] = job.seq_len
            (folder / "config.json").write_text(json.dumps(config))
    return folder


def unsloth(job: Job, checkpointing: bool | str):
    """Unsloth loads from disk only."""
    folder = random_weights(job)
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    from hyclora.utils.args import LINEARS

    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=max(2048, job.seq_len),
        dtype=torch.bfloat16,
        load_in_4bit=job.base == "nf4",
        use_gradient_checkpointing=checkpointing,  # loading for offloading would set up its buffers
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=job.lora_rank,
        lora_alpha=job.lora_rank,
        lora_dropout=job.lora_dropout,
        bias="none",
        target_modules=job.target_modules or LINEARS,
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )


@dataclass(frozen=True)
class Peer:
    """How a peer's model is built, and the module that has to be installed."""

    build: Callable
    needs: str = "peft"


PEERS = {
    "PEFT LoRA": Peer(lora),
    "PEFT LoRA, checkpointing": Peer(partial(lora, checkpointing={})),
    "PEFT LoRA, checkpointing every 2nd layer": Peer(partial(lora, checkpointing={"every_n_layers": 2})),
    "PEFT LoRA, offloaded checkpointing": Peer(partial(lora, checkpointing={"offload": True})),
    "Liger": Peer(liger, "liger_kernel"),
    "Liger, checkpointing": Peer(partial(liger, checkpointing={}), "liger_kernel"),
    "Unsloth": Peer(partial(unsloth, checkpointing=False), "unsloth"),
    "Unsloth, checkpointing": Peer(partial(unsloth, checkpointing=True), "unsloth"),
    "Unsloth, offloaded checkpointing": Peer(partial(unsloth, checkpointing="unsloth"), "unsloth"),
    "torch.compile, bf16 base, memory budget 1.0": Peer(partial(compiled, budget=1.0)),
    "torch.compile, bf16 base, memory budget 0.2": Peer(partial(compiled, budget=0.2)),
}


def stock(job: Job):
    """The job's model before this project patches it; UserError if its peer is not installed."""
    if needed := missing(job):
        raise UserError(f"{job.setting} needs the module {needed}, which is not installed")
    return lora(job) if isinstance(job.setting, dict) else PEERS[job.setting].build(job)


def patch(job: Job, model):
    """The model as the job's setting has it: this project's is PEFT's, patched."""
    if isinstance(job.setting, dict):
        from hyclora import HycloraConfig, apply_hyclora

        apply_hyclora(model, HycloraConfig(**job.setting))
    return model


def build(job: Job):
    """The job's model."""
    return patch(job, stock(job))


def micro_step(job: Job):
    """The job's micro-step, warmed up."""
    model = build(job)
    from hyclora.utils.profiling import random_micro_step

    return random_micro_step(model, job.batch_size, job.seq_len, job.warm_up_seq_len, job.device)


def measure(job: Job) -> dict:
    """Memory and time of the job's micro-step, or of training on its rows."""
    if job.rows is None:
        step = micro_step(job)
        found = step.memory() | step.throughput(job.steps)
    elif job.rows.get("packing"):
        model = stock(job)
        from benchmarks.packed_rows import measure_packed  # after a peer's own imports

        found = measure_packed(job, model, patch)
    elif job.rows.get("steady"):
        model = build(job)
        from benchmarks.steady import measure_steady

        found = measure_steady(job, model)
    elif job.rows.get("scaling"):
        model = build(job)
        from benchmarks.scaling import measure_scaling

        found = measure_scaling(job, model)
    else:
        model = build(job)
        from benchmarks.real_rows import measure_rows

        found = measure_rows(job, model)
    return found | {"allocator": os.environ.get("PYTORCH_ALLOC_CONF")}


def cause(error: BaseException) -> str:
    """An error as the words of a table cell."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def missing(job: Job) -> str | None:
    """The module that a job's peer needs and that is not installed."""
    peer = PEERS.get(job.setting) if isinstance(job.setting, str) else None
    return peer.needs if peer and importlib.util.find_spec(peer.needs) is None else None


def gpus_of(job: Job) -> str:
    """The GPUs that the job may see: the first ones. With more than its own the Trainer would take all of them."""
    return ",".join(visible_gpus(job.gpus))


def command(text: str) -> list[str]:
    """What measures a job, of whose JSON this is."""
    return [sys.executable, "-m", "benchmarks.peers", text]


def run(job: Job, timeout: float) -> dict:
    """`measure` in a process of its own; a failure is {"error": its cause}."""
    if missing(job):
        return {"error": NOT_INSTALLED}
    return alone(command(json.dumps(asdict(job))), timeout, {"CUDA_VISIBLE_DEVICES": gpus_of(job)})


def alone(words: list[str], timeout: float, environment: dict | None = None) -> dict:
    """What the process of a command prints behind MARK; a failure is {"error": its cause}."""
    # A file, not a pipe: workers that a compiler leaves behind would hold a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | ALLOCATOR | OFFLINE | {PARENT: str(os.getpid())} | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"{NOT_DONE} {timeout:g} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    for line in lines:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    said = next((line for line in reversed(lines) if line.strip()), "nothing said")
    return {"error": cause(RuntimeError(f"exit code {process.returncode}, {said}"))}


def answer(measure: Callable[[], dict]) -> None:
    """Print what `alone` reads in the process that started this one: what was measured, or {"error": its cause}."""
    end_with_parent()
    try:
        found = measure()
    except Exception as error:
        traceback.print_exc()
        found = {"error": cause(error)}
    print(MARK + json.dumps(found), flush=True)


def main(argv: list[str] | None = None):
    end_with_parent()
    (text,) = sys.argv[1:] if argv is None else argv
    job = Job(**json.loads(text))
    try:
        with together(job.gpus, command(text), job.device):
            found = measure(job)
    except Exception as error:
        traceback.print_exc()
        found = {"error": cause(error)}
    if rank() == 0 or "error" in found:
        print(MARK + json.dumps(found), flush=True)
    if rank() and "error" in found:
        end_rank_0()


if __name__ == "__main__":
    main()
