"""What the processes of a run do together: the batches of an evaluation, and what all have to know alike."""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.state import PartialState
from tqdm import tqdm

Found = TypeVar("Found")


def n_ranks() -> int:
    """How many processes the run has."""
    told = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if told else 1


def is_first() -> bool:
    """Whether this process is the first of its run, which tells what all of them do."""
    return int(os.environ.get("RANK", 0)) == 0


def of_first(compute: Callable[[], Found]) -> Found:
    """What compute() gives on the first process, which alone calls it; all have to ask for it."""
    if n_ranks() == 1:
        return compute()
    found = [compute() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def of_all(own: Found) -> list[Found]:
    """What each process has, in their order; all have to ask for it."""
    found = [own] * n_ranks()
    if len(found) > 1:
        torch.distributed.all_gather_object(found, own)
    return found


def wait_on(device: torch.device) -> None:
    """Have processes that compute on the CPU wait for each other there too.

    accelerate's wait_for_everyone gives each process a GPU of its own wherever torch sees one, and there may be fewer
    of them than processes. torch's barrier takes the CPU where the processes talk by gloo.
    """
    if device.type == "cpu" and n_ranks() > 1:
        PartialState().wait_for_everyone = torch.distributed.barrier  # all instances share what one has


def share_batches(
    lengths: Sequence[int], size: int, compute: Callable[[list[int]], Found]
) -> list[tuple[list[int], Found]]:
    """The batches of an evaluation, each the places of at most `size` rows, and what compute gives for each.

    lengths: of all rows, of which the longest come first. The batches are those of one process, and so is what they
    give, if each is computed by itself: processes take turns, and all get what all have found. All of them call compute
    equally often, since those that share weights gather each layer together: who has no batch in the last turn
    computes the last one too, for nothing.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    n = n_ranks()
    rank, own = torch.distributed.get_rank() if n > 1 else 0, []
    with tqdm(total=len(order), desc="evaluating", disable=not is_first()) as bar:
        for start in range(0, len(batches), n):
            turn = batches[start : start + n]
            own.append(compute(turn[min(rank, len(turn) - 1)]))
            bar.update(sum(map(len, turn)))
    found = of_all(own)
    return [(batch, found[i % n][i // n]) for i, batch in enumerate(batches)]
