"""The MLP in tiles of tokens: what a whole input gives, in a working set that does not grow with it."""

import types

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models import calibration
from hyclora.models.config import POLICIES, SLOTS
from hyclora.models.patch import find_patch
from hyclora.operators import token_tiles
from hyclora.operators.savers import ChannelQuant
from tests.helpers.counting import Live
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal, offloaded
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch
from tests.models.test_blocks import check_recomputation
from tests.operators.attention.test_flash import Recorder

CONFIGS = {
    **{layer_type: {"layer_type": layer_type} for layer_type in POLICIES},
    "paper": {"scale_rule": "paper", "q_bit": 8},
    "3 bit": {"q_bit": 3},
    "outliers": {"layernorm_outlier_ratio": 0.05},
    "exact gate": {"slot_savers": {"gate": "exact", "hidden": "exact"}},
    "all quantized": {"layer_type": "intra_inter", "slot_savers": dict.fromkeys(("mlp_in", "act", "hidden"), "quant4")},
    "exact x_hat": {"slot_savers": {"norm_in": "exact"}},
}


@pytest.fixture
def tile(monkeypatch):
    """Sets the tokens of a tile; the small batches have 63, of which the last is alone in a third tile of 31."""
    return lambda n=31: monkeypatch.setattr(token_tiles, "TILE_TOKENS", n)


@pytest.fixture
def packed(monkeypatch):
    """Codes and scales that were packed, by saver, tiles put together; read() forgets them."""
    found: dict[ChannelQuant, list] = {}
    original = ChannelQuant.packed

    def note(self, codes, scale, kept=None):
        found.setdefault(self, []).append((codes, scale))
        return original(self, codes, scale, kept)

    def read():
        whole = [tuple(torch.cat(t) for t in zip(*tiles, strict=True)) for tiles in found.values()]
        counts = [len(tiles) for tiles in found.values()]
        found.clear()
        return whole, counts

    monkeypatch.setattr(ChannelQuant, "packed", note)
    return read


def statistics(model) -> list[dict]:
    savers = [s for block in find_patch(model).blocks for s in block.savers.values()]
    return [s.statistics for s in savers if isinstance(s, ChannelQuant) and s.statistics]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tiles_give_what_the_whole_gives(tile, packed, config, dtype):
    """Loss, gradients, statistics, and packed bytes in fp64, where no GEMM's rounding decides a code; while
    calibrating and after.
    """
    batches = [padded_batch(seed=seed) for seed in range(3)]
    found = []
    for n_tiles in (1, 3):
        if n_tiles == 3:
            tile()
        model = llama({"bias": "all"}, mlp_bias=True).to(dtype)
        apply_hyclora(model, HycloraConfig(iteration_threshold=2, stream=False, **config))
        found.append([(*gradients(model, batch), *packed()) for batch in batches])
        found[-1].append(statistics(model))
        assert n_tiles == max((1, *found[-1][0][3])) or config.get("layer_type") == "baseline"
    *whole, expected = found[0]
    *tiled, measured = found[1]
    # statistics are of fp32; below fp64 a code may fall to the other side of a rounding
    tolerance = {torch.float64: 1e-5, torch.float32: 5e-3, torch.bfloat16: 0.1}[dtype]
    for (loss, theirs, whole_bytes, _), (our_loss, ours, our_bytes, _) in zip(whole, tiled, strict=True):
        assert abs(our_loss - loss) <= (1e-5 if dtype != torch.bfloat16 else 0.02)
        assert largest_error(ours, theirs) < tolerance
        assert all(ours[name].dtype == dtype for name in ours)
        for a, b in zip(our_bytes, whole_bytes, strict=True):
            # nor does the order of the statistics' sums, on a CPU; on a GPU it carries a group's scale over an edge
            moved = max((x != y).float().mean().item() for x, y in zip(a, b, strict=True) if x.numel())
            assert dtype != torch.float64 or moved <= (0.0 if DEVICE == "cpu" else 5e-3)
    for ours, theirs in zip(measured, expected, strict=True):
        assert ours["count"] == theirs["count"] and ours["steps"] == theirs["steps"] == 2
        scale = 1e-5 if dtype != torch.bfloat16 else 0.02
        assert all(torch.allclose(ours[n], theirs[n], rtol=scale, atol=scale * theirs[n].abs().max()) for n in theirs)


@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_dropout_is_that_of_peft_on_the_same_tiles(tile, layer_type):
    """Backward draws what forward drew, and a calibrating pass draws it too: exact slots give stock gradients."""
    tile(17)
    model, batches = llama({"lora_dropout": 0.3}), [padded_batch(seed=seed) for seed in range(2)]
    layers = model.get_base_model().model.layers
    for layer in layers:

        def in_tiles(mlp, x):
            parts = [type(mlp).forward(mlp, part) for part in x.reshape(-1, x.shape[-1]).split(17)]
            return torch.cat(parts).view(x.shape)

        layer.mlp.forward = types.MethodType(in_tiles, layer.mlp)
    stock = [gradients(model, batch) for batch in batches]
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=8, iteration_threshold=1))
    for batch, (loss, expected) in zip(batches, stock, strict=True):
        our_loss, ours = gradients(model, batch)
        assert abs(our_loss - loss) < 1e-5
        assert largest_error(ours, expected) < (1e-5 if layer_type == "baseline" else 0.1)


