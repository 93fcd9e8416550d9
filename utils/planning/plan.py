"""The table of hyclora/plan.py: what each mode needs for a batch, whether that fits, and what is chosen."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path

import torch

from hyclora.models.config import HycloraConfig
from hyclora.utils.args import ALL_LINEAR, LoraArguments, require
from hyclora.utils.errors import UserError
from hyclora.utils.planning.budget import Choice, below_static, choose
from hyclora.utils.planning.fitting import STEP, Load, fits, longest, longest_of
from hyclora.utils.planning.kept import Savers
from hyclora.utils.planning.live import count
from hyclora.utils.planning.measuring import Bench, measure_modes
from hyclora.utils.planning.modes import MODES, Mode
from hyclora.utils.planning.need import Need
from hyclora.utils.planning.peers import PEERS, Peer, most_tokens, peer_of
from hyclora.utils.planning.recorded import times as recorded_times
from hyclora.utils.planning.shape import Shape
from hyclora.utils.planning.telling import DETAILS, SHORT, told
from hyclora.utils.planning.times import Batch, Time, fastest
from hyclora.utils.planning.times_file import KeptTimes, check_place, device_name
from hyclora.utils.planning.units import DEVICES, is_whole, parse_size, parse_tokens, say_size

NOT_MEASURED = "--measure measures them on the GPU that is planned for"
SAME_CARD = 1.05  # a card has a little less than its name says


@dataclass(frozen=True)
class Row:
    """One mode: its Need for the batch, whether that fits, the longest single row that does (0: none), its time.

    near: how near the count of dyn is. size: tokens of the batch. or_more: longer rows than that are not counted.
    hosted: the longest row with embeddings in host memory, None where that cannot be, or is so already.
    """

    mode: Mode | Peer
    need: Need
    fits: bool
    longest: int
    time: Time
    near: str
    size: int
    or_more: bool = False
    hosted: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens, as full rows have no padding; None where the time is unknown."""
        return None if self.time.ms is None else 1e3 * self.size / self.time.ms


@dataclass(frozen=True)
class Plan:
    """A row a mode, of those that fit the fastest chosen, or while times are unknown the least. str() is for a person
    at a terminal.

    Where none does, rows of those follow that would fit with embeddings in host memory.
    timed: where times are from, or why they are unknown. lost: why those that were measured are in no file, though they
    should be. budget: what memory_budget would choose, None if nothing fits, or for packed rows. peers: rows of other
    ways to train, for comparison; none is ever chosen, and there are none where they are not counted
    (peers.py).
    """

    rows: list[Row]
    batch: tuple[int, int]
    gpu: int
    host: int
    timed: str
    lost: str = ""
    budget: Choice | None = None
    peers: list[Row] = field(default_factory=list)

    @property
    def chosen(self) -> Row | None:
        """None if no mode fits."""
        return self.fastest or self.least

    @property
    def fastest(self) -> Row | None:
        """Of the modes that fit and whose time is known; the first of those that are alike: more bits before fewer."""
        known = [row for row in self.rows if row.fits and row.time.ms is not None]
        return known[fastest([row.time.ms for row in known])] if known else None

    @property
    def least(self) -> Row | None:
        """Of the modes that fit the one with the least GPU memory."""
        return min((row for row in self.rows if row.fits), key=lambda row: row.need.gpu, default=None)

    def __str__(self) -> str:
        return told(self, SHORT)

    def details(self) -> str:
        """All that is known of each mode, in lines of some 230 characters."""
        return told(self, DETAILS)


