"""The fused GELU kernels: same packed bytes as the unfused path, either direction pairs with the other."""

import pytest
import torch

from hyclora.operators.linear.lora import Projection, ProjectionGroup
from hyclora.operators.mlp import fused_gelu, mlp
from hyclora.operators.mlp.activation import GELU
from hyclora.operators.mlp.mlp import MlpSpec
from hyclora.operators.packing.codebook import GROUP
from hyclora.operators.reference import padded_rank
from hyclora.operators.savers import ChannelQuant, Keeper, Recompute, Step
from tests.helpers.kernel_checks import HALF, ROUNDING, rand, relative_error
from tests.helpers.small_models import roberta


def prepare(n_rows, n_cols, bits, rank, dtype, adapted=True, group=GROUP):
    """A spec, the frozen path of up, its adapter, and a maker of keepers that hold x A^T."""
    lora = {"target_modules": ["intermediate.dense" if adapted else "query"], "r": rank}
    layer = roberta(lora, intermediate_size=n_cols, num_hidden_layers=1).get_base_model().roberta.encoder.layer[0]
    only = ProjectionGroup([Projection(layer.intermediate.dense, "intermediate.dense")])
    spec = MlpSpec(only, None, compensate=True, fused=True, activation=GELU)
    savers = {"up": ChannelQuant(bits, "channel_group", 0.0, group), "hidden": Recompute()}
    step = Step(threshold=1, index=1)

    def keeper():
        k = Keeper(savers, step)
        if adapted:
            k.keep_exact(only.xa_name, rand(n_rows, padded_rank(rank), dtype=dtype, seed=5))
            weight = only.parameters()[1].data
            weight.copy_(rand(*weight.shape, seed=6) / 10)
        return k

    return spec, rand(n_rows, n_cols, dtype=dtype) * 2, only.low_rank(only.parameters(), dtype), keeper


@pytest.mark.parametrize("shape, bits, adapted", [((1, 40), 2, True), ((5, 64), 3, True), ((37, 200), 4, True),
                                                  ((70, 130), 8, True), ((5, 64), 4, False)], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("group", [GROUP, 2 * GROUP])
def test_fused_equals_unfused(kernels, shape, bits, dtype, adapted, group):
    """Packed bytes bit for bit; hidden and dup within the rounding of dtype."""
    spec, frozen, low_rank, keeper = prepare(*shape, bits, 8, dtype, adapted, group)
    fused, plain = keeper(), keeper()
    hidden = fused_gelu.fused_gelu_fwd(spec, frozen.clone(), low_rank, fused)
    assert relative_error(hidden, mlp._activate_fwd(spec, frozen.clone(), low_rank, plain)) < ROUNDING[dtype]
    for ours, theirs in zip(fused.source("up", hidden).packed, plain.source("up", hidden).packed, strict=True):
        assert torch.equal(ours, theirs)
    dhidden = rand(*shape, dtype=dtype, seed=9)
    g, A = rand(shape[0], 8, dtype=dtype, seed=10), rand(8, shape[1], dtype=dtype, seed=11)
    ours = fused_gelu.fused_gelu_bwd(spec, dhidden.clone(), (g, A), low_rank, fused)
    theirs = mlp._activate_bwd(spec, torch.addmm(dhidden, g, A), low_rank, plain)
    for found, expected in zip(ours, theirs, strict=True):
        assert relative_error(found, expected) < ROUNDING[dtype]
