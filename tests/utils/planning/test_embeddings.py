"""Embeddings in host memory, as plans and budgets count and offer them: where nothing else fits."""

import pytest

from hyclora.models.config import HycloraConfig
from hyclora.plan import main, plan
from hyclora.utils.errors import UserError
from hyclora.utils.planning import MODES, Savers, Shape, count, mode_of
from hyclora.utils.planning.budget import candidates, choose
from hyclora.utils.planning.fitting import STEP, Load, fits
from hyclora.utils.planning.need import RESERVE

GIB = 2**30
SHAPE, TIED = "llama-3-8b", "llama-3.2-1b"
EMBEDDINGS = 128256 * 4096 * 2
LOAD = Load.full(1, 2048)


@pytest.fixture(scope="module")
def shape():
    return Shape(SHAPE, rank=32)


@pytest.fixture(scope="module")
def small():
    """On a card whose rest beside weights, adapters and Adam is less than any row takes."""
    return plan(SHAPE, 8 * GIB, 64 * GIB, (1, 4096), lora_rank=32)


def chosen(shape, gpu, host=64 * GIB, load=LOAD, **settings):
    return choose(shape, HycloraConfig(memory_budget="1GiB", **settings), load, int(gpu), int(host))


@pytest.mark.parametrize("graphs", [False, True])
def test_static_memory_falls_by_their_bytes_and_host_memory_rises(shape, graphs):
    settings = {"offload": True, "cuda_graphs": graphs}
    before, after = (
        count(Savers(shape, HycloraConfig(**settings, offload_embeddings=on_host)), 1, 4096)
        for on_host in (False, True)
    )
    assert before.static["weights"] - after.static["weights"] == before.gpu - after.gpu == EMBEDDINGS
    assert after.on_host - before.on_host == after.embeddings == EMBEDDINGS and after.host == before.host
    assert after.moments == before.moments and before.embeddings == 0


def test_a_budget_has_them_on_the_host_where_nothing_else_fits(shape):
    """First the modes as they are, then the same in the same order."""
    found = list(candidates(HycloraConfig(memory_budget="1GiB")))
    half = len(found) // 2
    assert [one.offload_embeddings for one in found] == [False] * half + [True] * half
    needs = [LOAD.need(Savers(shape, one)) for one in found[:half]]
    least = min(need.gpu for need in needs)
    assert not chosen(shape, least).config.offload_embeddings
    choice = chosen(shape, least - 1)
    assert choice.config.offload_embeddings and choice.name.endswith(", embeddings in host memory")
    others = [(one, LOAD.need(Savers(shape, one))) for one in found[half:]]
    assert choice.config == next(one for one, need in others if fits(need, least - 1, 64 * GIB))
    assert f"{choice.need.on_host / GIB:.2f} GiB of host memory" in str(choice)


def test_what_is_set_stays(shape):
    assert chosen(shape, 80 * GIB, offload_embeddings=True).config.offload_embeddings
    with pytest.raises(UserError, match="with offload_embeddings=False as set, .* the nearest that fits is offload_em"):
        chosen(shape, 7.5 * GIB, offload_embeddings=False)


def test_what_nobody_set_is_not_told_as_set():
    """apply_hyclora has embeddings that cannot wait on the device."""
    settings = {"q_bit": 8, "layers": "slots", "offload_embeddings": False}
    with pytest.raises(UserError, match="^with q_bit=8, layers=slots as set, .* the nearest that fits is q_bit=4: "):
        chosen(Shape(TIED), 11 * GIB, 0, Load.full(8, 4096), **settings)


def test_host_memory_is_a_limit(shape):
    with pytest.raises(UserError, match="no plan fits"):
        chosen(shape, 7.6 * GIB, host=EMBEDDINGS - 1)


def test_a_head_that_has_their_weight_keeps_them_on_the_device():
    shape = Shape(TIED)
    assert shape.tied and not any(one.offload_embeddings for one in candidates(HycloraConfig(), tied=True))
    with pytest.raises(UserError, match="offload_embeddings=True: the head shares its weight with the embeddings"):
        Savers(shape, HycloraConfig(offload_embeddings=True))
    found = plan(TIED, 4 * GIB, 64 * GIB, (64, 4096))
    assert len(found.rows) == len(MODES) and all(row.hosted is None for row in found.rows)


def test_a_plan_tells_the_longest_row_with_them_on_the_host(small, shape):
    for row in small.rows[: len(MODES)]:
        savers = Savers(shape, row.mode.with_embeddings_on_host.config)
        longest, longer = (count(savers, 1, row.hosted + more, row.mode.checkpointing) for more in (0, STEP))
        assert row.hosted > row.longest == 0
        assert fits(longest, small.gpu, small.host) and not fits(longer, small.gpu, small.host)
    assert "embeddings on host" in small.details()


def test_a_plan_has_modes_with_them_on_the_host_where_none_fits(small):
    ordinary, hosted = small.rows[: len(MODES)], small.rows[len(MODES) :]
    assert not any(row.fits for row in ordinary) and hosted and all(row.fits for row in hosted)
    assert small.chosen in hosted and "offload=True, cuda_graphs=False, offload_embeddings=True)" in " ".join(
        str(small).split()
    )
    assert small.budget.config.offload_embeddings
    roomy = plan(SHAPE, 80 * GIB, 64 * GIB, (1, 4096), lora_rank=32)
    assert len(roomy.rows) == len(MODES) and not any(row.mode.config.offload_embeddings for row in roomy.rows)


def test_the_longest_row_of_all_is_told_where_a_batch_fits_in_no_way(capsys):
    with pytest.raises(SystemExit):
        main([SHAPE, "--gpu", "8GiB", "--host", "64GiB", "--tokens", "4x65536", "--lora_rank", "32"])
    told = "no mode fits; the longest single row is 9472 tokens (offloaded, layer by layer, 2 bit, embeddings in host m"
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_card_without_room_is_told_so_with_them_on_the_host(shape):
    least = min(sum(LOAD.need(Savers(shape, one)).static.values()) for one in candidates(HycloraConfig(q_bit=4)))
    assert least > 5 * GIB
    with pytest.raises(UserError, match="with embeddings in host memory if they can be"):
        chosen(shape, least - EMBEDDINGS + RESERVE - GIB)


def test_a_line_of_theirs_is_of_no_mode_without():
    mode = MODES[0]
    assert mode_of(mode.config.to_dict()) is mode
    assert mode_of(mode.with_embeddings_on_host.config.to_dict()) is None
    assert mode.with_embeddings_on_host.accuracy == "no measured line"
