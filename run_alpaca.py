"""Instruction tuning on one GPU in plain PyTorch: four techniques to save memory, one by one or together.

    bash run_alpaca.sh                                             # demo, a minute on a CPU
    data_name=alpaca model_name=llama-2-7b-hf mixed_precision=bf16 bash run_alpaca.sh
    sweep=True bash run_alpaca.sh                                  # every combination, and what each one takes

Gradient accumulation, gradient checkpointing, mixed precision and LoRA, and HyC-LoRA on top; without LoRA all weights
are trained. The loop is below, `train_step` is its heart. The settings are at the top of run_alpaca.sh and in
utils/settings.sh; `python run_alpaca.py --help` lists all of them.
"""

import hyclora.utils.interrupts

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks import technique_grid
from hyclora.models.finite import FiniteGradients
from hyclora.utils.args import DataArguments, option
from hyclora.utils.checkpointing import checkpoint_layers
from hyclora.utils.data.alpaca import HUB_ID, TEST_PROMPTS, load_examples
from hyclora.utils.data.tokens import IGNORED, TokenizedRows, tokenize_rows
from hyclora.utils.driver import Driver, Fitted, Fitting
from hyclora.utils.errors import Interrupted, entry_point
from hyclora.utils.generate import WritingArguments, sample
from hyclora.utils.metrics import evaluate_loss
from hyclora.utils.plain import checkpoints
from hyclora.utils.plain.arguments import OFF, OptionalLoraArguments, PlainArguments
from hyclora.utils.plain.breakdown import breakdown, count_parameters, kept_bytes, told
from hyclora.utils.plain.progress import Progress
from hyclora.utils.runs.room import telling
from hyclora.utils.tasks import Task
from hyclora.utils.trainer import StopOnSignal


@dataclass
class AlpacaArguments(DataArguments):
    data_name: Literal["demo", "alpaca"] = option("demo", "demo: generated problems; alpaca: rows of instructions.")
    data_dir: str = option("", "A JSON list of rows with instruction, input and output; '' downloads tatsu-lab/alpaca.")
    max_train_samples: int | None = option(200, "Train on the first N rows only.")
    max_eval_samples: int | None = option(None, "Hold out the last N rows; default: a tenth of them, at most 100.")


def instructions(data: AlpacaArguments, evaluation: WritingArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    examples, held_out, unanswered = load_examples(data)
    train, test = tokenize_rows(examples, tokenizer, data.seq_len), TokenizedRows([], 0, 0, "held-out")
    if held_out:
        test = tokenize_rows(held_out, tokenizer, data.seq_len, kind="held-out")

    def loss(model):
        return {"held-out loss": evaluate_loss(model, test.rows, tokenizer.pad_token_id, evaluation)}, []

    write = partial(sample, tokenizer=tokenizer, prompts=TEST_PROMPTS, args=evaluation)
    summary = f"{train}\n{test}"
    if unanswered:
        summary += f"\n{unanswered} rows of {HUB_ID} have no response, and are left out"
    forms = {"held-out loss": ".4f"}
    return Task(train.rows, test.rows, summary, forms, loss, write=write if evaluation.test_prompts else None)


def train_step(model, batches: list[dict], optimizer, scaler, autocast, allows=lambda loss: True) -> tuple[Tensor, int]:
    """One step of the optimizer on the mean loss of all response tokens in the micro-batches: that loss, and how many.

    allows: whether the optimizer may take it, given its loss.

    Each micro-batch adds (sum of the losses of its tokens) / (tokens of all micro-batches), so that the gradients add
    up to those of one big batch. Their means, divided by the number of micro-batches, would not: tokens of short
    responses would weigh more.
    """
    # nothing predicts the first token of a row
    tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with telling(batch):
            with autocast():
                loss = model(**batch, num_items_in_batch=tokens).loss
            scaler.scale(loss).backward()  # fp16 has no room for small gradients: they are made larger
        total += loss.detach()
    if allows(total):
        scaler.step(optimizer)  # unscales them first, and takes no step if one of them is not finite
        scaler.update()
    optimizer.zero_grad()
    return total, tokens


def micro_batches(job: Fitting, done: int, steps: int) -> Iterator[list[dict]]:
    """The micro-batches of each step that is left, on the CPU; every epoch has its order, which the seed decides."""
    args, rows = job.training, job.task.train
    size = args.per_device_train_batch_size
    per_step = size * args.gradient_accumulation
    for step in range(done, steps):
        epoch, at = divmod(step, math.ceil(len(rows) / per_step))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        chosen = [rows[i] for i in order[at * per_step :][:per_step]]
        yield [job.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def fit(job: Fitting) -> Fitted:
    """The training loop, and what a step takes."""
    args, model, device = job.training, job.model, job.training.device
    if args.gradient_checkpointing != OFF:
        checkpoint_layers(model, args.leave_out)
    autocast = partial(torch.autocast, device.type, args.dtype) if args.dtype else nullcontext
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")  # off: it changes nothing
    parameters = count_parameters(model)
    print(f"trainable parameters: {parameters['trained']:,} of {parameters['total']:,} ({parameters['share']:.4%})")

    job.verify(lambda batch: {name: tensor.to(device) for name, tensor in batch.items()}, autocast)
    progress, stop = Progress(model, device, job.steps, args.logging_steps, scaler.get_scale()), StopOnSignal()
    if job.run.checkpoint:
        progress.resume(*checkpoints.restore(job.run.checkpoint, model, optimizer, scaler))
    finite = FiniteGradients(model, args.non_finite)
    model.train()
    with stop.listening(), finite.listening():
        for batches in micro_batches(job, progress.state.global_step, job.steps):
            allows = partial(
                finite.allows, progress.state.global_step + 1, look_at_gradients=not scaler.is_enabled()
            )  # fmt: skip
            loss, tokens = train_step(model, batches, optimizer, scaler, autocast, allows)
            progress.count(loss, batches, tokens, scaler.get_scale(), finite.has_skipped)
            if progress.is_due(args.save_steps) or stop.received is not None and args.save_steps:
                checkpoints.save(job.run.folder, model, optimizer, scaler, progress, args.save_total_limit)
            if stop.received is not None:
                raise Interrupted(f"stopped at step {progress.state.global_step} of {job.steps}")
    totals = progress.result()
    job.clock.lap("train")
    longest = sorted(job.task.train, key=lambda row: len(row["input_ids"]))[-args.per_device_train_batch_size :]
    batch = {name: tensor.to(device) for name, tensor in job.collate(longest).items()}
    taken = breakdown(model, optimizer, batch, autocast)
    print(told(taken), f"average loss {totals['average_loss']:.4f}, {totals['seconds']:.1f} s of training", sep="\n")
    facts = {"breakdown": taken, "parameters": parameters}
    return Fitted(progress.state.log_history, totals, {job.kept_by: kept_bytes(taken)}, facts)


DEFAULTS = {"lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "dtype": "float32"}
DRIVER = Driver(
    "alpaca", AlpacaArguments, WritingArguments, {"demo": instructions, "alpaca": instructions}, DEFAULTS,
    OptionalLoraArguments, PlainArguments, fit,
)  # fmt: skip


@entry_point
def main(argv: list[str] | None = None):
    groups = DRIVER.parse(argv)
    if groups[-1].sweep:
        technique_grid.sweep(DRIVER, groups, argv)
    else:
        groups[-1].check_no_sweep()
        DRIVER.run(groups, argv)


if __name__ == "__main__":
    main()
