"""LayerNorm of a sum of which one part is dropped, forward and backward."""

import pytest
import torch
from torch.nn import functional

from hyclora.operators import reference
from hyclora.operators.layer_norm import (
    LayerNormFunction,
    layer_norm_bwd,
    layer_norm_fwd,
    layer_norm_pack,
    layer_norm_unpack_bwd,
)
from hyclora.operators.savers import ChannelQuant, Exact, Keeper, Step
from tests.helpers.counting import kept
from tests.helpers.kernel_checks import (
    DEVICE,
    DTYPES,
    HALF,
    ROUNDING,
    assert_as_good_as_torch,
    rand,
    relative_error,
    strided,
)

SHAPES = [(1, 33), (3, 7), (5, 96), (33, 257)]
SEED = torch.tensor([2**62 + 5], device=DEVICE)


def stock(x, residual, weight, bias, eps, p):
    """What HF's RobertaSelfOutput ends with, with the mask of SEED."""
    factors = reference.dropout_factors(x.detach(), SEED, 0, p).to(x.dtype)
    return functional.layer_norm(x * factors + residual, x.shape[-1:], weight, bias, eps)


def inputs(shape, dtype):
    x, residual, dy = (rand(*shape, dtype=dtype, seed=i) for i in range(3))
    weight = 1 + 0.2 * rand(shape[1], dtype=dtype, seed=3)
    return x, residual + 0.5, dy, weight, rand(shape[1], dtype=dtype, seed=4)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_as_good_as_torch(kernels, shape, dtype, p):
    """The mask of backward is that of forward; a mean that is not 0 is taken away."""
    x, residual, dy, weight, bias = inputs(shape, dtype)

    def truth(kind):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (x, residual)]
        y = stock(*leaves, weight.to(kind), bias.to(kind), 1e-5, p)
        y.backward(dy.to(kind))
        return y.detach(), *(leaf.grad for leaf in leaves)

    y, x_hat, rstd = layer_norm_fwd(strided(x), strided(residual), weight, bias, 1e-5, SEED, p)
    dresidual, dx = layer_norm_bwd(strided(dy), x_hat, rstd, weight, SEED, p)
    for ours, theirs, exact in zip((y, dx, dresidual), truth(dtype), truth(torch.float64), strict=True):
        assert ours.dtype == dtype
        assert_as_good_as_torch(ours, theirs, exact, slack=1.5)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_each_gradient_has_the_dtype_of_its_input(kernels, p):
    """As under autocast, where the residual is in fp32 and the block's output is not."""
    x, residual, dy, weight, bias = inputs((5, 40), torch.float32)
    y, x_hat, rstd = layer_norm_fwd(x.to(HALF), residual, weight, bias, 1e-5, SEED, p)
    assert y.dtype == x_hat.dtype == rstd.dtype == torch.float32
    found = layer_norm_bwd(dy, x_hat, rstd, weight, SEED, p, HALF)
    assert [t.dtype for t in found] == [torch.float32, HALF]
    expected = reference.layer_norm_bwd(dy, x_hat, rstd, weight, SEED, p)
    assert relative_error(found[0], expected[0]) < 1e-6 and relative_error(found[1], expected[1]) < 1e-2


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(p):
    """In fp64 and with exact x_hat, of x, the residual, weight and bias, at each seed that is drawn."""
    shapes = (4, 6), (4, 6), (6,), (6,)
    leaves = [rand(*s, seed=i).double().add(i == 2).requires_grad_() for i, s in enumerate(shapes)]

    def run(*leaves):
        torch.manual_seed(3)
        return LayerNormFunction.apply(*leaves, 1e-5, p, Keeper({"norm_in": Exact()}, Step(1)))

    assert torch.autograd.gradcheck(run, leaves)


def test_eps_is_the_modules():
    """RobertaConfig() has 1e-12 and the published checkpoints 1e-5."""
    x, weight, bias = rand(4, 32, scale=1e-3), torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    for eps in (1e-12, 1e-5):
        y = layer_norm_fwd(x, torch.zeros_like(x), weight, bias, eps)[0]
        torch.testing.assert_close(y, functional.layer_norm(x, (32,), weight, bias, eps))


