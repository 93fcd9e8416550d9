"""Micro-steps of TRL's SFTTrainer with packing=True: several documents in a row, as a user of the Trainer gets them.

    python -m benchmarks.packed_rows --data ../shared/data/alpaca/alpaca_*.json --tokenizer ../shared/tokenizers/llama2
    python -m benchmarks.packed_rows ... --cells 1x2048 --settings '["Unsloth", {"offload": true}]'

Needs trl and datasets. Random weights of a shape in NF4, LoRA on all seven linears; rows as the scripts read and
tokenize them (--data_name json), in one shuffled order for all settings, packed by TRL (bfd: no document is cut in two)
to the cell's length. A micro-step has the cell's number of such rows, one behind the other; an optimizer step, with
TRL's defaults, comes every 4. Gradient checkpointing is as a peer's model was built. Times, memory and lines are those
of real_rows, but that the GPU is waited for only where a time is told (TRL and the Trainer wait for it more often).
"""

import argparse
import importlib.util
import random
import statistics
import tempfile
from collections.abc import Callable

from benchmarks.jobs import Job
from benchmarks.real_rows import ACCUMULATE, ORDER, Meter, add_row_arguments, sweep_rows, tokenizer_of
from hyclora.utils.errors import UserError, entry_point

NAME = "packed_rows"
NEEDS = ("trl", "datasets")
SETTINGS = """["Unsloth", "Unsloth, offloaded checkpointing", "PEFT LoRA", {}, {"offload": true},
    {"offload": true, "cuda_graphs": false}]"""


def optimizer_steps(job: Job) -> int:
    """How many it takes until all of the job's micro-steps are done."""
    return -(-(job.rows["warm_up"] + job.steps) // ACCUMULATE)


def documents_of(job: Job) -> tuple[list[dict], object]:
    """The job's documents {"input_ids", "labels"}, the same for every setting, and their tokenizer.

    UserError if they do not fill all micro-steps.
    """
    from hyclora.utils.args import DataArguments
    from hyclora.utils.data.instructions import load_examples
    from hyclora.utils.data.tokens import tokenize_rows

    tokenizer = tokenizer_of(job)
    files = (DataArguments(data_name="json", data_dir=file) for file in job.rows["data"])
    examples = [example for file in files for example in load_examples(file, "train")]
    random.Random(ORDER).shuffle(examples)
    documents = tokenize_rows(examples, tokenizer, job.seq_len).rows
    tokens = sum(len(document["input_ids"]) for document in documents)
    needed = optimizer_steps(job) * ACCUMULATE * job.batch_size * job.seq_len
    if tokens < needed:
        raise UserError(f"--data has {tokens} tokens, and this takes {needed}: lower --steps or name more files")
    return documents, tokenizer


def measure_packed(job: Job, model, patch: Callable) -> dict:
    """Train the job's model on them; patch(job, model) is called when the trainer is made, as README says."""
    import datasets
    import transformers
    import trl  # where Unsloth was imported, its trainer

    documents, tokenizer = documents_of(job)
    meter = Meter(job.device, job.rows["warm_up"], job.steps, settled=False)
    packed: list[tuple[int, int]] = []

    class Ends(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            meter.start()

        def on_substep_end(self, *args, optimizer, **kwargs):
            meter.step(optimizer)

        def on_optimizer_step(self, *args, optimizer, **kwargs):  # on_step_end comes when gradients have been freed
            meter.step(optimizer)

    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            folder,
            packing=True,
            max_length=job.seq_len,
            per_device_train_batch_size=job.batch_size,
            gradient_accumulation_steps=ACCUMULATE,
            max_steps=optimizer_steps(job),
            learning_rate=1e-5,
            optim="adamw_torch_fused",
            bf16=job.device == "cuda",
            use_cpu=job.device == "cpu",
            gradient_checkpointing=False,  # it would be switched on; where a model has it, it stays
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trl.SFTTrainer(
            model,
            config,
            train_dataset=datasets.Dataset.from_list(documents),
            processing_class=tokenizer,
            callbacks=[Ends()],
        )
        collate = trainer.data_collator

        def collate_and_count(rows: list[dict]) -> dict:
            batch = collate(rows)
            if "position_ids" not in batch or len(batch["input_ids"]) > 1:
                raise ValueError(f"these rows were not packed, {type(collate).__name__} gave {', '.join(batch)}")
            packed.append((batch["input_ids"].numel(), int((batch["position_ids"] == 0).sum())))
            return batch

        trainer.data_collator = collate_and_count
        patch(job, trainer.model)
        loss = trainer.train().training_loss
    tokens, n_documents = zip(*packed, strict=True)
    return meter.result(tokens) | {
        "documents": round(statistics.mean(n_documents[meter.warm : meter.total]), 1),
        "loss": round(loss, 4),  # mean of all optimizer steps
        "trl": trl.__version__,
    }


def check(job: Job) -> None:
    """UserError for what the first model need not be made to know."""
    if absent := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"this trains with TRL, and {' and '.join(absent)} cannot be found: pip install trl datasets")
    documents_of(job)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "JSON files, or folders with train.jsonl, of the formats of --data_name json"
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE_OR_FOLDER", help=told)
    add_row_arguments(parser, SETTINGS, (1, 2048))
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    sweep_rows(NAME, args, {"packing": True, "data": args.data}, check)


if __name__ == "__main__":
    main()
