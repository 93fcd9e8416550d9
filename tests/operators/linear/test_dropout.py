"""Masks that are made of a seed: the kernel's are the reference's, and are random."""

import math

import pytest
import torch
from torch import nn

from hyclora.operators import reference
from hyclora.operators.linear.dropout import DropoutFunction, add_dropped, draw_seed, dropped, same_dropout
from hyclora.operators.linear.lora import Projection, ProjectionGroup
from hyclora.operators.savers import Keeper
from tests.helpers.kernel_checks import DEVICE, DTYPES, rand, relative_error, strided

SEED = 2**62 + 12345678901


def seed_of(number: int = SEED) -> torch.Tensor:
    return torch.tensor([number], device=DEVICE)


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (7, 96), (2, 1030), (2, 2048), (0, 8)], ids=str)
def test_kernel_has_the_masks_of_the_reference(kernels, shape, dtype, p):
    """Bit for bit, whatever the width; a view of any row stride is read, and written to, where it is."""
    x, dx = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    for which, number in ((0, SEED), (2, 7)):
        seed = seed_of(number)
        expected = reference.dropped(x, seed, which, p)
        assert torch.equal(dropped(x, seed, which, p), expected)
        assert torch.equal(dropped(strided(x), seed, which, p), expected)
        wide = strided(dx)
        assert add_dropped(wide, x, seed, which, p) is wide
        # a GPU adds the product before that is rounded
        eps = torch.finfo(dtype).eps if DEVICE == "cuda" else 0
        torch.testing.assert_close(wide, reference.add_dropped(dx.clone(), x, seed, which, p), rtol=eps, atol=eps)


