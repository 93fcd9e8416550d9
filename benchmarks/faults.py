"""Break runs in the ways that users' runs break, go on with them, and compare with the run that nothing broke.

    python -m benchmarks.faults
    python -m benchmarks.faults --faults "Ctrl-C" "out of memory" --model ckpt/smollm2-135m

A fault comes once, in the first micro-batch of run_gsm8k's fifth step or in its second checkpoint. What is told of it:
the exit code; whether the user read one sentence and no traceback; and, once the run has gone on by
--resume_from_checkpoint True (but where it went on by itself), what differs from the unbroken run, as in
benchmarks.kills. Damage is done to the newest checkpoint of a run that was killed. Appends a line a fault to
OUTPUT_DIR/faults.jsonl.
"""

import argparse
import errno
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.kills import COMMON, check_checkpoint, options_of, outcome
from benchmarks.record import RESULTS, record
from benchmarks.repeatable import EXACT_OPTIONS, Processes, prepare, settle
from hyclora.utils.args import ROOT
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point
from hyclora.utils.runs.script import PROGRAM

NAME, DRIVER = "faults", "run_gsm8k"
MICRO_BATCH, SAVING = 9, 2  # the fifth step's first of two, behind the second checkpoint; and a checkpoint
ADAPTERS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Fault:
    """where: a method of HycloraTrainer, in whose `at`-th call it comes; what: done there, with the call's result.

    damage: done to the newest checkpoint after the run; options: of the run; ends: whether the run ends by it.
    """

    where: str = "training_step"
    at: int = MICRO_BATCH
    what: Callable = lambda result: result
    damage: Callable[[Path], None] | None = None
    options: tuple[str, ...] = ()
    ends: bool = True


def _send(number: int, result):
    os.kill(os.getpid(), number)
    return result


def _no_room(result):
    import torch

    raise torch.OutOfMemoryError("injected")


def _full_disk(result):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")


def _cut(checkpoint: Path) -> None:
    file = checkpoint / ADAPTERS
    file.write_bytes(file.read_bytes()[:-100])


def _change(checkpoint: Path) -> None:
    file = checkpoint / ADAPTERS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def _take_away(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


LOSS, KILL = "compute_loss", partial(_send, signal.SIGKILL)
FAULTS = {
    "Ctrl-C": Fault(what=partial(_send, signal.SIGINT)),
    "SIGTERM": Fault(what=partial(_send, signal.SIGTERM)),
    "SIGKILL": Fault(what=KILL),
    "a checkpoint's file cut short": Fault(what=KILL, damage=_cut),
    "a bit of a checkpoint changed": Fault(what=KILL, damage=_change),
    "a checkpoint's file gone": Fault(what=KILL, damage=_take_away),
    "disk full while saving": Fault("save_model", SAVING, _full_disk),
    "out of memory": Fault(what=_no_room),
    "a loss of NaN, non_finite=stop": Fault(LOSS, what=lambda loss: loss * float("nan")),
    "a loss of NaN, non_finite=skip": Fault(
        LOSS, what=lambda loss: loss * float("nan"), options=("--non_finite", "skip"), ends=False
    ),
}


def run(start: Processes, argv: list[str], log: Path, fault: str | None = None) -> int:
    """The exit code of a run in a process of its own, broken by a fault."""
    (process,), _ = start.start(argv, log, fault)
    process.join()
    return process.exitcode


def _serve(pipe, environment: dict[str, str], argv: list[str], log: Path, fault: str | None) -> None:
    settle(environment | {PROGRAM: DRIVER})
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import run_gsm8k
    from hyclora.utils.trainer import HycloraTrainer

    if fault:
        _break(HycloraTrainer, FAULTS[fault])
    run_gsm8k.main(argv)


def _break(owner: type, fault: Fault) -> None:
    method, calls = getattr(owner, fault.where), iter(range(1, 10**9))

    def broken(*args, **kwargs):
        result = method(*args, **kwargs)
        return fault.what(result) if next(calls) == fault.at else result

    setattr(owner, fault.where, broken)


def try_out(start: Processes, name: str, options: list[str], work: Path, expected: dict) -> dict:
    """What became of a run with a fault, and of going on with it."""
    from hyclora.utils.runs.checkpoints import newest_whole, state_of

    fault, folder, log = FAULTS[name], work / name.replace(" ", "-"), work / f"{name.replace(' ', '-')}.txt"
    argv = [*options, *fault.options, "--output_dir", str(folder)]
    code = run(start, argv, log, name)
    said = log.read_text(encoding="utf-8")
    line = {"exit_code": code, "sentences": said.count("error: "), "traceback": "Traceback" in said}
    if not fault.ends:
        return line | {"skipped": said.count("the step is skipped"), "finite": is_finite(folder)}
    (run_folder,) = (path for path in folder.iterdir() if path.is_dir())
    if fault.damage:
        fault.damage(newest_whole(run_folder)[0])
    checkpoint, torn = newest_whole(run_folder)
    line |= {"resumed_from": state_of(checkpoint).global_step if checkpoint else 0, "torn": len(torn)}
    if code := run(start, [*argv, "--resume_from_checkpoint", "True"], log):
        return line | {"error": f"exit code {code}: {log.read_text(encoding='utf-8').splitlines()[-1]}"}
    found = outcome(folder)
    return line | {"differ": [name for name in expected if found[name] != expected[name]]}


def is_finite(folder: Path) -> bool:
    """Whether all adapters of the one run in a folder are."""
    from safetensors.torch import load_file

    (file,) = folder.glob(f"*/{ADAPTERS}")
    return all(bool(t.isfinite().all()) for t in load_file(file).values())


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--model", type=to_path, default=ROOT / "ckpt" / "tiny-llama", help="folder of a checkpoint")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    check_checkpoint(args.model)
    context, device, gpus = prepare([DRIVER])
    start = Processes(context, _serve, gpus=gpus)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    options = [*options_of(DRIVER, args.model), *(EXACT_OPTIONS if gpus else ())]
    if run(start, [*options, "--output_dir", str(work / "unbroken")], work / "unbroken.txt"):
        raise UserError(f"{DRIVER} fails without being broken, see {work / 'unbroken.txt'}")
    expected = outcome(work / "unbroken")
    for name in args.faults:
        line = try_out(start, name, options, work, expected)
        asked = {"device": device, "options": COMMON.split()}
        record(
            NAME,
            {"setting": DRIVER, "fault": name, "model": args.model.name, **line, "arguments": asked},
            args.output_dir,
        )
        print(f"{name}: {json.dumps(line)}", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
