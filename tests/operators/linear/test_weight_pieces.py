"""NF4 weights in pieces: the same weights, products and gradients as of the whole, in less memory."""

import pytest
import torch
from torch import nn

from hyclora import HycloraConfig, apply_hyclora
from hyclora.operators.linear import lora, weight_pieces
from hyclora.operators.linear.lora import Projection, ProjectionGroup
from hyclora.operators.linear.weight_pieces import WEIGHT_BUFFER, WHOLE, make_pieces
from hyclora.operators.savers import Keeper
from tests.helpers.counting import Live
from tests.helpers.kernel_checks import DEVICE, rand, relative_error
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch
from tests.models.test_blocks import VARIANTS

bnb = pytest.importorskip("bitsandbytes")
MODELS = {
    "7b": (4096, [4096] * 3, 11008),
    "mistral 7b, llama-3 8b": (4096, [4096, 1024, 1024], 14336),
    "13b": (5120, [5120] * 3, 13824),
    "70b": (8192, [8192, 1024, 1024], 28672),
}


@pytest.fixture
def pieces_of(monkeypatch):
    """Sets the bytes of a part and of what may be whole, and tiles of 8."""

    def set_limit(n: int, whole: int = 0):
        monkeypatch.setattr(weight_pieces, "WEIGHT_BUFFER", n)
        monkeypatch.setattr(weight_pieces, "WHOLE", whole or n)
        monkeypatch.setattr(weight_pieces, "TILE", 8)
        monkeypatch.setattr(lora, "MANY_TOKENS", 0)

    return set_limit


