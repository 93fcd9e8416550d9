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
import signal
import sys

from benchmarks.jobs import Job, add_arguments, cell, make_job
from benchmarks.peers import NOT_DONE, NOT_INSTALLED, PEERS, run
from benchmarks.record import is_alike, read, record
from benchmarks.rows import LSE_KEPT, name_of, whole
from hyclora.models.config import PRESETS, HycloraConfig
from hyclora.utils.disk import check_output
from hyclora.utils.errors import Interrupted, entry_point
from hyclora.utils.results import environment

NAME = "memory_throughput"
GPU_PRESETS = ("fastest", "least_memory", "longest")
LAYER_BY_LAYER = {"cuda_graphs": False}
OURS = [
    *({"layer_type": "intra_inter_full_fuse", "q_bit": 4} | PRESETS[name].settings for name in GPU_PRESETS),
    {"layer_type": "intra_inter_full_fuse", "q_bit": 2, "cuda_graphs": True},
    {"layer_type": "intra_inter_full_fuse", "q_bit": 4, "offload": True, "slot_savers": LSE_KEPT} | LAYER_BY_LAYER,
    *({"layer_type": "intra_inter_full_fuse", "q_bit": bits} | LAYER_BY_LAYER for bits in (4, 2)),
    *({"layer_type": "intra_inter", "q_bit": bits} | LAYER_BY_LAYER for bits in (8, 4, 2, "auto")),
    {"layer_type": "baseline"} | LAYER_BY_LAYER,
]


def settings(text: str) -> list[str | dict]:
    """A JSON list of peers' names and HycloraConfig arguments; "peers" and "ours" stand for all of them."""
    given, found = json.loads(text), []
    if not isinstance(given, list):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON list")
    for item in given:
        found += {"peers": list(PEERS), "ours": OURS}.get(item, [item]) if isinstance(item, str) else [item]
    for item in found:
        if isinstance(item, dict):
            try:
                HycloraConfig(**item)
            except (TypeError, ValueError) as error:
                raise argparse.ArgumentTypeError(f"{json.dumps(item)}: {error}") from None
        elif item not in PEERS:
            raise argparse.ArgumentTypeError(f"{item} is not one of peers, ours, {'; '.join(PEERS)}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b"], help="in benchmarks/shapes, or folders")
    parser.add_argument("--cells", nargs="+", type=cell, default=[(4, 512)], help="BATCHxLENGTH")
    parser.add_argument("--settings", type=settings, default='["peers", "ours"]', help=settings.__doc__)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one setting, loading included")
    parser.add_argument("--again", action="store_true", help="measure also what this commit has measured")
    add_arguments(parser, steps=10)
    return parser.parse_args(argv)


def measured(job: Job, lines: list[dict], now: dict, timeout: float) -> bool:
    """Whether a line of this commit and device answers the job.

    A peer may have been installed since, and what was not done in time may have more of it now.
    """
    return any(
        is_alike(line, now)
        and whole(line["setting"]) == whole(job.setting)
        and line["arguments"] == job.arguments
        and line.get("error") != NOT_INSTALLED
        and not (line.get("error", "").startswith(NOT_DONE) and timeout > float(line["error"].split()[-2]))
        for line in lines
    )


def sweep(name: str, jobs: list[Job], args: argparse.Namespace) -> None:
    """Measure what no line answers, a line each; Interrupted by Ctrl-C, with all lines of before kept."""
    check_output(args.output_dir, needed=2**20)
    now, lines = environment(), read(args.output_dir / f"{name}.jsonl")
    # so that the process that measures ends as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for job in jobs:
            print(f"{job.shape} {job.batch_size}x{job.seq_len}  {name_of(job.setting):<46}", end="", flush=True)
            if measured(job, lines, now, args.timeout) and not args.again:
                print("measured already")
                continue
            found = run(job, args.timeout)
            record(name, {"setting": whole(job.setting), **found, "arguments": job.arguments}, args.output_dir)
            told = (f"{key} {value}" for key, value in found.items() if not isinstance(value, list))
            print("  ".join(told), flush=True)
    except KeyboardInterrupt:
        raise Interrupted("interrupted: the same command goes on where it stopped") from None


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    jobs = [make_job(args, *one) for one in itertools.product(args.shapes, args.cells, args.settings)]
    sweep(NAME, jobs, args)


if __name__ == "__main__":
    main()
