"""The grid of `sweep=True`: every combination of the techniques of run_alpaca.py, each in a process of its own.

    sweep=True bash run_alpaca.sh
    sweep=True model_dir=benchmarks/shapes model_name=llama-2-7b random_weights=True \\
        tokenizer_dir=../shared/tokenizers/llama2 data_name=alpaca data_dir=rows.json bash run_alpaca.sh
    ... bash run_alpaca.sh --sweep_gpus 2 --sweep_minutes 9                   # two combinations at a time, for so long
    ... bash run_alpaca.sh --dtype bfloat16 --sweep_peers True                # and Unsloth on the same rows

What the settings of the run have on is measured off and on: accumulation x checkpointing x precision x (LoRA with
HyC-LoRA, LoRA, all weights). A JSON line each is appended to technique_grid.jsonl in output_dir; a combination that
runs out of memory or time, or fails, is a line with the cause. What this commit has measured on this device with the
same settings, rows and model is not measured again, so that an interrupted grid goes on where it stopped.
technique_grid.md has the tables and .png the picture, made of these lines (benchmarks/technique_tables.py).
"""

import importlib.util
import itertools
import json
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from benchmarks import technique_peers
from benchmarks.record import is_alike, read, record
from benchmarks.technique_tables import report
from benchmarks.workers import NOT_DONE, require_gpus, run_all, visible_gpus
from hyclora.models.config import LAUNCH
from hyclora.utils import results
from hyclora.utils.args import Parser, require
from hyclora.utils.disk import check_output
from hyclora.utils.driver import Driver
from hyclora.utils.errors import Interrupted, RunStopped, is_out_of_memory
from hyclora.utils.generate import WritingArguments
from hyclora.utils.plain.arguments import OFF
from hyclora.utils.plain.breakdown import counted_peak
from hyclora.utils.profiling import MIB
from hyclora.utils.runs.identity import content_of, identity, in_effect

NAME = "technique_grid"
MACHINE = (*LAUNCH, "use_cpu")  # how and where it is computed
KILLED = f"exit code {-signal.SIGKILL}"
# of a combination alone: no evaluation, no texts, nothing saved
BARE = {"sweep": False, "sweep_peers": False, "max_eval_samples": 0, "test_prompts": False, "save_steps": 0}
# what is of no effect then
IDLE = ("run_name", "max_eval_samples", *(f.name for f in fields(WritingArguments)), "save_steps", "save_total_limit")


@dataclass(frozen=True)
class Combination:
    """Which techniques are on, and how. peer: whose model it is, if not this project's."""

    gradient_accumulation: int
    gradient_checkpointing: str
    mixed_precision: str
    use_lora: bool
    use_hyclora: bool
    peer: str = ""

    @property
    def name(self) -> str:
        method = self.peer or ("hyclora" if self.use_hyclora else "lora" if self.use_lora else "full")
        words = (self.gradient_accumulation, self.gradient_checkpointing, self.mixed_precision, method)
        return "-".join(re.sub(r"\W+", "", str(word)) for word in words)


def combinations(groups: tuple) -> list[Combination]:
    """Those of a run's settings; what they have off stays off, NF4 weights are not trained, and 16-bit ones need LoRA
    and a computation in 16 bit. The order: of HyC-LoRA, LoRA, peers, all weights; of each with most techniques first.
    Peers compute in 16 bit and accumulate as set, which changes neither memory nor time of a row.
    """
    values = {name: value for group in groups for name, value in vars(group).items()}
    floats = values["dtype"] == "float32"
    methods = [(True, True, "")] * values["use_hyclora"] + [(True, False, "")] * values["use_lora"]
    methods += [(True, False, technique_peers.UNSLOTH)] * values["sweep_peers"]
    methods += [(False, False, "")] * (floats and not values["load_in_4bit"])
    axes = (
        (values["mixed_precision"], OFF) if floats else (values["mixed_precision"],),
        (values["gradient_checkpointing"], OFF),
        (values["gradient_accumulation"], 1),
    )
    found = (
        Combination(accumulation, checkpointing, precision, *method)
        for method, precision, checkpointing, accumulation in itertools.product(methods, *axes)
        if not method[-1] or (precision != OFF and accumulation == values["gradient_accumulation"])
    )
    return list(dict.fromkeys(found))  # an axis that is off has one value twice


