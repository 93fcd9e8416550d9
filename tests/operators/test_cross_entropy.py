"""Cross-entropy: kernel against autograd in float64; the linear and chunked Function against torch's own."""

import pytest
import torch
from torch import nn

from hyclora.operators import cross_entropy, reference
from hyclora.operators.cross_entropy import Targets, cross_entropy_, linear_cross_entropy
from hyclora.operators.linear.lora import Projection
from hyclora.operators.reference import IGNORED
from tests.helpers.counting import Live
from tests.helpers.kernel_checks import DEVICE, DTYPES, assert_as_good_as_torch, rand, relative_error, strided

SHAPES = [(1, 1), (3, 37), (2, 8193), (5, 20011)]


def some_labels(n_rows, vocab, ignored=(), seed=0):
    labels = torch.randint(0, vocab, (n_rows,), generator=torch.Generator().manual_seed(seed))
    labels[list(ignored)] = IGNORED
    return labels.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(kernels, shape, dtype):
    logits = rand(*shape, dtype=dtype, scale=3.0)
    labels = some_labels(*shape, ignored=[1] if shape[0] > 1 else [])

    def truth(kind):
        z = logits.detach().to(kind, copy=True).requires_grad_()
        loss = nn.functional.cross_entropy(z, labels, reduction="none")
        loss.sum().backward()
        return loss.detach(), z.grad

    ours = strided(logits)
    padding = ours.as_strided((shape[0], 5), ours.stride(), shape[1])
    loss = cross_entropy_(ours, labels)
    assert loss.dtype == torch.float32 and padding.isnan().all(), "a row's neighbour was written"
    exact_loss, exact_grad = truth(torch.float64)
    assert relative_error(loss, exact_loss) < 1e-6
    assert_as_good_as_torch(ours, truth(dtype)[1], exact_grad)
    if shape[0] > 1:
        assert loss[1] == 0 and not ours[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_equals_reference_on_large_logits_and_minus_infinity(kernels, dtype):
    """No overflow, no cancellation at 1e4; a block of the vocabulary that is masked out has no gradient."""
    logits = rand(4, 9000, dtype=dtype, scale=4.0) + 1e4
    logits[1, :8192] = float("-inf")
    logits[2] = -logits[2]
    labels = torch.tensor([0, 8999, 17, IGNORED], device=DEVICE)
    theirs = logits.clone()
    expected = reference.cross_entropy_(theirs, labels)
    loss = cross_entropy_(logits, labels)
    assert loss.isfinite().all() and logits.isfinite().all()
    assert relative_error(loss, expected) < 1e-5 and relative_error(logits, theirs) < 1e-2
    assert not logits[1, :8192].any()


def test_kernel_makes_a_label_outside_of_the_vocabulary_loud(kernels):
    logits = rand(3, 10)
    loss = cross_entropy_(logits, torch.tensor([10, 2, -1], device=DEVICE))
    assert loss.isnan().tolist() == [True, False, True]


def test_kernel_of_no_rows(kernels):
    assert cross_entropy_(rand(0, 10), some_labels(0, 10)).shape == (0,)


class Adapted(nn.Module):
    """What a Projection reads of a PEFT layer."""

    def __init__(self, vocab, width, rank, dropout, bias):
        super().__init__()
        self.base_layer = nn.Linear(width, vocab, bias)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, vocab, bias=bias)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.scaling, self.active_adapters = {"default": 1.7}, ["default"]
        self.disable_adapters, self.merged_adapters = False, []

    def forward(self, x):
        low = self.lora_B["default"](self.lora_A["default"](self.lora_dropout["default"](x)))
        return self.base_layer(x) + low * self.scaling["default"]


def head(lora, dropout=0.0, bias=False, vocab=301, width=24):
    torch.manual_seed(0)
    module = Adapted(vocab, width, 4, dropout, bias) if lora else nn.Linear(width, vocab, bias)
    module = module.to(DEVICE)
    getattr(module, "base_layer", module).weight.requires_grad_(False)
    return module


