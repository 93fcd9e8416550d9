"""An MLP whose output nobody reads: what it keeps and has for a time; gradients are those of exact slots."""

from functools import partial

import pytest
import torch
from triton.runtime.jit import KernelInterface

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.blocks import MlpBlock
from hyclora.models.patch import find_patch
from hyclora.operators import dispatch, token_tiles
from tests.helpers.counting import Live, kept
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import llama, roberta
from tests.operators import test_bytes

LORAS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "biases": {"lora_bias": True},
    "no adapter here": {"target_modules": ["q_proj", "query"]},
    "down alone": {"target_modules": ["down_proj", "output.dense"]},
}
SIZE = 256, 512, 2, 1, 128  # C, F, H, H_kv, D


@pytest.fixture
def launches_left_out(monkeypatch):
    """Bytes as on a GPU, as in test_bytes.py."""
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)


def mlp_of(family, lora: dict, dtype: torch.dtype, **config) -> MlpBlock:
    """The first one of a patched model, before whose norm nothing is derived, in training."""
    model = family(lora).to(dtype)
    apply_hyclora(model.train(), HycloraConfig(slot_savers={"mlp_in": "exact"}, layer_type="baseline", **config))
    return next(block for block in find_patch(model).blocks if isinstance(block, MlpBlock))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_gradients_are_those_of_exact_slots(monkeypatch, family, lora, dtype):
    """In several tiles, the last one shorter, which draw their seeds in the order of any forward; y takes no memory."""
    monkeypatch.setattr(token_tiles, "TILE_TOKENS", 16)
    block, found, drawn = mlp_of(family, lora, dtype), [], []
    given = torch.randn(3, 13, block.spec.down.width, device=DEVICE).to(dtype)
    for residual in (given.flip(0), None, given.flip(1).float()):
        for late in (False, True):
            torch.manual_seed(5)
            inputs = [t for t in (given.clone(), residual) if t is not None]
            inputs = [t.requires_grad_() for t in inputs]
            wanted = [*inputs, *(p for p in block.spec.parameters() if p is not None and p.requires_grad)]
            y = block.run(None, *inputs, late=late)
            drawn.append(torch.rand(2))
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
            found.append((y, torch.autograd.grad(y, wanted, dy)))
    for (y, expected), (promised, ours) in zip(found[::2], found[1::2], strict=True):
        assert (promised.shape, promised.dtype, promised.device) == (y.shape, y.dtype, y.device)
        assert promised.untyped_storage().nbytes() == y.element_size() and promised.isnan().all()
        near = 1e-5 if dtype == torch.float32 else 1e-2
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == b.dtype and (a - b).abs().max() <= near * b.abs().max()
    assert all(torch.equal(one, drawn[0]) for one in drawn)


def test_an_input_that_wants_no_gradient(kernels):
    block = mlp_of(llama, {}, torch.float32)
    parameters = [p for p in block.spec.parameters() if p is not None and p.requires_grad]
    given = torch.randn(1, 7, block.spec.down.width, device=DEVICE)
    found = [torch.autograd.grad(block.run(None, given, late=late).sum(), parameters) for late in (False, True)]
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(*found, strict=True))


def test_adapters_that_change_in_between_are_refused():
    block = mlp_of(llama, {}, torch.float32)
    y = block.run(None, torch.randn(1, 7, block.spec.down.width, device=DEVICE), late=True)
    next(iter(block.projections)).module.scaling["default"] *= 2
    block.projections[0].refresh()
    with pytest.raises(ValueError, match="were changed between a forward and its backward"):
        y.sum().backward()


@pytest.mark.parametrize("layers", ["input4", "slots"])
def test_kept(launches_left_out, layers):
    """Nothing beside the norm's slot, or, where that is packed, x by reference."""
    layer = test_bytes.Layer(SIZE, layers=layers)
    for t in (1, 40):
        given = layer.given("mlp", t)
        assert kept(partial(layer.block("mlp").forward, given[0], late=True), *layer.known(given)) == 0


@pytest.mark.parametrize("layers", ["input4", "slots"])
def test_working_set(launches_left_out, monkeypatch, layers):
    """gate, up and hidden of one tile, into which their gradients go; of all tokens dx and x A^T alone."""
    monkeypatch.setattr(token_tiles, "TILE_TOKENS", 512)
    layer, peaks, (c, f, *_) = test_bytes.Layer(SIZE, layers=layers), [], SIZE
    for t in (1024, 1536):
        given = layer.given("mlp", t)
        with Live(*layer.known(given)) as forward:
            y = layer.block("mlp").forward(given[0], late=True)
        dy = torch.ones(y.shape)
        with Live(*layer.known(given), y, dy) as backward:
            torch.autograd.grad(y, given[0], dy)
        assert forward.peak == 4
        peaks.append(backward.peak)
    low_rank = 16 + 16  # x A^T of both groups, filled up
    assert peaks[1] - peaks[0] == 512 * 4 * (c + low_rank)
    # the adapters, stacked and their gradients, are no more than this
    few = 4 * 3 * 16 * (2 * c + 4 * f)
    assert peaks[0] - 4 * (1024 * (c + low_rank) + 512 * (c + 3 * f)) < few + 512 * 4 * 2 * low_rank
