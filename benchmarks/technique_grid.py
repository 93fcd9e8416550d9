"""The grid of `sweep=True`: every combination of the techniques of run_alpaca.py, each in a process of its own.

    sweep=True bash run_alpaca.sh
    sweep=True model_dir=benchmarks/shapes model_name=llama-2-7b random_weights=True \\
        tokenizer_dir=../shared/tokenizers/llama2 data_name=alpaca data_dir=rows.json bash run_alpaca.sh

What the settings of the run have on is measured off and on: accumulation x checkpointing x precision x (all weights,
LoRA, LoRA with HyC-LoRA). A JSON line each is appended to technique_grid.jsonl in output_dir; a combination that runs
out of memory or fails is a line with the cause. What this commit has measured on this device with the same settings is
not measured again, so that an interrupted grid goes on where it stopped. technique_grid.md has the tables and .png the
picture, made of these lines (benchmarks/technique_tables.py).
"""

import importlib.util
import itertools
import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.record import read, record
from benchmarks.technique_tables import report
from hyclora.utils import results
from hyclora.utils.args import ROOT
from hyclora.utils.disk import check_output
from hyclora.utils.driver import Driver
from hyclora.utils.errors import Interrupted, RunStopped, is_out_of_memory
from hyclora.utils.plain.arguments import OFF
from hyclora.utils.plain.breakdown import counted_peak
from hyclora.utils.profiling import MIB
from hyclora.utils.runs.identity import identity

NAME = "technique_grid"
KILLED = -signal.SIGKILL
# of a combination alone: no evaluation, no texts, nothing saved
BARE = {"sweep": False, "max_eval_samples": 0, "test_prompts": False, "save_steps": 0}


@dataclass(frozen=True)
class Combination:
    """Which techniques are on, and how."""

    gradient_accumulation: int
    gradient_checkpointing: str
    mixed_precision: str
    use_lora: bool
    use_hyclora: bool

    @property
    def name(self) -> str:
        method = "hyclora" if self.use_hyclora else "lora" if self.use_lora else "full"
        words = (self.gradient_accumulation, self.gradient_checkpointing, self.mixed_precision, method)
        return "-".join(re.sub(r"\W+", "", str(word)) for word in words)


def combinations(groups: tuple) -> list[Combination]:
    """Those of a run's settings; what they have off stays off, NF4 weights are not trained, and 16-bit ones need LoRA
    and a computation in 16 bit.
    """
    values = {name: value for group in groups for name, value in vars(group).items()}
    floats = values["dtype"] == "float32"
    methods = [(False, False)] if floats and not values["load_in_4bit"] else []
    methods += [(True, False)] * values["use_lora"] + [(True, True)] * values["use_hyclora"]
    axes = (
        (1, values["gradient_accumulation"]),
        (OFF, values["gradient_checkpointing"]),
        (OFF, values["mixed_precision"]) if floats else (values["mixed_precision"],),
        methods,
    )
    found = (Combination(*one, *method) for *one, method in itertools.product(*axes))
    return list(dict.fromkeys(found))  # an axis that is off has one value twice


def arguments_of(groups: tuple) -> dict:
    """What a line says of the settings that all combinations share."""
    techniques = {f.name for f in fields(Combination)}
    shared = {name: value for name, value in identity(results.settings(*groups)).items() if name not in techniques}
    return json.loads(json.dumps(shared, default=str))


def sweep(driver: Driver, groups: tuple, argv: list[str] | None) -> None:
    """Measure what no line answers, and write the report of all lines of these settings.

    Interrupted by Ctrl-C, RunStopped if a combination failed for another reason than memory: the lines are kept.
    """
    driver.read(groups, tell=lambda line: None)  # its mistakes would be those of every combination
    folder = Path(groups[-1].output_dir)
    check_output(folder)
    options, common = list(sys.argv[1:] if argv is None else argv), arguments_of(groups)
    now, file = results.environment(), folder / f"{NAME}.jsonl"
    grid, lines = combinations(groups), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process that measures ends as well
    try:
        for number, one in enumerate(grid, 1):
            print(f"{number} of {len(grid)}  {one.name:<24}", end="", flush=True)
            line = answer(read(file), one, common, now)
            if line is not None:
                print("measured already")
            else:
                found = run(one, options, folder / "grid")
                line = record(NAME, {"setting": asdict(one), **found, "arguments": common}, folder)
                print(told(found), flush=True)
            lines.append(line)
    except KeyboardInterrupt:
        raise Interrupted("interrupted: the same command goes on where it stopped") from None
    drawn = importlib.util.find_spec("matplotlib") is not None
    text = report(lines, folder / f"{NAME}.png" if drawn else None)
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(f"{text}\n\nlines: {file}, tables: {folder / NAME}.md", "picture: pip install matplotlib" * (not drawn))
    failed = [line for line in lines if "error" in line and not is_out_of_memory(RuntimeError(line["error"]))]
    if failed:
        raise RunStopped(f"{len(failed)} of {len(grid)} combinations failed, the last one: {failed[-1]['error']}")


def answer(lines: list[dict], one: Combination, common: dict, now: dict) -> dict | None:
    """The line of this commit, device and settings that has the combination; a failure is tried again."""
    found = (
        line
        for line in reversed(lines)
        if (line["commit"], line["device"]) == (now["commit"], now["device"])
        and line["setting"] == asdict(one)
        and line["arguments"] == common
        and is_out_of_memory(RuntimeError(line.get("error", "out of memory")))
    )
    return next(found, None)


def run(one: Combination, options: list[str], folder: Path) -> dict:
    """What a run of the driver with these options and the combination finds; {"error": its cause} if it fails."""
    folder.mkdir(exist_ok=True)
    settings = {**asdict(one), **BARE, "run_name": one.name, "output_dir": str(folder)}
    command = [
        sys.executable,
        str(ROOT / "run_alpaca.py"),
        *options,
    ]  # of an option that comes twice the last one counts
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    before = set(folder.glob(f"{one.name}-*.json"))
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == KILLED:
        return {"error": "out of memory: the process was killed, probably as the host had none left"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        out = next((line for line in said if is_out_of_memory(RuntimeError(line))), None)
        return {"error": "out of memory" if out else said[-1].removeprefix("error: ")}
    (file,) = set(folder.glob(f"{one.name}-*.json")) - before
    return measured(json.loads(file.read_text(encoding="utf-8")))


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
        "average_loss": round(train["average_loss"], 4),
        "skipped_steps": train["skipped_steps"],
        "tokens": train["tokens"],
        "parameters": found["parameters"],
        "flops": taken["flops"],
        "mib": {name: round(size / MIB, 3) for name, size in taken.items() if name != "flops"},
    }


def told(found: dict) -> str:
    return found.get("error") or f"{found['peak_mib']:.0f} MiB  {found['seconds']:.1f} s"