def results(module, hidden, labels, loss_of, weight=1.0):
    """Loss, and gradients of hidden and of every parameter."""
    hidden = hidden.detach().clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(module, hidden, labels)
    (loss * weight).backward()
    return [loss.detach(), hidden.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def stock(num_items=None):
    def loss_of(module, hidden, labels):
        reduction = "mean" if num_items is None else "sum"
        loss = nn.functional.cross_entropy(module(hidden).float(), labels, reduction=reduction)
        return loss if num_items is None else loss / num_items

    return loss_of


def chunked(num_items=None):
    return lambda module, hidden, labels: linear_cross_entropy(
        hidden, Targets(labels), Projection(module, "lm_head"), num_items
    )


HEADS = {
    "frozen": {"lora": False},
    "frozen with bias": {"lora": False, "bias": True},
    "lora": {"lora": True},
    "lora, dropout": {"lora": True, "dropout": 0.3},
    "lora, biases, dropout": {"lora": True, "dropout": 0.3, "bias": True},
}


@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_function_equals_torch(monkeypatch, shape, rows, num_items):
    """Loss, dh, dA, dB and biases in fp32, whatever the chunk; the dropout mask is the one PEFT would draw."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 301 * 4)
    module, hidden = head(**shape), rand(19, 24)
    labels = some_labels(19, 301, ignored=[0, 4, 5, 18])
    theirs = results(module, hidden, labels, stock(num_items), weight=2.5)
    ours = results(module, hidden, labels, chunked(num_items), weight=2.5)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype and relative_error(mine, expected) < 2e-6


def test_function_with_kernels(kernels, monkeypatch):
    """The same on Triton's side, out of poisoned memory, with three chunks."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 3 * 301 * 4)
    module, hidden, labels = head(lora=True), rand(9, 24), some_labels(9, 301, ignored=[2])
    for mine, expected in zip(
        results(module, hidden, labels, chunked()), results(module, hidden, labels, stock()), strict=True
    ):
        assert relative_error(mine, expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_half_precision_is_no_worse_than_torch(monkeypatch, shape, dtype):
    """fp32 adapters: their gradients are summed over chunks in fp32."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 8 * 301 * 2)
    module, hidden = head(**shape), rand(64, 24)
    labels = some_labels(64, 301, ignored=[3])
    exact = results(module, hidden, labels, stock())
    with torch.autocast(DEVICE, dtype=dtype):
        theirs = results(module, hidden, labels, stock())
    ours = results(module, hidden, labels, lambda m, h, t: chunked()(m, h.to(dtype), t))
    # a single number's error is luck, so the loss is held to the dtype's rounding instead
    assert relative_error(ours[0], exact[0]) < torch.finfo(dtype).eps / 16
    for mine, torchs, truth in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert mine.dtype == torchs.dtype
        assert relative_error(mine, truth) <= 1.5 * relative_error(torchs, truth)


@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_no_target_at_all(shape):
    """NaN as torch's mean over nothing, 0 with a given number of items; the gradients are 0 either way."""
    module, hidden, labels = head(**shape), rand(5, 24), some_labels(5, 301, ignored=range(5))
    for num_items in (None, 7):
        ours = results(module, hidden, labels, chunked(num_items))
        theirs = results(module, hidden, labels, stock(num_items))
        assert torch.equal(ours[0].isnan(), theirs[0].isnan()) and ours[0].nan_to_num() == 0
        assert all(not g.any() for g in ours[1:]) and all(not g.any() for g in theirs[1:])


def test_backward_twice():
    """What forward kept is not overwritten."""
    module, labels = head(lora=True), some_labels(9, 301)
    hidden = rand(9, 24).requires_grad_()
    loss = chunked()(module, hidden, labels)
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss * 2, hidden)[0], 2 * once)


def test_ignored_rows_cost_no_gemm(monkeypatch):
    """The head multiplies the counted rows alone, and keeps dh of those alone."""
    seen, kept, linear = [], [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    module, hidden = head(lora=False), rand(20, 24).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        chunked()(module, hidden, some_labels(20, 301, ignored=range(0, 20, 2)))
    assert seen == [10] and (10, 24) in kept and (20, 24) not in kept


def test_chunks_are_whole_tiles_within_the_budget():
    sizes = {32000: 1024, 128256: 256, 10**9: 1}
    for vocab, rows in sizes.items():
        assert cross_entropy._chunk_rows(torch.empty(vocab, 0, dtype=torch.bfloat16)) == rows


def test_one_chunk_of_logits_at_a_time(monkeypatch):
    """Four chunks need what one does, rows of hidden apart; with a loss that, like the kernel, needs no room."""
    monkeypatch.setattr(cross_entropy, "cross_entropy_", lambda logits, labels: logits[:, 0].clone())
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 512 * 16)
    monkeypatch.setattr(cross_entropy, "TILE_ROWS", 16)
    head = Projection(nn.Linear(8, 512, bias=False, device=DEVICE).requires_grad_(False), "lm_head")

    def peak(n_rows: int) -> int:
        targets = Targets(torch.randint(0, 512, (n_rows,), device=DEVICE))
        with Live() as live:
            linear_cross_entropy(rand(n_rows, 8).requires_grad_(), targets, head, None).backward()
        return live.peak

    assert cross_entropy.CHUNK_BYTES < peak(16) <= peak(64) < peak(16) + cross_entropy.CHUNK_BYTES / 2
