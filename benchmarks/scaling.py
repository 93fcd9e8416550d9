"""Training on one GPU and on several of one host: tokens a second of each, memory, and the time they spend talking.

    python -m benchmarks.scaling --data_dir ../shared/data/gsm8k --tokenizer ../shared/tokenizers/llama2 --gpus 1 2 4 8
    python -m benchmarks.scaling ... --shape llama-2-70b --packed --cells 1x2048 --parallel ddp

On GSM8K's rows as in real_rows, padded, or (--packed) behind each other as far as a cell's length goes; an optimizer
step every 4 micro-steps of each GPU. ddp: each GPU has the whole base; fsdp2: they share it by fully_shard. Beside what
real_rows says, of the first process: host_mib, the most memory of the host that it had; communication_ms of a
micro-step, NCCL's kernels on the GPU with their wait for other ranks, which other kernels may run beside (torch's
profiler, one optimizer step after the timed ones); and losses of the first ten optimizer steps, the mean of all
processes. For each number of GPUs one process trains for ten steps on the rows of all, to compare the losses with: its
line has "accumulate", the micro-steps before each of its optimizer steps.
"""

import argparse
import itertools
import re
from dataclasses import replace
from pathlib import Path

from benchmarks.jobs import Job, make_job, number
from benchmarks.memory_throughput import sweep
from benchmarks.real_rows import ACCUMULATE, Meter, Training, add_row_arguments, batches_of
from hyclora.utils.disk import to_path
from hyclora.utils.errors import UserError, entry_point

NAME = "scaling"
SETTINGS = '[{"offload": true}]'
COMPARED = 10  # optimizer steps whose losses are told


def measure_scaling(job: Job, model) -> dict:
    """Train the job's model on its rows; every process says the same of losses."""
    meter = Meter(job.device, job.rows["warm_up"], job.steps)
    training = Training(job, model, meter)
    n_steps = job.rows["warm_up"] + job.steps
    losses = []
    for i in range(n_steps):
        losses.append(training.micro_step(i))
        meter.step(training.optimizer)
    found = meter.result(training.tokens) | {"losses": mean_losses(losses, training.every), "host_mib": host_mib()}
    if job.gpus > 1 and training.cuda:
        found["communication_ms"] = communication_ms(training)
    return found


def mean_losses(losses: list, every: int) -> list[float]:
    """Of the first optimizer steps, over all micro-batches of all processes."""
    import torch

    steps = torch.stack(losses).float()[: COMPARED * every]
    means = steps[: len(steps) // every * every].view(-1, every).mean(1)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(means)
        means /= torch.distributed.get_world_size()
    return [round(loss, 6) for loss in means.tolist()]


def host_mib(which: str = "VmHWM") -> float:
    """This process' host memory, pinned memory and libraries included: the most that it has had, or VmRSS, it has."""
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(rf"{which}:\s*(\d+) kB", status)[1]) / 1024, 1)


def communication_ms(training: Training) -> float:
    """NCCL's kernels in a micro-step, the mean of one optimizer step's."""
    import torch
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for i in range(training.every):
            training.micro_step(i)
        torch.cuda.synchronize()
    kernels = (e for e in profiler.events() if e.device_type == DeviceType.CUDA and e.name.startswith("nccl"))
    return round(sum(e.time_range.elapsed_us() for e in kernels) / 1e3 / training.every, 2)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Of each cell and setting one process, then each number of GPUs in each way, and what its losses compare with."""
    rows = {"scaling": True, "data_dir": str(args.data_dir), "tokenizer": str(args.tokenizer), "warm_up": args.warm_up}
    rows |= {"flat": True} if args.packed else {}
    found = []
    for cell, setting, gpus in itertools.product(args.cells, args.settings, args.gpus):
        for parallel in args.parallel if gpus > 1 else ["ddp"]:
            found.append(make_job(args, args.shape, cell, setting, rows, gpus, parallel))
        if gpus > 1:
            every = ACCUMULATE * gpus
            alone = rows | {"accumulate": every, "warm_up": every}
            found.append(replace(found[-1], gpus=1, parallel="ddp", steps=(COMPARED - 1) * every, rows=alone))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=to_path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--gpus", nargs="+", type=number(1), default=[1, 2, 4, 8], help="of this host")
    parser.add_argument("--parallel", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--packed", action="store_true", help="rows behind each other, one row of cells 1xLENGTH")
    add_row_arguments(parser, SETTINGS, (4, 512))
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.packed and any(n_rows > 1 for n_rows, _ in args.cells):
        raise UserError("--packed makes one row of many: --cells 1xLENGTH, for instance 1x2048")
    jobs = jobs_of(args)
    batches_of(max(jobs, key=lambda job: job.gpus * (job.steps + job.rows["warm_up"])))
    sweep(NAME, jobs, args)


if __name__ == "__main__":
    main()
