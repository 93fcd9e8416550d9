"""Will it fit, and how long may a row be: what each mode needs of GPU and host memory, before anything is loaded.

    python -m hyclora.plan MODEL --gpu 24GiB --host 64GiB --tokens 4x512
    python -m hyclora.plan MODEL --gpu 24GiB --host 64GiB --tokens 4x512 --measure --times times.json

MODEL: a folder with a config.json, that file, or a name in benchmarks/shapes. Bytes are counted from the slot table and
the buffers of the operators, not measured on this machine. What the allocator takes beside live tensors is an allowance
(plan() says of what size), and 1 GB is left for the driver. The preset `paper`, whose attention map is square, is not
among the modes. Where none fits, those follow that do with embeddings in host memory (offload_embeddings=True), unless
these are the head's weight. What PEFT alone, with or without checkpointing, and Unsloth with offloaded checkpointing
need is counted beside them where weights are NF4 and all linear layers have adapters, without dropout; they are never
chosen. All holds with PYTORCH_ALLOC_CONF=expandable_segments:True, which the scripts set.

--details has wide tables, with the longest row of each mode with embeddings in host memory, and how near its count of
live memory was to what was measured, or that it never was, or only with earlier builds. README.md has how near all was.

Times of a micro-step (a forward and a backward) are unknown until they are measured: --measure runs a few layers of the
shape with random weights on the GPU at hand, with some two seconds for each mode once kernels are compiled, and tells
what all layers would take. Long rows are measured at shorter ones, with what attention has to do taken into account.
The fastest mode that fits is chosen then. --times FILE keeps the times, and without --measure they are read from it, on
the same GPU with the same versions.
"""

import argparse
import sys
from importlib import import_module

from hyclora.utils.disk import to_path
from hyclora.utils.errors import RunStopped, UserError, entry_point
from hyclora.utils.planning.units import BASES, DEVICES

_COUNTS = ("Plan", "Row", "plan")
__all__ = ["main", *_COUNTS]


def __getattr__(name: str):
    """What counts (utils/planning/plan.py), imported when it is asked for: a mistyped option waits for no torch."""
    if name not in _COUNTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hyclora.utils.planning.plan"), name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see python -m hyclora.plan --help)")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = _Parser(
        "python -m hyclora.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder, config.json, or a name in benchmarks/shapes")
    parser.add_argument("--gpu", required=True, help="memory of the card, for instance 24GiB")
    parser.add_argument("--host", required=True, help="host memory for what is offloaded, for instance 64GiB")
    parser.add_argument("--tokens", default="4x512", help="ROWSxTOKENS of a micro-step (default: 4x512)")
    parser.add_argument("--base", choices=BASES, default="nf4", help="frozen weights (default: nf4)")
    parser.add_argument("--lora_rank", type=int, default=16, help="rank of the adapters (default: 16)")
    parser.add_argument("--target_modules", nargs="+", help="linear layers with adapters, as q_proj (default: all)")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="dropout of the adapters (default: 0)")
    parser.add_argument("--documents", type=int, help="documents that the rows are packed of, in all")
    parser.add_argument("--measure", action="store_true", help="times of a micro-step, on the GPU at hand")
    parser.add_argument(
        "--times", type=to_path, metavar="FILE", help="JSON file that --measure writes times to, else to read from"
    )
    parser.add_argument("--device", choices=DEVICES, help="to measure on (default: cuda; cpu tries it out)")
    parser.add_argument("--details", action="store_true", help="wide tables, with all that is known of each mode")
    return parser


@entry_point
def main(argv: list[str] | None = None):
    args = vars(parser().parse_args(argv))
    details = args.pop("details")
    from hyclora.utils.planning.plan import plan  # which takes seconds, for torch, transformers and PEFT

    found = plan(**args, tell=lambda line: print(line, file=sys.stderr, flush=True))
    print(found.details() if details else found)
    if found.lost:
        raise RunStopped(found.lost)
    if found.chosen is None:
        raise RunStopped("no mode fits this batch: choose fewer or shorter rows, or a larger GPU")


if __name__ == "__main__":
    main()
