"""The fused q/k/v kernel: same packed bytes as the unfused path, either direction pairs with the other."""

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hyclora.operators.attention import attention
from hyclora.operators.attention.attention import AttentionSpec
from hyclora.operators.attention.fused_qkv import fits, fused_norms, fused_qkv_fwd, fused_qkv_restore, packed_qkv
from hyclora.operators.linear.lora import Projection, ProjectionGroup
from hyclora.operators.reference import padded_rank
from hyclora.operators.savers import ChannelQuant, Exact, Keeper, Step
from tests.helpers.kernel_checks import HALF, ROUNDING, rand, relative_error
from tests.helpers.small_models import llama

BATCH, SEQ_LEN = 2, 37  # more rows than a tile has


def prepare(bits, dtype, heads=3, kv_heads=1, head_dim=128, targets=("q_proj", "k_proj", "v_proj"), norms=False):
    """A spec, frozen paths [q, k, v], the stacked adapters, cos, sin, and a maker of keepers; norms: of heads."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    model = llama({"target_modules": [*targets, "down_proj"], "r": 4}, **sizes)
    layer = model.get_base_model().model.layers[0].self_attn
    group = ProjectionGroup([Projection(getattr(layer, name), name) for name in ("q_proj", "k_proj", "v_proj")])
    modules = {name: Qwen3RMSNorm(head_dim, eps) for name, eps in (("q", 1e-6), ("k", 1e-1)) if norms}
    for i, norm in enumerate(modules.values()):
        norm.weight.data = 1 + rand(head_dim, dtype=dtype, seed=7 + i, scale=0.3)
    spec = AttentionSpec(group, None, None, compensate=True, fused=True, head_dim=head_dim, norms=modules)
    savers = {name: ChannelQuant(b, "channel_group", 0.0) for name, b in zip("qkv", bits, strict=True)}
    y = rand(BATCH * SEQ_LEN, group.width, dtype=dtype, scale=2.0)
    step = Step(threshold=1, index=1)

    def keeper():
        k = Keeper(savers, step)
        for name, norm in modules.items():
            k.keep_exact(f"{name}_norm", norm.weight)
        if group.needs_input:
            rank = padded_rank(sum(p.rank for p in group.projections))
            k.keep_exact(group.xa_name, rand(BATCH * SEQ_LEN, rank, dtype=dtype, seed=5))
        return k

    for p in group.projections:
        if p.has_adapter:
            torch.nn.init.normal_(p.parameters()[1], std=0.1)
    angle = rand(1, SEQ_LEN, head_dim // 2, seed=2) * 3
    cos, sin = (torch.cat((f(angle), f(angle)), dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    return spec, y, group.low_rank(group.parameters(), dtype), cos, sin, keeper


BITS = [(2, 2, 2), (4, 4, 4), (3, 8, 2)]
PLAIN = [(2, 2, 128, False), (3, 1, 128, False), (1, 1, 256, False)]
NORMALIZED = [(2, 1, 128, True)]


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, norms, dtype, bits",
    [
        (*heads, dtype, BITS[(i + j) % 3])
        for i, heads in enumerate(PLAIN)
        for j, dtype in enumerate((torch.float32, HALF))
    ]
    + [(*heads, HALF, BITS[i % 3]) for i, heads in enumerate(NORMALIZED)],
    ids=str,
)
def test_fused_equals_unfused(kernels, heads, kv_heads, head_dim, norms, bits, dtype):
    spec, y, low_rank, cos, sin, keeper = prepare(bits, dtype, heads, kv_heads, head_dim, norms=norms)
    fused, plain = keeper(), keeper()
    out = fused_qkv_fwd(spec, y.clone(), cos, sin, BATCH, low_rank, fused)
    heads_of = attention._rotate_fwd(spec, y.clone(), cos, sin, BATCH, low_rank, plain)
    expected = torch.cat([head.flatten(0, 1).flatten(1) for head in heads_of], dim=1)
    tolerance = ROUNDING[dtype]
    assert relative_error(out, expected) < tolerance
    for name in "qkv":
        first, count, *_ = fused._layout[name]
        first_plain, *_ = plain._layout[name]
        for i in range(count):
            assert torch.equal(fused._tensors[first + i], plain._tensors[first_plain + i])
    slots = packed_qkv(plain)
    restored = fused_qkv_restore(spec, slots, cos, sin, BATCH, dtype, low_rank, plain)
    normalized = fused_norms(spec, slots, cos, sin, BATCH, dtype, low_rank, plain)
    heads_of, expected_norms, _ = attention._rotate_restored(spec, cos, sin, BATCH, low_rank, fused, False)
    for ours, theirs in zip(normalized, expected_norms, strict=True):
        assert ours.weight is theirs.weight and ours.eps == theirs.eps
        assert relative_error(ours.x, theirs.x) < tolerance
    expected = torch.cat([head.flatten(0, 1).flatten(1) for head in heads_of], dim=1)
    assert relative_error(restored, expected) < tolerance


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("k_proj",)], ids=str)
@pytest.mark.parametrize("bits", [(2, 4, 4), (3, 8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_fused_equals_unfused_without_rope(kernels, dtype, bits, targets):
    """Heads of any size: 60 and 20 channels are no whole group."""
    spec, y, low_rank, _, _, keeper = prepare(bits, dtype, heads=3, head_dim=20, targets=targets)
    fused, plain = keeper(), keeper()
    out = fused_qkv_fwd(spec, y.clone(), None, None, BATCH, low_rank, fused)
    heads_of = attention._rotate_fwd(spec, y.clone(), None, None, BATCH, low_rank, plain)
    assert relative_error(out, torch.cat([head.flatten(0, 1).flatten(1) for head in heads_of], dim=1)) < ROUNDING[dtype]
    for name in "qkv":
        for ours, theirs in zip(fused.source(name, y).packed, plain.source(name, y).packed, strict=True):
            assert torch.equal(ours, theirs)
    restored = fused_qkv_restore(spec, packed_qkv(fused), None, None, BATCH, dtype, low_rank, fused)
    heads_of, _, _ = attention._rotate_restored(spec, None, None, BATCH, low_rank, plain, False)
    expected = torch.cat([head.flatten(0, 1).flatten(1) for head in heads_of], dim=1)
    assert relative_error(restored, expected) < ROUNDING[dtype]


def test_normalized_heads_in_fp32_are_not_fused(kernels):
    for norms, dtype, fuses in (
        (True, torch.float32, False),
        (True, HALF, True),
        (False, torch.float32, True),
    ):
        spec, y, *_ = prepare((4, 4, 4), dtype, norms=norms)
        assert spec.fuses(y) == fuses


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj",), ()], ids=str)
def test_without_an_adapter_on_some(kernels, targets):
    spec, y, low_rank, cos, sin, keeper = prepare((4, 4, 4), torch.float32, targets=targets)
    out = fused_qkv_fwd(spec, y.clone(), cos, sin, BATCH, low_rank, keeper())
    heads = attention._rotate_fwd(spec, y.clone(), cos, sin, BATCH, low_rank, keeper())
    assert relative_error(out, torch.cat([head.flatten(0, 1).flatten(1) for head in heads], dim=1)) < 1e-5


def test_what_the_kernel_cannot_take():
    """Half a head must be whole groups; every slot must be quantized."""
    quantized = {name: ChannelQuant(4, "channel_group", 0.0) for name in "qkv"}
    assert fits(128, quantized) and fits(256, quantized)
    assert not fits(64, quantized) and not fits(96, quantized) and not fits(384, quantized)
    assert not fits(128, quantized | {"k": Exact()})
    assert not fits(128, quantized | {"k": ChannelQuant(4, "channel_group", 0.0, group=128)})
    assert fits(64, quantized, rotary=False) and not fits(64, quantized | {"k": Exact()}, rotary=False)
    assert fits(128, quantized, norms=True) and not fits(256, quantized, norms=True)