@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_no_tensor_of_all_tokens_and_channels(tile, layer_type, monkeypatch):
    """Calibrating or not; a whole input takes [T, 2 F] at once."""
    monkeypatch.setattr(calibration, "BUCKETS", 2**12)  # of contexts, however many tokens there are
    model, batch = llama(intermediate_size=600, num_hidden_layers=1), padded_batch(rows=4, width=64)

    def largest() -> int:
        apply_hyclora(model, HycloraConfig(layer_type=layer_type, iteration_threshold=1, stream=False))
        with Recorder() as recorder:
            for _ in range(2):
                gradients(model, batch)
        remove_hyclora(model)
        return recorder.largest

    assert largest() >= 256 * 1200
    tile(32)
    assert largest() <= 600 * 96  # a weight


@pytest.mark.parametrize("layer_type", [name for name in POLICIES if name != "baseline"])
def test_the_working_set_does_not_grow_with_the_tokens(tile, layer_type):
    """Peak bytes of the block a token: what is kept of it, x, y and their gradients, but not gate, up and hidden."""
    width, inner = 16, 400
    model = llama(
        {"r": 2}, num_hidden_layers=1, hidden_size=width, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=inner,
    )  # fmt: skip
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, iteration_threshold=3))
    block = next(b for b in find_patch(model).blocks if b.name.endswith("mlp"))
    norm = next(b for b in find_patch(model).blocks if b.name.endswith("post_attention_layernorm"))

    def peak(tokens: int) -> int:
        x = torch.randn(1, tokens, width, device=DEVICE, requires_grad=True)
        find_patch(model).step.index += 1
        y = norm.forward(x)
        with Live() as live:
            block.forward(y).backward(x.detach())
        return live.peak

    def a_token() -> float:
        """Of a forward that calibrates and of one that does not, whichever is more."""
        find_patch(model).step.index = 0
        for block in find_patch(model).blocks:
            for saver in block.savers.values():
                saver._last_step = 0
        calibrating = (peak(1024) - peak(512)) / 512
        find_patch(model).step.index = 9
        return max(calibrating, (peak(1024) - peak(512)) / 512)

    assert a_token() > 4 * 3 * inner
    tile(64)
    kept = {"intra": 4, "intra_inter": 2, "intra_inter_full_fuse": 2}[layer_type] * inner * 4.5 / 8
    low_rank = 4 * (3 * 16 + 2)  # x A^T of both groups and g, padded, and what numbers a row has
    assert a_token() < kept + 4 * 6 * width + low_rank


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tiles_in_a_store(tile, config, deterministic_attention):
    """Bit for bit the resident gradients, a unit a block as ever, and nothing is left behind."""
    model, batches = llama({"lora_dropout": 0.1}), [padded_batch(seed=seed) for seed in range(3)]
    config = HycloraConfig(iteration_threshold=1, cuda_graphs=False, **config)
    store = offloaded(model, config)
    gradients(model, batches[0])
    units = store._serial
    remove_hyclora(model)
    tile()
    apply_hyclora(model, config)
    resident = [gradients(model, batch) for batch in batches]
    remove_hyclora(model)
    store = offloaded(model, config)
    for i, (batch, (loss, expected)) in enumerate(zip(batches, resident, strict=True)):
        our_loss, ours = gradients(model, batch)
        assert our_loss == loss and equal(ours, expected)
        assert store.host_bytes == store.device_bytes == 0
        assert store._serial == units * (i + 1)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_tiles_under_gradient_checkpointing(tile, layer_type, use_reentrant):
    """The recomputed forward does not calibrate again, and draws the dropout of the first, which is stock code when
    that runs without grad.
    """
    tile()
    check_recomputation(layer_type, use_reentrant)


def test_a_retained_graph_of_tiles_can_be_read_again(tile):
    tile()
    model = llama()
    savers = dict.fromkeys(set(SLOTS) - {"prob"}, "quant4") | {"lse": "exact"}
    apply_hyclora(model, HycloraConfig(slot_savers=savers))
    model.zero_grad()
    loss = model(**padded_batch()).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    assert equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, first)


def test_the_fused_kernels_take_tiles(tile, kernels, packed):
    """After calibration, in which the unfused path measures for them."""
    found = []
    for n_tiles in (1, 3):
        if n_tiles == 3:
            tile(4)
        model, batch = llama(num_hidden_layers=1), padded_batch(2, 5)
        config = {"q_bit": 8, "iteration_threshold": 1, "stream": False}
        apply_hyclora(model, HycloraConfig(layer_type="intra_inter_full_fuse", **config))
        gradients(model, batch)
        found.append(gradients(model, batch))
        assert max(packed()[1]) == 2 * n_tiles
    (loss, whole), (our_loss, tiled) = found
    assert abs(loss - our_loss) < 1e-5 and largest_error(tiled, whole) < 0.01
