"""How long one row may be on a card: the longest that the plan has room for, trained on with that card's memory.

    python -m benchmarks.longest_rows                              # Llama-3-8B's shape on seven cards
    python -m benchmarks.longest_rows --seconds 600                # at full depth as far as ten minutes a step allow
    python -m benchmarks.longest_rows --cards 80 --shape llama-2-70b
    python -m benchmarks.longest_rows --cards 8 24 --tokens 12288 168960    # rows of your own choice

Random weights in NF4, LoRA of rank 32 on all seven linears, one row of random tokens. For each card the plan chooses
the mode with the longest row, whose slots fit into --host; CUDA graphs, which take more, are not among them. Embeddings
are in host memory where that makes the row longer, or of --tokens where these have no room otherwise. A process
of its own calibrates on rows of 2048 tokens, as a run does whose first rows are short, and then takes one step on the
long row: forward, backward, AdamW. A row that runs out of memory stays as a line, and one of 5 % fewer tokens is tried,
at most twice.

Cards are in GiB. A card is so much memory less half a GiB for the driver and CUDA's context, which no allocator counts:
of the GPU at hand torch may take no more (set_per_process_memory_fraction). `context_mib` of a line is what these took.
Some cards have less than their name says, those of 80 GB a little over 79 GiB: name what yours has. Random weights are
drawn in 16 bit before they are packed, so the cap holds from the first micro-step on, not before.

Where a step would take longer than --seconds, fewer layers are run, at least two. How long it would take is an estimate
from FLOPs: causal attention at 450 TFLOP/s, products with weights at 600, what is run twice counted twice. Memory is
linear in the layers (plan_check.py), and the cap is lowered by what the plan counts for the missing ones, gaps of the
allocator included, so that such a row fits only if the whole model would. `full` of a line is the count for all layers.
`seconds` is of the first long step, so pinning host memory is in it.

On a CPU (to try it out) there is no cap, nothing is offloaded, and only what autograd keeps is measured. A row that
this commit has measured on this device is not measured again.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from benchmarks.jobs import number
from benchmarks.peers import OUT_OF_MEMORY, alone, answer
from benchmarks.plan_check import Case, batch_of, beside_allocator, line_of, model_of, predict
from benchmarks.record import RESULTS, is_alike, read, record
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point

NAME = "longest_rows"
CARDS = (8, 12, 16, 24, 40, 48, 80)  # GiB
GIB, MIB = 2**30, 2**20
BESIDE = GIB // 2  # of a card: the driver and CUDA's context
MULTIPLE = 1024  # tokens
CALIBRATED_ON = 2048
SHORTER, TRIES = 0.95, 3
LEAST_LAYERS = 2  # the plan's peak is in a layer that has one below it
ATTENTION, PRODUCTS = 450e12, 600e12  # FLOP/s of a Hopper GPU
LOADING = 180  # seconds


@dataclass(frozen=True)
class Row:
    """A row on a card of so many GiB. limit: MiB that torch's allocator may take for the layers that are run."""

    card: int
    mode: str
    case: Case
    limit: int

    def __str__(self) -> str:
        depth = f"{self.case.layers} of {self.case.config(0)['num_hidden_layers']} layers"
        return f"{self.case.shape}, {self.card} GiB: {self.case.seq_len} tokens, {self.mode}, {depth}"


def seconds_a_layer(shape, tokens: int) -> float:
    """An estimate, not a measurement, of one layer's part of a step: its forward, that again, and backward."""
    forward = 2 * tokens**2 * shape.q  # Q K^T and P V, the half of each that is not masked
    weights = sum(linear.weight.numel() for group in shape.groups.values() for linear in group.linears)
    return forward * (1 + 1 + 2.5) / ATTENTION + 2 * tokens * weights * 3 / PRODUCTS


def choose_mode(shape, card: int, args: argparse.Namespace, tokens: int | None = None):
    """The mode with the longest row on a card, and its tokens; UserError if none has room for MULTIPLE of them.

    Embeddings stay on the card if so many tokens have room beside them.
    """
    from hyclora.utils.planning import MODES, Savers
    from hyclora.utils.planning.fitting import Load, longest
    from hyclora.utils.planning.need import RESERVE
    from hyclora.utils.planning.units import parse_size

    host = parse_size(args.host, "--host", or_none=True)
    gpu = card * GIB - BESIDE + RESERVE  # the plan leaves RESERVE for the driver and CUDA

    def rows(modes: list) -> dict:
        return {
            mode: longest(Savers(shape, mode.config), Load.full(1, 0, checkpointing=mode.checkpointing), gpu, host)
            for mode in modes
        }

    modes = [mode for mode in MODES if not mode.config.cuda_graphs and args.match in mode.name]
    found = rows([mode for mode in modes if not (args.device == "cpu" and mode.config.offload)])
    if not shape.tied and (tokens is None or tokens > max(found.values(), default=0)):
        found |= rows([mode.with_embeddings_on_host for mode in found])
    if not found:
        raise UserError(
            f"--match {args.match}: no mode that can be measured here is called so; python -m hyclora.plan lists them"
        )
    mode = max(found, key=found.get)
    if found[mode] < MULTIPLE:
        raise UserError(f"--cards {card}: not even a row of {MULTIPLE} tokens fits there, leave that card out")
    return mode, found[mode]


