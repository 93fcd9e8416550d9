"""Where the time of one micro-step goes: on the GPU by kernel, on the host by function.

    python -m benchmarks.profile_step --setting '{"q_bit": 2, "cuda_graphs": false}'
    python -m benchmarks.profile_step --setting "Liger, checkpointing" --cell 1x8192
    python -m benchmarks.profile_step --host                          # and the functions of forward and backward

ms: a micro-step on its own, as benchmarks.memory_throughput measures it. forward_ms, backward_ms: host time until the
call returns, the GPU idle before it; a call that waits for the GPU counts its wait. gpu_ms: time in which at least one
kernel runs, copy_ms: at least one copy or fill; kernels and copies may overlap. Counts and times are those of one step.
"""

import argparse
import cProfile
import json
import os
import pstats
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import mean, median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.jobs import Job, add_arguments, cell, make_job
from benchmarks.peers import OFFLINE, PEERS, micro_step
from benchmarks.record import record
from benchmarks.rows import whole
from hyclora.utils.disk import check_output
from hyclora.utils.errors import entry_point

COPIES = ("Memcpy", "Memset")
NOISE = ("void ", "at::native::", "(anonymous namespace)::", "c10::", "cutlass::", "std::")
PROFILED = 3  # micro-steps under a profiler


def setting(text: str) -> str | dict:
    """A peer's name, or HycloraConfig arguments as JSON."""
    found = json.loads(text) if text.startswith("{") else text
    if isinstance(found, str) and found not in PEERS:
        raise argparse.ArgumentTypeError(f"{found} is neither a JSON object nor one of {'; '.join(PEERS)}")
    return found


def synchronize(step) -> None:
    if step.device.type == "cuda":
        torch.cuda.synchronize()


def host_times(step, repeat: int) -> dict[str, float]:
    """Median milliseconds until forward and backward return."""
    seconds = defaultdict(list)

    def timed(name: str, call: Callable, *args):
        synchronize(step)
        start = time.perf_counter()
        result = call(*args)
        seconds[name].append(time.perf_counter() - start)
        return result

    for _ in range(repeat):
        timed("backward_ms", timed("forward_ms", step.forward, step.batch).backward)
    return {name: round(1e3 * median(seconds[name]), 2) for name in ("forward_ms", "backward_ms")}


def device_spans(step, repeat: int) -> list[tuple[str, float, float]]:
    """What the GPU does in `repeat` micro-steps: name, start and end in microseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeat):
            step.forward(step.batch).backward()
            synchronize(step)
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Time in which at least one of the intervals runs."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def short(name: str, width: int = 110) -> str:
    """A kernel's name without what many have in common."""
    for noise in NOISE:
        name = name.replace(noise, "")
    return name.rpartition("(")[0][:width] if name.endswith(")") and not name.startswith(COPIES) else name[:width]


def device_times(spans: list[tuple[str, float, float]], steps: int, layers: int, top: int = 40) -> dict:
    """Busy milliseconds and number of kernels of one step, and its `top` kernels by time."""
    kernels = [span for span in spans if not span[0].startswith(COPIES)]
    copies = [span for span in spans if span[0].startswith(COPIES)]
    durations: dict[str, list[float]] = defaultdict(list)
    for name, start, end in spans:
        durations[short(name)].append(end - start)
    rows = [
        {"name": name, "count": len(us) / steps, "us": round(sum(us) / steps, 1), "mean_us": round(mean(us), 2)}
        for name, us in durations.items()
    ]
    return {
        "gpu_ms": round(union(span[1:] for span in kernels) / steps / 1e3, 2),
        "copy_ms": round(union(span[1:] for span in copies) / steps / 1e3, 2),
        "kernels": round(len(kernels) / steps, 1),
        "kernels_a_layer": round(len(kernels) / steps / layers, 1),
        "top_kernels": sorted(rows, key=lambda row: -row["us"])[:top],
    }


def host_functions(step, repeat: int, top: int = 50) -> None:
    """Print the functions of `repeat` micro-steps by own time, which the profiler itself inflates."""
    profiler = cProfile.Profile()
    # With its own threads autograd would run backward where this thread's profiler does not look.
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(repeat):
            synchronize(step)
            profiler.enable()
            step.forward(step.batch).backward()
            profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(top)


def one_job(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, Job]:
    """The parser's arguments and those of a single job, and the job."""
    parser.add_argument("--setting", type=setting, default={"cuda_graphs": False}, help=setting.__doc__)
    parser.add_argument("--shape", default="llama-2-7b", help="in benchmarks/shapes, or a folder")
    parser.add_argument("--cell", type=cell, default=(4, 512), help="BATCHxLENGTH")
    add_arguments(parser, steps=10)
    args = parser.parse_args(argv)
    check_output(args.output_dir, needed=2**20)
    return args, make_job(args, args.shape, args.cell, args.setting)


@entry_point
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true", help="also profile the host's functions")
    args, job = one_job(parser, argv)
    os.environ |= OFFLINE
    step = micro_step(job)
    found = {"ms": step.throughput(job.steps)["ms"], **host_times(step, job.steps)}
    if step.device.type == "cuda":
        found |= device_times(device_spans(step, PROFILED), PROFILED, step.model.config.num_hidden_layers)
    record("profile_step", {"setting": whole(job.setting), **found, "arguments": job.arguments}, args.output_dir)
    rows = found.pop("top_kernels", [])
    print(json.dumps(job.setting), "  ".join(f"{name} {value}" for name, value in found.items()), sep="\n")
    for row in rows:
        print(f"{row['us']:10.1f} us{row['count']:8.1f} x{row['mean_us']:9.2f} us  {row['name']}")
    if args.host:
        host_functions(step, PROFILED)


if __name__ == "__main__":
    main()
