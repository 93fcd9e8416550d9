"""Savers and the keeper that carries their packed tensors."""

import weakref

import numpy as np
import pytest
import torch

from hyclora.models.config import SAVERS
from hyclora.operators.savers import ChannelQuant, Exact, Keeper, Recompute, Sparse, Step, make_saver
from tests.helpers.kernel_checks import DEVICE, rand, relative_error


def quant(bits=4, rule="channel_group", outliers=0.0):
    return ChannelQuant(bits, rule, outliers)


def round_trip(saver, x, step=None):
    step = step or Step(threshold=1, index=1)
    return saver.unpack(saver.pack(x, step), x.shape, x.dtype)


def test_every_named_saver_can_be_made():
    options = {"scale_rule": "channel_group", "outlier_ratio": 0.0, "softmax_outlier_ratio": 0.05}
    assert [make_saver(name, **options).stored for name in SAVERS] == [
        name not in ("derived", "recompute") for name in SAVERS
    ]


@pytest.mark.parametrize("ratio, kept", [(0.0, 1), (0.05, 3), (0.5, 25), (1.0, 50)])
def test_sparse_keeps_the_largest_of_each_row(ratio, kept):
    """A fixed capacity of ceil(ratio * S), so no count leaves the device."""
    prob = torch.softmax(rand(2, 3, 7, 50) * 3, dim=-1)
    saver = Sparse(ratio)
    values, columns = saver.pack(prob, Step(1))
    assert values.shape[-1] == kept and columns.dtype == torch.int16
    restored = saver.unpack((values, columns), prob.shape, prob.dtype)
    threshold = prob.topk(kept, dim=-1).values[..., -1:]
    assert torch.equal(restored, torch.where(prob >= threshold, prob, 0.0))


def test_outlier_channels_are_exact():
    x = rand(64, 100)
    x[:, [5, 17]] *= 40
    saver = quant(bits=2, outliers=0.02)
    restored = round_trip(saver, x)
    assert saver.outliers.tolist() == [5, 17]
    assert torch.equal(restored[:, [5, 17]], x[:, [5, 17]])
    assert not torch.equal(restored, x)


def test_statistics_use_the_whole_batch():
    """Defect of the original: scales from sample 0 of the batch alone."""
    x = torch.cat((rand(50, 16) * 0.01, rand(50, 16, seed=1) * 5 + 3))
    saver = quant(bits=8)
    assert relative_error(round_trip(saver, x), x) < 0.02
    assert torch.allclose(saver.mean, x.mean(dim=0), atol=1e-4)
    assert torch.allclose(saver.std, x.std(dim=0, correction=0), rtol=1e-3)


def test_padding_is_left_out_of_statistics():
    x = rand(40, 16)
    mask = torch.ones(4, 10, device=DEVICE)
    mask[:, 6:] = 0
    noisy = torch.where(mask.reshape(-1, 1) == 1, x, 1e4)
    saver = quant()
    saver.pack(noisy, Step(threshold=1, index=1, token_mask=mask))
    assert torch.allclose(saver.mean, x[mask.reshape(-1) == 1].mean(dim=0), atol=1e-5)


def test_a_batch_of_padding_alone_leaves_finite_statistics():
    saver = quant(rule="paper")
    x = rand(8, 16)
    restored = round_trip(saver, x, Step(1, 1, token_mask=torch.zeros(2, 4, device=DEVICE)))
    assert torch.isfinite(restored).all()


def test_constant_channels_are_restored():
    """A channel without spread must not divide by zero."""
    x = rand(32, 20)
    x[:, 3] = 7.0
    x[:, 4] = 0.0
    restored = round_trip(quant(bits=4), x)
    assert torch.allclose(restored[:, 3:5], x[:, 3:5], atol=1e-3)


def test_paper_rule_averages_ranges_over_steps():
    """scale = (max - min) / (2^b - 1), averaged over the calibration steps."""
    saver, step = quant(bits=4, rule="paper"), Step(threshold=2)
    ranges = []
    for index in (1, 2, 3):
        step.index = index
        x = rand(30, 8, seed=index) * index
        saver.pack(x, step)
        ranges.append(x.amax(dim=0) - x.amin(dim=0))
    assert torch.allclose(saver.std, (ranges[0] + ranges[1]) / 2 / 15)
    assert not saver.mean.any()


def test_what_comes_first_calibrates():
    """Forwards may fail, or be run by checkpointing after others: a saver without statistics begins with what comes."""
    saver, x = quant(), rand(64, 8) * 3 + 1
    saver.pack(x, Step(threshold=5, index=9))
    torch.testing.assert_close(saver.mean, x.mean(dim=0))
    saver.pack(x + 1, Step(threshold=5, index=10))
    torch.testing.assert_close(saver.mean, x.mean(dim=0))


