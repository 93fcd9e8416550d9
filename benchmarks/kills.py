"""Kill runs with SIGKILL at random points, resume them, and compare with the run that nobody killed, bit by bit.

    python -m benchmarks.kills --kills 20
    python -m benchmarks.kills --drivers run_gsm8k --kills 6 --model ckpt/smollm2-135m -- --q_bit 2
    python -m benchmarks.kills --drivers run_gsm8k --processes 2 --jobs 8
    python -m benchmarks.kills --exact False       # on a GPU, as runs are by default

A point lies in a step, in saving (a checkpoint or the trained adapters) or in the evaluation behind the training, in
turns; which one, and after which share of the time that it took, is drawn. All lie behind the first whole checkpoint.
Every step's loss, gradient norm and learning rate, the scores, the predictions and the file of adapters have to be
equal. With --processes one of several is killed, and then the others. On a GPU that takes deterministic algorithms and
no CUDA graphs; what they cost is told as ms, of a micro-batch, beside default_ms. With --exact False runs are as by
default, and the trained adapters may lie apart from the nearest of some unbroken runs (apart, relative) by no more than
twice what these do from each other (spread). Runs are side by side as the host's cores allow. What follows -- goes to
the drivers. Appends a line a kill to OUTPUT_DIR/kills.jsonl; exit code 1 if one differs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.jobs import number
from benchmarks.record import RESULTS, record
from benchmarks.repeatable import EXACT_OPTIONS, Processes, distance, prepare, settle, spread
from hyclora.utils.args import ROOT
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point
from hyclora.utils.runs.script import PROGRAM

NAME = "kills"
UNBROKEN = 4  # runs whose spread is told where runs are not exact
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


def _serve(pipe, environment: dict[str, str], driver: str, argv: list[str], log: Path) -> None:
    """One of the run's processes."""
    settle(environment | {PROGRAM: driver})
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


@dataclass(frozen=True)
class Unbroken:
    """A driver's runs that nobody killed: their options, what the first one went through, and all that came out."""

    options: list[str]
    events: list[Event]
    outcomes: list[dict]

    @property
    def ms(self) -> float:
        """Of a micro-batch, from its beginning to that of the next one."""
        begun = [event.time for event in self.events if event.phase == STEP and event.begins]
        return round(1e3 * median(b - a for a, b in pairwise(begun)), 2)

    def compare(self, found: dict) -> dict:
        """Of a resumed run's outcome what differs, bit by bit, or of several unbroken ones by how much."""
        if len(self.outcomes) == 1:
            return {"differ": [name for name, value in self.outcomes[0].items() if found[name] != value]}
        files = [outcome["adapters"] for outcome in self.outcomes]
        apart, own = min(distance(found["adapters"], file) for file in files), spread(files)
        return {"differ": [] if apart <= 2 * own else ["adapters"], "apart": apart, "spread": own}


def leave_alone(start: Processes, driver: str, options: list[str], folder: Path, n: int) -> Unbroken:
    """n runs of a driver, one after the other; UserError if one fails or ends before it could be killed."""
    events, outcomes = [], []
    for i in range(n):
        place = folder.with_name(f"{folder.name}-{i}")
        log = place.with_suffix(".txt")
        code, seen = run(start, driver, [*options, "--output_dir", str(place)], log)
        if code:
            raise UserError(f"{driver} fails without being killed, see {log}")
        if not all(points(seen, phase) for phase in PHASES):
            raise UserError(
                f"{driver} {' '.join(options)} ends before it could be killed in all of {', '.join(PHASES)}"
            )
        outcomes.append(outcome(place))
        events = events or seen
    return Unbroken(options, events, outcomes)


def kill(start: Processes, driver: str, phase: str, folder: Path, seed: str, unbroken: Unbroken) -> dict:
    """Kill a run at points of a phase that a seed draws, until it has not ended by then, and resume it."""
    drawn, line, attempt = random.Random(seed), None, 0
    while line is None:
        attempt += 1
        end = drawn.choice(points(unbroken.events, phase))
        point = end._replace(seconds=end.seconds * drawn.random())
        killed = drawn.randrange(start.n) if start.n > 1 else 0
        line = kill_at(start, driver, folder.with_name(f"{folder.name}-{attempt}"), point, killed, unbroken)
    return {"after_ms": round(1e3 * point.seconds, 1), **line}


