"""Micro-steps on a user's rows, each batch padded to its longest row: what a fixed shape hides.

    python -m benchmarks.real_rows --data_dir ../shared/data/gsm8k --tokenizer ../shared/tokenizers/llama2
    python -m benchmarks.real_rows ... --cells 16x512 --lora_dropout 0.05 --settings '["Unsloth", {"stream": false}]'
    python -m benchmarks.real_rows --alpaca ../shared/data/alpaca/alpaca_small.json ... --cells 1x512
    python -m benchmarks.real_rows ... --gpus 2 --settings '["PEFT LoRA", {"offload": true}]'

Random weights of a shape in NF4, LoRA on all seven linears, rows of GSM8K (or, with --alpaca, instructions in Alpaca's
format) in one shuffled order for all settings, cut at the cell's length, widths a multiple of 8, a step of AdamW every
4 micro-steps. One process a setting. first_100_s: from the first micro-step on, calibration and recordings included,
compiled kernels not if they were run before; seconds: of all of them; times of a micro-step after --warm_up of them.
dyn and held: the peak of the whole run, as graphs are seen by the allocator while they are recorded alone, over static:
the model and at the end its gradients and Adam's state. Real tokens are those that are no padding. Lines are kept and
continued as those of memory_throughput. With --gpus N each of N processes has rows of its own (DistributedDataParallel;
gradients are added up over micro-steps before they are exchanged): times and memory are those of the first process,
tokens those of all.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.jobs import Job, add_arguments, cell, make_job, number
from benchmarks.memory_throughput import settings, sweep
from benchmarks.ranks import data_parallel, exchanging, fully_sharded, rank
from hyclora.utils.disk import to_path
from hyclora.utils.errors import UserError, entry_point

NAME = "real_rows"
ACCUMULATE = 4
FIRST = 100
ORDER = 5  # a seed
SETTINGS = """["Unsloth", "Unsloth, offloaded checkpointing", "PEFT LoRA",
    {"offload": true, "cuda_graphs": false, "stream": false}, {"offload": true, "cuda_graphs": false, "stream": true},
    {"offload": true, "cuda_graphs": true, "stream": false}, {"offload": true, "cuda_graphs": true, "stream": true}]"""


class Meter:
    """When micro-steps ended, and the memory of the GPU that they took.

    settled: wait for the GPU after every micro-step, not only where times are told.
    """

    def __init__(self, device: str, warm: int, steps: int, settled: bool = True):
        self.cuda, self.warm, self.total, self.settled = device == "cuda", warm, warm + steps, settled
        self.times: list[float] = []
        self.found: dict[str, float] = {}

    def start(self) -> None:
        if self.cuda:
            import torch

            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.loaded = torch.cuda.memory_allocated()
        self.first = self.last = time.perf_counter()

    def step(self, optimizer) -> None:
        """A micro-step has ended, and its gradients are still there: they count as static."""
        import torch

        done = len(self.times) + 1
        if self.cuda and (self.settled or done in (self.warm, FIRST, self.total)):
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times.append(now - self.last)
        if done == FIRST:
            self.found["first_100_s"] = round(now - self.first, 2)
        if done == self.total and self.cuda:
            from hyclora.utils.profiling import MIB, gradients_and_state

            static = self.loaded + sum(t.numel() * t.element_size() for t in gradients_and_state(optimizer))
            sizes = {"static": static, "dyn": torch.cuda.max_memory_allocated() - static}
            sizes["held"] = torch.cuda.max_memory_reserved() - static
            self.found |= {f"{name}_mib": round(size / MIB, 1) for name, size in sizes.items()}
        self.last = time.perf_counter()

    def result(self, tokens: list[int]) -> dict[str, float]:
        """What a line says of the timed micro-steps; tokens: how many each of all had that are no padding."""
        timed, real = self.times[self.warm : self.total], tokens[self.warm : self.total]
        if len(timed) < self.total - self.warm:
            raise ValueError(f"{len(self.times)} micro-steps were seen of {self.total}")
        return {
            "ms": round(1e3 * statistics.mean(timed), 1),
            **({"ms_median": round(1e3 * statistics.median(timed), 1)} if self.settled else {}),
            "real_tokens_per_second": round(sum(real) / sum(timed)),
            "real_tokens": round(statistics.mean(real)),
            "seconds": round(sum(self.times[: self.total]), 2),
            **self.found,
        }


def tokenizer_of(job: Job):
    """The tokenizer of the job's rows, as the scripts load it."""
    from transformers import AutoConfig

    from hyclora.utils.tokenizer import load_as_trained

    if not Path(job.rows["tokenizer"]).is_dir():
        raise UserError(f"{job.rows['tokenizer']} does not exist: --tokenizer is the folder of a tokenizer's files")
    return load_as_trained(job.rows["tokenizer"], AutoConfig.from_pretrained(job.folder))[0]


def examples_of(job: Job) -> tuple[list, str]:
    """All rows that the job may take, and where they come from."""
    from hyclora.utils.args import DataArguments
    from hyclora.utils.data import alpaca, gsm8k

    if file := job.rows.get("alpaca"):
        asked = {"max_train_samples": job.rows.get("first"), "max_eval_samples": 0}
        return alpaca.load_examples(DataArguments(data_name="alpaca", data_dir=file, **asked))[0], file
    folder = job.rows["data_dir"]
    return gsm8k.examples_of(gsm8k.load_rows(DataArguments(data_name="gsm8k", data_dir=folder), "train")), folder


