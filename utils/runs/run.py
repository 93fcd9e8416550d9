"""A run of a driver: the folder that it alone writes into, the checkpoint that it goes on from, and how it ends.

    run = begin(groups, source, rows, argv)
    with run.at_work():
        ...
        run.finish(results)

`<run>/settings.json` is what the run is known by, `<run>.json` says that it is finished. A run is resumed with equal
settings only (utils/runs/identity.py), from a whole checkpoint only (utils/runs/checkpoints.py).
"""

import contextlib
import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from hyclora.models.finite import BrokenWeight
from hyclora.utils import results
from hyclora.utils.disk import check_output
from hyclora.utils.errors import (
    Finished,
    Interrupted,
    RunStopped,
    UserError,
    is_disk_full,
    is_out_of_memory,
)
from hyclora.utils.planning.units import say_size
from hyclora.utils.ranks import of_all
from hyclora.utils.runs.checkpoints import fault_of, is_checkpoint, newest_whole, state_of
from hyclora.utils.runs.identity import content_of, differences, identity
from hyclora.utils.runs.room import NoRoom, available, what_fits
from hyclora.utils.runs.script import again
from hyclora.utils.training_arguments import TrainingArguments

RESUME = "--resume_from_checkpoint"
ACCUMULATION = ("gradient_accumulation", "gradient_accumulation_steps")  # what drivers call it