def arguments_of(groups: tuple) -> dict:
    """What a line says of the settings that all combinations share."""
    techniques = {f.name for f in fields(Combination)}
    shared = {name: value for name, value in identity(results.settings(*groups)).items() if name not in techniques}
    return json.loads(json.dumps(shared, default=str))


def conditions_of(groups: tuple, content: dict[str, str]) -> dict:
    """What else a line is of: content, of rows and model, and settings that change memory or time, though no loss."""
    values = {name: value for group in groups for name, value in vars(group).items()}
    return content | {name: values[name] for name in MACHINE if in_effect(name, values)}


def sweep(driver: Driver, groups: tuple, argv: list[str] | None) -> None:
    """Measure what no line answers, and write the report of all lines of these settings.

    Interrupted by Ctrl-C, RunStopped if a combination failed for another reason than memory or time, or if
    sweep_minutes did not do for all of them: the lines are kept. UserError for a mistake of all combinations.
    """
    begun, training = time.monotonic(), groups[-1]
    check(driver, groups)
    model, data, *others = groups
    groups = (model, replace(data, max_eval_samples=BARE["max_eval_samples"]), *others)  # the rows that are measured
    source, _, task = driver.read(groups, tell=lambda line: None)  # its mistakes would be those of every combination
    folder = Path(training.output_dir).resolve()
    check_output(folder)
    options = list(sys.argv[1:] if argv is None else argv)
    common = {
        "arguments": arguments_of(groups),
        "conditions": conditions_of(groups, content_of(source, task.train)),
    }
    now, file = results.environment(), folder / f"{NAME}.jsonl"
    grid, before = combinations(groups), read(file)
    lines = {one: answer(before, one, common, now, training.sweep_timeout) for one in grid}
    jobs = [(one, *job(one, groups, options, folder, len(task.train))) for one in grid if lines[one] is None]
    print(f"{len(grid)} combinations, {len(grid) - len(jobs)} measured already", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes that measure end as well
    n = training.sweep_gpus
    gpus = visible_gpus(n) if n > 1 else [None]
    until = begun + 60 * (training.sweep_minutes or float("inf"))
    (folder / "grid").mkdir(exist_ok=True)
    try:
        for (one, *_), found in run_all(jobs, n, gpus, folder / "grid", until, training.sweep_timeout, alone=True):
            line = {"setting": asdict(one), **kept(found), **common} | ({"gpus": n} if n > 1 else {})
            lines[one] = record(NAME, line, folder)
            print(f"{time.monotonic() - begun:5.0f} s  {one.name:<24}{told(lines[one])}", flush=True)
    except KeyboardInterrupt:
        raise Interrupted("interrupted: the same command goes on where it stopped") from None
    conclude([line for line in lines.values() if line is not None], len(grid), folder)


def check(driver: Driver, groups: tuple) -> None:
    """UserError for settings without effect, too few GPUs, or peers that cannot be measured."""
    training, parser = groups[-1], Parser(driver.groups, driver.all_defaults)
    values = {name: value for group in groups for name, value in vars(group).items()}
    for name in IDLE:
        default = parser.get_default(name)
        require(
            values[name] in (default, BARE.get(name, default)),
            f"{name} has no effect with sweep=True, which measures combinations without evaluation, texts and "
            "checkpoints, under names of their own: drop it, or set sweep=False",
        )
    for name in ("verify", "memory_budget"):
        require(not values[name], f"{name} is of HyC-LoRA alone, and a sweep measures LoRA beside it: drop it")
    if training.sweep_gpus > 1:
        require(not training.use_cpu, f"sweep_gpus {training.sweep_gpus} with use_cpu=True: drop one of them")
        require_gpus("sweep_gpus", training.sweep_gpus)
    if training.sweep_peers:
        technique_peers.check(groups)


def conclude(lines: list[dict], asked: int, folder: Path) -> None:
    """Write the report of the lines; RunStopped if some failed, or are fewer than were asked for."""
    if lines:
        drawn = importlib.util.find_spec("matplotlib") is not None
        text = report(lines, folder / f"{NAME}.png" if drawn else None)
        (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
        print(f"{text}\n\nlines: {folder / NAME}.jsonl, tables: {folder / NAME}.md")
        if not drawn:
            print("picture: pip install matplotlib")
    failed = [line for line in lines if "error" in line and not is_answer(line)]
    if failed:
        raise RunStopped(f"{len(failed)} of {asked} combinations failed, the last one: {failed[-1]['error']}")
    if len(lines) < asked:
        raise RunStopped(f"{asked - len(lines)} of {asked} combinations are left: the same command goes on")


def is_answer(line: dict) -> bool:
    """Whether a line has numbers, or says that memory or time ran out."""
    error = line.get("error")
    return error is None or error.startswith(NOT_DONE) or is_out_of_memory(RuntimeError(error))


def answer(lines: list[dict], one: Combination, common: dict, now: dict, timeout: float) -> dict | None:
    """The line of this commit and device that has the combination, and what all of them have in common.

    A failure is tried again, and what was not done in time if there is more of it now.
    """
    found = (
        line
        for line in reversed(lines)
        if is_alike(line, now)
        and line["setting"] == asdict(one)
        and all(line.get(name) == value for name, value in common.items())
        and is_answer(line)
        and not (line.get("error", "").startswith(NOT_DONE) and timeout > float(line["error"].split()[-2]))
    )
    return next(found, None)


def job(one: Combination, groups: tuple, options: list[str], folder: Path, n_rows: int) -> tuple[str, list[str]]:
    """The driver that measures a combination, and its options; those of `options` that come again do not count."""
    if one.peer:
        asked = technique_peers.job_of(groups, one.gradient_accumulation, one.gradient_checkpointing, n_rows)
        return "benchmarks.technique_peers", technique_peers.options(asked, groups[-1].sweep_timeout)
    techniques = {name: value for name, value in asdict(one).items() if name != "peer"}
    settings = {**techniques, **BARE, "run_name": one.name, "output_dir": str(folder / "grid")}
    return "run_alpaca", [*options, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def kept(found: dict) -> dict:
    """What a line keeps of what a worker found: numbers, or the cause of a failure in a few words."""
    error = found.get("error")
    if error is None:
        return measured(found) if "breakdown" in found else found
    if KILLED in error:
        return {"error": "out of memory: the process was killed, probably as the host had none left"}
    if is_out_of_memory(RuntimeError(error)):
        return {"error": "out of memory"}
    return {"error": " ".join(error.split())[:300]}


def measured(found: dict) -> dict:
    """What a line keeps of a run's results.

    peak_mib: of the GPU; on a CPU, where counted is True, of the breakdown, as no allocator tells it.
    """
    train, taken = found["train"], found["breakdown"]
    on_gpu = train["peak_bytes"] > 0
    return {
        "peak_mib": round((train["peak_bytes"] if on_gpu else counted_peak(taken)) / MIB, 2),
        **({"held_mib": round(train["held_bytes"] / MIB, 2)} if on_gpu else {"counted": True}),
        "seconds": round(train["seconds"], 2),
        "row_ms": train["row_ms"],
        "average_loss": round(train["average_loss"], 4),
        "skipped_steps": train["skipped_steps"],
        "tokens": train["tokens"],
        "parameters": found["parameters"],
        "flops": taken["flops"],
        "mib": {name: round(size / MIB, 3) for name, size in taken.items() if name != "flops"},
    }


def told(found: dict) -> str:
    return found.get("error") or f"{found['peak_mib']:.0f} MiB  {found['seconds']:.1f} s  {found['row_ms']} ms a row"