def test_philox_is_philox(monkeypatch):
    """Random123's known answer for ten rounds, key and counter of zeros, found by what each probability keeps."""
    monkeypatch.setattr(reference, "PHILOX_ROUNDS", 10)
    x, pieces = torch.ones(1, 8, device=DEVICE), [0] * 8
    for bit in reversed(range(16)):
        for i in range(8):
            least = pieces[i] + 2**bit
            pieces[i] = least if reference.dropped(x, seed_of(0), 0, least / 2**16)[0, i] > 0 else pieces[i]
    words = [low + high * 2**16 for low, high in zip(pieces[::2], pieces[1::2], strict=True)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_what_is_kept_is_scaled_as_by_peft():
    x = rand(64, 96)
    y = dropped(x, seed_of(), 0, 0.2)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.8)
    assert dropped(x * float("inf"), seed_of(), 0, 0.2).isnan().any()  # 0 * inf, as in torch


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard deviations of that of independent numbers."""
    a, b = a.flatten().double(), b.flatten().double()
    return torch.corrcoef(torch.stack((a, b)))[0, 1].item() * math.sqrt(len(a))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_are_random(p):
    """Shares within 5 sigma over 2^20 elements; neighbours, rows, projections and seeds know nothing of each other."""
    ones = torch.ones(1024, 1024, device=DEVICE)
    keys = [(SEED, 0), (SEED, 1), (SEED + 1, 0), (SEED + 2**32, 0)]
    masks = [dropped(ones, seed_of(seed), which, p) for seed, which in keys]
    for mask in masks:
        sigma = math.sqrt(p * (1 - p) / mask.numel())
        assert abs((mask > 0).double().mean().item() - (1 - p)) < 5 * sigma
        assert abs(mask.double().mean().item() - 1) < 5 * sigma / (1 - p)
        for step in (1, 2, 7, 8, 16):
            assert abs(correlation(mask[:, step:], mask[:, :-step])) < 5
        for step in (1, 2, 8):
            assert abs(correlation(mask[step:], mask[:-step])) < 5
        # what rows and columns keep is spread as a binomial's sums are
        for dim in (0, 1):
            spread = (mask > 0).double().sum(dim).var().item() / (1024 * p * (1 - p))
            assert abs(spread - 1) < 5 * math.sqrt(2 / 1023)
    for i, mask in enumerate(masks):
        assert all(abs(correlation(mask, other)) < 5 for other in masks[:i])


def test_seeds_follow_the_generator_of_the_device():
    torch.manual_seed(5)
    first, second = draw_seed(torch.device(DEVICE)), draw_seed(torch.device(DEVICE))
    torch.manual_seed(5)
    assert torch.equal(draw_seed(torch.device(DEVICE)), first) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (1,)


class Adapted(nn.Module):
    """What a Projection reads of a PEFT layer."""

    def __init__(self, n_in: int, n_out: int, rank: int, p: float):
        super().__init__()
        self.base_layer = nn.Linear(n_in, n_out)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n_in, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, n_out, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(p) if p else nn.Identity()})
        self.scaling, self.active_adapters = {"default": 1.7}, ["default"]
        self.disable_adapters, self.merged_adapters = False, []

    def forward(self, x):
        low = self.lora_B["default"](self.lora_A["default"](self.lora_dropout["default"](x)))
        return self.base_layer(x) + low * self.scaling["default"]


def make_group(*ps: float | None) -> ProjectionGroup:
    """Projections of one input with such probabilities; None: without an adapter."""
    torch.manual_seed(0)
    modules = [nn.Linear(40, 24) if p is None else Adapted(40, 24, 4, p) for p in ps]
    return ProjectionGroup([Projection(m.to(DEVICE), name) for m, name in zip(modules, "qkv", strict=False)])


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("ps", [(0.3,), (0.3, 0.3, 0.3), (0.5, None, 0.1), (0.0, 0.4)], ids=str)
def test_forward_and_all_gradients_have_one_mask(ps, interpreted, request):
    """Those of a plain formula with the masks that are read off ones, a different one for each projection."""
    if interpreted:
        request.getfixturevalue("kernels")
    group, x, keeper, switches = make_group(*ps), rand(19, 40), Keeper({}, None), {}
    with torch.no_grad():
        y = group.forward(x, group.parameters(), keeper, switches)
        seed, dy = keeper.exact(group.seed_name), rand(*y.shape, seed=4)
        low_rank = group.kept_low_rank(keeper, switches, x.dtype)
        g, dB = group.backward_low_rank(dy, low_rank, keeper)
        dx = group.backward_input(dy, g, low_rank, keeper)
        grads = group.backward_parameters(dy, g, dB, x, keeper, (True,) * len(group.parameters()))

    leaf = x.clone().requires_grad_()
    masks = [dropped(torch.ones_like(x), seed, i, p or 0.0) for i, p in enumerate(ps)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i] if (a == 0).any())
    outs = []
    for p, mask in zip(group.projections, masks, strict=True):
        A, B, *_ = p.parameters()
        frozen = p.base(leaf)
        outs.append(frozen if A is None else frozen + 1.7 * (leaf * mask) @ A.t() @ B.t())
    truth = torch.cat(outs, dim=1)
    assert relative_error(y, truth) < 1e-5
    truth.backward(dy)
    assert relative_error(dx, leaf.grad) < 1e-5
    for ours, parameter in zip(grads, group.parameters(), strict=True):
        assert parameter is None or relative_error(ours, parameter.grad) < 1e-5


def test_pefts_code_drops_the_same():
    """Every time that it runs, and what a Dropout has of its own comes back; twice differentiable."""
    group, x = make_group(0.3, 0.3), rand(19, 40)
    p, q = group.projections
    torch.manual_seed(2)
    with torch.no_grad():
        expected = [group.forward(x, group.parameters(), Keeper({}, None), {}) for _ in range(2)]
    torch.manual_seed(2)
    with same_dropout(group):
        for y in expected:
            torch.testing.assert_close(torch.cat((p.module(x), q.module(x)), dim=1), y)
    assert not {"forward"} & p.drop.__dict__.keys() and p.drop(torch.ones(9)).shape == (9,)
    leaf = rand(2, 3, 40).double().requires_grad_()
    torch.autograd.gradgradcheck(lambda t: DropoutFunction.apply(t * t, seed_of(), 1, 0.3), leaf)