def plan(
    model, gpu: str | int, host: str | int, tokens: str | tuple[int, int] = (4, 512), base: str = "nf4",
    lora_rank: int = 16, documents: int | None = None, target_modules: list[str] | None = None,
    lora_dropout: float = 0.0, measure: bool = False, times: str | Path | None = None, device: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:  # fmt: skip
    """What a micro-step of a model with LoRA on its linear layers needs in each mode of today, and what fits.

    model: a folder, a config.json, a name in benchmarks/shapes or a Transformers configuration of a decoder; gpu,
    host: bytes as a whole number, or as 24GiB; tokens: rows and tokens a row, or as 4x512; base: nf4 or bf16 weights;
    documents: how many the rows are packed of in all, None for one a row; target_modules: names of the linear layers
    with adapters, None for all of them. measure: the times of the modes that fit, on device (None: the GPU), with what
    is being measured to tell (measuring.py); times: a file to keep them in, or without measure to read
    them from.

    static = weights + 4 x 4 bytes a trained number (itself, gradient, Adam's two) + 24 or 32 bytes a channel of each
    quantizer + GEMM workspaces; dyn = largest sum of live tensors over the moments of a step (live.py);
    gpu in all = static + dyn + 30 % of dyn, 1 GiB at most, and 96 MiB a pool for gaps (need.py there; and, beside the
    pool of graphs, the loss's tensors or what a step of AdamW has for a time) + 1 GB for the driver and CUDA's context,
    which no allocator counts. The count of dyn alone has no margin: see Mode.accuracy. Padding costs less than counted.
    Allocates nothing on a GPU, and no weights on the host, unless it measures.

    Raises UserError for a model without configuration or without such target_modules, a size, batch or count that is
    none, adapters that cannot be, for a budget below the static part of every mode, for measuring without a GPU, and
    for a file that cannot be read or written, or has times of another GPU or other versions alone.
    """
    where, times = _device(device, measure), None if times is None else Path(times)
    if times is not None and measure:
        check_place(times)
    gpu, host = parse_size(gpu, "gpu"), parse_size(host, "host", or_none=True)
    batch = parse_tokens("x".join(map(str, tokens)) if isinstance(tokens, (tuple, list)) else tokens, "tokens")
    for name, value in {"lora_rank": lora_rank, "documents": 1 if documents is None else documents}.items():
        require(is_whole(value), f"{name}={value!r} is no whole number")
    require(isinstance(lora_dropout, Real), f"lora_dropout={lora_dropout!r} is no number")
    adapters = {"target_modules": [ALL_LINEAR] if target_modules is None else target_modules}
    lora = LoraArguments(lora_rank=lora_rank, lora_dropout=lora_dropout, **adapters)  # refuses what the scripts refuse
    if documents is not None and documents < batch[0]:
        raise UserError(f"{documents} documents do not fill {batch[0]} rows: each row has one at least")
    if documents is not None and documents > batch[0] * batch[1]:
        raise UserError(f"{documents} documents are more than {batch[0]} x {batch[1]} tokens: each has one at least")
    shape = Shape(model, base, lora_rank, lora.target_modules, lora_dropout > 0)
    kept = KeptTimes(shape, lora, Batch(*batch, documents), where, times)
    known = {} if measure else kept.read()
    comparable = documents is None and target_modules is None and not lora_dropout
    recorded = recorded_times(shape, *batch) if comparable else {}

    def row_of(mode: Mode) -> Row:
        savers = Savers(shape, mode.config)
        need = count(savers, *batch, mode.checkpointing, documents)
        most = longest(savers, Load.full(1, 0, checkpointing=mode.checkpointing), gpu, host)
        time = Time(elsewhere=recorded.get(mode.name, ""))
        return Row(mode, need, fits(need, gpu, host), most, time, mode.accuracy, batch[0] * batch[1])

    rows = [row_of(mode) for mode in MODES]
    hosted = [] if shape.tied else [row_of(mode.with_embeddings_on_host) for mode in MODES]
    below_static(min(sum(row.need.static.values()) for row in (*rows, *hosted)), gpu)
    if hosted:
        rows = [replace(row, hosted=other.longest) for row, other in zip(rows, hosted, strict=True)]
    if not any(row.fits for row in rows):
        rows += [row for row in hosted if row.fits]
    lost = ""
    if why := _other_card(gpu, where):
        known = {}
    elif measure and any(row.fits for row in rows):
        known = measure_modes(Bench(shape, lora, where), [row.mode for row in rows if row.fits], kept.batch, tell)
        lost = kept.write(known)
    where_kept = f"; they are in {times}" if times and not lost else ""
    timed = f"times are of {kept.device}, from some of the layers up to all{where_kept}"
    if not known:
        missing = f"{times} has none of this model with such adapters and rows" if times else NOT_MEASURED
        missing = "no mode fits, so none was measured" if measure else missing
        timed = f"times are unknown: {why or missing}"
    rows = [replace(row, time=known.get(row.mode.name, row.time)) for row in rows]
    if documents is not None:
        return Plan(rows, batch, gpu, host, timed, lost)
    return Plan(rows, batch, gpu, host, timed, lost, _budget(shape, batch, gpu, host), _peers(shape, batch, gpu, host))


def _device(name: str | None, measure: bool) -> torch.device:
    """Where times are of; UserError where nothing can be measured."""
    require(name in (None, *DEVICES), f"device={name!r} is none of {', '.join(DEVICES)}")
    there = torch.cuda.is_available()
    if not there and (name == "cuda" or measure and name is None):
        raise UserError(
            f"times are of a GPU, and there is none here: {'measure' if measure else 'plan'} on the machine that "
            f"trains, or drop --{'measure (--device cpu tries it out)' if measure else 'device cuda'}"
        )
    return torch.device(name or ("cuda" if there else "cpu"))


def _other_card(gpu: int, device: torch.device) -> str:
    """Why the GPU at hand is not the one that is planned for, "" if it may be."""
    card = torch.cuda.mem_get_info()[1] if device.type == "cuda" else gpu
    if gpu <= card * SAME_CARD:
        return ""
    return f"the plan is for {say_size(gpu)} of GPU memory, and the {device_name(device)} here has {say_size(card)}"


def _peers(shape: Shape, batch: tuple[int, int], gpu: int, host: int) -> list[Row]:
    """A row a peer, none where such rows are not counted."""
    most, rows = most_tokens(shape), []
    known = recorded_times(shape, *batch, of=peer_of)
    for peer in PEERS if batch[1] <= most else ():
        need = peer.need(shape, *batch)
        tokens = longest_of(partial(peer.need, shape, 1), gpu, host, most)
        or_more = tokens + STEP > most
        time, near = Time(elsewhere=known.get(peer.name, "")), peer.accuracy(shape)
        rows.append(Row(peer, need, fits(need, gpu, host), tokens, time, near, batch[0] * batch[1], or_more))
    return rows


def _budget(shape: Shape, batch: tuple[int, int], gpu: int, host: int) -> Choice | None:
    """What memory_budget would choose for such rows, None if nothing fits."""
    try:
        return choose(shape, HycloraConfig(memory_budget=gpu), Load.full(*batch), gpu, host)
    except UserError:
        return None
