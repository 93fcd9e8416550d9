"""What docstrings say of bytes, counted on the way that a GPU goes: kernels' launches are left out, all else happens.

made: bytes alive at the peak of a call, results included, arguments not. kept: bytes that autograd keeps of a forward.
T tokens of C channels in bfloat16, two bytes an element, unless a row says otherwise.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from triton.runtime.jit import KernelInterface

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.blocks import SOURCE
from hyclora.models.patch import find_patch
from hyclora.operators import cross_entropy, dispatch
from hyclora.operators.attention.fused_qkv import fused_qkv_fwd, fused_qkv_restore, packed_qkv
from hyclora.operators.attention.rope import rope, rope_bwd
from hyclora.operators.attention.softmax import softmax_bwd
from hyclora.operators.checkpoint import CheckpointFunction
from hyclora.operators.cross_entropy import Targets, cross_entropy_, linear_cross_entropy
from hyclora.operators.linear.lora import Projection
from hyclora.operators.linear.low_rank import LowRank, stack_adapters
from hyclora.operators.linear.low_rank_grad import low_rank_grads
from hyclora.operators.linear.nf4 import dequantize_4bit
from hyclora.operators.linear.residual import add_residual
from hyclora.operators.mlp.activation import silu_mul_bwd, silu_mul_fwd
from hyclora.operators.mlp.fused_mlp import fused_mlp_bwd, fused_mlp_fwd
from hyclora.operators.norm import RMSNormFunction, rms_norm_bwd, rms_norm_fwd, rms_norm_pack, rms_norm_unpack_bwd
from hyclora.operators.packing.codebook import CODEBOOKS
from hyclora.operators.packing.quantize import dequantize, dequantize_rows, quantize
from hyclora.operators.savers import ChannelQuant, Exact, Keeper, Step
from hyclora.operators.store import Store
from tests.helpers.counting import Live, kept, peak_of
from tests.helpers.offloading import LazyCopies
from tests.helpers.small_models import llama
from tests.operators.attention.test_fused_qkv import BATCH, SEQ_LEN
from tests.operators.attention.test_fused_qkv import prepare as prepare_qkv
from tests.operators.mlp.test_fused_mlp import prepare as prepare_mlp

SHAPES = [(1, 40), (7, 96), (37, 200), (65, 257)]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    """Host functions of kernels run on CPU tensors, and launch nothing."""
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)


def x(*shape: int, dtype=BF16) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


def up(n: int, multiple: int = 16) -> int:
    return -(-n // multiple) * multiple


def packed(t: int, c: int, bits: int, exact: int = 0, grouped: bool = True, group: int = 64) -> int:
    """Codes, scales and exact channels, each at a multiple of 16 bytes."""
    groups = -(-c // group)
    return up(t * groups * group // 8 * bits) + up(t * groups * 2 * grouped) + up(t * exact * 2)


def saver(c: int, bits: int, ratio: float = 0.0) -> tuple[ChannelQuant, Step]:
    """A calibrated one."""
    found, step = ChannelQuant(bits, "channel_group", ratio), Step(threshold=1, index=1)
    found.pack(x(2, c), step)
    step.index = 2
    return found, step


def tensors(value) -> list[Tensor]:
    """All tensors in what a function is given."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, LowRank | Keeper | ChannelQuant):
        value = vars(value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [t for v in values for t in tensors(v)]


def quantizing(rule: str, bits: int, function, group: int = 64):
    """Rows of a packed slot and what function makes of it."""
    book, (mean, std) = replace(CODEBOOKS[rule][bits], group=group), (lambda c: x(c, dtype=torch.float32),) * 2

    def call(t, c):
        channels = mean(c), std(c)
        if function is quantize:
            return quantize, x(t, c), *channels, book
        codes, scale = quantize(x(t, c), *channels, book)
        if function is dequantize:
            return dequantize, codes, scale, *channels, book, BF16
        return dequantize_rows, codes, scale, x(t, 2), *channels, torch.tensor([0, 1]), book, BF16, x(c)

    return call


def packing_norm(t, c):
    return rms_norm_pack, x(t, c), x(c), 1e-5, *saver(c, 3, 0.02)


def unpacking_norm(t, c):
    found, step = saver(c, 3, 0.02)
    return rms_norm_unpack_bwd, x(t, c), x(t, dtype=torch.float32), x(c), found.pack(x(t, c), step), found.book, x(t, c)


def low_rank_gradients(t, c, dtype=BF16):
    c *= 4
    dy, xa, B, g = (x(*shape, dtype=dtype) for shape in ((t, 2 * c), (t, 16), (2 * c, 16), (t, 16)))
    return low_rank_grads, dy, xa, B, [c, c], [4, 8], g


def low_rank_bytes(t, c, stripe=512):
    """Each stripe of a projection has a part of g, and each range of rows one of dB, of 16 ranks; and dB itself."""
    c *= 4
    stripes = 2 * -(-c // stripe)
    ranges = -(-t // up(-(-t // (256 // stripes)), 32))
    return 4 * 16 * (stripes * t + ranges * 2 * c) + 4 * c * (4 + 8)


def stacked(t, c):
    return stack_adapters, [(x(4, c), x(t, 4)), None, (x(8, c), x(t, 8))], [1.0, 1.0, 2.0], [t, t, t], BF16


def mlp(t, c, backward=False, group=64):
    spec, frozen, adapters, keeper = prepare_mlp(t, c, 4, 8, BF16, group=group)
    slots = keeper()
    fused_mlp_fwd(spec, frozen, adapters, slots)
    if backward:
        return fused_mlp_bwd, spec, x(t, c), None, adapters, slots
    slots.step.index = 2
    return fused_mlp_fwd, spec, frozen, adapters, keeper()


def heads(c):
    """Of q, of 128 channels; k and v have one."""
    return 1 + c % 3


def qkv(t, c, restore=False):
    spec, y, adapters, cos, sin, keeper = prepare_qkv((4, 3, 8), BF16, heads=heads(c))
    slots = keeper()
    fused_qkv_fwd(spec, y, cos, sin, BATCH, adapters, slots)
    if restore:
        return fused_qkv_restore, spec, packed_qkv(slots), cos, sin, BATCH, BF16, adapters, slots
    slots.step.index = 2
    return fused_qkv_fwd, spec, y, cos, sin, BATCH, adapters, keeper()


def nf4(t, c):
    bnb = pytest.importorskip("bitsandbytes")
    weight = bnb.nn.Params4bit(x(8 * t, 8 * c), requires_grad=False, quant_type="nf4").to("cpu")
    return dequantize_4bit, weight, x(8 * t, 8 * c)


TOKENS = BATCH * SEQ_LEN
MADE = {
    "quantize": (quantizing("channel_group", 3, quantize), lambda t, c: packed(t, c, 3)),
    "quantize, published": (quantizing("paper", 8, quantize), lambda t, c: packed(t, c, 8, grouped=False)),
    "dequantize": (quantizing("channel_group", 2, dequantize), lambda t, c: 2 * t * c),
    "dequantize_rows": (quantizing("channel_group", 4, dequantize_rows), lambda t, c: 2 * t * c),
    "rms_norm_fwd": (lambda t, c: (rms_norm_fwd, x(t, c), x(c), 1e-5), lambda t, c: t * (4 * c + 4)),
    "rms_norm_bwd": (
        lambda t, c: (rms_norm_bwd, x(t, c), x(t, c), x(t, dtype=torch.float32), x(c), x(t, c)),
        lambda t, c: 2 * t * c,
    ),
    "rms_norm_pack": (packing_norm, lambda t, c: t * (2 * c + 4) + packed(t, c, 3, math.ceil(0.02 * c))),
    "rms_norm_unpack_bwd": (unpacking_norm, lambda t, c: 2 * t * c),
    "silu_mul_fwd": (lambda t, c: (silu_mul_fwd, x(t, c), x(t, c)), lambda t, c: 2 * t * c),
    "silu_mul_bwd": (lambda t, c: (silu_mul_bwd, x(t, c), x(t, c), x(t, c)), lambda t, c: 2 * t * 3 * c),
    "fused_mlp_fwd": (mlp, lambda t, c: 2 * t * c + 2 * packed(t, c, 4)),
    "fused_mlp_bwd": (lambda t, c: mlp(t, c, backward=True), lambda t, c: 2 * t * 2 * c),
    "fused_qkv_fwd": (
        qkv, lambda t, c: packed(TOKENS, 128 * heads(c), 4) + packed(TOKENS, 128, 3) + packed(TOKENS, 128, 8)
    ),
    "fused_qkv_restore": (lambda t, c: qkv(t, c, restore=True), lambda t, c: 2 * TOKENS * 128 * (heads(c) + 2)),
    "rope": (lambda t, c: (rope, x(1, t, 3, c // 2 * 2), *[x(1, t, c)] * 2), lambda t, c: 2 * t * 3 * (c // 2 * 2)),
    "rope_bwd": (
        lambda t, c: (rope_bwd, x(1, t, 3, 2 * c), *[x(1, t, 1, 2 * c)] * 2, *[x(1, t, 2 * c)] * 2),
        lambda t, c: 2 * t * (3 + 2) * 2 * c,
    ),
    "softmax_bwd": (lambda t, c: (softmax_bwd, x(3, t, t), x(3, t, t)), lambda t, c: 2 * 3 * t * t),
    "cross_entropy_": (lambda t, c: (cross_entropy_, x(t, c), torch.zeros(t).long()), lambda t, c: 4 * t),
    "add_residual": (
        lambda t, c: (add_residual, x(t, c), x(t, 16), x(c, 16), x(t, c), True),
        lambda t, c: 0,
    ),
    "add_residual in fp32": (
        lambda t, c: (add_residual, x(t, c), x(t, 16), x(c, 16), x(t, c, dtype=torch.float32), False),
        lambda t, c: 4 * t * c,
    ),
    "stack_adapters": (stacked, lambda t, c: 2 * 16 * (c + 3 * t)),
    "dequantize_4bit": (nf4, lambda t, c: 0),
    "low_rank_grads": (low_rank_gradients, low_rank_bytes),
    "low_rank_grads in fp32": (
        partial(low_rank_gradients, dtype=torch.float32), partial(low_rank_bytes, stripe=256)
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MADE)
def test_made(name, shape):
    call, formula = MADE[name]
    assert peak_of(tensors, *call(*shape)) == formula(*shape)


def norm(t, c, bits=None, fused=False):
    savers = {"norm_in": Exact()} if bits is None else {"norm_in": saver(c, bits, 0.02)[0]}
    return RMSNormFunction.apply, x(t, c).requires_grad_(), x(c), 1e-5, Keeper(savers, AFTER), fused


def checkpointed(t, c, bits=None):
    savers = {"layer_in": Exact()} if bits is None else {"layer_in": saver(c, bits)[0]}
    return CheckpointFunction.apply, x(t, c).requires_grad_(), torch.relu, Keeper(savers, AFTER), None


def head(t, c):
    """Of c tokens t are in the loss; the adapter of the head is trained in fp32."""
    model = llama({"r": 4, "target_modules": ["lm_head"]}, num_hidden_layers=1).cpu()
    p = Projection(model.get_base_model().lm_head, "lm_head")
    labels = torch.full((max(t, c),), -100).index_fill(0, torch.arange(t), 1)
    hidden = x(max(t, c), 96, dtype=torch.float32).requires_grad_()
    return linear_cross_entropy, hidden, Targets(labels), p, None


AFTER = Step(threshold=0, index=2)
KEPT = {
    "RMSNormFunction, exact": (norm, lambda t, c: t * (2 * c + 4)),
    "RMSNormFunction": (
        lambda t, c: norm(t, c, 3), lambda t, c: 4 * t + packed(t, c, 3) + 2 * t * math.ceil(0.02 * c)
    ),
    "RMSNormFunction, fused": (
        lambda t, c: norm(t, c, 3, fused=True), lambda t, c: 4 * t + packed(t, c, 3, math.ceil(0.02 * c))
    ),
    "CheckpointFunction, exact": (checkpointed, lambda t, c: 0),
    "CheckpointFunction": (lambda t, c: checkpointed(t, c, 8), lambda t, c: packed(t, c, 8)),
    "linear_cross_entropy": (head, lambda t, c: t * 96 * 4 + 8 * t + 8 + 4 * 4 * (96 + 128)),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_kept(name, shape):
    call, formula = KEPT[name]
    function, *args = call(*shape)
    assert kept(partial(function, *args), *tensors(args)) == formula(*shape)


SIZES = {"whole groups": (256, 512, 2, 1, 128), "odd": (96, 200, 6, 2, 16)}  # C, F, H, H_kv, D
BITS = 4


class Layer:
    """A layer in fp32 with LoRA of rank 8, calibrated: its blocks, each behind its norm."""

    def __init__(self, size, **config):
        c, f, n, n_kv, d = size
        shape = {"hidden_size": c, "intermediate_size": f, "num_attention_heads": n, "num_key_value_heads": n_kv}
        self.model, self.size = llama({"r": 8}, num_hidden_layers=1, head_dim=d, **shape).cpu(), size
        apply_hyclora(self.model, HycloraConfig(iteration_threshold=1, **{"q_bit": BITS} | config))
        self.step, self.blocks = find_patch(self.model).step, find_patch(self.model).blocks
        self.step.index = 1
        for name in NORMS:
            self.run(name, *self.given(name, 3))
        self.step.index = 2

    def block(self, name: str):
        return next(b for b in self.blocks if b.name.endswith(name))

    def given(self, name: str, t: int) -> list[Tensor]:
        """The block's input, and cos, sin."""
        hidden = x(1, t, self.size[0], dtype=torch.float32).requires_grad_()
        return [self.block(NORMS[name]).forward(hidden), *[x(1, t, self.size[-1], dtype=torch.float32)] * 2]

    def run(self, name: str, y, cos, sin) -> Tensor:
        if name == "mlp":
            return self.block(name).forward(y)
        return self.block(name).forward(y, position_embeddings=(cos, sin))[0]

    def known(self, given: list[Tensor]) -> list[Tensor]:
        """What lives anyway: parameters, the savers' own, the norm's."""
        savers = [s for b in self.blocks for s in b.savers.values()]
        return [*self.model.parameters(), *tensors(savers), *given, *tensors(getattr(given[0], SOURCE)[0].packed)]


NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
# a token's elements that are kept exactly, and the widths that are packed
BLOCKS = {
    "baseline": {
        "self_attn": lambda c, f, n, n_kv, d: ((n + 2 * n_kv) * d + n * d + n, []),
        "mlp": lambda c, f, n, n_kv, d: (4 * f, []),
    },
    "intra": {
        "self_attn": lambda c, f, n, n_kv, d: (0, [c, n * d, n_kv * d, n_kv * d, n * d]),
        "mlp": lambda c, f, n, n_kv, d: (0, [c, f, f, f, f]),
    },
    "intra_inter": {
        "self_attn": lambda c, f, n, n_kv, d: (0, [n * d, n_kv * d, n_kv * d]),
        "mlp": lambda c, f, n, n_kv, d: (0, [f, f]),
    },
}
BLOCKS["intra_inter_full_fuse"] = BLOCKS["intra_inter"]
RANKS = {"self_attn": up(3 * 8) + up(8), "mlp": up(2 * 8) + up(8)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("layer_type", BLOCKS)
def test_kept_by_blocks(layer_type, size):
    """AttentionFunction and MlpFunction: their slots, and x A^T of both groups."""
    layer = Layer(size, layer_type=layer_type)
    for name, formula in BLOCKS[layer_type].items():
        exact, widths = formula(*size)
        for t in (1, 7, 40):
            given = layer.given(name, t)
            expected = 4 * t * (exact + RANKS[name]) + sum(packed(t, width, BITS) for width in widths)
            assert kept(partial(layer.run, name, *given), *layer.known(given)) == expected


# a token's elements beside what is kept: in forward, in backward. The MLP's backward has g of both groups as well;
# fused that of gate and up alone, as it is at its peak where there are parts of that for each 256 columns
WORKING = {
    ("self_attn", "intra_inter_full_fuse"): lambda c, f, n, n_kv, d: (
        2 * n * d + 2 * n_kv * d + n, 2 * (2 * n * d + 2 * n_kv * d) + n
    ),
    ("mlp", "intra_inter_full_fuse"): lambda c, f, n, n_kv, d: (3 * f, 3 * f + up(2 * 8) + 2 * f // 256 * 16),
    ("mlp", "intra_inter"): lambda c, f, n, n_kv, d: (3 * f, 6 * f + RANKS["mlp"]),
}  # fmt: skip


@pytest.mark.parametrize("name, layer_type", WORKING)
def test_working_set_of_blocks(name, layer_type):
    """At the peak: q, k, v, o, in backward their gradients too, and lse; gate, up, hidden, or their gradients."""
    size = SIZES["whole groups"]
    layer, found = Layer(size, layer_type=layer_type), []
    for t in (512, 1024):
        given = layer.given(name, t)
        with Live(*layer.known(given)) as forward:
            y = layer.run(name, *given)
        dy = torch.ones_like(y)
        with Live(*layer.known(given), y, dy) as backward:
            torch.autograd.grad(y, given[0], dy)
        found.append((forward.peak, backward.peak))
    working = [(two - one) / 512 / 4 for one, two in zip(*found, strict=True)]
    forward, backward = WORKING[name, layer_type](*size)
    slots = sum(packed(512, width, BITS) for width in BLOCKS[layer_type][name](*size)[1]) / 512 / 4
    assert working == [forward + slots + RANKS[name] - up(8), backward]


def test_slots_are_freed_before_attention_runs_again(monkeypatch):
    """Attention's backward is the peak: of what is packed only the norm's, for x, is there by then."""
    layer, packed_slots, alive = Layer(SIZES["whole groups"], layer_type="intra_inter_full_fuse"), [], []
    given, core = layer.given("self_attn", 512), layer.block("self_attn").spec.core

    def note(t):
        packed_slots.extend([StorageWeakRef(t.untyped_storage())] if t.dtype == torch.uint8 else [])
        return t.detach()

    def run(*args, stock=core.run):
        alive.append([not slot.expired() for slot in packed_slots])
        return stock(*args)

    with saved_tensors_hooks(note, lambda t: t):
        y = layer.run("self_attn", *given)
    monkeypatch.setattr(core, "run", run)
    torch.autograd.grad(y, given[0], torch.ones_like(y))
    assert alive == [[True] * 2 + [False] * 6]


@pytest.mark.parametrize("adapter, elements", [("lm_head", 2 * 128 + 96 + 4), ("q_proj", 128 + 2 * 96)])
def test_working_set_of_the_head(monkeypatch, adapter, elements):
    """A row of a chunk: its logits, twice under an adapter with x A^T, its hidden state, else also that before it."""
    model = llama({"r": 4, "target_modules": [adapter]}, num_hidden_layers=1).cpu()
    p, found = Projection(model.get_base_model().lm_head, "lm_head"), []
    for rows in (16, 32):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 128 * 4)
        with Live(*model.parameters()) as live:
            hidden = x(64, 96, dtype=torch.float32).requires_grad_()
            linear_cross_entropy(hidden, Targets(torch.ones(64).long()), p, None)
        found.append(live.peak)
    assert (found[1] - found[0]) / 16 / 4 == elements


def test_store():
    """A unit takes its tensors' bytes of host memory, each buffer at a multiple of 512."""
    store = Store(LazyCopies(), slab=2**14)
    homes = store.put([x(5, 40), x(3, 200)]), store.put([x(1000)])
    store.settle()
    assert homes and store.host_bytes == up(400, 512) + up(1200, 512) + up(2000, 512)
