"""The default generator of a device, put back to where it was so that something is drawn again."""

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
