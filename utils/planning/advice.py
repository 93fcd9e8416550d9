"""What would fit where memory has run out, for a person: other settings, fewer rows at a time, shorter rows."""

from collections.abc import Iterator
from dataclasses import fields, replace

from hyclora.models.config import HycloraConfig
from hyclora.utils.planning.budget import FREE, available_host, candidates, say_need
from hyclora.utils.planning.fitting import STEP, Load, fits, longest
from hyclora.utils.planning.live import Need, Savers
from hyclora.utils.planning.modes import describe
from hyclora.utils.planning.shape import Shape


def advice(
    shape: Shape,
    config: HycloraConfig,
    rows: int,
    tokens: int,
    capacity: int,
    host: int | None = None,
    checkpointing: bool = False,
) -> list[str]:
    """Up to three changes after which a micro-step that had no room is predicted to fit, each a sentence: other
    settings for the same rows, bits as they are if possible; fewer rows at a time; shorter rows with what takes least.

    config: the settings that it ran with, none open. rows, tokens: how many rows of how many tokens. capacity: bytes of
    the card that the process can have, its context included; host: of host memory, by default what is available. Each
    takes less than the present settings are predicted to; empty if nothing fits. Arithmetic alone.
    """
    host = available_host() if host is None else host
    load = Load.full(rows, tokens, checkpointing=checkpointing)
    now, found = load.need(Savers(shape, config)), []

    def better(need: Need) -> bool:
        return fits(need, capacity, host) and need.gpu < now.gpu

    others = list(_others(shape, config, load))
    for one, need in others:
        if better(need):
            found.append(f"{_change(one, config, checkpointing)}: {load} take {say_need(need)}")
            break
    n = rows
    while n > 1:
        n //= 2
        need = replace(load, rows=n, real=n * tokens).need(Savers(shape, config))
        if better(need):
            found.append(
                f"{n} instead of {rows} rows at a time, more of them a step, settings as they are: {say_need(need)}"
            )
            break
    least = min([(config, now), *others], key=lambda pair: pair[1].gpu)[0]
    savers = Savers(shape, least)
    most = min(longest(savers, load, capacity, host), (tokens - 1) // STEP * STEP)
    if most and better(need := replace(load, tokens=most, real=rows * most).need(savers)):
        kept = _change(least, config, checkpointing)
        found.append(f"rows of at most {most} instead of {tokens} tokens, {kept}: {say_need(need)}")
    return found


def _change(one: HycloraConfig, config: HycloraConfig, checkpointing: bool) -> str:
    """What differs in one, with its name."""
    change = [f"{f.name}={getattr(one, f.name)}" for f in fields(one) if _differ(one, config, f.name)]
    return f"{', '.join(change)} ({describe(one, checkpointing)})" if change else "settings as they are"


def _others(shape: Shape, config: HycloraConfig, load: Load) -> Iterator[tuple[HycloraConfig, Need]]:
    """Other settings with what they take, best first: those with the same bits, then those with any."""
    free = replace(config, **FREE, memory_budget=load.need(Savers(shape, config)).gpu)
    for one in (
        *candidates(replace(free, q_bit=config.q_bit), load.checkpointing),
        *candidates(free, load.checkpointing),
    ):
        yield one, load.need(Savers(shape, one))


def _differ(one: HycloraConfig, other: HycloraConfig, name: str) -> bool:
    """Whether two settings differ; that graphs are on by themselves or by order makes none."""
    a, b = getattr(one, name), getattr(other, name)
    return bool(a) != bool(b) if name == "cuda_graphs" else a != b
