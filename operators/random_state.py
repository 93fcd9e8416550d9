"""The default generator of a device, put back to where it was so that something is drawn again; or what was drawn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def get_rng_state(device: torch.device) -> Tensor:
    """State of the default generator that draws for tensors on device (a CPU byte tensor, no sync)."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Put that generator to state."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


@contextmanager
def replayed_rng(device: torch.device, state: Tensor):
    """Run with the default generator of device put back to state, and restored afterwards."""
    now = get_rng_state(device)
    set_rng_state(device, state)
    try:
        yield
    finally:
        set_rng_state(device, now)


class Draws:
    """What is drawn in the first run of a layer, given again in order in the second one.

    For CUDA graphs: no generator can be put back in one, and each replay draws anew. Keeps the tensors.
    """

    def __init__(self):
        self._drawn: list[Tensor] = []
        self._given: Iterator[Tensor] | None = None

    def next(self, draw: Callable[[], Tensor]) -> Tensor:
        if self._given is not None:
            return next(self._given)
        self._drawn.append(draw())
        return self._drawn[-1]

    def rewind(self) -> None:
        """The second run begins."""
        self._given = iter(self._drawn)
