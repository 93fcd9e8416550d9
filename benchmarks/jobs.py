"""What a measurement of a micro-step is of, and the command line that says it. Imports nothing that is heavy."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.workers import require_gpus
from hyclora.utils.disk import to_path
from hyclora.utils.errors import UserError

SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Job:
    """What to measure.

    setting: a key of PEERS, or arguments of HycloraConfig; rows: real ones (real_rows.py, packed_rows.py). gpus: data
    parallel, with batch_size rows each; parallel: ddp, or fsdp2, by which they share the weights.
    target_modules: of LoRA, None for all seven linears.
    """

    setting: str | dict
    shape: str
    base: str
    lora_rank: int
    batch_size: int
    seq_len: int
    steps: int
    warm_up_seq_len: int | None
    device: str
    checkpoints: str
    lora_dropout: float = 0.0
    rows: dict | None = None
    gpus: int = 1
    parallel: str = "ddp"
    target_modules: list[str] | None = None

    @property
    def folder(self) -> Path:
        """Where the shape's config.json is: a shape that is shipped, or a folder."""
        shipped = SHAPES / self.shape
        return shipped if shipped.is_dir() else Path(self.shape)

    @property
    def arguments(self) -> dict:
        """What a line of results calls so: all but what is told elsewhere in it or is only a place."""
        found = {name: value for name, value in asdict(self).items() if name not in ("setting", "checkpoints")}
        found["rows"] = self.rows and {name: _name(value) for name, value in self.rows.items()}
        # lines from before there were such options are of jobs without
        since = {"lora_dropout": 0, "rows": None, "gpus": 1, "parallel": "ddp", "target_modules": None}
        return {name: value for name, value in found.items() if name not in since or value != since[name]}


def _name(value):
    """The last part of a path, or of each in a list; anything else as it is."""
    if isinstance(value, list):
        return [_name(item) for item in value]
    return Path(value).name if isinstance(value, str) else value


def cell(text: str) -> tuple[int, int]:
    """4x512 as (batch size, sequence length)."""
    batch_size, _, seq_len = text.partition("x")
    if not (batch_size.isdecimal() and seq_len.isdecimal() and int(batch_size) and int(seq_len) > 1):
        raise argparse.ArgumentTypeError(f"{text} is not BATCHxLENGTH of two tokens or more, for instance 4x512")
    return int(batch_size), int(seq_len)


def number(least: int):
    """A whole number from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return parse


def add_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """What all jobs of one command have in common."""
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4", help="frozen weights")
    parser.add_argument("--lora_rank", type=number(1), default=16)
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=number(1), default=steps, help="timed micro-steps")
    parser.add_argument(
        "--warm_up_seq_len", type=number(2), help="calibrate on sequences this short; default: the cell's"
    )
    parser.add_argument("--checkpoints", default="ckpt", help="folder for the random checkpoints that Unsloth loads")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries it out")


def make_job(
    args: argparse.Namespace,
    shape: str,
    cell: tuple[int, int],
    setting: str | dict,
    rows: dict | None = None,
    gpus: int = 1,
    parallel: str = "ddp",
) -> Job:
    """A job of the command; refused where it has no shape or too few GPUs."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this measures GPU memory and time: it needs a GPU (or --device cpu)")
    if args.device == "cuda":
        require_gpus("--gpus", gpus)
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora_dropout {args.lora_dropout} does not lie in [0, 1)")
    names = ("base", "lora_rank", "lora_dropout", "steps", "warm_up_seq_len", "device", "checkpoints")
    common = {name: getattr(args, name) for name in names}
    job = Job(setting, shape, batch_size=cell[0], seq_len=cell[1], rows=rows, gpus=gpus, parallel=parallel, **common)
    if not job.folder.joinpath("config.json").is_file():
        raise UserError(f"{job.folder} has no config.json: a shape is a name in benchmarks/shapes or a folder")
    return job
