"""Micro-steps on a user's rows, each batch padded to its longest row: what a fixed shape hides.

    python -m benchmarks.real_rows --data_dir ../shared/data/gsm8k --tokenizer ../shared/tokenizers/llama2
    python -m benchmarks.real_rows ... --cells 16x512 --lora_dropout 0.05 --settings '["Unsloth", {"stream": false}]'

Random weights of a shape in NF4, LoRA on all seven linears, rows of GSM8K in one shuffled order for all settings, cut
at the cell's length, widths a multiple of 8, an optimizer step every 4 micro-steps. One process a setting. first_100_s:
from the first micro-step on, calibration and recordings included, compiled kernels not if they were run before; times
of a micro-step after --warm_up of them. dyn and held: the peak of the whole run, as graphs are seen by the allocator
while they are recorded alone, over static: the model and at the end its gradients and Adam's state. Real tokens are
those that are no padding. Lines are kept and continued as those of memory_throughput.
"""

import argparse
import gc
import random
import statistics
import time
from pathlib import Path

from benchmarks.jobs import Job, add_arguments, cell, make_job, number
from benchmarks.memory_throughput import settings, sweep
from hyclora.utils.errors import UserError, entry_point

NAME = "real_rows"
ACCUMULATE = 4
FIRST = 100
ORDER = 5  # a seed
SETTINGS = """["Unsloth", "Unsloth, offloaded checkpointing", "PEFT LoRA",
    {"offload": true, "cuda_graphs": false, "stream": false}, {"offload": true, "cuda_graphs": false, "stream": true},
    {"offload": true, "cuda_graphs": true, "stream": false}, {"offload": true, "cuda_graphs": true, "stream": true}]"""


def batches_of(job: Job) -> list[dict]:
    """The job's micro-batches on the CPU, the same for every setting; UserError if there are too few rows."""
    from transformers import AutoConfig

    from hyclora.utils.args import DataArguments
    from hyclora.utils.data import gsm8k
    from hyclora.utils.data.tokens import Collator, tokenize_rows
    from hyclora.utils.tokenizer import load_as_trained

    if not Path(job.rows["tokenizer"]).is_dir():
        raise UserError(f"{job.rows['tokenizer']} does not exist: --tokenizer is the folder of a tokenizer's files")
    tokenizer, _ = load_as_trained(job.rows["tokenizer"], AutoConfig.from_pretrained(job.folder))
    rows = gsm8k.load_rows(DataArguments(data_name="gsm8k", data_dir=job.rows["data_dir"]), "train")
    random.Random(ORDER).shuffle(rows)
    needed = (job.rows["warm_up"] + job.steps) * job.batch_size
    found = tokenize_rows(gsm8k.examples_of(rows[: 2 * needed]), tokenizer, job.seq_len).rows[:needed]
    if len(found) < needed:
        raise UserError(f"{job.rows['data_dir']} has {len(found)} such rows, and this takes {needed}: lower --steps")
    collate = Collator(tokenizer.pad_token_id)
    return [collate(found[i : i + job.batch_size]) for i in range(0, len(found), job.batch_size)]


def measure_rows(job: Job, model) -> dict:
    """Train the job's model on them."""
    import torch

    from hyclora.utils.profiling import MIB, gradients_and_state

    batches, warm, device = batches_of(job), job.rows["warm_up"], torch.device(job.device)
    cuda = device.type == "cuda"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
    ends, loaded = [], 0
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
    model.train()

    def settle() -> None:
        if cuda:
            torch.cuda.synchronize()

    start = time.perf_counter()
    for i, batch in enumerate(batches):
        batch = {name: t.to(device) for name, t in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = model(**batch).loss
        (loss / ACCUMULATE).backward()
        if i % ACCUMULATE == ACCUMULATE - 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        settle()
        ends.append(time.perf_counter())
    each = [1e3 * (b - a) for a, b in zip([start, *ends], ends, strict=False)]
    timed, real = each[warm:], [int(batch["attention_mask"].sum()) for batch in batches]
    found = {
        "ms": round(statistics.mean(timed), 1),
        "ms_median": round(statistics.median(timed), 1),
        "real_tokens_per_second": round(1e3 * sum(real[warm:]) / sum(timed)),
        "real_tokens": round(statistics.mean(real[warm:])),
        "width": round(statistics.mean(batch["input_ids"].shape[1] for batch in batches[warm:]), 1),
        "widths": len({batch["input_ids"].shape[1] for batch in batches}),
        "loss": round(loss.item(), 4),
    }
    if len(ends) >= FIRST:
        found["first_100_s"] = round(ends[FIRST - 1] - start, 2)
    if cuda:
        static = loaded + sum(t.numel() * t.element_size() for t in gradients_and_state(trained, optimizer))
        sizes = {"static": static, "dyn": torch.cuda.max_memory_allocated() - static}
        sizes["held"] = torch.cuda.max_memory_reserved() - static
        found |= {f"{name}_mib": round(size / MIB, 1) for name, size in sizes.items()}
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer's files")
    parser.add_argument("--shape", default="llama-2-7b", help="in benchmarks/shapes, or a folder")
    parser.add_argument("--cells", nargs="+", type=cell, default=[(4, 512)], help="ROWSxLONGEST")
    parser.add_argument("--settings", type=settings, default=SETTINGS, help=settings.__doc__)
    parser.add_argument("--warm_up", type=number(1), default=32, help="micro-steps before those that are timed")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one setting, loading included")
    parser.add_argument("--again", action="store_true", help="measure also what this commit has measured")
    add_arguments(parser, steps=96)
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    rows = {"data_dir": str(args.data_dir), "tokenizer": str(args.tokenizer), "warm_up": args.warm_up}
    jobs = [make_job(args, args.shape, one, setting, rows) for one in args.cells for setting in args.settings]
    batches_of(jobs[0])  # what is wrong with rows or tokenizer is said before a model is made
    sweep(NAME, jobs, args)


if __name__ == "__main__":
    main()