def kill_at(
    start: Processes, driver: str, folder: Path, point: Point, killed: int, unbroken: Unbroken
) -> dict | None:  # fmt: skip
    """Kill a run at a point and resume it: what became of it; None if it had ended by then."""
    from hyclora.utils.runs.checkpoints import newest_whole, state_of

    argv, log = [*unbroken.options, "--output_dir", str(folder)], folder.with_suffix(".txt")
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
    return line | unbroken.compare(outcome(folder))


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
    parser.add_argument("--model", type=to_path, default=ROOT / "ckpt" / "tiny-llama", help="folder of a checkpoint")
    parser.add_argument("--processes", type=number(1), default=1, help="of each run, a GPU each if there are GPUs")
    parser.add_argument("--seed", type=number(0), default=0, help="of the points")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=number(1), help="runs at a time; by default as many as there are cores for")
    parser.add_argument("--exact", choices=("True", "False"), default="True", help="on a GPU: compared bit by bit")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(own)
    args.more, args.jobs = more, args.jobs or max(1, cores // args.processes)
    if args.processes > 1 and "run_alpaca" in args.drivers:
        raise UserError("run_alpaca trains in one process: --drivers run_gsm8k with --processes")
    return args


def options_of(driver: str, model: Path) -> list[str]:
    """Of a short run of a driver on the checkpoint in a folder."""
    place = ["--model_dir", str(model.resolve().parent), "--model_name", model.name]
    return [*place, *COMMON.split(), *COURSES[driver].options.split()]


def check_checkpoint(model: Path) -> None:
    """UserError for a folder whose model the drivers cannot train."""
    from hyclora.utils.args import LoraArguments, ModelArguments
    from hyclora.utils.heads import NEXT_TOKEN
    from hyclora.utils.loading import check_model, find_base

    model, lora = model.resolve(), LoraArguments()
    check_model(find_base(ModelArguments(model.name, str(model.parent)), lora, named_by="--model"), NEXT_TOKEN, lora)


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_output(args.output_dir)
    check_checkpoint(args.model)
    context, device, gpus = prepare(args.drivers, args.processes)
    exact = args.exact == "True"
    if not exact and not gpus:
        raise UserError("--exact False is for runs on a GPU, and on a CPU all are exact: drop it")
    start, default = (Processes(context, _serve, args.processes, gpus, exact=x) for x in (exact, False))
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    asked = {"device": device, "seed": args.seed, "options": COMMON.split() + args.more}
    asked |= {"processes": args.processes} if args.processes > 1 else {}
    asked |= {"exact": exact} if gpus else {}
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        unbroken, by_default = {}, {}
        for driver in args.drivers:
            options = [*options_of(driver, args.model), *args.more]
            chosen = [*options, *(EXACT_OPTIONS if gpus and exact else ())]
            n = 1 if exact else UNBROKEN
            unbroken[driver] = pool.submit(leave_alone, start, driver, chosen, work / driver, n)
            if gpus and exact:
                by_default[driver] = pool.submit(leave_alone, default, driver, options, work / f"{driver}-default", 1)
        unbroken, by_default = ({name: run.result() for name, run in runs.items()} for runs in (unbroken, by_default))
        kills = {}
        for i in range(args.kills):
            driver, phase = args.drivers[i % len(args.drivers)], PHASES[i // len(args.drivers) % len(PHASES)]
            folder = work / f"{driver}-kill{i}"
            kills[pool.submit(kill, start, driver, phase, folder, f"{args.seed}-{i}", unbroken[driver])] = i, driver
        for done in as_completed(kills):
            (i, driver), line = kills[done], done.result()
            ms = {"ms": unbroken[driver].ms} if gpus else {}
            ms |= {"default_ms": by_default[driver].ms} if driver in by_default else {}
            told = {"driver": driver, "kill": i, "model": args.model.name, **line, **ms, "arguments": asked}
            record(NAME, {"setting": driver, **told}, args.output_dir)
            bad = line.get("error") or ", ".join(line["differ"])
            failed += bool(bad)
            at = f"{i + 1} of {args.kills}: {driver} killed in {line['killed_in']}, resumed from {line['resumed_from']}"
            print(f"{at}: {f'differs: {bad}' if bad else 'equal' if exact else 'within the spread'}", flush=True)
    if failed:
        raise UserError(f"{failed} of {args.kills} kills left another run; their folders are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
