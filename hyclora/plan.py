"""Will it fit, and how long may a row be: what each mode needs of GPU and host memory, before anything is loaded.

    python -m hyclora.plan MODEL --gpu 24GiB --host 64GiB --tokens 4x512

MODEL: a folder with a config.json, that file, or a name in benchmarks/shapes. Bytes are counted from the slot table and
the buffers of the operators, not measured on this machine. How near the count of live memory was to what was measured
is told with each mode, and README.md has how near all of it was. What the allocator takes beside live tensors is an
allowance (plan() says of what size), and 1 GB is left for the driver. Modes that were never measured, or only with
earlier builds, say so; the preset `paper`, whose attention map is square, is not among them. What PEFT alone, with or
without checkpointing, and Unsloth with offloaded checkpointing need is counted beside them where weights are NF4 and
all linear layers have adapters, without dropout; they are never chosen. All holds with
PYTORCH_ALLOC_CONF=expandable_segments:True, which the scripts set.
"""

import argparse
from dataclasses import dataclass, field
from functools import partial
from numbers import Real

from hyclora.models.config import HycloraConfig
from hyclora.utils.args import LoraArguments, require
from hyclora.utils.errors import RunStopped, UserError, entry_point
from hyclora.utils.planning.budget import Choice, below_static, choose
from hyclora.utils.planning.fitting import STEP, Load, fits, longest, longest_of
from hyclora.utils.planning.live import Savers, count
from hyclora.utils.planning.modes import MODES, Mode
from hyclora.utils.planning.need import Need
from hyclora.utils.planning.peers import PEERS, Peer, most_tokens, peer_of
from hyclora.utils.planning.recorded import times
from hyclora.utils.planning.shape import BASES, Shape
from hyclora.utils.planning.units import is_whole, parse_size, parse_tokens, say_size
from hyclora.utils.results import table

UNKNOWN = "not measured"  # a time


@dataclass(frozen=True)
class Row:
    """One mode: its Need for the batch, whether that fits, the longest single row that does (0: none), its time.

    near: how near the count of dyn is. or_more: longer rows than that are not counted.
    """

    mode: Mode | Peer
    need: Need
    fits: bool
    longest: int
    time: str
    near: str
    or_more: bool = False

    def cells(self) -> tuple[str, ...]:
        need = self.need
        sizes = [say_size(n) for n in (sum(need.static.values()), need.dyn, need.gpu, need.pinned)]
        longest = f"{self.longest} tokens{' or more' * self.or_more}" if self.longest else "none"
        return self.mode.name, *sizes, "yes" if self.fits else "no", longest, self.time, self.near


@dataclass(frozen=True)
class Plan:
    """A row a mode; chosen: the one that fits with the least GPU memory, None if none does. str() is for a person.

    budget: what memory_budget would choose, None if nothing fits, or for packed rows. peers: rows of other ways to
    train, for comparison; none is ever chosen, and there are none where they are not counted (utils/planning/peers.py).
    """

    rows: list[Row]
    batch: tuple[int, int]
    gpu: int
    host: int
    budget: Choice | None = None
    peers: list[Row] = field(default_factory=list)

    @property
    def chosen(self) -> Row | None:
        return min((row for row in self.rows if row.fits), key=lambda row: row.need.gpu, default=None)

    def __str__(self) -> str:
        head = (
            "mode",
            "static",
            "dyn",
            "GPU in all",
            "host",
            "fits",
            "longest row",
            "a micro-step",
            "count of dyn, where measured",
        )
        first = self.rows[0].need
        parts = [f"  {name}: {say_size(size)}" for name, size in first.static.items()]
        budget = f"{say_size(self.gpu)} of GPU and {say_size(self.host)} of host memory"
        budget = f"{self.batch[0]} x {self.batch[1]} tokens, {budget}"
        lines = [head, *(row.cells() for row in self.rows)]
        told = [budget, table(lines), f"static, {self.rows[0].mode.name}:", *parts, self._verdict()]
        if self.peers:
            told += [
                "",
                "for comparison, counted, and never chosen:",
                table([head, *(row.cells() for row in self.peers)]),
            ]
        return "\n".join(told)

    def _verdict(self) -> str:
        row = self.chosen
        if row is None:
            best = max(self.rows, key=lambda row: row.longest)
            longest = f"; the longest single row is {best.longest} tokens ({best.mode.name})" if best.longest else ""
            return f"no mode fits{longest}"
        settings = ", ".join(f"{name}={value!r}" for name, value in row.mode.config_arguments.items())
        checkpointing = " and gradient checkpointing" if row.mode.checkpointing else ""
        setting = f"HycloraConfig({settings}){checkpointing}"
        least = f"least memory: {row.mode.name}, {setting}; the peak is in {row.need.peak}"
        return least if self.budget is None else f"{least}\nmemory_budget={say_size(self.gpu)!r} takes {self.budget}"


