"""Counted bytes: what savers keep against patched models, and how the moments of a step depend on the setting."""

from dataclasses import replace

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.patch import find_patch
from hyclora.operators.savers import ChannelQuant
from hyclora.utils.planning import Savers, Shape, count, live
from tests.helpers.small_models import llama, qwen3

SETTINGS = [
    {},
    {"q_bit": 2},
    {"q_bit": "auto", "average_bits": 4.0},
    {"layer_type": "intra", "q_bit": 8},
    {"slot_savers": {"gate": "quant8", "attn_out": "quant4"}},
]
CORE = "backward of attention: core"
LAYER_BY_LAYER = {"cuda_graphs": False}


@pytest.fixture(scope="module")
def shapes():
    found = {}

    def shape(name, **options):
        key = name, *options.items()
        if key not in found:
            found[key] = Shape(name, **options)
        return found[key]

    return shape


def need(shape, batch=4, length=512, checkpointing=False, documents=None, **settings):
    return count(Savers(shape, HycloraConfig(**settings)), batch, length, checkpointing, documents)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("model", [llama, qwen3])
def test_slots_are_those_of_a_patched_model(model, settings):
    config = HycloraConfig(**settings)
    patched = model()
    report = apply_hyclora(patched, config)
    units = Savers(Shape(patched.config, base="bf16"), config).units
    assert sum(unit.layer for unit in units) == sum(report.slot_bits.values()) / 8


def test_inputs_are_those_of_a_patched_model():
    """Of both kinds of layers: host memory is what the report says."""
    config = HycloraConfig(layers="1*slots,input4", offload=True)
    patched = llama(num_hidden_layers=3)
    report = apply_hyclora(patched, replace(config, offload=False))
    counted = count(Savers(Shape(patched.config, base="bf16"), config), 1, 64)
    assert counted.host == 64 * sum(report.slot_bits.values()) / 8 and "layer_in" in report.slot_bits


def test_statistics_are_those_of_calibration():
    model, config = llama(), HycloraConfig(layernorm_outlier_ratio=0.1)
    apply_hyclora(model, config)
    ids = torch.arange(16, device=model.device)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    patch, wide = find_patch(model), lambda t: t.numel() > 1 and t.dtype == torch.float32
    quantizers = [s for b in patch.blocks for s in b.savers.values() if isinstance(s, ChannelQuant)]
    tensors = {
        id(t): t.numel() * 4
        for saver in quantizers
        for t in (saver.mean, saver.std, saver.inv_std, *saver.restoring, *filter(wide, saver.statistics.values()))
    }
    assert Savers(Shape(model.config, base="bf16"), config).statistics == sum(tensors.values())


def test_documents_take_memory_of_the_kernel_for_runs(shapes):
    shape = shapes("llama-2-7b")
    few, many = (need(shape, documents=n, offload=True, **LAYER_BY_LAYER) for n in (4, 16))
    # fp32 dq of 128 tokens more for each, in the same number of pieces
    assert many.moments[CORE] - few.moments[CORE] == 12 * 128 * 4 * 4096


def test_a_window_that_rows_reach_takes_the_kernel_for_runs(shapes):
    mistral = shapes("mistral-7b")
    inside, beyond = (need(mistral, 1, n, **LAYER_BY_LAYER).moments[CORE] for n in (4096, 8192))
    assert beyond > 2 * inside


@pytest.mark.parametrize("graphs", [False, True])
def test_a_forward_layer_by_layer_has_one_workspace(shapes, graphs, monkeypatch):
    """Static memory has that of autograd's thread, which a forward gives back before it starts."""
    shape, found = shapes("llama-2-7b"), []
    for size in (2**25, 2**26):
        monkeypatch.setattr(live, "WORKSPACE", size)
        found.append(need(shape, cuda_graphs=graphs).moments)
    small, large = found
    ahead = {name for name in small if large[name] != small[name]}
    forward = {name for name in small if name.startswith("forward") or name == "loss"}
    assert forward and ahead == (set() if graphs else forward)
    assert all(small[name] - large[name] == 2**25 for name in ahead)


def test_fewer_bits_and_the_host_take_less(shapes):
    shape = shapes("llama-2-7b")
    dyn = [need(shape, q_bit=bits, offload=offload).dyn for offload in (False, True) for bits in (8, 4, 2)]
    assert dyn == sorted(dyn, reverse=True)
    assert need(shape, offload=True).host > 0 == need(shape).host


def test_checkpointing_keeps_layer_inputs_alone(shapes):
    """Of a store two are on the GPU; the embeddings, a leaf that gets a gradient, are there either way."""
    shape = shapes("llama-2-7b")
    inputs = {saver: {"slot_savers": {"layer_in": saver}, "cuda_graphs": False} for saver in ("exact", "quant8")}
    host = {saver: need(shape, checkpointing=True, offload=True, **inputs[saver]).host for saver in inputs}
    assert host["exact"] == 32 * 2048 * 4096 * 2
    assert host["quant8"] == 32 * 2048 * (4096 + 4096 // 64 * 2 + 2 * 21)  # of which 21 channels are exact
    resident, offloaded = (need(shape, checkpointing=True, offload=o, **inputs["quant8"]) for o in (False, True))
    assert resident.host == 0 and resident.dyn - offloaded.dyn == 30 * host["quant8"] // 32


def test_layers_that_keep_their_input(shapes):
    """Host memory is theirs alone; where layers are of both kinds it lies between, and so does a resident peak.

    The first of a chain of differences is in 8 bit, and the model's first layer too.
    """
    shape = shapes("llama-2-7b")
    size, first = (2048 * (4096 // 64 * (64 * bits + 16) + 16 * 21) // 8 for bits in (4, 8))
    mixed = {name: need(shape, layers=name, offload=True) for name in ("input4", "8*slots,input4", "slots")}
    assert mixed["input4"].host == 27 * size + 5 * first
    assert mixed["8*slots,input4"].host == 20 * size + 4 * first + mixed["slots"].host // 4
    resident = [need(shape, layers=name).dyn for name in ("input4", "8*slots,input4", "slots")]
    assert resident == sorted(resident) and need(shape, layers="input4", offload=True).dyn < resident[0]


def test_long_rows_grow_by_what_is_kept_of_a_token_and_few_activations(shapes):
    savers = Savers(shapes("llama-2-7b"), HycloraConfig(offload=True, cuda_graphs=False))
    one, two, three = (count(savers, 1, n * 2**18).dyn for n in (2, 3, 4))  # one head of attention at a time
    assert abs((three - two) - (two - one)) < 1024
