"""The course of a run, the same for every driver: read, load, evaluate, train, measure, save, evaluate, report.

DRIVER = Driver("gsm8k", Gsm8kArguments, GenerationArguments, {"demo": word_problems, "json": instructions})
main = DRIVER.main
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyclora import apply_hyclora, remove_hyclora, verify
from hyclora.utils import results
from hyclora.utils.args import (
    ROOT,
    DataArguments,
    EvalArguments,
    HycloraArguments,
    LoraArguments,
    ModelArguments,
    parse_arguments,
)
from hyclora.utils.checkpointing import check_checkpointing, checkpoint_layers, checkpointed
from hyclora.utils.data.tokens import Collator
from hyclora.utils.disk import check_output, checkpoint_bytes
from hyclora.utils.errors import UserError, entry_point
from hyclora.utils.heads import Head
from hyclora.utils.loading import (
    check_embeddings,
    check_layers,
    check_model,
    check_positions,
    check_windows,
    find_base,
    keep_initial_adapters,
    load_model,
    load_tokenizer,
)
from hyclora.utils.planning.fitting import Load
from hyclora.utils.profiling import buffered_bytes
from hyclora.utils.runs.card import save_trained, write_card
from hyclora.utils.runs.identity import digest_of
from hyclora.utils.runs.launch import is_launched, launch
from hyclora.utils.runs.run import Run, begin
from hyclora.utils.sharded import STORAGE, rest_gathered, shard, trained_of
from hyclora.utils.tasks import Task
from hyclora.utils.training_arguments import TrainingArguments
from hyclora.utils.within_budget import settle

MEASURED = 1  # batches that verify measures, after those that calibrate


@dataclass
class Fitting:
    """What a training loop gets: the model with its adapters and patched, if asked for, and what it is trained on.

    training: the driver's last group of arguments.
    """

    model: PeftModel | PreTrainedModel
    task: Task
    run: Run
    training: TrainingArguments
    hyclora: HycloraArguments
    tokenizer: PreTrainedTokenizerBase
    clock: results.Clock

    def __post_init__(self):
        self.collate = self.task.collate or Collator(self.tokenizer.pad_token_id)
        self.steps = results.steps_of(self.training, len(self.task.train))

    @property
    def compressed(self) -> bool:
        """Whether HyC-LoRA is at work."""
        return self.hyclora.use_hyclora

    def verify(self, prepare: Callable[[dict], dict], context: Callable) -> None:
        """Compare gradients of a few batches with exact LoRA's, if that is asked for and the run is a new one.

        prepare: puts a batch to where the model is; context: in which it is trained. ValueError, as
        `Verification.check` says.
        """
        if not self.hyclora.verify or self.run.checkpoint is not None:
            return
        rows, size = self.task.train, self.training.per_device_train_batch_size
        count = self.hyclora.iteration_threshold + MEASURED
        # without touching the random state
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.training.seed))[: count * size]
        batches = [prepare(self.collate([rows[int(i)] for i in places])) for places in drawn.split(size)]
        with context():
            found = verify(self.model, batches)
        print(found)
        found.check(self.hyclora.verify_threshold)
        self.clock.lap("verify")

    @property
    def kept_by(self) -> str:
        """What of `results.KEPT_BY` keeps activations for backward."""
        if self.compressed or not isinstance(self.model, PeftModel):
            return "hyclora" if self.compressed else "full"
        return "lora_checkpointing" if self.training.gradient_checkpointing != "off" else "lora"


@dataclass
class Fitted:
    """What a training loop found: history, an entry {"step", "loss"} each time that it logged; totals: the numbers of
    `trainer.Progress`; buffered: bytes kept for backward by the names of `results.KEPT_BY`; facts: more for the results
    file.
    """

    history: list[dict]
    totals: dict
    buffered: dict[str, int]
    facts: dict = field(default_factory=dict)


def fit_with_trainer(job: Fitting) -> Fitted:
    """By HF's Trainer."""
    from hyclora.utils.trainer import HycloraTrainer  # the Trainer imports datasets: --help need not wait for it

    trainer = HycloraTrainer(
        model=job.model,
        args=job.training,
        train_dataset=job.task.train,
        data_collator=job.collate,
        processing_class=job.tokenizer,
        compressed=job.compressed,
    )
    with checkpointed(job.model, job.training.gradient_checkpointing):
        job.verify(trainer._prepare_inputs, trainer.compute_loss_context_manager)
    trainer.train(job.run.checkpoint)
    job.clock.lap("train")
    batch = trainer._prepare_inputs(job.collate(job.task.train[: job.training.per_device_train_batch_size]))
    with trainer.compute_loss_context_manager():
        alone = job.hyclora.has_budget  # which plain LoRA may exceed
        buffered = _measure_buffers(job.model, batch, job.compressed, job.training.gradient_checkpointing, alone)
    return Fitted(trainer.state.log_history, trainer.progress.totals, buffered)


