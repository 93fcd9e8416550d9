"""Kill runs with SIGKILL at random points, resume them, and compare with the run that nobody killed, bit by bit.

    python -m benchmarks.kills --kills 20
    python -m benchmarks.kills --drivers run_gsm8k --kills 6 --model ckpt/smollm2-135m -- --q_bit 2
    python -m benchmarks.kills --drivers run_gsm8k --processes 2

A point lies in a step, in saving (a checkpoint or the trained adapters) or in the evaluation behind the training, in
turns; which one, and after which share of the time that it took, is drawn. All lie behind the first whole checkpoint.
Every step's loss, gradient norm and learning rate, the scores, the predictions and the file of adapters have to be
equal. With --processes one of several is killed, and then the others. What follows -- goes to the drivers. Appends a
line a kill to OUTPUT_DIR/kills.jsonl; exit code 1 if one differs.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple

from benchmarks.jobs import number
from benchmarks.ranks import environment_of, free_port
from benchmarks.record import RESULTS, record
from benchmarks.workers import ENVIRONMENT
from hyclora.utils.args import ROOT
from hyclora.utils.disk import check_output
from hyclora.utils.errors import UserError, entry_point

NAME = "kills"
STEP, SAVING, EVALUATION = PHASES = ("step", "saving", "evaluation")
COMMON = (
    "--max_steps 8 --save_steps 2 --save_total_limit 2 --logging_steps 1 --per_device_train_batch_size 2 "
    "--max_train_samples 40 --max_eval_samples 2 --max_new_tokens 4 --learning_rate 1e-3 --lora_dropout 0.1 "
    "--iteration_threshold 10"
)


@dataclass(frozen=True)
class Course:
    """A driver's own options, two micro-batches a step among them, and the functions of each phase (module:path)."""

    options: str
    phases: dict[str, tuple[str, ...]]


COURSES = {
    "run_gsm8k": Course(
        "--gradient_accumulation_steps 2 --disable_tqdm True",
        {
            STEP: ("hyclora.utils.trainer:HycloraTrainer.training_step",),
            SAVING: ("hyclora.utils.trainer:HycloraTrainer._save_checkpoint", "hyclora.utils.driver:save_trained"),
            EVALUATION: ("run_gsm8k:evaluate_generation", "run_gsm8k:evaluate_loss"),
        },
    ),
    "run_alpaca": Course(
        "--gradient_accumulation 2 --test_prompts False",
        {
            STEP: ("run_alpaca:train_step",),
            SAVING: ("hyclora.utils.plain.checkpoints:save", "hyclora.utils.driver:save_trained"),
            EVALUATION: ("run_alpaca:evaluate_loss",),
        },
    ),
}


class Event(NamedTuple):
    phase: str
    number: int
    begins: bool
    time: float


class Point(NamedTuple):
    """So many seconds behind the beginning of a phase's n-th time."""

    phase: str
    number: int
    seconds: float


@dataclass(frozen=True)
class Processes:
    """How the processes of a run are started, and how many."""

    context: BaseContext
    n: int

    def start(self, driver: str, argv: list[str], log: Path) -> tuple[list, Connection]:
        """All of a run, and what the first one says of itself."""
        ours, theirs = self.context.Pipe(duplex=False)
        port = free_port() if self.n > 1 else 0
        pipes = [theirs, *[None] * (self.n - 1)]
        found = [
            self.context.Process(target=_serve, args=(pipe, driver, argv, log, environment_of(i, self.n, port)))
            for i, pipe in enumerate(pipes)
        ]
        for process in found:
            process.start()
        theirs.close()
        return found, ours


def run(start: Processes, driver: str, argv: list[str], log: Path, point: Point | None = None, killed: int = 0):
    """A run in processes of its own, of which `killed` is killed at a point, and then the others: that one's exit code,
    and the events that the first one went through.
    """
    processes, pipe = start.start(driver, argv, log)
    events = []
    with contextlib.suppress(EOFError):
        while True:
            events.append(Event(*pipe.recv(), time.perf_counter()))
            if point is not None and events[-1][:3] == (point.phase, point.number, True):
                time.sleep(point.seconds)
                for process in (processes[killed], *processes):
                    process.kill()
    for process in processes:
        process.join()
    return processes[killed].exitcode, events


def _serve(pipe, driver: str, argv: list[str], log: Path, environment: dict[str, str]) -> None:
    """One of the run's processes."""
    os.environ |= environment
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main, counts = import_module(driver).main, Counter()
    for phase, functions in COURSES[driver].phases.items() if pipe else ():
        for name in functions:
            _announce(name, phase, counts, pipe)
    main(argv)


def _announce(name: str, phase: str, counts: Counter, pipe) -> None:
    """Have a function say when it begins and ends."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    owner = reduce(getattr, owners, import_module(module))
    function = getattr(owner, last)

    def announced(*args, **kwargs):
        counts[phase] += 1
        pipe.send((phase, now := counts[phase], True))
        found = function(*args, **kwargs)
        pipe.send((phase, now, False))
        return found

    setattr(owner, last, announced)


def points(events: list[Event], phase: str) -> list[Point]:
    """The ends of a phase's times that begin behind the first whole checkpoint of an unbroken run."""
    saved = next(event.time for event in events if event.phase == SAVING and not event.begins)
    begun = {event[:2]: event.time for event in events if event.begins and event.time >= saved}
    ends = [event for event in events if event.phase == phase and not event.begins and event[:2] in begun]
    return [Point(*event[:2], event.time - begun[event[:2]]) for event in ends]


