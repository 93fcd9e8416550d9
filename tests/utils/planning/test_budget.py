"""What a memory budget chooses: best first, within what the user set, and what it says where nothing fits."""

from dataclasses import replace

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models import patch
from hyclora.models.config import OPEN
from hyclora.utils.errors import UserError
from hyclora.utils.planning import Savers, Shape
from hyclora.utils.planning.budget import budget_of, candidates, choose, choose_for
from hyclora.utils.planning.fitting import Load, fits
from tests.helpers.small_models import llama

GIB = 2**30
OPEN_CONFIG = HycloraConfig(memory_budget="1GiB")
LOAD = Load.full(4, 512)


@pytest.fixture(scope="module")
def shape():
    return Shape("llama-2-7b")


def chosen(shape, gib, load=LOAD, host=64, **settings):
    return choose(shape, HycloraConfig(memory_budget="1GiB", **settings), load, int(gib * GIB), host * GIB)


def test_the_first_that_fits_is_taken(shape):
    assert chosen(shape, 80).name == "resident, CUDA graphs, 4 bit"
    assert chosen(shape, 7).name == "offloaded, CUDA graphs, 4 bit"
    for gib in (5.7, 6.2, 7, 8, 12):
        choice, needs = chosen(shape, gib), []
        for one in candidates(OPEN_CONFIG):
            needs.append(LOAD.need(Savers(shape, one)))
            if one == choice.config:
                break
        assert fits(needs.pop(), int(gib * GIB), 64 * GIB) and not any(fits(n, int(gib * GIB), 64 * GIB) for n in needs)


def test_host_memory_is_a_limit_too(shape):
    assert chosen(shape, 7, host=1).name.startswith("resident layer inputs")


@pytest.mark.parametrize(
    "settings",
    [{"q_bit": 8}, {"offload": True, "q_bit": 4}, {"cuda_graphs": False}, {"layers": "slots", "offload": False}],
    ids=str,
)
def test_what_is_set_stays(shape, settings):
    for one in candidates(HycloraConfig(memory_budget="1GiB", **settings)):
        assert {name: getattr(one, name) for name in settings} == settings
    config = chosen(shape, 80, **settings).config
    assert config == replace(HycloraConfig(**settings), **{name: getattr(config, name) for name in OPEN})


def test_no_setting_is_open_after_a_choice(shape):
    config = chosen(shape, 80).config
    assert config.memory_budget is None and config.largest_batch is None
    assert all(getattr(config, name) is not None for name in OPEN)


def test_checkpointing_leaves_open_where_inputs_wait_and_graphs():
    found = [(one.cuda_graphs, one.offload) for one in candidates(OPEN_CONFIG, checkpointing=True)]
    assert found == [("auto", False), ("auto", True), (False, False), (False, True)] * 2


def test_maps_of_attention_are_not_recorded_by_themselves(shape):
    config = HycloraConfig(memory_budget="1GiB", attention="eager")
    assert not any(one.cuda_graphs for one in candidates(config))
    flash, eager = chosen(shape, 80), chosen(shape, 80, attention="eager")
    assert eager.name == "resident, layer by layer, 4 bit, with a map of attention" and eager.need.dyn > flash.need.dyn


def test_it_says_what_and_why(shape):
    text = str(chosen(shape, 7))
    assert text.startswith("offloaded, CUDA graphs, 4 bit, for 4 x 512 tokens: ")
    assert "1.50 GiB of host memory; resident, CUDA graphs, 4 bit, preferred to it, would take " in text
    assert str(chosen(shape, 80)).endswith("; nothing is preferred to it")


def test_a_budget_below_the_static_part(shape):
    with pytest.raises(UserError, match=r"^3.00 GiB of GPU memory is below the 4.91 GiB that weights"):
        chosen(shape, 3)


def test_settings_that_do_not_fit_name_the_nearest_that_do(shape):
    said = "with offload=False, layers=slots as set, 4 x 512 tokens take .* the nearest that fits is offload=True: "
    with pytest.raises(UserError, match=said + "offloaded, CUDA graphs, 4 bit, "):
        chosen(shape, 6, offload=False, layers="slots")


