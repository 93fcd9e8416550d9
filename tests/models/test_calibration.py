"""How long calibration lasts, what it is made of, and when it begins again."""

import copy
import logging

import pytest
import torch

from hyclora.models import calibration
from hyclora.models.calibration import PATIENCE, SAMPLES, _contexts
from hyclora.models.patch import find_patch
from hyclora.models.state import load_calibration, save_calibration
from hyclora.operators.savers import ChannelQuant, Derived, GaugedQuant, Step
from tests.helpers.calibrating import (
    POOR,
    WIDTH,
    as_embeddings,
    count,
    patched,
    repeated,
    run,
    statistics,
    usual,
)
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.ranks import run_ranks
from tests.helpers.replaying import graphed, replayed
from tests.helpers.small_models import gradients, llama, mean_cosine, padded_batch

EVERY = 2  # looked at more often than in earnest
WINDOW = EVERY * SAMPLES


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(calibration, "EVERY", EVERY)


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, "hyclora")
    return lambda word: [r.message for r in caplog.records if word in r.message and "trained already" not in r.message]


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", POOR)
def test_poor_forwards_first(kind, embedded):
    """Usual rows behind them are what counts: gradients are as near the exact ones as with these rows alone."""
    exact = gradients(llama(), usual(99))[1]
    found = {}
    for name, first in (("usual", []), ("poor", [POOR[kind]()] * 5)):
        model, patch = patched(q_bit=4)
        for batch in [*first, *(usual(seed) for seed in range(5))]:
            gradients(model, as_embeddings(model, batch) if embedded else batch)
        found[name] = mean_cosine(gradients(model, usual(99))[1], exact)
        assert not patch.step.calibrating
    assert found["poor"] > found["usual"] - 0.003


@pytest.mark.parametrize("kind", ["one id", "many empty", "one short row", "padding only", "no mask on the padding"])
def test_what_repetition_alone_gave_is_replaced(kind):
    """By the first novel forward, from which calibration lasts its whole length."""
    model, patch = patched(3)
    run(model, [POOR[kind]()] * 7)
    assert patch.step.calibrating
    for seed in range(3):
        assert patch.step.calibrating
        run(model, [usual(seed)])
        assert count(patch) == 3 * WIDTH * (seed + 1)
    run(model, [usual(9)])
    assert not patch.step.calibrating and count(patch) == 9 * WIDTH


def test_statistics_are_those_of_the_usual_rows_alone():
    """Bit for bit, dummy rows or none before."""
    found = []
    for first in ([], [POOR["one id"]()] * 3):
        model, patch = patched(2)
        run(model, [*first, usual(0), usual(1)])
        found.append(statistics(patch))
    for one, other in zip(*(found_one.values() for found_one in found), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one if name != "last_step")


def test_different_poor_forwards_do_not_outweigh_usual_ones():
    model, patch = patched()
    run(model, [POOR["empty"](), *(repeated([i]) for i in (1, 2, 3)), usual(0)])
    assert count(patch) == 3 * WIDTH


def test_rows_that_repeat_do_not_add_up():
    """The same batch again replaces itself, since the parameters have moved; part of it says nothing."""
    model, patch = patched()
    run(model, [usual(0), usual(1)])
    assert count(patch) == 6 * WIDTH
    part = {name: t[:1] for name, t in usual(0).items()}
    run(model, [part])
    assert count(patch) == 6 * WIDTH and patch.step.since == 1
    model, patch = patched()
    run(model, [usual(0)])
    before = statistics(patch)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    run(model, [usual(0)])
    assert count(patch) == 3 * WIDTH and patch.step.since == 2
    after = statistics(patch)
    assert any(not torch.equal(after[key]["total"], before[key]["total"]) for key in before)
    run(model, [usual(0)] * 4)
    assert not patch.step.calibrating and count(patch) == 3 * WIDTH


@pytest.mark.parametrize("threshold, rows, width, ends", [(5, 1, 16, 5), (5, 1, 8, 5), (1, 3, 16, 1), (1, 1, 8, 4)])
def test_small_runs_end_in_time(threshold, rows, width, ends, warned):
    """At iteration_threshold, unless these forwards have fewer than ENOUGH tokens."""
    model, patch = patched(threshold)
    lasted = []
    for seed in range(8):
        run(model, [usual(seed, rows, width)])
        lasted.append(patch.step.calibrating)
    assert lasted[: ends - 1] == [True] * (ends - 1) and patch.step.threshold == ends
    assert count(patch) == ends * rows * width and not warned("")