def nf4_linear(n_in: int, n_out: int, seed: int = 0) -> nn.Module:
    linear = bnb.nn.Linear4bit(n_in, n_out, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight = rand(n_out, n_in, seed=seed).cpu()
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(DEVICE)
    return linear


def plan(n_in: int, widths: list[int], many_tokens: bool, dtype=torch.bfloat16) -> dict[bool, list]:
    linears, start = [], 0
    with torch.device("meta"):
        for width in widths:
            linear = bnb.nn.Linear4bit(n_in, width, bias=False)
            linears.append((linear, slice(start, start + width)))
            start += width
    return {by_rows: weight_pieces.weight_pieces(linears, dtype, by_rows, many_tokens) for by_rows in (False, True)}


def test_a_plan_allocates_no_weights(kernels):
    """Nor does one after a test whose kernels replace torch.empty: torch.device would replace that one for good."""
    for by_rows, pieces in plan(64, [64], many_tokens=False).items():
        assert all(linear.weight.is_meta for piece in pieces for linear, _ in piece.linears), by_rows


@pytest.mark.parametrize("many_tokens", [False, True])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_pieces_are_equal_and_within_the_limit(model, many_tokens):
    """Each element is in one piece; as few of them as fit, none much smaller than its neighbour."""
    hidden, qkv, ffn = model
    for n_in, widths in ((hidden, qkv), (hidden, qkv[:1]), (hidden, [ffn, ffn]), (ffn, [hidden])):
        for by_rows, pieces in plan(n_in, widths, many_tokens).items():
            covered = torch.zeros(sum(widths) // 64, n_in // 64, dtype=torch.int8)
            for piece in pieces:
                n_rows, n_cols = piece.shape
                joined = len(piece.linears) > 1
                elsewhere = joined if by_rows else not joined and n_rows <= n_in
                limit = WHOLE if joined or not many_tokens else WEIGHT_BUFFER
                assert elsewhere and not joined or 2 * n_rows * n_cols <= limit
                assert piece.columns.start % 256 == piece.rows.start % 256 == 0
                covered[piece.rows.start // 64 : piece.rows.stop // 64, piece.columns.start // 64 :][
                    :, : n_cols // 64
                ] += 1
            assert (covered == 1).all()


def test_what_is_cut_of_7b_and_8b():
    """o stays whole; gate, up and down become two, of 2048 columns where y or dx has 4096; q, k, v in backward alone.

    With few tokens nothing is cut, as half a W would not fill a GPU.
    """

    def shapes(*args, by_rows=False, many_tokens=True):
        return [piece.shape for piece in plan(*args, many_tokens)[by_rows]]

    assert shapes(4096, [4096] * 3) == [(12288, 2048)] * 2
    assert shapes(4096, [4096] * 3, by_rows=True) == [(12288, 4096)]
    assert shapes(4096, [4096, 1024, 1024]) == [(6144, 4096)]
    assert shapes(4096, [11008] * 2) == [(11008, 2048)] * 4
    assert shapes(11008, [4096]) == [(4096, 11008)]
    assert shapes(11008, [4096], by_rows=True) == [(2048, 11008)] * 2
    assert shapes(4096, [11008] * 2, by_rows=True) == [(5632, 4096), (5376, 4096)] * 2
    assert shapes(4096, [14336]) == [(14336, 2048)] * 2
    for by_rows in (False, True):
        assert shapes(4096, [4096], by_rows=by_rows) == [(4096, 4096)]
        few = {"by_rows": by_rows, "many_tokens": False}
        assert shapes(4096, [4096] * 3, **few) == [(12288, 4096)]
        assert shapes(4096, [14336] * 2, **few) == [(14336, 4096)] * 2 and shapes(14336, [4096], **few) == [
            (4096, 14336)
        ]


@pytest.mark.parametrize("limit", [1, 4 * 64 * 10, 4 * 64 * 20, 4 * 64 * 68])
@pytest.mark.parametrize("joined", [4 * 64, 4 * 64 * 68])
@pytest.mark.parametrize("by_rows, many_tokens", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("kinds", ["444", "4f4", "f44", "fff"])
def test_pieces_are_parts_of_the_whole(pieces_of, kernels, kinds, by_rows, many_tokens, joined, limit):
    """Bit for bit, with other rows below the last ones; all that are dequantized in one place."""
    pieces_of(limit, joined)
    linears, whole, start = [], [], 0
    for i, (kind, width) in enumerate(zip(kinds, (30, 8, 27), strict=True)):
        linear = nf4_linear(64, width, i) if kind == "4" else nn.Linear(64, width, bias=False, device=DEVICE)
        linears.append((linear, slice(start, start + width)))
        whole.append(Projection(linear, "").weight(torch.float32))
        start += width
    below = rand(5, 64) if kinds[-1] == "4" else None
    whole = torch.cat([*whole, *([] if below is None else [below])])
    made, places = torch.full_like(whole, float("nan")), set()
    pieces = weight_pieces.weight_pieces(linears, torch.float32, by_rows, many_tokens)
    for piece, (rows, columns, weight) in zip(pieces, make_pieces(pieces, torch.float32, below), strict=True):
        made[rows, columns] = weight
        if piece.in_4bit:
            places.add(weight.untyped_storage().data_ptr())
        else:
            assert weight.data_ptr() == piece.linears[0][0].weight.data_ptr()
    assert torch.equal(made, whole)
    assert len(places) == ("4" in kinds)


@pytest.mark.parametrize("limits", [(1,), (4 * 128 * 40, 2**30), (4 * 128 * 150,)], ids=str)
@pytest.mark.parametrize("adapters", [{}, {"lora_dropout": 0.3}, {"target_modules": ["up_proj"]}], ids=str)
@pytest.mark.parametrize("base", ["nf4", "float32"])
@torch.no_grad()
def test_products_of_pieces(pieces_of, base, adapters, limits):
    """y, x A^T, dx and g are those of the whole."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192}
    model = llama({"bias": "all"} | adapters, base, mlp_bias=True, **shape)
    mlp = model.get_base_model().model.layers[0].mlp
    x, dy, found = rand(7, 128), rand(7, 384, seed=3), []
    for sizes in ((2**30,), limits):
        pieces_of(*sizes)
        group = ProjectionGroup([Projection(getattr(mlp, f"{n}_proj"), n) for n in ("gate", "up")])
        torch.manual_seed(1)
        keeper, rng = Keeper({}, None), {}
        y, low_rank = group.project(x, group.parameters(), keeper, rng)
        buffer = group.buffer(7, low_rank, x)
        buffer[:, : group.width] = dy
        g, _ = group.backward_low_rank(buffer, low_rank, keeper)
        found.append([y, keeper.exact(group.xa_name), g, group.backward_input(buffer, g, low_rank, keeper)])
    for ours, theirs in zip(*reversed(found), strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("layer_type", ["baseline", "intra", "intra_inter_full_fuse"])
@pytest.mark.parametrize("variant", ["dropout", "trainable biases", "q and v only", "rank pattern"])
def test_gradients_of_pieces(pieces_of, variant, layer_type):
    found = []
    for limit in (2**30, 2**14):
        pieces_of(limit)
        shape = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192}
        model = llama(base="nf4", **shape | VARIANTS[variant])
        apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=8, iteration_threshold=1))
        found.append([gradients(model, padded_batch(seed=seed)) for seed in range(2)])
    for (loss, whole), (our_loss, ours) in zip(*found, strict=True):
        assert abs(our_loss - loss) < 1e-5
        assert largest_error(ours, whole) < (1e-5 if layer_type == "baseline" else 5e-3)  # codes round otherwise


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@torch.no_grad()
def test_the_peak_follows_the_limit(pieces_of, kernels, dropout):
    """Forward and backward of gate and up need as many bytes less as a piece is smaller, A below it apart."""
    model = llama(
        {"r": 4, "lora_dropout": dropout}, "nf4", num_hidden_layers=1, hidden_size=64, num_attention_heads=4,
        intermediate_size=256,
    )  # fmt: skip
    mlp = model.get_base_model().model.layers[0].mlp
    x, peaks, limits = rand(2, 64), [], (2**17, 2**16, 2**15)
    for limit in limits:
        pieces_of(limit)
        group = ProjectionGroup([Projection(getattr(mlp, f"{n}_proj"), n) for n in ("gate", "up")])
        keeper, rng = Keeper({}, None), {}
        with Live() as forward:
            _, low_rank = group.project(x, group.parameters(), keeper, rng)
        dy = rand(*group.buffer(2, low_rank, x).shape)
        with Live() as backward:
            g, _ = group.backward_low_rank(dy, low_rank, keeper)
            group.backward_input(dy, g, low_rank, keeper)
        peaks.append((forward.peak, backward.peak))
    for limit, peak in zip(limits, peaks, strict=True):
        for ours, theirs in zip(peak, peaks[0], strict=True):
            assert abs((theirs - ours) - (limits[0] - limit)) <= low_rank.A.nbytes
