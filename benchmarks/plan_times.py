"""The times that plan --measure predicts from a few layers, beside those of all layers, measured by the same clock.

    python -m benchmarks.plan_times                                  # two batches of two shapes, six modes: one GPU
    python -m benchmarks.plan_times --shapes llama-2-7b --cells 1x32768 --match layer

Random weights, LoRA on all linear layers. Each shape and batch is a process of its own, in which the plan's measuring
is done first, and then each mode is run at full depth. A line a mode: predicted_ms and measured_ms, or the error. A
mode that this commit has measured on this device is not measured again. On a CPU (to try it out) only what runs there
is.
"""

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.jobs import SHAPES, cell, number
from benchmarks.peers import OUT_OF_MEMORY, alone, answer
from benchmarks.record import RESULTS, is_alike, read, record
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point

NAME = "plan_times"
USUAL = (
    "resident, CUDA graphs, 4 bit",
    "offloaded, CUDA graphs, 4 bit",
    "offloaded, CUDA graphs, 2 bit",
    "offloaded, layer by layer, 4 bit",
    "checkpointing, resident layer inputs, exact",
    "offloaded layer inputs, CUDA graphs, 8 bit",
)


@dataclass(frozen=True)
class Case:
    """A batch of a shape. shape: in benchmarks/shapes, or a folder."""

    shape: str
    batch_size: int
    seq_len: int
    base: str = "nf4"
    lora_rank: int = 16
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.shape} {self.base} {self.batch_size}x{self.seq_len}"

    @property
    def file(self) -> Path:
        shipped = SHAPES / self.shape
        return (shipped if shipped.is_dir() else Path(self.shape)) / "config.json"


def measure(case: Case, names: list[str]) -> dict[str, dict]:
    """By mode's name, what is predicted and what is so, in this process."""
    import torch

    from hyclora.utils.args import ALL_LINEAR, LoraArguments
    from hyclora.utils.planning import MODES, Shape
    from hyclora.utils.planning.measuring import Bench, measure_modes
    from hyclora.utils.planning.times import Batch

    lora = LoraArguments(lora_rank=case.lora_rank, target_modules=[ALL_LINEAR])
    bench = Bench(Shape(case.file, case.base, case.lora_rank), lora, torch.device(case.device))
    modes, batch = [mode for mode in MODES if mode.name in names], Batch(case.batch_size, case.seq_len)
    predicted, found = measure_modes(bench, modes, batch), {}
    for mode in modes:
        time = predicted[mode.name]
        if time.ms is None:
            found[mode.name] = {"error": time.why}
            continue
        seconds = bench.seconds(mode, bench.n, batch)
        measured = {"error": OUT_OF_MEMORY} if seconds is None else {"measured_ms": round(1e3 * seconds, 2)}
        found[mode.name] = {"predicted_ms": round(time.ms, 2)} | measured
    return found


def in_a_process(case: Case, names: list[str], timeout: float) -> dict[str, dict]:
    """`measure` in a process of its own; a failure is one of each mode."""
    told = json.dumps({"case": asdict(case), "modes": names})
    found = alone([sys.executable, "-m", f"benchmarks.{NAME}", "--case", told], timeout)
    return dict.fromkeys(names, found) if "error" in found else found


def chosen(match: str, device: str) -> list[str]:
    """Modes that are called so, those of USUAL for ""; on a CPU only what runs there."""
    from hyclora.utils.planning import MODES

    named = [mode for mode in MODES if (match in mode.name if match else mode.name in USUAL)]
    return [mode.name for mode in named if device == "cuda" or not mode.needs_gpu]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "llama-3.2-1b"], help="or folders")
    parser.add_argument("--cells", nargs="+", type=cell, default=[(4, 512), (1, 8192)], help="BATCHxLENGTH")
    parser.add_argument("--match", default="", help="only modes whose name has this in it; default: six usual ones")
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4", help="frozen weights")
    parser.add_argument("--lora_rank", type=number(1), default=16)
    parser.add_argument("--timeout", type=float, default=540, help="seconds for one shape and batch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries it out")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own gets
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.case:
        told = json.loads(args.case)
        return answer(lambda: measure(Case(**told["case"]), told["modes"]))
    import torch

    from hyclora.utils.results import environment

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this measures times on a GPU: it needs one (or --device cpu)")
    names = chosen(args.match, args.device)
    if not names:
        raise UserError(
            f"--match {args.match!r}: no mode that runs here is called so; python -m hyclora.plan lists them"
        )
    of = itertools.product(args.shapes, args.cells)
    cases = [Case(shape, *batch, args.base, args.lora_rank, args.device) for shape, batch in of]
    for case in cases:
        if not case.file.is_file():
            raise UserError(
                f"--shapes {case.shape}: a shape is a name in benchmarks/shapes or a folder with config.json"
            )
    check_output(args.output_dir, needed=2**20)
    now, lines = environment(), read(args.output_dir / f"{NAME}.jsonl")
    known = [(line["mode"], line["arguments"]) for line in lines if is_alike(line, now)]
    for case in cases:
        missing = [name for name in names if (name, asdict(case)) not in known]
        for name, found in in_a_process(case, missing, args.timeout).items() if missing else ():
            record(NAME, {"mode": name, **found, "arguments": asdict(case)}, args.output_dir)
            print(f"{case} {name}: {found}", flush=True)


if __name__ == "__main__":
    main()