@pytest.mark.parametrize("shape, bits, outliers, p", [((1, 33), 2, 0.05, 0.1), ((5, 96), 3, 0.0, 0.1),
                                                     ((7, 257), 4, 0.05, 0.0), ((3, 300), 8, 0.02, 0.1)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_packing_inside_the_kernels_changes_nothing(kernels, shape, bits, outliers, p, dtype):
    """The same as norm, then pack, exact channels included; both gradients as from the restored x_hat."""
    x, residual, dy, weight, bias = inputs(shape, dtype)
    saver, step, drop = ChannelQuant(bits, "channel_group", outliers), Step(threshold=1, index=1), (SEED, p)
    y, x_hat, rstd = layer_norm_fwd(x, residual, weight, bias, 1e-5, *drop)
    packed = saver.pack(x_hat, step)
    ours, our_rstd, our_packed = layer_norm_pack(strided(x), strided(residual), weight, bias, 1e-5, saver, *drop)
    assert relative_error(ours, y) < ROUNDING[dtype] and relative_error(our_rstd, rstd) < 1e-6
    assert [(t.shape, t.dtype) for t in our_packed] == [(t.shape, t.dtype) for t in packed]
    # another order of summation moves rstd by a rounding, and a code with it once in a while
    restored = saver.unpack(packed, x_hat.shape, torch.float32)
    assert relative_error(saver.unpack(our_packed, x_hat.shape, torch.float32), restored) < 0.05
    assert relative_error(our_packed[2], x_hat[:, saver.outliers]) < ROUNDING[dtype] or not saver.n_outliers
    expected = reference.layer_norm_bwd(dy.float(), restored, rstd, weight.float(), *drop)
    found = layer_norm_unpack_bwd(strided(dy), rstd, weight, packed, saver.book, *drop)
    assert all(relative_error(a, b) < ROUNDING[dtype] for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_kept(kernels, bits):
    """Packed x_hat and rstd alone, from which the gradient is that of the reference; and the output, derived."""
    x, residual, dy, weight, bias = inputs((32, 128), HALF)
    saver, step = ChannelQuant(bits, "channel_group", 0.01), Step(threshold=1, index=1)
    keeper, leaves = Keeper({"norm_in": saver}, step), [t.requires_grad_() for t in (x, residual)]
    found = []
    count = kept(lambda: found.append(LayerNormFunction.apply(*leaves, weight, bias, 1e-5, 0.0, keeper, True)), weight)
    state = sum(t.numel() * t.element_size() for t in (*saver.restoring, saver.outliers))
    assert count == 32 * saver.bits(128) / 8 + 32 * 4 + state
    source = keeper.source("norm_in", weight, bias)
    y, x_hat, rstd = layer_norm_fwd(x.detach(), residual.detach(), weight, bias, 1e-5)
    restored = saver.unpack(source.packed, x_hat.shape, torch.float32)
    derived = Keeper({}, step)
    derived.derive("attn_in", source)
    assert relative_error(derived.restore("attn_in"), restored * weight + bias) < 2 * ROUNDING[HALF]
    found[0].backward(dy)
    assert relative_error(x.grad, reference.layer_norm_bwd(dy.float(), restored, rstd, weight)[1]) < ROUNDING[HALF]


def test_statistics_come_to_where_the_activations_are(kernels):
    """They are loaded on the CPU, and the first forward after that is no calibration."""
    x, residual, _, weight, bias = inputs((5, 96), torch.float32)
    saver = ChannelQuant(4, "channel_group", 0.0)
    saver.pack(x, Step(threshold=1, index=1))
    expected = layer_norm_pack(x, residual, weight, bias, 1e-5, saver)[0]
    saver._set_scales(torch.device("meta"))
    assert torch.equal(layer_norm_pack(x, residual, weight, bias, 1e-5, saver)[0], expected)
    assert saver.mean.device.type == DEVICE