@dataclass(frozen=True)
class Driver:
    """What a driver has of its own.

    name: its runs are in exp_results_<name>. data, evaluation: its classes of arguments. tasks: for each data_name what
    reads and tokenizes all rows, given data and evaluation arguments and the tokenizer; UserError for a mistake in
    them. defaults: values of options, where the groups have others. lora, training, fit: a training loop of its own,
    and the arguments that it takes.
    """

    name: str
    data: type[DataArguments]
    evaluation: type[EvalArguments]
    tasks: dict[str, Callable[..., Task]]
    defaults: dict = field(default_factory=dict)
    lora: type[LoraArguments] = LoraArguments
    training: type = TrainingArguments
    fit: Callable[[Fitting], Fitted] = fit_with_trainer

    @property
    def groups(self) -> tuple[type, ...]:
        return (ModelArguments, self.data, self.lora, HycloraArguments, self.evaluation, self.training)

    @property
    def all_defaults(self) -> dict:
        return {"output_dir": str(ROOT / f"exp_results_{self.name}"), **self.defaults}

    def parse(self, argv: list[str] | None = None) -> tuple:
        """The filled groups; UserError names a mistake."""
        return parse_arguments(argv, self.groups, self.all_defaults)

    def main(self, argv: list[str] | None = None) -> None:
        """The program: one run with the options argv, or those of the command line."""
        entry_point(self._start)(argv)

    def _start(self, argv: list[str] | None) -> None:
        groups = self.parse(argv)
        n = getattr(groups[-1], "num_gpus", 1)
        if n > 1 and not is_launched():
            launch(n, str(ROOT / f"run_{self.name}.py"), sys.argv[1:] if argv is None else argv)
        else:
            self.run(groups, argv)

    def run(self, groups: tuple, argv: list[str] | None = None) -> dict | None:
        """One run with filled groups: the content of its results file, None on a process that writes none.

        argv: where they come from, to be repeated in messages. UserError for a mistake, RunStopped if it ended early.
        """
        return _run(self, groups, argv)

    def read(self, groups: tuple, tell: Callable[[str], None]) -> tuple[str, PreTrainedTokenizerBase, Task]:
        """Where the base model lies, its tokenizer and the tokenized rows; UserError for a mistake in any of them.

        Nothing is loaded or written. tell gets what was decided about the tokenizer. With memory_budget the settings
        that it leaves open are chosen for the longest rows.
        """
        model_args, data_args, lora_args, hyclora_args, eval_args, training = groups
        source = find_base(model_args, lora_args)
        tokenizer = load_tokenizer(source, tell, model_args.tokenizer_dir)
        task = self.tasks[data_args.data_name](data_args, eval_args, tokenizer)
        task = replace(task, head=task.head.of(source))
        check_model(source, task.head, lora_args)
        check_layers(source, task.head, hyclora_args.config())
        check_checkpointing(source, task.head, getattr(training, "leave_out", None))
        check_embeddings(source, task.head, lora_args, hyclora_args.config())
        check_positions(source, task.head, *task.longest)
        check_windows(source, task.head, len(task.train[0]["input_ids"]))
        task.head.check(training, hyclora_args)
        if hyclora_args.has_budget:
            settle(hyclora_args, model_args, lora_args, source, task.head, _load(task, training))
        return source, tokenizer, task


def _load(task: Task, training: TrainingArguments) -> Load:
    """The largest micro-step of a run: the longest rows together."""
    checkpointing = training.gradient_checkpointing
    if getattr(training, "leave_out", None):
        raise UserError(f"memory_budget cannot count gradient_checkpointing={checkpointing!r}: set off, or all")
    lengths, multiple = [len(row["input_ids"]) for row in task.train], Collator.multiple if task.collate is None else 1
    if getattr(training, "parallel", "ddp") != "ddp":
        raise UserError(
            "memory_budget counts a whole model on each GPU, and parallel=fsdp2 shares it: drop one of both"
        )
    options = {"checkpointing": checkpointing not in (False, "off"), "processes": training.world_size}
    return Load.of(lengths, training.per_device_train_batch_size, multiple, **options)