def planned(args: argparse.Namespace, shape, card: int, tokens: int | None) -> Iterator[Row]:
    """The row of a card, of so many tokens or as many as fit, and shorter ones."""
    mode, most = choose_mode(shape, card, args, tokens)
    tokens = tokens or most // MULTIPLE * MULTIPLE
    for _ in range(TRIES):
        layers = args.layers
        if layers is None:
            layers = max(LEAST_LAYERS, int(args.seconds / seconds_a_layer(shape, tokens)))
        layers = min(layers or len(shape.layers), len(shape.layers))
        case = Case(
            args.shape, 1, tokens, mode.config_arguments, base=args.base, lora_rank=args.lora_rank,
            checkpointing=mode.checkpointing, layers=layers, device=args.device,
        )  # fmt: skip
        run, full = predict(case, layers), predict(case, 0)
        limit = int((card * GIB - BESIDE) / MIB - sum(full[name] - run[name] for name in ("static_mib", "held_mib")))
        if limit <= 0:
            raise UserError(f"--tokens {tokens}: layers that are not run would take all of {card} GiB, name fewer")
        yield Row(card, mode.name, case, limit)
        tokens = int(tokens * SHORTER) // MULTIPLE * MULTIPLE
        if not tokens:
            return


def measure(case: Case, limit: int) -> dict:
    """One step on the case's row in this process, of which torch may take `limit` MiB of the GPU."""
    import torch

    from hyclora.utils.profiling import MicroStep

    model = model_of(case)
    vocab, on_a_gpu = model.config.vocab_size, case.device == "cuda"
    if on_a_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit * MIB / torch.cuda.mem_get_info()[1])
    short = replace(case, seq_len=min(case.seq_len, CALIBRATED_ON))
    step = MicroStep(model, batch_of(case, vocab), batch_of(short, vocab))
    start = time.perf_counter()
    found = step.memory()
    if not on_a_gpu:
        return found
    step.optimizer.step()
    torch.cuda.synchronize()
    found["seconds"] = round(time.perf_counter() - start, 2)
    sizes = {"reserved": torch.cuda.max_memory_reserved(), "card": beside_allocator()}
    return found | {f"{name}_mib": round(size / MIB, 1) for name, size in sizes.items()}


def in_a_process(row: Row, timeout: float) -> dict:
    """`measure` in a process of its own; a failure is {"error": its cause}."""
    told = json.dumps({"case": asdict(row.case), "limit": row.limit})
    return alone([sys.executable, "-m", f"benchmarks.{NAME}", "--row", told], timeout)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=number(1), nargs="+", default=CARDS, help="GiB of each")
    parser.add_argument("--shape", default="llama-3-8b", help="in benchmarks/shapes, or a folder")
    parser.add_argument(
        "--tokens", type=number(2), nargs="+", help="of each card's row; default: as the plan has room for"
    )
    parser.add_argument("--layers", type=number(0), help="to run; 0: all; default: as many as --seconds allows")
    parser.add_argument("--seconds", type=number(1), default=40, help="that a step may take, as it is estimated")
    parser.add_argument("--host", default="100GB", help="host memory for what is offloaded")
    parser.add_argument("--match", default="", help="only modes whose name has this in it")
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4", help="frozen weights")
    parser.add_argument("--lora_rank", type=number(1), default=32)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries it out")
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what a process of its own gets
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """UserError for what cannot be measured here."""
    import torch

    if not Case(args.shape).file.is_file():
        raise UserError(f"--shape {args.shape}: a shape is a name in benchmarks/shapes or a folder with a config.json")
    if args.tokens and len(args.tokens) != len(args.cards):
        raise UserError(f"--tokens has {len(args.tokens)} numbers for {len(args.cards)} cards: give one for each")
    if args.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise UserError("this measures GPU memory: it needs a GPU (or --device cpu)")
    there = torch.cuda.mem_get_info()[1]
    if max(args.cards) * GIB - BESIDE > there:
        raise UserError(f"--cards {max(args.cards)}: the GPU has {there / GIB:.1f} GiB, name no larger card")


@entry_point
def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.row:
        told = json.loads(args.row)
        return answer(lambda: measure(Case(**told["case"]), told["limit"]))
    from hyclora.utils.planning import Shape
    from hyclora.utils.results import environment

    check(args)
    check_output(args.output_dir, needed=2**20)
    shape = Shape(Case(args.shape).file, args.base, args.lora_rank)
    tokens = args.tokens or [None] * len(args.cards)
    rows = [planned(args, shape, *pair) for pair in zip(args.cards, tokens, strict=True)]
    firsts = [next(tries) for tries in rows]  # a card without room is told of before anything is run
    now, lines = environment(), read(args.output_dir / f"{NAME}.jsonl")
    known = {(line["card_gib"], json.dumps(line["arguments"])): line for line in lines if is_alike(line, now)}
    for first, shorter in zip(firsts, rows, strict=True):
        for row in (first, *shorter):
            line = known.get((row.card, json.dumps(asdict(row.case))))
            if line is None:
                print(row, end=" ... ", flush=True)
                line = line_of_row(row, in_a_process(row, LOADING + 3 * args.seconds))
                record(NAME, line, args.output_dir)
                print(f"measured {line['measured']}, predicted {line['predicted']}", flush=True)
            if line["measured"].get("error") != OUT_OF_MEMORY:
                break


def line_of_row(row: Row, measured: dict) -> dict:
    """A line of results."""
    own = {"card_gib": row.card, "mode": row.mode, "limit_mib": row.limit, "fits": "error" not in measured}
    seconds = {name: measured[name] for name in ("seconds",) if name in measured}
    return own | seconds | line_of(row.case, measured, alone_on_card=True)


if __name__ == "__main__":
    main()
