"""What is alive at the peak of one micro-step, by the place in this project that allocated it.

    python -m benchmarks.peak_memory --setting '{"q_bit": 2, "cuda_graphs": false}'
    python -m benchmarks.peak_memory --setting '{"offload": true, "cuda_graphs": true}' --cell 1x8192

Memory that is there before the step (weights, adapters, gradients, Adam) does not count. With CUDA graphs the step is
the one that records them, in which the allocator sees all tensors. other_peaks: what was allocated in all when a place
allocated at most, so what would be the peak if that of the others were lower.
"""

import argparse
import gc
import os
from collections import Counter
from pathlib import Path

import torch

from benchmarks.peers import OFFLINE, micro_step
from benchmarks.profile_step import one_job
from benchmarks.record import record
from benchmarks.rows import whole
from hyclora.utils.args import ROOT
from hyclora.utils.errors import UserError, entry_point
from hyclora.utils.profiling import graphs_of

MIB = 2**20
PROJECT = tuple(str(ROOT / folder) for folder in ("models", "operators", "utils"))
CALLERS = 3  # frames that tell a place


def place(frames: list[dict]) -> str:
    """The innermost frames of the project, innermost first; the innermost of all where none is the project's."""
    own = [frame for frame in frames if frame["filename"].startswith(PROJECT)] or frames[:1]
    return " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in own[:CALLERS]) or "unknown"


def at_peak(events: list[dict]) -> tuple[int, list[dict], dict[str, int]]:
    """Most bytes alive at a time, the allocations alive then, and the most at an allocation of each place.

    events: the allocator's trace of one device; what it frees without having allocated it does not count.
    """
    live, now, peak, alive, most = {}, 0, 0, [], {}
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            now += event["size"]
            where = place(event.get("frames", []))
            most[where] = max(now, most.get(where, 0))
            if now > peak:
                peak, alive = now, list(live.values())
        elif event["action"] == "free_completed" and event["addr"] in live:
            now -= live.pop(event["addr"])["size"]
    return peak, alive, most


def trace(step) -> list[dict]:
    """The allocator's events of a forward and a backward."""
    graphs = graphs_of(step.model)
    if graphs is not None:
        graphs.clear()
        step.forward(step.batch).backward()  # the next one records
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=2**21, stacks="python")
    step.forward(step.batch).backward()
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    return events


@entry_point
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top", type=int, default=30, help="places to name")
    args, job = one_job(parser, argv)
    if job.device != "cuda":
        raise UserError("peak_memory reads the trace of a GPU's allocator: leave --device at cuda")
    os.environ |= OFFLINE
    peak, alive, most = at_peak(trace(micro_step(job)))
    sizes, counts = Counter(), Counter()
    for event in alive:
        where = place(event.get("frames", []))
        sizes[where] += event["size"]
        counts[where] += 1
    found = [{"place": p, "mib": round(n / MIB, 2), "count": counts[p]} for p, n in sizes.most_common(args.top)]
    others = {p: round(n / MIB, 1) for p, n in Counter(most).most_common(args.top)}
    result = {"peak_mib": round(peak / MIB, 1), "alive": found, "other_peaks": others}
    record("peak_memory", {"setting": whole(job.setting), **result, "arguments": job.arguments}, args.output_dir)
    print(f"{peak / MIB:.1f} MiB at the peak")
    for row in found:
        print(f"{row['mib']:10.2f} MiB x{row['count']:4d}  {row['place']}")
    print("most in all while a place allocated")
    for where, size in others.items():
        print(f"{size:10.1f} MiB        {where}")


if __name__ == "__main__":
    main()
