"""verify() on a checkpoint and your own rows: how close the gradients are to those of exact LoRA.

    python -m hyclora.fidelity --model FOLDER --data my_rows.jsonl
    python -m hyclora.fidelity --model FOLDER --data my_text.txt --adapters FOLDER --q_bit 2

Rows are read as run_gsm8k.sh reads your own, .txt as run_wikitext2.sh does; demo are generated word problems. Adapters
are those of a folder, or new ones, which are trained exactly for some steps: where lora_B is still 0, the gradient of
lora_A is 0 too, and tells nothing. The settings of HyC-LoRA and of LoRA are those of the drivers. The last line says
how long it took, and what took it: on a small model mostly what is imported.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyclora import BEGUN, Verification, apply_hyclora, verify
from hyclora.utils.args import (
    DataArguments,
    HycloraArguments,
    LoraArguments,
    ModelArguments,
    option,
    parse_arguments,
    require,
)
from hyclora.utils.data.gsm8k import examples_of, load_rows
from hyclora.utils.data.instructions import load_examples
from hyclora.utils.data.text import blocks, read_text, tokenize
from hyclora.utils.data.tokens import Collator, tokenize_rows
from hyclora.utils.errors import UserError, entry_point
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


@dataclass
class FidelityArguments:
    _argument_group_name = "verification"

    model: str = option("", "Checkpoint folder.")
    data: str = option("demo", "demo, a .json, .jsonl or .txt file, or a folder with train.jsonl.")
    adapters: str = option("", "Folder of trained adapters; '' makes new ones.")
    exact_steps: int = option(8, "Steps that new adapters are trained exactly for.")
    batches: int = option(1, "Batches that are measured, after those that calibrate.")
    batch_size: int = option(4, "Rows of a batch.")
    seq_len: int = option(512, "Longest row in tokens.")
    load_in_4bit: bool = option(False, "Keep the frozen linear weights in NF4.")
    bf16: bool | None = option(None, "Compute in bfloat16 under autocast. Default: on a GPU only.")
    device: str = option("auto", "cuda, cpu, or auto: a GPU if there is one.")
    seed: int = option(11, "Of new adapters.")

    def __post_init__(self):
        require(bool(self.model), "say with --model which checkpoint folder it is")
        for name in ("batches", "batch_size"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, not {getattr(self, name)}")
        require(self.seq_len >= 2, f"seq_len must be at least 2, not {self.seq_len}")
        require(self.exact_steps >= 0, f"exact_steps must not be negative, not {self.exact_steps}")
        data = Path(self.data)
        require(self.data == "demo" or data.exists(), f"data {data} does not exist: name a file or a folder")
        train = [data / f"train.{suffix}" for suffix in ("jsonl", "json")]
        require(
            not data.is_dir() or any(file.is_file() for file in train),
            f"{data} has no train.jsonl: put it there, or name a file with --data",
        )
        require(self.device in ("auto", "cuda", "cpu"), f"device must be auto, cuda or cpu, not {self.device}")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.bf16 is None:
            self.bf16 = self.device == "cuda"
        require(
            not self.adapters or (Path(self.adapters) / "adapter_config.json").is_file(),
            f"adapters {self.adapters} has no adapter_config.json: name a folder that save_pretrained has written",
        )


@dataclass
class VerifiedArguments(HycloraArguments):
    """HyC-LoRA's, which this command verifies whatever else they say."""

    verify: bool = option(True, "True: this command does nothing else.")

    def __post_init__(self):
        require(self.use_hyclora, "use_hyclora=False leaves nothing to verify: drop it")
        require(self.verify, "this command verifies, and there is nothing else to do with verify=False: drop it")
        super().__post_init__()
        require(not self.has_budget, "memory_budget does not count exact LoRA, which is verified against: drop it")


_WANTED = "name a folder that save_pretrained has written of adapters of this model"
GROUPS = (FidelityArguments, LoraArguments, VerifiedArguments)


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


def check_new_adapters(args: FidelityArguments, lora: LoraArguments) -> None:
    """UserError for settings of new adapters beside a folder of trained ones."""
    new = {**vars(lora), "exact_steps": args.exact_steps, "seed": args.seed}
    left = {**vars(LoraArguments()), "exact_steps": FidelityArguments.exact_steps, "seed": FidelityArguments.seed}
    given = [name for name, value in new.items() if args.adapters and value != left[name]]
    require(not given, f"{', '.join(given)}: of no effect on adapters that are trained: drop that, or --adapters")


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


def read(args: FidelityArguments, tokenizer, count: int) -> list[dict]:
    """At most so many tokenized rows of the data."""
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


@entry_point
def main(argv: list[str] | None = None) -> Verification:
    clock = Clock(BEGUN if argv is None else time.perf_counter())
    if argv is None:
        clock.lap("imports")
    args, lora, hyclora = parse_arguments(argv, GROUPS)
    check_new_adapters(args, lora)
    folder, device = Path(args.model).resolve(), torch.device(args.device)
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
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    train_exactly(model.train(), batches[:steps], autocast)
    clock.lap(f"{steps} exact steps")
    apply_hyclora(model, hyclora.config())
    with autocast():
        found = verify(model, batches[steps:])
        clock.lap("gradients")
    print(found, clock, sep="\n")
    found.check(hyclora.verify_threshold)
    return found


if __name__ == "__main__":
    main()