@pytest.mark.parametrize("kind", ["empty", "one id"])
def test_patience_ends_in_one_sentence(kind, warned):
    model, patch = patched(2)
    run(model, [POOR[kind]()] * (2 * PATIENCE - 1))
    assert not warned("")
    run(model, [POOR[kind]()] * 3)
    assert patch.step.threshold == 2 * PATIENCE and not patch.step.calibrating
    (text,) = warned("")
    assert f"{2 * PATIENCE} training forwards" in text and "usual rows" in text


def test_exact_slots_need_no_evidence(warned):
    """Nor do evaluation and another count of steps matter."""
    model, patch = patched(1, layer_type="baseline")
    run(model, [POOR["empty"]()] * (PATIENCE + 1))
    assert patch.step.threshold == 1 and patch.calibration.seen is None and not warned("")


@pytest.mark.parametrize("shift", [0, 3])
def test_contexts_are_told_apart_and_padding_is_none(shift):
    """Left or right: a context is the same wherever its row has padding."""
    ids = torch.tensor([[4, 5, 6, 4, 5], [4, 5, 6, 4, 7]])
    padded = torch.nn.functional.pad(ids, (shift, 3 - shift), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (shift, 3 - shift)).bool()
    keys = _contexts(padded, mask.flatten()).view(2, 5)
    assert torch.equal(keys, _contexts(ids, None).view(2, 5))
    assert torch.equal(keys[0, :4], keys[1, :4]) and keys.unique().numel() == 6
    embeds = torch.randn(10, 16)[ids]
    assert _contexts(embeds.bfloat16(), None).unique().numel() == 6


def sequence() -> list[dict]:
    """Poor rows, few rows, usual rows; then rows of a kind that contradicts them, and these again."""
    first = [POOR["one id"]()] * 2 + [POOR["empty"]()] + [usual(s, 1, 8, high=4) for s in range(2)]
    return first + [usual(s, high=4) for s in range(3)] + [usual(s) for s in range(WINDOW + EVERY + 6)]


def test_interrupted_anywhere_is_unbroken(tmp_path):
    """Resumed again and again, before, in and after calibration and while the gauge is read: bit for bit."""
    batches = sequence()
    cuts = {1, 2, 3, 4, 6, 9, 11, *range(WINDOW + 7, WINDOW + 14)}
    unbroken, patch = patched(3)
    broken, _ = patched(3)
    for i, batch in enumerate(batches):
        if i in cuts:
            save_calibration(broken, tmp_path)
            broken, _ = patched(3)
            load_calibration(broken, tmp_path)
        expected, found = (gradients(model, batch)[1] for model in (unbroken, broken))
        assert all(torch.equal(found[name], expected[name]) for name in expected), i
        assert find_patch(broken).step.threshold == patch.step.threshold
    assert patch.calibration.restarts == 1


def test_rows_unlike_the_first_calibrate_again(warned):
    """Statistics of the new rows replace the old, and gradients are near the exact ones again."""
    exact = gradients(llama(), usual(99))[1]
    model, patch = patched(2, q_bit=2)
    run(model, [usual(seed, high=4) for seed in range(2)])
    before = mean_cosine(gradients(model, usual(99))[1], exact)
    run(model, [usual(seed) for seed in range(WINDOW + EVERY - 2)])
    assert not warned("") and not patch.step.calibrating
    run(model, [usual(98)])
    assert patch.step.calibrating and count(patch) == 3 * WIDTH
    run(model, [usual(97), usual(96)])
    assert not patch.step.calibrating and count(patch) == 6 * WIDTH
    (text,) = warned("")
    assert "calibrating again for 2 forwards" in text
    assert mean_cosine(gradients(model, usual(99))[1], exact) > before + 0.01
    run(model, [usual(seed) for seed in range(3 * WINDOW)])
    assert patch.calibration.restarts == 1


def test_a_few_odd_forwards_are_no_contradiction(warned):
    """Most of the forwards that were looked at have to agree; dummy rows and padding alone are not unlike."""
    model, patch = patched(2)
    odd = [POOR["padding only"](), POOR["one id"](), POOR["empty"]()]
    run(model, [usual(0, high=4), usual(1, high=4)])
    for i in range(1, 2 * WINDOW + EVERY + 2):
        unlike = i % WINDOW in (EVERY, 3 * EVERY)
        run(model, [usual(i) if unlike else odd[i % 3] if i % 5 == 0 else usual(i, high=4)])
    assert not warned("") and patch.calibration.restarts == 0