@dataclass
class Run:
    folder: Path
    groups: tuple
    argv: list[str] | None
    source: str
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def training(self) -> TrainingArguments:
        return self.groups[-1]

    @property
    def results(self) -> Path:
        return results_of(self.folder)

    def check_shared(self) -> None:
        """UserError on all processes unless all have the folder, and go on from the same checkpoint.

        On a disk of its own each machine would keep a part of every checkpoint, and none could be resumed exactly.
        """
        has_folder = (self.folder / results.SETTINGS).is_file()
        found = of_all((socket.gethostname(), has_folder, self.checkpoint and self.checkpoint.name))
        for rank, (host, seen, checkpoint) in enumerate(found):
            if not seen or checkpoint != found[0][-1]:
                what = f"has no {self.folder}" if not seen else f"has {checkpoint}, the first one {found[0][-1]}"
                raise UserError(
                    f"process {rank} on {host} {what}: set --output_dir to a folder that all machines share"
                )

    @contextlib.contextmanager
    def at_work(self):
        """Log what happens inside; whatever ends it, the user reads what is left and how to go on."""
        try:
            with results.logged(self.folder.with_name(f"{self.folder.name}.log"), self.training):
                for note in self.notes:
                    print(note)
                yield
        except BaseException as error:
            ending = self.ending(error)
            if ending is None:
                raise
            raise ending from error

    def finish(self, found: dict) -> None:
        """Write the results, with the digests of what the settings name."""
        settings = json.loads((self.folder / results.SETTINGS).read_text(encoding="utf-8"))
        results.write_json(self.results, found | {"content": settings["content"]})

    def ending(self, error: BaseException) -> RunStopped | None:
        """What to say when `error` ends the run; None for a mistake that says it all and for a defect of the code."""
        if isinstance(error, KeyboardInterrupt):
            return Interrupted(f"interrupted; {self.left()}")
        if isinstance(error, BrokenWeight):
            return RunStopped(f"{error}: it is so in {self.source}, copy its weights again; {self.left()}")
        if isinstance(error, FloatingPointError):
            return RunStopped(f"{error}; {self._without_overflow()}")
        if isinstance(error, RunStopped):
            return type(error)(f"{error}; {self.left()}")
        if is_disk_full(error):
            return RunStopped(f"the disk of {self.folder} is full; free some space; {self.left()}")
        if is_out_of_memory(error):
            batch = (error.rows, error.tokens) if isinstance(error, NoRoom) else None
            return RunStopped(f"{error if batch else 'out of memory'}; {self._in_less_memory(batch)}")
        return None

    def left(self, *more, anew: str = "") -> str:
        """What exists, and the next command, with the options `more`; anew: what makes that another run."""
        if self.results.exists():
            return f"the run is finished: {self.results}"
        checkpoint, _ = newest_whole(self.folder)
        start = f"start again{anew and f' with {anew}'}: {again(self.argv, *more)}"
        if checkpoint is None:
            return f"no checkpoint was written; {start}"
        if anew:
            return f"{checkpoint} is from before that; {start}"
        state, resume = state_of(checkpoint), f"go on with: {again(self.argv, RESUME, checkpoint, *more)}"
        if state.global_step >= state.max_steps:
            return f"the training is done, the evaluation is not; {resume}"
        return f"the newest checkpoint is of step {state.global_step} of {state.max_steps}; {resume}"

    def _without_overflow(self) -> str:
        """`left` with a lower learning rate, and the command that goes on without steps that are not finite."""
        lower = f"{self.training.learning_rate / 3:.1g}"
        start = self.left("--learning_rate", lower, anew="a lower learning rate")
        checkpoint, _ = newest_whole(self.folder)
        if checkpoint is None or self.training.non_finite == "skip":
            return start
        skipping = again(self.argv, RESUME, checkpoint, "--non_finite", "skip")
        return f"{start}; or go on without such steps: {skipping}"

    def _in_less_memory(self, batch: tuple[int, int] | None) -> str:
        """`left` with settings that need less: what fits by the plan if the batch is known, else smaller batches."""
        values = {name: value for group in self.groups for name, value in vars(group).items()}
        room = available(self.training.device)
        fitting = what_fits(self.source, values, batch, *room) if batch and room else []
        if fitting:
            first, told = fitting[0], ", or ".join(map(str, fitting))
            start = self.left(*first.options, anew="" if first.keeps_numbers else "the first of them")
            return f"by the plan there is room for it in {say_size(room[0])} with {told}; {start}"
        if room and values["use_hyclora"] and not values["offload"]:
            return self.left("--offload", True)
        size, accumulation = self.training.per_device_train_batch_size, self.training.gradient_accumulation_steps
        if size > 1:
            name = next(name for name in ACCUMULATION if name in values)
            smaller = ("--per_device_train_batch_size", size // 2, f"--{name}", accumulation * 2)
            return self.left(*smaller, anew="smaller batches")
        return self.left("--seq_len", max(values["seq_len"] // 2, 2), anew="shorter rows")


def results_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def begin(groups: tuple, source: str, rows: list[dict], argv: list[str] | None) -> Run:
    """A new run in output_dir, or the one that resume_from_checkpoint asks for.

    groups: all arguments, the Trainer's last; source and rows: where the base model lies, and what is trained on.
    UserError if there is no such run, naming the settings that differ, or if not all processes have its folder;
    `Finished` if it has its results.
    """
    training = groups[-1]
    content = {**content_of(source, rows), "processes": training.world_size}
    settings = json.loads(json.dumps(results.settings(*groups) | {"content": content}, default=str))
    root, resume = Path(training.output_dir), training.resume_from_checkpoint or "False"
    if resume.lower() == "false":
        if training.run_name and Path(training.run_name).name != training.run_name:
            raise UserError(f"run_name {training.run_name} is no name of a folder: leave out the slashes")
        check_output(root)
        run = Run(results.start_run(root, training.run_name or tag_of(groups), settings), groups, argv, source)
    else:
        find = _newest(root, identity(settings)) if resume.lower() == "true" else _named(resume, identity(settings))
        checkpoint, passed = find
        check_output(checkpoint.parent)
        step = state_of(checkpoint).global_step
        run = Run(
            checkpoint.parent, groups, argv, source, checkpoint, [*passed, f"resuming {checkpoint} at step {step}"]
        )
    run.check_shared()
    training.output_dir = str(run.folder)
    return run


def tag_of(groups: tuple) -> str:
    """The settings that tell runs apart at a glance."""
    values = {name: value for group in groups for name, value in vars(group).items()}
    start = f"{Path(values['model_name']).name}-{values['data_name']}"
    if not values.get("use_lora", True):
        return f"{start}-full"
    method = f"{values['layer_type']}-q{values['q_bit']}" if values["use_hyclora"] else "lora"
    return f"{start}-{method}-r{values['lora_rank']}"


def _identity_of(folder: Path) -> dict | None:
    """What the run in `folder` is known by; None if its settings cannot be read."""
    try:
        return identity(json.loads((folder / results.SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return None


def _named(resume: str, ours: dict) -> tuple[Path, list[str]]:
    """The checkpoint that is given by its folder or by its run's."""
    path = Path(os.path.realpath(resume))
    if not path.is_dir():
        raise UserError(f"resume_from_checkpoint: folder {resume} does not exist")
    folder = path.parent if is_checkpoint(path) else path
    theirs = _identity_of(folder)
    if theirs is None:
        raise UserError(
            f"{folder} has no readable {results.SETTINGS}: it is no run of this driver, start without {RESUME}"
        )
    if changed := differences(theirs, ours):
        raise UserError(
            f"{path} is of a run with other settings (its / yours): {changed}; repeat its settings, "
            f"or start without {RESUME}"
        )
    _refuse_finished(folder)
    if path == folder:
        checkpoint, passed = newest_whole(folder)
        if checkpoint is None:
            raise UserError("; ".join([*passed, f"{folder} has no whole checkpoint: start without {RESUME}"]))
        return checkpoint, passed
    if fault := fault_of(path):
        raise UserError(
            f"{path} cannot be resumed, {fault}: name another checkpoint, or {folder} for its newest whole one"
        )
    return path, []


def _newest(root: Path, ours: dict) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of the newest unfinished run in `root` with our identity."""
    files = sorted(root.glob(f"*/{results.SETTINGS}"), key=lambda file: file.stat().st_mtime, reverse=True)
    runs = {file.parent: theirs for file in files if (theirs := _identity_of(file.parent)) is not None}
    same = [folder for folder, theirs in runs.items() if not differences(theirs, ours)]
    passed = []
    for folder in same:
        if not results_of(folder).exists():
            checkpoint, torn = newest_whole(folder)
            passed += torn
            if checkpoint:
                return checkpoint, passed
    for folder in same:
        _refuse_finished(folder)
    if same:
        raise UserError("; ".join([*passed, f"{same[0]} has no whole checkpoint: start without {RESUME}"]))
    others = [folder for folder in runs if not results_of(folder).exists() and newest_whole(folder)[0]]
    if not others:
        raise UserError(f"no unfinished run with a whole checkpoint in {root}: start without {RESUME}")
    nearest = min(others, key=lambda folder: differences(runs[folder], ours).count(" / "))
    raise UserError(
        f"no unfinished run in {root} has these settings; the nearest, {nearest.name}, differs in (its / yours) "
        f"{differences(runs[nearest], ours)}: repeat its settings, or start without {RESUME}"
    )


def _refuse_finished(folder: Path) -> None:
    if results_of(folder).exists():
        raise Finished(f"{folder} is finished, its results are in {results_of(folder)}: to run it again, drop {RESUME}")
