"""The count of bytes that autograd keeps: exact where it can be computed by hand, and without a trace."""

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hyclora.utils.profiling import buffered_bytes


class Square(nn.Module):
    """tanh of a scaled and shifted input, squared through two views of it."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_buffer("shift", torch.ones(size))

    def forward(self, x):
        hidden = torch.tanh(x * self.weight + self.shift)
        return (hidden.view(-1) * hidden.flatten()).sum()


def test_each_storage_counts_once_and_residents_do_not():
    # tanh's result, saved three times; x is the batch's, weight and shift are the model's.
    assert buffered_bytes(Square(64), {"x": torch.randn(8, 64)}) == 8 * 64 * 4


def test_nothing_is_kept_of_what_is_not_trained():
    model = Square(64).requires_grad_(False)
    assert buffered_bytes(model, {"x": torch.randn(8, 64)}) == 0


def test_dropout_draws_from_a_random_state_that_comes_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    state = torch.get_rng_state()
    model.forward = lambda x: nn.Sequential.forward(model, x).sum()
    assert buffered_bytes(model, {"x": torch.randn(2, 4, generator=torch.Generator())}) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_nothing_stays_alive():
    """An operator that saves its own output, such as tanh, is freed after the count."""
    model, seen = nn.Linear(4, 4), []

    def forward(x):
        hidden = torch.tanh(nn.Linear.forward(model, x))
        seen.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden.sum()

    model.forward = forward
    assert buffered_bytes(model, {"x": torch.randn(2, 4)}) == 2 * 4 * 4
    assert seen[0].expired()
