"""The adapters of a group as one: products of the stack are those of its parts, also inside of the GEMM with W."""

import pytest
import torch

from hyclora.operators import reference
from hyclora.operators.linear.lora import Projection, ProjectionGroup
from hyclora.operators.linear.low_rank import stack_adapters
from hyclora.operators.savers import Keeper
from tests.helpers.kernel_checks import DTYPES, rand, relative_error
from tests.helpers.small_models import llama

GROUPS = {
    "one": ([(4, 30)], 21),
    "gate and up": ([(8, 40), (8, 40)], 33),
    "q, k, v of unequal ranks and widths": ([(3, 50), (5, 10), (2, 10)], 64),
    "k without an adapter": ([(4, 16), None, (6, 8)], 17),
    "only v": ([None, None, (16, 24)], 9),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_stack_is_the_sum_of_its_parts(kernels, name, dtype):
    shapes, n_cols = GROUPS[name]
    widths = [12 if shape is None else shape[1] for shape in shapes]
    scalings = [0.5 * (i + 1) for i in range(len(shapes))]
    adapters = [
        None if s is None else (rand(s[0], n_cols, seed=i), rand(s[1], s[0], seed=9 + i)) for i, s in enumerate(shapes)
    ]
    stack = stack_adapters(adapters, scalings, widths, dtype)
    expected = reference.stack_adapters(adapters, scalings, widths, dtype)
    tolerance = 0.0 if dtype == torch.float32 else 1e-2
    assert relative_error(stack.A, expected[0]) <= tolerance and relative_error(stack.B, expected[1]) <= tolerance
    x = rand(5, n_cols, seed=3)
    parts = [
        torch.zeros(5, w, device=x.device) if a is None else s * (x @ a[0].t()) @ a[1].t()
        for a, s, w in zip(adapters, scalings, widths, strict=True)
    ]
    assert relative_error((x.to(dtype) @ stack.A.t()) @ stack.B.t(), torch.cat(parts, dim=1)) < 3e-2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", ["nf4", "float32"])
@pytest.mark.parametrize("rank", [4, 8])
@torch.no_grad()
def test_a_stands_below_w(rank, base, dropout):
    """x A^T and g A come with the GEMMs of a dequantized W, and are the same as by themselves."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = llama({"r": rank, "lora_dropout": dropout}, base, **shape)
    attention = model.get_base_model().model.layers[0].self_attn
    group = ProjectionGroup([Projection(getattr(attention, f"{n}_proj"), n) for n in "qkv"])
    x, keeper, switches = rand(7, 128), Keeper({}, None), {}
    y, low_rank = group.project(x, group.parameters(), keeper, switches)
    assert relative_error(y, group.frozen(x)) < 1e-6
    if not dropout:
        assert relative_error(keeper.exact(group.xa_name), x @ low_rank.A.t()) < 1e-6
    buffer = group.buffer(7, low_rank, x)
    assert (buffer.shape[1] > group.width) == (base == "nf4" and not dropout)
    buffer[:, : group.width] = rand(7, group.width, seed=3)
    dy = buffer[:, : group.width].clone()
    found = []
    for t in (buffer, dy):
        g, _ = group.backward_low_rank(t, low_rank, keeper)
        found.append((g, group.backward_input(t, g, low_rank, keeper)))
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-6


@torch.no_grad()
def test_gradients_are_contiguous():
    """Each adapter's by itself, as adding a part of another tensor to .grad is a kernel of its own."""
    attention = llama().get_base_model().model.layers[0].self_attn
    group = ProjectionGroup([Projection(getattr(attention, f"{n}_proj"), n) for n in "qkv"])
    x, keeper, switches = rand(7, 96), Keeper({}, None), {}
    _, low_rank = group.project(x, group.parameters(), keeper, switches)
    dy = rand(7, group.width, seed=3)
    needs = tuple(t is not None for t in group.parameters())
    grads = group.backward_parameters(dy, *group.backward_low_rank(dy, low_rank, keeper), x, keeper, needs)
    assert sum(needs) == 6
    for grad, parameter, need in zip(grads, group.parameters(), needs, strict=True):
        assert grad is None if not need else grad.shape == parameter.shape and grad.is_contiguous()