def test_rows_that_fit_in_no_way_name_the_longest_and_the_least_budget(shape):
    with pytest.raises(UserError) as error:
        chosen(shape, 8, Load.full(4, 16384))
    said = str(error.value)
    tokens = int(said.partition("GiB of host memory: 4 x ")[2].partition(" tokens would fit (")[0])
    assert chosen(shape, 8, Load.full(4, tokens)).need.gpu <= 8 * GIB
    with pytest.raises(UserError):
        chosen(shape, 8, Load.full(4, tokens + 64))
    least = float(said.partition("all of it takes ")[2].partition(" GiB")[0])
    assert chosen(shape, least + 0.01, Load.full(4, 16384)).need.gpu / GIB == pytest.approx(least, abs=0.01)
    with pytest.raises(UserError, match="not even 2000 x 64 would fit"):
        chosen(shape, 8, Load.full(2000, 16384))


@pytest.mark.parametrize("size, nbytes", [("20GiB", 20 * GIB), (20 * GIB, 20 * GIB)])
def test_a_budget_is_a_text_or_bytes(size, nbytes):
    assert budget_of(HycloraConfig(memory_budget=size)) == nbytes


def test_a_budget_is_no_more_than_the_card_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 12 * GIB))
    assert budget_of(HycloraConfig(memory_budget="12GiB")) == 12 * GIB
    with pytest.raises(UserError, match="memory_budget=20GiB is more than the 12.00 GiB that the GPU has: lower it"):
        budget_of(HycloraConfig(memory_budget="20GiB"))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"memory_budget": "20Gib"}, "memory_budget: '20Gib' is no size of memory"),
        ({"memory_budget": "H100"}, "memory_budget: 'H100' is no size of memory"),
        ({"memory_budget": 20}, "memory_budget=20 are bytes: write a unit"),
        ({"memory_budget": float("nan")}, "memory_budget: nan is no size of memory"),
        ({"memory_budget": True}, "memory_budget: True is no size of memory"),
        ({"memory_budget": "20GiB", "largest_batch": (4, 512)}, r"largest_batch: \(4, 512\) is no batch"),
        ({"memory_budget": "20GiB", "largest_batch": "512"}, "largest_batch: '512' is no batch"),
        ({"largest_batch": "4x512"}, "largest_batch='4x512' has no effect without memory_budget"),
    ],
)
def test_settings_that_cannot_work(settings, said):
    with pytest.raises(ValueError, match=said):
        HycloraConfig(**settings)


def test_open_settings_have_their_defaults_without_a_budget():
    assert {name: getattr(HycloraConfig(), name) for name in OPEN} == OPEN
    assert {name: getattr(OPEN_CONFIG, name) for name in OPEN} == dict.fromkeys(OPEN)


def test_a_model_that_is_there():
    """Its rows are as long as its positions unless it is told."""
    model = llama().to(torch.bfloat16)
    told = choose_for(model, HycloraConfig(memory_budget="80GiB", largest_batch="2x32"))
    untold = choose_for(model, HycloraConfig(memory_budget="80GiB"))
    assert (told.load.rows, told.load.tokens) == (2, 32)
    assert (untold.load.rows, untold.load.tokens) == (1, model.config.max_position_embeddings)
    assert told.need.dyn < untold.need.dyn


def test_a_model_with_a_plan_tells_of_the_first_larger_batch(monkeypatch, caplog):
    """The report has the plan, and the settings that it chose are the model's."""
    monkeypatch.setattr(patch, "_gpu", lambda layers, option: torch.device("cpu"))
    model = llama().train()
    model.get_base_model().get_input_embeddings().to(torch.bfloat16)  # by which the weights' size is told
    config = HycloraConfig(memory_budget="80GiB", largest_batch="1x16", offload=False, cuda_graphs=False)
    report = apply_hyclora(model, config)
    assert report.config == HycloraConfig(offload=False, cuda_graphs=False)
    assert "memory_budget: resident, layer by layer, 4 bit, for 1 x 16 tokens: " in str(report)
    model.get_base_model().get_input_embeddings().float()
    for tokens in (16, 17, 18):
        ids = torch.arange(tokens, device=model.device)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    told = [record.message for record in caplog.records if "larger than the 1 x 16 tokens" in record.message]
    assert len(told) == 1 and told[0].startswith("HyC-LoRA: a micro-step of 1 x 17 tokens")


def test_a_plan_is_of_a_gpu():
    with pytest.raises(
        ValueError, match="memory_budget needs all layers on one GPU; the layers are on cpu: move them there, or drop"
    ):
        apply_hyclora(llama().cpu(), HycloraConfig(memory_budget="20GiB"))
