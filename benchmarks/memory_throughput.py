"""Memory and time of a training micro-step, against the peers: one process a setting, one GPU, one run.

    python -m benchmarks.memory_throughput                                   # Llama-2-7B's shape, 4 x 512 tokens
    python -m benchmarks.memory_throughput --shapes llama-3-8b --cells 1x8192 --settings '["peers", {"q_bit": 2}]'
    python -m benchmarks.memory_throughput --cells 1x131072 --warm_up_seq_len 512 --steps 1

Random weights in NF4, LoRA on all seven linears, bfloat16 autocast, AdamW. After warm-up (calibration is over) and an
optimizer step: static memory, then the peak of one forward and backward, then the median time. dyn is peak - static. A
peer that is missing, fails or runs out of memory is a row with the cause. A row that this commit already has for this
device and these arguments is not measured again, so an interrupted sweep continues where it stopped.
"""

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.peers import NOT_INSTALLED, PEERS, Job, run
from benchmarks.record import RESULTS, record
from benchmarks.rows import name_of
from utils.errors import UserError, entry_point
from utils.results import environment

NAME = "memory_throughput"
OURS = [
    {"layer_type": "baseline"},
    *({"q_bit": bits} for bits in (8, 4, 2)),
    *({"layer_type": "intra_inter_full_fuse", "q_bit": bits} for bits in (4, 2)),
    {"q_bit": "auto"},
    *({"q_bit": bits, "offload": True} for bits in (8, 4, 2)),
]


def cell(text: str) -> tuple[int, int]:
    """4x512 as (batch size, sequence length)."""
    batch_size, _, seq_len = text.partition("x")
    if not (batch_size.isdecimal() and seq_len.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} is not BATCHxLENGTH, for instance 4x512")
    return int(batch_size), int(seq_len)


def settings(text: str) -> list[str | dict]:
    """A JSON list of peers' names and HycloraConfig arguments; "peers" and "ours" stand for all of them."""
    found = []
    for item in json.loads(text):
        found += {"peers": list(PEERS), "ours": OURS}.get(item, [item]) if isinstance(item, str) else [item]
    if unknown := [item for item in found if isinstance(item, str) and item not in PEERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of peers, ours, {'; '.join(PEERS)}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b"], help="in benchmarks/shapes, or folders")
    parser.add_argument("--cells", nargs="+", type=cell, default=[(4, 512)], help="BATCHxLENGTH")
    parser.add_argument("--settings", type=settings, default='["peers", "ours"]', help=settings.__doc__)
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4", help="frozen weights")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="timed micro-steps")
    parser.add_argument("--warm_up_seq_len", type=int, help="calibrate on sequences this short; default: the cell's")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one setting, loading included")
    parser.add_argument("--again", action="store_true", help="measure also what this commit has measured")
    parser.add_argument("--checkpoints", default="ckpt", help="folder for the random checkpoints that Unsloth loads")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of memory_throughput.jsonl")
    parser.add_argument("--device", default="cuda", help="cpu only tries it out: it counts what autograd keeps")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("benchmarks.memory_throughput measures GPU memory and time: it needs a GPU (or --device cpu)")
    return args


def measured(job: Job, lines: list[dict], now: dict) -> bool:
    """Whether a line of this commit and device answers the job; a peer may have been installed since."""
    return any(
        (line["commit"], line["device"]) == (now["commit"], now["device"])
        and name_of(line["setting"]) == name_of(job.setting)
        and line["arguments"] == arguments_of(job)
        and line.get("error") != NOT_INSTALLED
        for line in lines
    )


def arguments_of(job: Job) -> dict:
    """The job without what is told elsewhere in a line or is only a place."""
    return {name: value for name, value in asdict(job).items() if name not in ("setting", "checkpoints")}


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    now = environment()
    file = args.output_dir / f"{NAME}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    common = {name: getattr(args, name) for name in ("base", "lora_rank", "steps", "warm_up_seq_len", "device")}
    for shape, (batch_size, seq_len), setting in itertools.product(args.shapes, args.cells, args.settings):
        job = Job(setting, shape, batch_size=batch_size, seq_len=seq_len, checkpoints=args.checkpoints, **common)
        print(f"{shape} {batch_size}x{seq_len}  {name_of(setting):<46}", end="", flush=True)
        if not job.folder.joinpath("config.json").is_file():
            raise UserError(f"{job.folder} has no config.json: --shapes takes a name in benchmarks/shapes or a folder")
        if measured(job, lines, now) and not args.again:
            print("measured already")
            continue
        found = run(job, args.timeout)
        record(NAME, {"setting": setting, **found, "arguments": arguments_of(job)}, args.output_dir)
        print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