@pytest.mark.parametrize("threshold", [1, 5])
def test_training_is_no_contradiction(threshold, warned):
    model, patch = patched(threshold)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(5 * WINDOW):
        gradients(model, padded_batch(seed=seed))
        optimizer.step()
    widths = patch.calibration.gauge.widths
    assert torch.isfinite(widths).all() and not warned("")


@pytest.mark.parametrize("layer_type", ["intra", "intra_inter_full_fuse"])
def test_the_gauge_reads_real_tokens(layer_type):
    """Whatever padding holds, and whichever kernel packs."""
    widths = []
    for filler in (3, 77):
        model, patch = patched(1, layer_type=layer_type)
        for seed in range(1 + EVERY):
            batch = padded_batch(seed=seed)
            ids = torch.where(batch["attention_mask"] == 1, batch["input_ids"], filler)
            gradients(model, batch | {"input_ids": ids})
        widths.append(patch.calibration.gauge.widths)
    assert torch.allclose(widths[0], widths[1], atol=0.02, equal_nan=True)
    assert torch.isfinite(widths[0]).tolist() == [True, True, False, False, False, False]


def test_the_gauge_is_the_mean_log_of_half_the_range():
    saver = GaugedQuant(8, "channel_group", 0.0)
    step = Step(1, 1)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    saver.ask(0)
    saver.pack(x, step)
    groups = ((x - saver.mean) * saver.inv_std).view(50, 2, 64)
    expected = ((groups.amax(-1) - groups.amin(-1)) / 2).log2().mean()
    assert abs(saver.widths[0] - expected) < 0.07 and saver.widths[1:].isnan().all()
    saver.ask(2)
    saver.pack(4 * x, step)
    assert abs(saver.widths[2] - saver.widths[0] - 2) < 0.07
    before = saver.widths.nan_to_num()
    saver.pack(9 * x, step)
    assert torch.equal(saver.widths.nan_to_num(), before)


@pytest.mark.parametrize("config", [{"scale_rule": "paper"}, {"slot_savers": {"norm_in": "exact"}}])
def test_where_nothing_can_be_read_off_nobody_looks(config):
    model, patch = patched(1, layer_type="intra", **config)
    run(model, [usual(0, high=4), *(usual(seed) for seed in range(WINDOW + EVERY))])
    assert patch.calibration.gauge is None and patch.step.threshold == 1