def test_calibration_resumes_on_the_device_of_the_activations():
    """A checkpoint is loaded on the CPU; the next calibration forward adds to it wherever the model runs."""
    first, x = quant(), rand(20, 30)
    first.pack(x, Step(3, 1))
    second = quant()
    second.load_state_dict({name: t.cpu() for name, t in first.state_dict().items()})
    second.pack(x, Step(3, 2))
    assert second.statistics["count"].item() == 40 and second.mean.device == x.device


def test_statistics_at_rest_are_on_the_host_and_add_up():
    savers = quant(outliers=0.1), quant(outliers=0.1)
    for saver in savers:
        saver.pack(rand(20, 30), Step(2, 1))
    savers[1].rest()
    assert {t.device.type for t in savers[1].statistics.values()} == {"cpu"} and savers[1].mean.device.type == DEVICE
    x = rand(20, 30, seed=1)
    packed = [saver.pack(x, Step(2, 2)) for saver in savers]
    assert all(map(torch.equal, *packed))
    assert all(map(torch.equal, *(saver.statistics.values() for saver in savers)))


def test_calibration_state_round_trip():
    """A loaded saver packs the same bytes, and is not calibrated again."""
    first, x = quant(outliers=0.1), rand(20, 30)
    packed = first.pack(x, Step(1, 1))
    second = quant(outliers=0.1)
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(second.pack(x, Step(1, 2)), packed, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="no calibration state"):
        Exact().load_state_dict({"count": torch.ones(1)})


def test_calibration_is_the_same_for_groups_of_any_size():
    """Statistics are of channels: a checkpoint of one size goes on with another."""
    x, wide = rand(40, 200), ChannelQuant(2, "channel_group", 0.0, group=128)
    narrow = quant(bits=4)
    narrow.pack(x, Step(1, 1))
    wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide.mean, narrow.mean) and torch.equal(wide.std, narrow.std)
    step = Step(threshold=0, index=2)
    assert relative_error(round_trip(wide, x, step), x) < 0.5


@pytest.mark.parametrize("n_cols", [1, 40, 200, 40000])
@pytest.mark.parametrize("name", [name for name in SAVERS if name not in ("derived", "recompute")])
@pytest.mark.parametrize("rule, group", [("channel_group", 64), ("channel_group", 128), ("paper", 64)])
def test_bits_are_what_is_packed(name, rule, group, n_cols):
    """Saver.bits, scales and exact channels included, is the size of the packed tensors that are the slot's own."""
    saver = make_saver(name, scale_rule=rule, outlier_ratio=0.05, softmax_outlier_ratio=0.05, group=group)
    packed = saver.pack(rand(3, n_cols, dtype=torch.bfloat16), Step(1, 1))
    assert 8 * sum(t.nbytes for t in packed[: len(packed) - saver.n_state]) == 3 * saver.bits(n_cols)


@pytest.mark.parametrize("outliers, a_channel, an_outlier", [(0.0, 24, 0), (0.05, 32, 8)])
def test_what_a_quantizer_holds_for_itself(outliers, a_channel, an_outlier):
    """A channel, an exact channel, and the counts of tokens and of forwards, once."""
    saver = quant(outliers=outliers)
    saver.pack(rand(3, 200), Step(1, 1))
    held = [*saver.statistics.values(), saver.mean, saver.std, saver.inv_std, *saver.restoring, saver.outliers]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t.numel()}
    assert sum(storages.values()) == 200 * a_channel + 10 * an_outlier + 2 * 4


def run_keeper(read, retain_graph=False):
    """Keep an owner's memory as slot a, and b by nothing; read(keeper, alive) runs in backward, twice if it can."""
    owner = np.ones((3, 4), dtype=np.float32)
    alive = weakref.ref(owner)

    class Block(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, slot):
            keeper = Keeper({"a": Exact(), "b": Recompute()}, Step(1))
            keeper.keep("a", slot)
            keeper.keep("b", slot)
            keeper.keep_exact("rstd", x.detach()[:, 0])
            keeper.save(ctx)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            read(Keeper.load(ctx), alive)
            return dy, None

    y = Block.apply(torch.ones(3, 4, requires_grad=True), torch.from_numpy(owner)).sum()
    del owner
    y.backward(retain_graph=retain_graph)
    if retain_graph:
        y.backward()


def test_keeper_frees_a_slot_as_it_is_read():
    """In the middle of its block's backward, not only after it."""
    seen = []

    def read(keeper, alive):
        assert keeper.restore("b") is None and torch.equal(keeper.exact("rstd"), torch.ones(3))
        assert torch.equal(keeper.restore("a"), torch.ones(3, 4))
        assert keeper.restore("a") is None
        seen.append(alive() is None)

    run_keeper(read)
    assert seen == [True]


def test_a_retained_graph_keeps_its_slots():
    seen = []
    run_keeper(lambda keeper, alive: seen.append(keeper.restore("a").clone()), retain_graph=True)
    assert len(seen) == 2 and torch.equal(*seen)
