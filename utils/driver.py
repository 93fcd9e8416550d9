"""The course of a run, the same for every driver: read, load, evaluate, train, measure, save, evaluate, report.

DRIVER = Driver("gsm8k", Gsm8kArguments, GenerationArguments, {"demo": word_problems, "json": instructions})
main = DRIVER.main
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hyclora import apply_hyclora, remove_hyclora, verify
from hyclora.utils import results
from hyclora.utils.args import (
    ROOT,
    DataArguments,
    EvalArguments,
    HycloraArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)
from hyclora.utils.data.tokens import Collator
from hyclora.utils.disk import check_output, checkpoint_bytes
from hyclora.utils.errors import entry_point
from hyclora.utils.loading import (
    check_model,
    check_positions,
    checkpoint_layers,
    checkpointed,
    find_base,
    keep_initial_adapters,
    load_model,
    load_tokenizer,
)
from hyclora.utils.profiling import buffered_bytes
from hyclora.utils.runs.card import save_adapters, write_card
from hyclora.utils.runs.identity import digest_of
from hyclora.utils.runs.run import Run, begin
from hyclora.utils.tasks import Task
from hyclora.utils.trainer import HycloraTrainer

MEASURED = 1  # batches that verify measures, after those that calibrate


@dataclass(frozen=True)
class Driver:
    """What a driver has of its own.

    name: its runs are in exp_results_<name>. data, evaluation: its classes of arguments. tasks: for each data_name what
    reads and tokenizes all rows, given data and evaluation arguments and the tokenizer; UserError for a mistake in
    them. defaults: values of options, where utils/args.py has others.
    """

    name: str
    data: type[DataArguments]
    evaluation: type[EvalArguments]
    tasks: dict[str, Callable[..., Task]]
    defaults: dict = field(default_factory=dict)

    @property
    def groups(self) -> tuple[type, ...]:
        return (ModelArguments, self.data, LoraArguments, HycloraArguments, self.evaluation, TrainingArguments)

    @property
    def all_defaults(self) -> dict:
        return {"output_dir": str(ROOT / f"exp_results_{self.name}"), **self.defaults}

    def parse(self, argv: list[str] | None = None) -> tuple:
        """The filled groups; UserError names a mistake."""
        return parse_arguments(argv, self.groups, self.all_defaults)

    def run(self, argv: list[str] | None = None) -> dict | None:
        """One run with the options argv, or those of the command line: the content of its results file.

        None on a process that writes none. UserError for a mistake, RunStopped if it ended early.
        """
        return _run(self, argv)

    def main(self, argv: list[str] | None = None) -> None:
        """The same as a program, which ends with one sentence and an exit code where it fails."""
        entry_point(self.run)(argv)


def _run(driver: Driver, argv: list[str] | None) -> dict | None:
    groups = driver.parse(argv)
    model_args, data_args, lora_args, hyclora_args, eval_args, training = groups
    source = find_base(model_args, lora_args)
    decided = []
    tokenizer = load_tokenizer(source, decided.append)
    task = driver.tasks[data_args.data_name](data_args, eval_args, tokenizer)
    head = task.head.of(source)
    check_model(source, head, lora_args)
    check_positions(source, head, task.longest)
    head.check(training, hyclora_args)

    run = begin(groups, source, task.train, argv)
    core = results.core_of(training, len(task.train))
    with run.at_work():
        results.print_settings(groups[:-1], core)
        print(*decided, task.summary, sep="\n")
        clock = results.Clock()
        model = load_model(model_args, lora_args, source, training.device, training.seed, head)
        clock.lap("load")
        initial = keep_initial_adapters(model, run.folder / "initial_adapters")
        check_output(run.folder, needed=checkpoint_bytes(model, training.save_total_limit))
        scores = {}
        if eval_args.evaluate_before and task.test:
            scores["before"] = _evaluate_once(task, model, run, eval_args)
            print(*map(": ".join, results.line_by_line(task.shown(scores)).items()), sep="\n")
            clock.lap("evaluate before")
        kept_bits = None
        if hyclora_args.use_hyclora:
            report = apply_hyclora(model, hyclora_args.config())
            kept_bits = report.average_bits
            print(report)

        collate = task.collate or Collator(tokenizer.pad_token_id)
        trainer = HycloraTrainer(
            model=model,
            args=training,
            train_dataset=task.train,
            data_collator=collate,
            processing_class=tokenizer,
            compressed=hyclora_args.use_hyclora,
        )
        if hyclora_args.verify and run.checkpoint is None:
            with trainer.compute_loss_context_manager(), checkpointed(model, training.gradient_checkpointing):
                found = verify(model, _some_batches(trainer, collate, hyclora_args.iteration_threshold + MEASURED))
            print(found)
            found.check(hyclora_args.verify_threshold)
            clock.lap("verify")
        trainer.train(run.checkpoint)
        clock.lap("train")
        batch = trainer._prepare_inputs(collate(task.train[: training.per_device_train_batch_size]))
        with trainer.compute_loss_context_manager():
            buffered = _measure_buffers(model, batch, hyclora_args.use_hyclora, training.gradient_checkpointing)
        if not training.should_save:
            return None
        save_adapters(model, run.folder, initial)
        tokenizer.save_pretrained(run.folder)
        if task.test:
            scores["after"], predictions = task.evaluate(model)
            clock.lap("evaluate after")
            if predictions:
                results.write_json(run.folder / "predictions.json", predictions)

        found = {
            "settings": results.settings(*groups),
            "core": core,
            "environment": results.environment(),
            "metrics": task.metrics(scores),
            **task.facts,
            "shown": task.shown(scores),
            "final_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
            "kept_bits": kept_bits,
            "buffered_bytes": buffered,
            "train": trainer.progress.totals,
            "seconds": clock.seconds,
            "log_history": trainer.state.log_history,
        }
        print(results.closing_table(found))
        write_card(run.folder, found, len(task.train), head)
        run.finish(found)
        print(f"results: {run.folder}.json, log: {run.folder}.log, adapters: {run.folder}")
        return found


def _some_batches(trainer: HycloraTrainer, collate: Callable, count: int) -> list[dict]:
    """So many batches of training rows, or what there is, drawn without touching the random state."""
    rows, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed))[: count * size]
    return [trainer._prepare_inputs(collate([rows[int(i)] for i in places])) for places in drawn.split(size)]


def _evaluate_once(task: Task, model, run: Run, evaluation: EvalArguments) -> dict[str, float]:
    """What the model is worth before training, which a resumed run need not find out again."""
    asked = {**vars(evaluation), "rows": digest_of(task.test)}
    return results.once(run.folder / "evaluated_before.json", asked, lambda: task.evaluate(model)[0])


def _measure_buffers(model, batch, compressed: bool, checkpointed: bool) -> dict[str, int]:
    """Bytes kept for backward on one batch: compressed, and as plain LoRA, which the model is afterwards.

    The last one is with checkpointing, which stays on. checkpointed: it is on already, as without it rows of this
    length may have no room.
    """
    buffered = {}
    if compressed:
        buffered["hyclora"] = buffered_bytes(model, batch)
        remove_hyclora(model)
    if not checkpointed:
        buffered["lora"] = buffered_bytes(model, batch)
        checkpoint_layers(model)
    return buffered | {"lora_checkpointing": buffered_bytes(model, batch)}