def plan(
    model, gpu: str | int, host: str | int, tokens: str | tuple[int, int] = (4, 512), base: str = "nf4",
    lora_rank: int = 16, documents: int | None = None, target_modules: list[str] | None = None,
    lora_dropout: float = 0.0,
) -> Plan:  # fmt: skip
    """What a micro-step of a model with LoRA on its linear layers needs in each mode of today, and what fits.

    model: a folder, a config.json, a name in benchmarks/shapes or a Transformers configuration of a decoder; gpu,
    host: bytes as a whole number, or as 24GiB; tokens: rows and tokens a row, or as 4x512; base: nf4 or bf16 weights;
    documents: how many the rows are packed of in all, None for one a row; target_modules: names of the linear layers
    with adapters, None for all of them.

    static = weights + 4 x 4 bytes a trained number (itself, gradient, Adam's two) + 24 or 32 bytes a channel of each
    quantizer + GEMM workspaces; dyn = largest sum of live tensors over the moments of a step (utils/planning/live.py);
    gpu in all = static + dyn + 30 % of dyn, 1 GiB at most, and 96 MiB a pool for gaps (need.py there; and, beside the
    pool of graphs, the loss's tensors or what a step of AdamW has for a time) + 1 GB for the driver and CUDA's context,
    which no allocator counts. The count of dyn alone has no margin: see Mode.accuracy. Padding costs less than counted.
    Allocates nothing on a GPU, and no weights on the host.

    Raises UserError for a model without configuration or without such target_modules, a size, batch or count that is
    none, adapters that cannot be, and for a budget below the static part of every mode.
    """
    gpu, host = parse_size(gpu, "gpu"), parse_size(host, "host", or_none=True)
    batch = parse_tokens("x".join(map(str, tokens)) if isinstance(tokens, (tuple, list)) else tokens, "tokens")
    for name, value in {"lora_rank": lora_rank, "documents": 1 if documents is None else documents}.items():
        require(is_whole(value), f"{name}={value!r} is no whole number")
    require(isinstance(lora_dropout, Real), f"lora_dropout={lora_dropout!r} is no number")
    adapters = {} if target_modules is None else {"target_modules": target_modules}
    LoraArguments(lora_rank=lora_rank, lora_dropout=lora_dropout, **adapters)  # refuses what the scripts refuse
    if documents is not None and documents < batch[0]:
        raise UserError(f"{documents} documents do not fill {batch[0]} rows: each row has one at least")
    if documents is not None and documents > batch[0] * batch[1]:
        raise UserError(f"{documents} documents are more than {batch[0]} x {batch[1]} tokens: each has one at least")
    shape = Shape(model, base, lora_rank, target_modules, lora_dropout > 0)
    recorded = documents is None and target_modules is None and not lora_dropout
    known, rows = times(shape, *batch) if recorded else {}, []
    for mode in MODES:
        savers = Savers(shape, mode.config)
        need = count(savers, *batch, mode.checkpointing, documents)
        most = longest(savers, Load.full(1, 0, checkpointing=mode.checkpointing), gpu, host)
        time = known.get(mode.name, UNKNOWN)
        rows.append(Row(mode, need, fits(need, gpu, host), most, time, mode.accuracy))
    below_static(min(sum(row.need.static.values()) for row in rows), gpu)
    if documents is not None:
        return Plan(rows, batch, gpu, host)
    return Plan(rows, batch, gpu, host, _budget(shape, batch, gpu, host), _peers(shape, batch, gpu, host))


def _peers(shape: Shape, batch: tuple[int, int], gpu: int, host: int) -> list[Row]:
    """A row a peer, none where such rows are not counted."""
    most, rows = most_tokens(shape), []
    known = times(shape, *batch, of=peer_of)
    for peer in PEERS if batch[1] <= most else ():
        need = peer.need(shape, *batch)
        tokens = longest_of(partial(peer.need, shape, 1), gpu, host, most)
        or_more = tokens + STEP > most
        time, near = known.get(peer.name, UNKNOWN), peer.accuracy(shape)
        rows.append(Row(peer, need, fits(need, gpu, host), tokens, time, near, or_more))
    return rows


def _budget(shape: Shape, batch: tuple[int, int], gpu: int, host: int) -> Choice | None:
    """What memory_budget would choose for such rows, None if nothing fits."""
    try:
        return choose(shape, HycloraConfig(memory_budget=gpu), Load.full(*batch), gpu, host)
    except UserError:
        return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see python -m hyclora.plan --help)")


@entry_point
def main(argv: list[str] | None = None):
    parser = _Parser(
        "python -m hyclora.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder, config.json, or a name in benchmarks/shapes")
    parser.add_argument("--gpu", required=True, help="memory of the card, for instance 24GiB")
    parser.add_argument("--host", required=True, help="host memory for offloaded slots, for instance 64GiB")
    parser.add_argument("--tokens", default="4x512", help="ROWSxTOKENS of a micro-step (default: 4x512)")
    parser.add_argument("--base", choices=BASES, default="nf4", help="frozen weights (default: nf4)")
    parser.add_argument("--lora_rank", type=int, default=16, help="rank of the adapters (default: 16)")
    parser.add_argument("--target_modules", nargs="+", help="linear layers with adapters, as q_proj (default: all)")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="dropout of the adapters (default: 0)")
    parser.add_argument("--documents", type=int, help="documents that the rows are packed of, in all")
    found = plan(**vars(parser.parse_args(argv)))
    print(found)
    if found.chosen is None:
        raise RunStopped("no mode fits this batch: choose fewer or shorter rows, or a larger GPU")


if __name__ == "__main__":
    main()
