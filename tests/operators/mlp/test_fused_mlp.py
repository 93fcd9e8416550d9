"""The fused MLP kernels: same packed bytes as the unfused path, either direction pairs with the other."""

import pytest
import torch

from hyclora.operators.linear.lora import Projection, ProjectionGroup
from hyclora.operators.mlp import fused_mlp, mlp
from hyclora.operators.mlp.mlp import MlpSpec
from hyclora.operators.packing.codebook import GROUP
from hyclora.operators.reference import padded_rank
from hyclora.operators.savers import ChannelQuant, Keeper, Recompute, Step
from tests.helpers.kernel_checks import DEVICE, HALF, ROUNDING, rand, relative_error
from tests.helpers.small_models import llama

SHAPES = [(1, 40), (70, 64), (9, 200)]  # 70 rows are more than a tile has
# in groups of two tiles: the second does not exist, all are whole, the last is not, or does not exist
SPARE = [(1, 40), (70, 128), (9, 200), (5, 136)]


def prepare(n_rows, n_cols, bits, rank, dtype, targets=("gate_proj", "up_proj"), group=GROUP):
    """A spec, the frozen paths of gate and up, and keepers that hold the low-rank parts."""
    lora = {"target_modules": [*targets, "down_proj"], "r": rank}
    layer = llama(lora, intermediate_size=n_cols).get_base_model().model.layers[0].mlp
    pair = ProjectionGroup([Projection(layer.gate_proj, "gate_proj"), Projection(layer.up_proj, "up_proj")])
    spec = MlpSpec(pair, None, compensate=True, fused=True)
    frozen = torch.cat([rand(n_rows, n_cols, dtype=dtype, seed=i) * 2 + i for i in range(2)], dim=1)
    savers = {name: ChannelQuant(b, "channel_group", 0.0, group) for name, b in (("gate", bits), ("up", 4))}
    savers |= {"act": Recompute(), "hidden": Recompute()}
    step = Step(threshold=1, index=1)

    def keeper():
        k = Keeper(savers, step)
        if pair.needs_input:
            rank = padded_rank(sum(p.rank for p in pair.projections))
            k.keep_exact(pair.xa_name, rand(n_rows, rank, dtype=dtype, seed=5))
        return k

    for p in pair.projections:
        if p.has_adapter:
            torch.nn.init.normal_(p.parameters()[1], std=0.1)
    return spec, frozen, pair.low_rank(pair.parameters(), dtype), keeper


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape, group", [*((s, GROUP) for s in SHAPES), *((s, 2 * GROUP) for s in SPARE)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_fused_equals_unfused(kernels, shape, group, bits, dtype):
    """Packed bytes bit for bit; hidden, dgate, dup within the rounding of dtype, in all pairings of directions."""
    spec, frozen, low_rank, keeper = prepare(*shape, bits, 8, dtype, group=group)
    fused_keeper = keeper()
    hidden = fused_mlp.fused_mlp_fwd(spec, frozen.clone(), low_rank, fused_keeper)
    plain_keeper = keeper()
    expected = mlp._activate_fwd(spec, frozen.clone(), low_rank, plain_keeper)
    tolerance = ROUNDING[dtype]
    assert relative_error(hidden, expected) < tolerance
    for name in ("gate", "up"):
        fused_packed, plain_packed = fused_keeper._layout[name], plain_keeper._layout[name]
        for ours, theirs in zip(
            _tensors(fused_keeper, fused_packed), _tensors(plain_keeper, plain_packed), strict=True
        ):
            assert torch.equal(ours, theirs)
    dhidden = rand(*shape, dtype=dtype, seed=9)
    g, A = rand(shape[0], 8, dtype=dtype, seed=10), rand(8, shape[1], dtype=dtype, seed=11)
    kept = [keeper(), keeper()]
    for k in kept:
        fused_mlp.fused_mlp_fwd(spec, frozen.clone(), low_rank, k)
    ours = fused_mlp.fused_mlp_bwd(spec, dhidden.clone(), (g, A), low_rank, kept[0])
    theirs = mlp._activate_bwd(spec, torch.addmm(dhidden, g, A), low_rank, kept[1])
    for found, expected in zip(ours, theirs, strict=True):
        assert relative_error(found, expected) < tolerance


def test_gate_and_up_are_rounded_before_the_product_as_unfused(kernels):
    """fp16, which the interpreter rounds as hardware does: as far from the truth as the unfused path, not less or more.

    On a CPU nearly every element is equal to the bit; cuBLAS and the kernel add in another order.
    """
    spec, frozen, low_rank, keeper = prepare(64, 192, 4, 8, torch.float16)
    hidden = fused_mlp.fused_mlp_fwd(spec, frozen.clone(), low_rank, keeper())
    plain = mlp._activate_fwd(spec, frozen.clone(), low_rank, keeper())
    if DEVICE == "cpu":
        assert (hidden != plain).float().mean() < 0.05
    summed = frozen.double() + keeper().exact(spec.gate_up.xa_name).double() @ low_rank.B.double().t()
    gate, up = summed.chunk(2, dim=1)
    truth = torch.nn.functional.silu(gate) * up
    ratio = relative_error(hidden, truth) / relative_error(plain, truth)
    assert 0.9 < ratio < 1.1, ratio


def _tensors(keeper, layout):
    first, count, *_ = layout
    return keeper._tensors[first : first + count]


@pytest.mark.parametrize("targets", [("gate_proj",), ("up_proj",), ()], ids=str)
def test_without_an_adapter_on_gate_or_up(kernels, targets):
    spec, frozen, low_rank, keeper = prepare(9, 70, 4, 8, torch.float32, targets)
    k = keeper()
    hidden = fused_mlp.fused_mlp_fwd(spec, frozen.clone(), low_rank, k)
    assert relative_error(hidden, mlp._activate_fwd(spec, frozen.clone(), low_rank, keeper())) < 1e-5
    dhidden, plain = rand(9, 70, seed=9), keeper()
    mlp._activate_fwd(spec, frozen.clone(), low_rank, plain)
    expected, _ = mlp._activate_bwd(spec, dhidden.clone(), low_rank, plain)
    dgate_up, again = fused_mlp.fused_mlp_bwd(spec, dhidden, None, low_rank, k)
    assert relative_error(dgate_up, expected) < 1e-5 and dgate_up.shape == (9, 140)
    assert relative_error(again, hidden) < 0.2
    assert dgate_up.device.type == DEVICE