def test_forwards_before_a_backward():
    """DPO: calibration begins again between two forwards, whose gradients are still right."""
    model, patch = patched(2, q_bit=8)
    exact = llama()
    run(model, [usual(seed, high=4) for seed in range(2)])
    for seed in range(0, WINDOW + EVERY + 4, 2):
        ours, theirs = {}, {}
        for m, found in ((model, ours), (exact, theirs)):
            m.zero_grad()
            (m(**usual(seed)).loss + 2 * m(**usual(seed + 1)).loss).backward()
            found |= {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
        again = patch.calibration.restarts == 1
        if again:
            assert mean_cosine(ours, theirs) > 0.999
    assert again


def test_recomputation_calibrates_alike():
    """Under gradient checkpointing too, poor rows first."""
    counted = []
    for checkpointing in (False, True):
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model, patch = patched(3, model)
        run(model, [*[POOR["one id"]()] * 4, *(usual(seed) for seed in range(4))])
        counted.append((count(patch), patch.step.threshold))
    assert counted[0] == counted[1] == (9 * WIDTH, 7)


def test_recordings_are_forgotten_when_calibration_begins_again():
    """They have the old statistics; layers are recorded anew afterwards, and gradients are those without graphs."""
    (model, plain), batches = (llama(), llama()), [usual(seed) for seed in range(WINDOW + EVERY + 8)]
    graphs = graphed(model, {"q_bit": 8})
    patched(2, plain, q_bit=8)
    first = [usual(seed, high=4) for seed in range(2)]
    run(model, first)
    run(plain, first)
    recorded, kept = [], []
    for batch in batches:
        expected, found = (gradients(m, batch)[1] for m in (plain, model))
        assert mean_cosine(found, expected) > 0.9999
        recorded.append(len(graphs.recordings))
        kept.append(next(iter(graphs.recordings.values()), None))
    assert recorded[5] == 1 and recorded[WINDOW + EVERY - 1] == 0 and recorded[-1] == 1
    assert kept[5] is kept[WINDOW + EVERY - 2] is not kept[-1]
    assert replayed(model, graphs, batches[0])


def test_a_copy_of_a_model_goes_on_by_itself():
    """Also where numbers of the gauge are on their way."""
    model, patch = patched(2)
    run(model, [usual(seed, high=4) for seed in range(2)])
    run(model, [usual(seed) for seed in range(WINDOW + 1)])
    assert patch.calibration._readback is not None
    clone = copy.deepcopy(model)
    run(clone, [usual(seed) for seed in range(EVERY)])
    assert find_patch(clone).calibration.restarts == 1 and patch.calibration.restarts == 0
    run(model, [usual(seed) for seed in range(EVERY)])
    assert patch.calibration.restarts == 1


def train_ranks(rank: int, folder: str) -> None:
    """Poor rows on one rank alone, then other rows on each, then rows that contradict on both."""
    calibration.EVERY = EVERY  # no fixture does it in this process
    model, patch = patched(2)
    batches = [POOR["one id"]() if rank else POOR["empty"]()] * 2
    batches += [POOR["one id"]() if rank else usual(0, high=4), usual(1 + rank, high=4)]
    batches += [usual(10 * i + rank) for i in range(WINDOW + EVERY + 2)]
    decided = []
    for batch in batches:
        gradients(model, batch)
        decided.append((patch.step.threshold, patch.step.since, patch.step.informative))
    widths = patch.calibration.gauge.widths.nan_to_num()
    torch.save((decided, statistics(patch), widths, patch.calibration.restarts), f"{folder}/{rank}.pt")


def test_two_ranks_agree(tmp_path):
    run_ranks(train_ranks, tmp_path, str(tmp_path))
    (decided, first, *rest), (other, second, *other_rest) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert decided == other and torch.equal(rest[0], other_rest[0]) and rest[1] == other_rest[1] == 1
    assert all(torch.equal(first[key][name], second[key][name]) for key in first for name in first[key])


def ask_ranks(rank: int) -> None:
    _, patch = patched(1)
    patch.step.index += 1
    patch.calibration.follow(POOR["one id"]()["input_ids"])
    assert int(patch.calibration.seen.sum()) == 4  # the same on both, so not twice
    patch.step.index += 1
    patch.calibration.follow(usual(rank, 1, 20)["input_ids"])
    assert int(patch.calibration.seen.sum()) == 44 and patch.calibration.counted == 40


def test_what_ranks_have_seen_adds_up_once(tmp_path):
    run_ranks(ask_ranks, tmp_path)


def test_nothing_waits_for_the_device_afterwards(monkeypatch):
    """Tokens are looked at while calibrating alone; then statistics rest."""
    rested = []
    monkeypatch.setattr(ChannelQuant, "rest", lambda quantizer: rested.append(quantizer))
    model, patch = patched(1)
    run(model, [usual(0)])
    assert not rested
    monkeypatch.setattr(calibration, "_contexts", None)
    run(model, [usual(1), usual(2)])
    assert patch.calibration.seen is None and rested == list(patch.calibration.quantizers.values())


def test_quantizers_of_slots_that_are_derived_elsewhere_count():
    first, second = ChannelQuant(4, "channel_group", 0.0), ChannelQuant(4, "channel_group", 0.0)
    savers = {"q": first, "up": Derived(second), "mlp_in": Derived()}
    assert calibration.Calibration(Step(1), savers).quantizers == {"q": first, "up": second}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronisation is a matter of the GPU")
def test_the_gauge_makes_no_forward_wait():
    """Forwards that are looked at, whose numbers are fetched and read, wait as often as all others."""
    model, patch = patched(1)
    run(model, [usual(seed) for seed in range(4)])
    waits, inputs = [], {name: t for name, t in usual(9).items() if name != "labels"}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(WINDOW + EVERY):
            with pytest.warns(UserWarning) as caught:
                model.get_base_model().model(**inputs)
                torch.ones(1, device=DEVICE).item()
            waits.append(len([w for w in caught if "synchroniz" in str(w.message)]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(set(waits)) == 1 and torch.isfinite(patch.calibration.gauge.widths).all()
