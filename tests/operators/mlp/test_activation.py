"""SiLU-Hadamard product, GELU, softmax backward: kernels against autograd in float64."""

import pytest
import torch

from hyclora.operators.attention.softmax import softmax_bwd
from hyclora.operators.mlp.activation import GELU, SILU_MUL, gelu_bwd, gelu_fwd, silu_mul_bwd, silu_mul_fwd
from tests.helpers.kernel_checks import DTYPES, assert_as_good_as_torch, rand, strided

SHAPES = [(1, 1), (3, 37), (9, 515)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(kernels, shape, dtype):
    gate, up, dhidden = (rand(*shape, dtype=dtype, seed=i, scale=2.0) for i in range(3))

    def truth(kind):
        g, u = (t.detach().to(kind, copy=True).requires_grad_() for t in (gate, up))
        hidden = torch.nn.functional.silu(g) * u
        hidden.backward(dhidden.to(kind))
        return g.grad, u.grad, hidden.detach()

    dy, hidden = silu_mul_bwd(strided(dhidden), strided(gate), strided(up))
    ours = *dy.chunk(2, dim=1), hidden
    assert torch.equal(silu_mul_fwd(strided(gate), strided(up)), ours[2])
    for mine, theirs, exact in zip(ours, truth(dtype), truth(torch.float64), strict=True):
        assert_as_good_as_torch(mine, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 2, 3, 1030)], ids=str)
def test_softmax_bwd(kernels, shape, dtype):
    prob = torch.softmax(rand(*shape) * 3, dim=-1).to(dtype)
    dprob = rand(*shape, dtype=dtype, seed=1)
    p64, d64 = prob.double(), dprob.double()
    exact = p64 * (d64 - (p64 * d64).sum(-1, keepdim=True))
    half = prob * (dprob - (prob * dprob).sum(-1, keepdim=True))
    assert_as_good_as_torch(softmax_bwd(dprob.transpose(0, 1).contiguous().transpose(0, 1), prob), half, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu(kernels, shape, dtype):
    """The one with erf; that with tanh is off by up to 5e-4."""
    up, dhidden = rand(*shape, dtype=dtype, scale=2.0), rand(*shape, dtype=dtype, seed=1)

    def truth(kind):
        x = up.detach().to(kind, copy=True).requires_grad_()
        hidden = torch.nn.functional.gelu(x)
        hidden.backward(dhidden.to(kind))
        return x.grad, hidden.detach()

    ours = gelu_bwd(strided(dhidden), strided(up))
    assert torch.equal(gelu_fwd(strided(up)), ours[1])
    for mine, theirs, exact in zip(ours, truth(dtype), truth(torch.float64), strict=True):
        assert_as_good_as_torch(mine, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [SILU_MUL, GELU], ids=["silu", "gelu"])
def test_gradients_in_place(kernels, activation, shape, dtype):
    """Bit for bit those that have memory of their own; what stands beside the inputs is not touched."""
    (n_rows, n_cols), n = shape, len(activation.slots)
    y, dhidden = rand(n_rows, n * n_cols + 3, dtype=dtype, scale=2.0), rand(*shape, dtype=dtype, seed=1)
    inputs, beside = [y[:, i * n_cols : (i + 1) * n_cols] for i in range(n)], y[:, n * n_cols :].clone()
    dy, hidden = activation.bwd(dhidden, *inputs)
    activation.bwd_(dhidden, *inputs)
    assert torch.equal(y, torch.cat((dy, beside), dim=1)) and torch.equal(dhidden, hidden)
