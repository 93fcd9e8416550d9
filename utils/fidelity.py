"""What python -m hyclora.fidelity does once its options are understood: it verifies a checkpoint on a user's rows."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyclora import Verification, apply_hyclora, verify
from hyclora.utils.args import DataArguments, HycloraArguments, LoraArguments, ModelArguments
from hyclora.utils.data.gsm8k import examples_of, load_rows
from hyclora.utils.data.instructions import load_examples
from hyclora.utils.data.text import blocks, read_text, tokenize
from hyclora.utils.data.tokens import Collator, tokenize_rows
from hyclora.utils.errors import UserError
from hyclora.utils.heads import NEXT_TOKEN
from hyclora.utils.loading import (
    check_embeddings,
    check_layers,
    check_model,
    check_positions,
    find_base,
    load_base,
    load_model,
    load_tokenizer,
)

_WANTED = "name a folder that save_pretrained has written of adapters of this model"


def with_adapters(base: PreTrainedModel, folder: str, source: str) -> PeftModel:
    """The model in source with the trained adapters of a folder; UserError if they are none of it."""
    if not Path(folder, SAFETENSORS_WEIGHTS_NAME).is_file():
        raise UserError(f"adapters {folder} cannot be loaded for {source}: {_WANTED} ({SAFETENSORS_WEIGHTS_NAME})")
    with warnings.catch_warnings():
        # PEFT asks whether layers are checkpointed by a name that newer transformers deprecate.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return PeftModel.from_pretrained(base, folder, is_trainable=True)
        except Exception as error:  # PEFT's, torch's or safetensors' own, whatever is wrong with the files
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"adapters {folder} cannot be loaded for {source} ({why}): {_WANTED}") from error


def train_exactly(
    model: nn.Module, batches: list[dict[str, Tensor]], autocast: Callable, learning_rate: float = 1e-3
) -> None:
    """One pass of AdamW over batches with stock PEFT.

    autocast: makes the context of a forward. Each has its own, as one keeps the weights that it has cast until it ends,
    and so would go on with those from before a step.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for batch in batches:
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def read(args, tokenizer, count: int) -> list[dict]:
    """At most so many tokenized rows of the data of args, the FidelityArguments."""
    data = Path(args.data)
    if data.suffix == ".txt":
        return blocks(tokenize(data.name, read_text(data), tokenizer), args.seq_len)[:count]
    limits = {"max_train_samples": count, "seq_len": args.seq_len}
    if args.data == "demo":
        examples = examples_of(load_rows(DataArguments(**limits), "train"))
    else:
        examples = load_examples(DataArguments(data_name="json", data_dir=args.data, **limits), "train")
    return tokenize_rows(examples, tokenizer, args.seq_len).rows


class Clock:
    """Seconds since it was begun, and what took them."""

    def __init__(self, begun: float):
        self.begun = self.last = begun
        self.parts: list[str] = []

    def lap(self, name: str) -> None:
        """What came since the last lap had this name."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts.append(f"{name} {now - self.last:.1f}")
        self.last = now

    def __str__(self) -> str:
        return f"verify: {self.last - self.begun:.1f} s: {', '.join(self.parts)}"


def run(args, lora: LoraArguments, hyclora: HycloraArguments, begun: float | None = None) -> Verification:
    """Verify what the arguments of hyclora/fidelity.py ask for, and print it; args: its FidelityArguments.

    begun: time.perf_counter() when the program began, if what was imported since is to be told of too. UserError for a
    model or rows that cannot be verified, ValueError if the gradients are below the threshold.
    """
    clock = Clock(time.perf_counter() if begun is None else begun)
    if begun is not None:
        clock.lap("imports")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    folder, device = Path(args.model).resolve(), torch.device(there if args.device == "auto" else args.device)
    base = ModelArguments(folder.name, str(folder.parent), load_in_4bit=args.load_in_4bit)
    source = find_base(base, lora, named_by="--model")
    check_model(source, NEXT_TOKEN, lora)
    check_layers(source, NEXT_TOKEN, hyclora.config())
    check_embeddings(source, NEXT_TOKEN, lora, hyclora.config())
    tokenizer = load_tokenizer(source)
    steps = 0 if args.adapters else args.exact_steps
    count = steps + hyclora.iteration_threshold + args.batches
    rows = read(args, tokenizer, count * args.batch_size)
    check_positions(source, NEXT_TOKEN, max(len(row["input_ids"]) for row in rows))
    collate = Collator(tokenizer.pad_token_id)
    batches = [collate(rows[i : i + args.batch_size]) for i in range(0, len(rows), args.batch_size)]
    if len(batches) < count:
        raise UserError(
            f"{args.data} has rows for {len(batches)} batches of {args.batch_size}, {count} are needed: give more, or "
            "lower --batch_size, --exact_steps or --iteration_threshold"
        )
    batches = [{name: t.to(device) for name, t in batch.items()} for batch in batches]
    if args.adapters:
        model = with_adapters(load_base(base, source, device), args.adapters, source)
    else:
        model = load_model(base, lora, source, device, args.seed)
    clock.lap("rows and model")
    autocast = partial(
        torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda" if args.bf16 is None else args.bf16
    )
    train_exactly(model.train(), batches[:steps], autocast)
    clock.lap(f"{steps} exact steps")
    apply_hyclora(model, hyclora.config())
    with autocast():
        found = verify(model, batches[steps:])
        clock.lap("gradients")
    print(found, clock, sep="\n")
    found.check(hyclora.verify_threshold)
    return found
