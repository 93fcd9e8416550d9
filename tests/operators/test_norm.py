"""RMSNorm forward and backward."""

import pytest
import torch

from hyclora.operators import reference
from hyclora.operators.norm import RMSNormFunction, rms_norm_bwd, rms_norm_fwd, rms_norm_pack, rms_norm_unpack_bwd
from hyclora.operators.savers import ChannelQuant, Exact, Keeper, Step
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


def stock(x, weight, eps=1e-5):
    """HF's LlamaRMSNorm in the dtype of its input."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    x_hat = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return weight * x_hat


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_as_good_as_torch(kernels, shape, dtype):
    x, dy = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight = 1 + 0.2 * rand(shape[1], dtype=dtype, seed=2)
    x64, w64 = x.double().requires_grad_(), weight.double()
    y64 = stock(x64, w64)
    y64.backward(dy.double())
    xt = x.clone().requires_grad_()
    yt = stock(xt, weight)
    yt.backward(dy)
    y, x_hat, rstd = rms_norm_fwd(strided(x), weight, 1e-5)
    dx = rms_norm_bwd(strided(dy), x_hat, rstd, weight)
    assert_as_good_as_torch(y, yt, y64)
    assert_as_good_as_torch(dx, xt.grad, x64.grad, slack=1.5)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_backward_has_no_layer_norm_mean_term(mean):
    """Defect of the original: LayerNorm's mean of g in RMSNorm's backward (61 % error at a mean of 1 sigma)."""
    x = rand(16, 64).double().requires_grad_()
    weight = torch.ones(64, dtype=torch.float64, device=DEVICE)
    dy = rand(16, 64, seed=1).double() + mean
    stock(x, weight).backward(dy)
    _, x_hat, rstd = reference.rms_norm_fwd(x.detach().float(), weight.float(), 1e-5)
    dx = reference.rms_norm_bwd(dy.float(), x_hat, rstd, weight.float())
    assert torch.allclose(dx.double(), x.grad, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_eps_is_the_modules(eps):
    """Defect of the original: eps fixed at 1e-5."""
    x = rand(4, 32, scale=0.05).requires_grad_()
    weight = rand(32, seed=1).requires_grad_()
    y = RMSNormFunction.apply(x, weight, eps, Keeper({"norm_in": Exact()}, Step(1)))
    expected = stock(x, weight, eps)
    assert torch.allclose(y, expected, atol=1e-6)
    got = torch.autograd.grad(y.sum(), (x, weight))
    for ours, theirs in zip(got, torch.autograd.grad(expected.sum(), (x, weight)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 33), (5, 96), (7, 257)], ids=str)
def test_packing_inside_the_kernels_changes_nothing(kernels, shape, bits, outliers, dtype):
    """The same as norm, then pack, exact channels included; dx as from the restored x_hat."""
    x, dy = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight = (1 + 0.2 * rand(shape[1], seed=2)).to(dtype)
    saver, step = ChannelQuant(bits, "channel_group", outliers), Step(threshold=1, index=1)
    y, x_hat, rstd = rms_norm_fwd(x, weight, 1e-5)
    packed = saver.pack(x_hat, step)
    step.index = 2
    ours, our_rstd, our_packed = rms_norm_pack(strided(x), weight, 1e-5, saver, step)
    assert relative_error(ours, y) < 1e-5 and relative_error(our_rstd, rstd) < 1e-6
    assert [t.shape for t in our_packed] == [t.shape for t in packed]
    # another order of summation moves rstd by a rounding, and a code with it once in a while
    ours, theirs = (saver.unpack(p, x_hat.shape, torch.float32) for p in (our_packed, packed))
    assert relative_error(ours, theirs) < 0.05
    exact = saver.outliers
    assert relative_error(ours[:, exact], x_hat[:, exact]) < 1e-6
    restored = saver.unpack(packed, x_hat.shape, torch.float32)
    expected = reference.rms_norm_bwd(dy.float(), restored, rstd, weight.float())
    tolerance = ROUNDING[dtype]
    assert relative_error(rms_norm_unpack_bwd(strided(dy), rstd, weight, packed, saver.book), expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("outliers", [0.0, 0.05])
@pytest.mark.parametrize("shape", [(1, 33), (5, 96), (7, 257)], ids=str)
def test_the_gradient_around_the_norm_is_added(kernels, shape, outliers, dtype):
    """dx + dresidual in fp32, at exact channels too; a view with any row stride, and a dtype of its own."""
    x, dy = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype, seed=1)
    weight = (1 + 0.2 * rand(shape[1], seed=2)).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else ROUNDING[dtype]
    saver = ChannelQuant(4, "channel_group", outliers)
    _, x_hat, rstd = rms_norm_fwd(x, weight, 1e-5)
    packed = saver.pack(x_hat, Step(threshold=1, index=1))
    restored = saver.unpack(packed, shape, torch.float32)
    for dresidual in (strided(rand(*shape, dtype=dtype, seed=3)), rand(shape[1], seed=4).expand(shape)):
        expected = reference.rms_norm_bwd(dy.float(), x_hat, rstd, weight, dresidual)
        dx = rms_norm_bwd(strided(dy), x_hat, rstd, weight, dresidual)
        assert dx.dtype == dtype and relative_error(dx, expected) < tolerance
        expected = reference.rms_norm_bwd(dy.float(), restored, rstd, weight, dresidual)
        dx = rms_norm_unpack_bwd(strided(dy), rstd, weight, packed, saver.book, dresidual)
        assert dx.dtype == dtype and relative_error(dx, expected) < tolerance