def batches_of(job: Job) -> list[dict]:
    """The job's micro-batches on the CPU, the same for every setting; UserError if there are too few rows.

    Padded to the longest of batch_size rows, or with rows=... "flat" as many behind each other as seq_len has room for.
    """
    from hyclora.utils.data.tokens import Collator, tokenize_rows

    tokenizer = tokenizer_of(job)
    examples, place = examples_of(job)
    random.Random(ORDER).shuffle(examples)
    needed = (job.rows["warm_up"] + job.steps) * job.gpus
    if job.rows.get("flat"):
        found, collate = _filled(tokenize_rows(examples, tokenizer, job.seq_len).rows, job.seq_len), _flattened
    else:
        n = job.batch_size
        rows = tokenize_rows(examples[: 2 * needed * n], tokenizer, job.seq_len).rows
        found, collate = [rows[i : i + n] for i in range(0, len(rows) - n + 1, n)], Collator(tokenizer.pad_token_id)
    if len(found) < needed:
        raise UserError(f"{place} fills {len(found)} micro-batches, and this takes {needed}: lower --steps")
    return [collate(rows) for rows in found[:needed]]


def _filled(rows: list[dict], seq_len: int) -> list[list[dict]]:
    """Rows in their order, as many together as seq_len tokens have room for; the last ones may be few."""
    groups, room = [], 0
    for row in rows:
        room -= len(row["input_ids"])
        if room < 0 or not groups:
            groups.append([])
            room = seq_len - len(row["input_ids"])
        groups[-1].append(row)
    return groups[:-1]


def _flattened(rows: list[dict]) -> dict:
    """One row of all, with the positions of each, as Hugging Face's collator has it."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening(return_tensors="pt")(rows)


class Training:
    """A job's model on its micro-batches, with an optimizer step every so many, alone or beside other processes.

    meter starts when the model's weights are where they stay.
    """

    def __init__(self, job: Job, model, meter: Meter):
        import torch

        batches, self.device = batches_of(job), torch.device(job.device)
        real = [batch.get("attention_mask", batch["input_ids"] >= 0).sum().item() for batch in batches]
        self.tokens = [sum(real[i : i + job.gpus]) for i in range(0, len(real), job.gpus)]
        self.batches, self.every = batches[rank() :: job.gpus], job.rows.get("accumulate", ACCUMULATE)
        self.cuda = self.device.type == "cuda"
        model.train()
        if job.parallel == "fsdp2":
            fully_sharded(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.cuda)
        meter.start()
        ddp = job.gpus > 1 and job.parallel == "ddp"  # in whose memory gradients may be
        self.network = data_parallel(model, job.device) if ddp else model

    def micro_step(self, i: int):
        """The loss of this process's i-th micro-batch, without its graph."""
        import torch

        batch = {name: t.to(self.device) for name, t in self.batches[i].items()}
        last = i % self.every == self.every - 1
        with exchanging(self.network, last):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
                loss = self.network(**batch).loss
            (loss / self.every).backward()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
        return loss.detach()


def measure_rows(job: Job, model) -> dict:
    """Train the job's model on them."""
    meter = Meter(job.device, job.rows["warm_up"], job.steps)
    training = Training(job, model, meter)
    batches = training.batches
    for i in range(len(batches)):
        loss = training.micro_step(i)
        meter.step(training.optimizer)
    return meter.result(training.tokens) | {
        "width": round(statistics.mean(batch["input_ids"].shape[1] for batch in batches[meter.warm :]), 1),
        "widths": len({batch["input_ids"].shape[1] for batch in batches}),
        "loss": round(loss.item(), 4),
    }


def add_row_arguments(parser: argparse.ArgumentParser, settings_: str, longest: tuple[int, int]) -> None:
    """What a benchmark on real rows takes whatever they are."""
    parser.add_argument("--tokenizer", type=to_path, required=True, help="folder of the tokenizer's files")
    parser.add_argument("--shape", default="llama-2-7b", help="in benchmarks/shapes, or a folder")
    parser.add_argument("--cells", nargs="+", type=cell, default=[longest], help="ROWSxLONGEST")
    parser.add_argument("--settings", type=settings, default=settings_, help=settings.__doc__)
    parser.add_argument("--warm_up", type=number(1), default=32, help="micro-steps before those that are timed")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one setting, loading included")
    parser.add_argument("--again", action="store_true", help="measure also what this commit has measured")
    add_arguments(parser, steps=96)


def sweep_rows(name: str, args: argparse.Namespace, rows: dict, check: Callable[[Job], object], gpus: int = 1) -> None:
    """A line for each cell and setting. What is wrong with rows or tokenizer is said before a model is made."""
    rows = {**rows, "tokenizer": str(args.tokenizer), "warm_up": args.warm_up}
    jobs = [make_job(args, args.shape, one, setting, rows, gpus) for one in args.cells for setting in args.settings]
    check(jobs[0])
    sweep(name, jobs, args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--data_dir", type=to_path, help="folder with GSM8K's train.jsonl")
    rows.add_argument("--alpaca", type=to_path, help="JSON list of rows with instruction, input and output")
    parser.add_argument("--gpus", type=number(1), default=1, help="data parallel; a cell's rows are those of each")
    add_row_arguments(parser, SETTINGS, (4, 512))
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    rows = {"alpaca": str(args.alpaca)} if args.alpaca else {"data_dir": str(args.data_dir)}
    sweep_rows(NAME, args, rows, batches_of, args.gpus)


if __name__ == "__main__":
    main()