def outcome(folder: Path) -> dict:
    """What has to be equal of the one run in a folder."""
    (file,) = folder.glob("*.json")
    found, run_folder = json.loads(file.read_text(encoding="utf-8")), file.with_suffix("")
    predictions = run_folder / "predictions.json"
    return {
        "losses": [entry for entry in found["log_history"] if "loss" in entry],
        "scores": found["metrics"],
        "predictions": predictions.read_bytes() if predictions.is_file() else None,
        "adapters": (run_folder / "adapter_model.safetensors").read_bytes(),
    }


def kill(
    start: Processes, driver: str, argv: list[str], folder: Path, point: Point, killed: int, expected: dict
) -> dict | None:  # fmt: skip
    """Kill a run at a point and resume it: what became of it; None if it had ended by then."""
    from hyclora.utils.runs.checkpoints import newest_whole, state_of

    argv, log = [*argv, "--output_dir", str(folder)], folder.with_suffix(".txt")
    code, events = run(start, driver, argv, log, point, killed)
    if code != -signal.SIGKILL:
        if code:
            raise UserError(f"{driver} failed before it was killed, see {log}")
        return None
    (run_folder,) = (path for path in folder.iterdir() if path.is_dir())
    checkpoint, torn = newest_whole(run_folder)
    ended = {event[:2] for event in events if not event.begins}
    inside = [event.phase for event in events if event.begins and event[:2] not in ended]
    line = {
        "phase": point.phase,
        "killed_in": inside[-1] if inside else "between",
        "step": max((event.number for event in events if event.phase == STEP), default=0),
        "resumed_from": state_of(checkpoint).global_step if checkpoint else 0,
        "calibrating": is_calibrating(checkpoint) if checkpoint else None,
        "torn": len(torn),
    }
    code, _ = run(start, driver, [*argv, "--resume_from_checkpoint", "True"], log)
    if code:
        return line | {"error": f"exit code {code}: {log.read_text(encoding='utf-8').splitlines()[-1]}"}
    found = outcome(folder)
    return line | {"differ": [name for name in expected if found[name] != expected[name]]}


def is_calibrating(checkpoint: Path) -> bool | None:
    """Whether calibration was under way when a checkpoint was written; None for one without."""
    from safetensors import safe_open

    from hyclora.models.state import FILE_NAME, PROGRESS

    if not (checkpoint / FILE_NAME).is_file():
        return None
    with safe_open(checkpoint / FILE_NAME, framework="pt") as file:
        numbers = json.loads(file.metadata()[PROGRESS])
    return numbers["index"] < numbers["threshold"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=number(1), default=20)
    parser.add_argument("--drivers", nargs="+", choices=COURSES, default=list(COURSES))
    parser.add_argument("--model", type=Path, default=ROOT / "ckpt" / "tiny-llama", help="folder of a checkpoint")
    parser.add_argument("--processes", type=number(1), default=1, help="of each run, a GPU each if there are GPUs")
    parser.add_argument("--seed", type=number(0), default=0, help="of the points")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(own)
    args.more = more
    if args.processes > 1 and "run_alpaca" in args.drivers:
        raise UserError("run_alpaca trains in one process: --drivers run_gsm8k with --processes")
    return args


def prepare(drivers: list[str]) -> tuple[BaseContext, str]:
    """What starts runs of drivers, and the device that they are on."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    # each run is forked from a process that has imported everything; CUDA does not survive that
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn"), "cuda"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(drivers)
    return context, "cpu"


def options_of(driver: str, model: Path) -> list[str]:
    """Of a short run of a driver on the checkpoint in a folder."""
    place = ["--model_dir", str(model.resolve().parent), "--model_name", model.name]
    return [*place, *COMMON.split(), *COURSES[driver].options.split()]


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_output(args.output_dir)
    context, device = prepare(args.drivers)
    start = Processes(context, args.processes)
    drawn, failed = random.Random(args.seed), 0
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    unbroken = {}
    for driver in args.drivers:
        options = [*options_of(driver, args.model), *args.more]
        folder = work / driver
        code, events = run(start, driver, [*options, "--output_dir", str(folder)], folder.with_suffix(".txt"))
        if code:
            raise UserError(f"{driver} fails without being killed, see {folder.with_suffix('.txt')}")
        unbroken[driver] = options, events, outcome(folder)
        if not all(points(events, phase) for phase in PHASES):
            raise UserError(
                f"{driver} {' '.join(args.more)} ends before it could be killed in all of {', '.join(PHASES)}"
            )
    for i in range(args.kills):
        driver, phase = args.drivers[i % len(args.drivers)], PHASES[i // len(args.drivers) % len(PHASES)]
        options, events, expected = unbroken[driver]
        line, attempt = None, 0
        while line is None:
            attempt += 1
            end = drawn.choice(points(events, phase))
            point = end._replace(seconds=end.seconds * drawn.random())
            killed = drawn.randrange(args.processes) if args.processes > 1 else 0
            line = kill(start, driver, options, work / f"{driver}-{i}-{attempt}", point, killed, expected)
        more = {"driver": driver, "kill": i, "model": args.model.name, "after_ms": round(1e3 * point.seconds, 1)}
        asked = {"device": device, "seed": args.seed, "options": COMMON.split() + args.more}
        asked |= {"processes": args.processes} if args.processes > 1 else {}
        record(NAME, {"setting": driver, **more, **line, "arguments": asked}, args.output_dir)
        bad = line.get("error") or ", ".join(line["differ"])
        failed += bool(bad)
        at = f"{i + 1} of {args.kills}: {driver} killed in {line['killed_in']}, resumed from {line['resumed_from']}"
        print(f"{at}: {f'differs: {bad}' if bad else 'equal'}", flush=True)
    if failed:
        raise UserError(f"{failed} of {args.kills} kills left another run; their folders are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
