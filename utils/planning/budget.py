"""What a memory budget takes: the first of the settings that can be, best first, whose largest micro-step fits.

What the user set stays as it is; open are settings that are None, and cuda_graphs="auto" (models/config.py: OPEN).
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import psutil
import torch

from hyclora.models.config import OPEN, HycloraConfig
from hyclora.utils.errors import UserError
from hyclora.utils.planning.fitting import STEP, Load, fits, longest
from hyclora.utils.planning.kept import Savers
from hyclora.utils.planning.modes import describe
from hyclora.utils.planning.need import RESERVE, Need
from hyclora.utils.planning.shape import Shape
from hyclora.utils.planning.units import parse_size, parse_tokens, say_size
from hyclora.utils.ranks import n_ranks, of_first

FEWER_BITS = (2,)  # than the default's: the last resort, as gradients are less exact
INPUTS = ("input", "input8", "input4")
FREE = {**dict.fromkeys(OPEN), "cuda_graphs": "auto"}  # all settings that a plan may choose, open


@dataclass(frozen=True)
class Choice:
    """What was chosen. config: no setting of it is open. before: the least of what is preferred and does not fit."""

    config: HycloraConfig
    need: Need = field(repr=False)
    load: Load
    budget: int
    before: tuple[str, Need] | None

    @property
    def name(self) -> str:
        return describe(self.config, self.load.checkpointing)

    def __str__(self) -> str:
        need = self.need
        static, held, reserve = (say_size(n) for n in (sum(need.static.values()), need.held, RESERVE))
        host = f", {say_size(need.on_host)} of host memory" if need.on_host else ""
        why = "nothing is preferred to it"
        if self.before is not None:
            name, other = self.before
            why = f"{name}, preferred to it, would take {say_need(other)}"
        return (
            f"{self.name}, for {self.load}: {say_size(need.gpu)} of the budget of {say_size(self.budget)} are "
            f"predicted ({static} static, {held} held beside it, {reserve} for the driver and CUDA){host}; {why}"
        )


def candidates(config: HycloraConfig, checkpointing: bool = False, tied: bool = False) -> Iterator[HycloraConfig]:
    """The settings that config leaves room for, best first.

    Slots in the default's bits; layer inputs, from which each layer is run again, a third more time for gradients that
    are as exact; slots in fewer bits. Of each, CUDA graphs before layer by layer, and GPU memory before the host's.
    Under gradient checkpointing it is only open where layer inputs wait, and whether there are graphs. After all of
    them, the same with embeddings in host memory, unless these are tied to the head.
    """
    lookups = (config.offload_embeddings,)
    if config.offload_embeddings is None:
        lookups = (False,) if tied else (False, True)
    bits = (OPEN["q_bit"], *FEWER_BITS) if config.q_bit is None else (config.q_bit,)
    where = (False, True) if config.offload is None else (config.offload,)
    graphs = ("auto", False) if config.cuda_graphs == "auto" else (config.cuda_graphs,)
    first, *fewer = itertools.product([config.layers or OPEN["layers"]], bits)
    inputs = INPUTS if config.layers is None and "layer_in" not in config.slot_savers else ()
    groups = [[first], [(kept, bits[0]) for kept in inputs], *([other] for other in fewer)]
    if checkpointing:
        groups = [[first]]
    if config.attention == "eager" and config.cuda_graphs == "auto":
        graphs = (False,)
    for lookup, group in itertools.product(lookups, groups):
        for launched, offload, (layers, q_bit) in itertools.product(graphs, where, group):
            settings = {"q_bit": q_bit, "offload": offload, "cuda_graphs": launched, "layers": layers}
            settings["offload_embeddings"] = lookup
            yield replace(config, memory_budget=None, largest_batch=None, **settings)


def choose(shape: Shape, config: HycloraConfig, load: Load, gpu: int, host: int) -> Choice:
    """The Choice of config for a budget of so many bytes of a card, and as many as there are of the host.

    UserError, one sentence, where nothing fits: the budget is below the static part; what was set is in the way, with
    the nearest settings that would fit; or no setting fits, with the longest rows that would, and the least budget.
    """
    tried: list[tuple[HycloraConfig, Need]] = []
    for one in candidates(config, load.checkpointing, shape.tied):
        need = load.need(Savers(shape, one))
        if fits(need, gpu, host):
            least = min(tried, key=lambda pair: pair[1].gpu, default=None)
            before = None if least is None else (describe(least[0], load.checkpointing), least[1])
            return Choice(one, need, load, gpu, before)
        tried.append((one, need))
    given = {name: getattr(config, name) for name, free in FREE.items() if getattr(config, name) != free}
    others = candidates(replace(config, **FREE), load.checkpointing, shape.tied) if given else ()
    others = [(one, load.need(Savers(shape, one))) for one in others]
    # where they are tied, embeddings on the device are nobody's choice
    given = {name: value for name, value in given.items() if any(getattr(one, name) != value for one, _ in others)}
    below_static(min(sum(need.static.values()) for _, need in (*tried, *others)), gpu)
    fitting = [(one, need) for one, need in others if fits(need, gpu, host)]
    budget = f"{say_size(gpu)} of GPU memory and {say_size(host)} of host memory"
    if fitting:
        one, need = min(fitting, key=lambda pair: len(_changed(pair[0], given)))
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        least = min((need for _, need in tried), key=lambda need: need.gpu)
        raise UserError(
            f"with {told} as set, {load} take {say_need(least)}, more than {budget}; the nearest that fits is "
            f"{', '.join(_changed(one, given))}: {describe(one, load.checkpointing)}, {say_need(need)}"
        )
    found = [(longest(Savers(shape, one), load, gpu, host), one) for one, _ in [*tried, *others]]
    tokens, one = max(found, key=lambda pair: pair[0])
    shorter = f"{load.rows} x {tokens} tokens would fit ({describe(one, load.checkpointing)})"
    shorter = shorter if tokens else f"not even {load.rows} x {STEP} would fit"
    one, need = min([*tried, *others], key=lambda pair: pair[1].gpu)
    raise UserError(
        f"no plan fits {load} into {budget}: {shorter}, and all of it takes {say_need(need)} at least "
        f"({describe(one, load.checkpointing)})"
    )


def below_static(static: int, gpu: int) -> None:
    """UserError for a card on which not even a model without a token has room."""
    if gpu < static + RESERVE:
        raise UserError(
            f"{say_size(gpu)} of GPU memory is below the {say_size(static + RESERVE)} that weights, adapters, "
            "gradients, Adam and CUDA take without a single token, with embeddings in host memory if they can be: "
            "choose a larger GPU or budget, or a smaller model"
        )


def choose_for(model, config: HycloraConfig) -> Choice:
    """The Choice of config.memory_budget for a PEFT model on a GPU, and config.largest_batch."""
    shape = Shape.of(model)
    positions = shape.config.max_position_embeddings
    rows, tokens = parse_tokens(config.largest_batch, "largest_batch") if config.largest_batch else (1, positions)
    # whoever has rows of one length alone is told a little too much
    load = Load(rows, tokens, rows * tokens, ragged=True, checkpointing=_checkpoints(model), processes=n_ranks())
    return choose(shape, config, load, budget_of(config), available_host())


def budget_of(config: HycloraConfig) -> int:
    """config.memory_budget in bytes; UserError for more than the card has."""
    given = config.memory_budget
    budget = parse_size(given, "memory_budget")
    card = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else budget
    if budget > card:
        raise UserError(f"memory_budget={given} is more than the {say_size(card)} that the GPU has: lower it")
    return budget


def available_host() -> int:
    """Bytes of host memory that a process may pin, where those of a machine share it; the same on every rank."""
    return of_first(lambda: psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _checkpoints(model) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _changed(one: HycloraConfig, given: dict) -> list[str]:
    """The settings that were given and are others in one, as text."""
    return [f"{name}={getattr(one, name)}" for name, value in given.items() if getattr(one, name) != value]


def say_need(need: Need) -> str:
    """GPU memory in all, and host memory if any."""
    return f"{say_size(need.gpu)}{f' and {say_size(need.on_host)} of host memory' if need.on_host else ''}"