def _run(driver: Driver, groups: tuple, argv: list[str] | None) -> dict | None:
    model_args, _, lora_args, hyclora_args, eval_args, training = groups
    decided = []
    source, tokenizer, task = driver.read(groups, decided.append)

    results.steps_of(training, len(task.train))  # refuses rows that fill no batch before there is a run
    run = begin(groups, source, task.train, argv)
    core = results.core_of(training, len(task.train))
    with run.at_work():
        results.print_settings(groups[:-1], core)
        print(*decided, task.summary, sep="\n")
        clock = results.Clock()
        model = _load_model(model_args, lora_args, source, training, task.head)
        clock.lap("load")
        initial = keep_initial_adapters(model, run.folder / "initial_adapters")
        if training.save_steps:
            check_output(run.folder, needed=checkpoint_bytes(model, training.save_total_limit))
        scores, texts = {}, {}
        if task.write is not None:
            with rest_gathered(model):
                file = run.folder / "texts_before.json"
                texts["before"] = results.once(file, vars(eval_args), lambda: task.write(model))
            clock.lap("write before")
        if eval_args.evaluate_before and task.test:
            with rest_gathered(model):
                scores["before"] = _evaluate_once(task, model, run, eval_args)
            print(*map(": ".join, results.line_by_line(task.shown(scores)).items()), sep="\n")
            clock.lap("evaluate before")
        kept_bits = None
        if hyclora_args.use_hyclora:
            report = apply_hyclora(model, hyclora_args.config())
            report.plan = hyclora_args.plan or None
            kept_bits = report.average_bits
            print(report)

        fitted = driver.fit(Fitting(model, task, run, training, hyclora_args, tokenizer, clock))
        trained = trained_of(model)  # from all processes
        if training.save_steps and training.should_save:
            save_trained(model, run.folder, initial, trained)
            tokenizer.save_pretrained(run.folder)
        predictions = []
        with rest_gathered(model):
            if task.test:
                scores["after"], predictions = task.evaluate(model)
                clock.lap("evaluate after")
            if task.write is not None:
                texts["after"] = task.write(model)
                clock.lap("write after")
        if not training.should_save:
            return None
        if predictions:
            results.write_json(run.folder / "predictions.json", predictions)
        if texts:
            print(results.texts_of(texts))

        found = {
            "settings": results.settings(*groups),
            "core": core,
            "environment": results.environment(),
            "metrics": task.metrics(scores),
            **task.facts,
            **fitted.facts,
            **({"texts": texts} if texts else {}),
            "shown": task.shown(scores),
            "final_loss": [entry["loss"] for entry in fitted.history if "loss" in entry][-1],
            "kept_bits": kept_bits,
            "buffered_bytes": fitted.buffered,
            "train": fitted.totals,
            "seconds": clock.seconds,
            "log_history": fitted.history,
        }
        print(results.closing_table(found))
        if training.save_steps and lora_args.use_lora:
            write_card(run.folder, found, len(task.train), task.head)
        run.finish(found)
        kept = f", {'adapters' if lora_args.use_lora else 'weights'}: {run.folder}" if training.save_steps else ""
        print(f"results: {run.folder}.json, log: {run.folder}.log{kept}")
        return found


def _load_model(
    model: ModelArguments, lora: LoraArguments, source: str, training: TrainingArguments, head: Head
) -> PeftModel | PreTrainedModel:
    """The model with its adapters on the device of the training, or of it what this process has by parallel=fsdp2.

    Weights to be shared wait in host memory, so that no GPU has all of them; but NF4 is made on the GPU.
    """
    device, seed = training.device, training.seed
    if getattr(training, "parallel", "ddp") == "ddp":
        return load_model(model, lora, source, device, seed, head)
    waiting = device if model.load_in_4bit else torch.device("cpu")
    if device.type == "cuda" and model.dtype == "auto":
        model = replace(model, dtype="bfloat16")
    shared = load_model(model, lora, source, waiting, seed, head, storage=STORAGE)
    shard(shared, device)
    print(f"weights: shared by {training.world_size} processes (FSDP2), each layer by itself")
    return shared


def _evaluate_once(task: Task, model, run: Run, evaluation: EvalArguments) -> dict[str, float]:
    """What the model is worth before training, which a resumed run need not find out again."""
    asked = {**vars(evaluation), "rows": digest_of(task.test)}
    return results.once(run.folder / "evaluated_before.json", asked, lambda: task.evaluate(model)[0])


def _measure_buffers(model, batch, compressed: bool, checkpointed: bool, alone: bool) -> dict[str, int]:
    """Bytes kept for backward on one batch: compressed, and as plain LoRA, which the model is afterwards.

    The last one is with checkpointing, which stays on. checkpointed: it is on already, as without it rows of this
    length may have no room. alone: nothing but what was trained is measured.
    """
    buffered = {}
    if compressed:
        buffered["hyclora"] = buffered_bytes(model, batch)
        remove_hyclora(model)
    if alone:
        return buffered
    if not checkpointed:
        buffered["lora"] = buffered_bytes(model, batch)
        checkpoint_layers(model)
    return buffered | {"lora_checkpointing": buffered_bytes(model, batch)}
