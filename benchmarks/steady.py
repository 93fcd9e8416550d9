"""Whether memory stays what it is over thousands of steps, in rows of ever other lengths.

    python -m benchmarks.steady                                    # SmolLM2-135M's shape, 2000 steps, each kind of rows
    python -m benchmarks.steady --rows padded --settings '[{"offload": true}, {"cuda_graphs": false}]' --steps 600
    python -m benchmarks.steady --shape ckpt/tiny-llama --device cpu --base bf16 --steps 200 --every 20

Random weights and tokens; each step is a forward, a backward and one of AdamW. padded: a cell's rows, of lengths drawn
between a quarter of its length and all of it; packed: as many documents behind each other in one row; whole: all of the
cell's length. Samples, one every 100 steps when the step is over: allocated_mib and held_mib of the GPU's allocator,
pinned_mib of the store, rss_mib of the process, how many tensors Python knows of, and tensor_mib of what they hold, on
the host too. Appends a line a setting and kind of rows to OUTPUT_DIR/steady.jsonl.
"""

import argparse
import gc
import itertools
import time

from benchmarks.jobs import Job, add_arguments, cell, make_job, number
from benchmarks.memory_throughput import settings, sweep
from benchmarks.scaling import host_mib
from hyclora.utils.errors import UserError, entry_point

NAME = "steady"
KINDS = ("padded", "packed", "whole")
POOL = 64  # batches that are drawn once, and used again and again
WARM_UP = 8  # steps before the first: calibration and the first graphs
MIB = 2**20


def batches_of(job: Job, vocab: int) -> list[dict]:
    """The job's batches, in host memory."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    rows, longest = job.batch_size, job.seq_len
    found = []
    for _ in range(1 if job.rows["steady"] == "whole" else POOL):
        least = longest if job.rows["steady"] == "whole" else max(1, longest // 4)
        lengths = torch.randint(least, longest + 1, (rows,), generator=drawn)
        if job.rows["steady"] == "packed":
            positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
            ids = torch.randint(0, vocab, positions.shape, generator=drawn)
            found.append({"input_ids": ids, "position_ids": positions, "labels": ids})
            continue
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.randint(0, vocab, mask.shape, generator=drawn)
        found.append({"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)})
    return found


def measure_steady(job: Job, model) -> dict:
    """Train the job's model, and sample."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batches, cuda = batches_of(job, model.config.vocab_size), job.device == "cuda"
    samples, begun = [], time.perf_counter()
    for i in range(1 - WARM_UP, job.steps + 1):
        batch = {name: t.to(job.device) for name, t in batches[i % len(batches)].items()}
        with torch.autocast(job.device, torch.bfloat16, enabled=cuda):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if i > 0 and i % job.rows["every"] == 0:
            samples.append(sample(i, loss.item(), model))
    return {"seconds": round(time.perf_counter() - begun, 1), "samples": samples}


def sample(step: int, loss: float, model) -> dict:
    """What there is behind a step."""
    import torch

    from hyclora.utils.profiling import pinned_bytes

    found = {"step": step, "loss": round(loss, 4), "rss_mib": host_mib("VmRSS"), **alive()}
    if torch.cuda.is_available():
        sizes = {"allocated": torch.cuda.memory_allocated(), "held": torch.cuda.memory_reserved()}
        found |= {f"{name}_mib": round(n / MIB, 2) for name, n in (sizes | {"pinned": pinned_bytes(model)}).items()}
    return found


def alive() -> dict:
    """Tensors that Python knows of, and the MiB of their storages, each once."""
    import torch

    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return {"tensors": len(tensors), "tensor_mib": round(sum(storages.values()) / MIB, 2)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", help="in benchmarks/shapes, or a folder")
    parser.add_argument("--cells", nargs="+", type=cell, default=[(4, 128)], help="BATCHxLENGTH")
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--settings", type=settings, default="[{}]", help=settings.__doc__)
    parser.add_argument("--every", type=number(1), default=100, help="steps from one sample to the next")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one line, loading included")
    parser.add_argument("--again", action="store_true", help="measure also what this commit has measured")
    add_arguments(parser, steps=2000)
    args = parser.parse_args(argv)
    if args.steps < 2 * args.every:
        raise UserError(f"--steps {args.steps} has fewer than two samples: lower --every {args.every}")
    return args


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    jobs = [
        make_job(args, args.shape, cell, setting, {"steady": kind, "every": args.every})
        for cell, setting, kind in itertools.product(args.cells, args.settings, args.rows)
    ]
    sweep(NAME, jobs, args)


if __name__ == "__main__":
    main()
