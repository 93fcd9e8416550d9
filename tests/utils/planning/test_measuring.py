"""Micro-steps of a few layers: which are run, what becomes of their times, and that a mode runs as it is set."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from hyclora.models.patch import patch_of
from hyclora.utils.args import LoraArguments
from hyclora.utils.planning import MODES, Shape, measuring
from hyclora.utils.planning.measuring import NO_GPU, NO_ROOM, Bench, batch_of, measure_modes, without_advice
from hyclora.utils.planning.times import Batch, Work
from tests.helpers.replaying import graphed
from tests.helpers.small_models import qwen3

ADAPTERS = LoraArguments(target_modules=["all-linear"])
CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAMES = {mode.name: mode for mode in MODES}
EXACT, FOUR = NAMES["exact, resident, layer by layer"], NAMES["resident, layer by layer, 4 bit"]
GRAPHS, CHECKPOINTING = NAMES["offloaded, CUDA graphs, 4 bit"], NAMES["checkpointing, resident layer inputs, exact"]


class Clocked(Bench):
    """No model is made: a micro-step takes what it has to do, and `without` have no memory for more than two layers."""

    without, speed = (), 1.0

    def __post_init__(self):
        super().__post_init__()
        self.runs = []

    def time(self, mode, work: Work) -> float:
        layer = 7e-4 + 2e-6 * work.tokens
        found = 0.008 + 1e-6 * work.tokens + work.layers * layer + 1.6e-4 * work.pairs
        return self.speed * found * (1 + NAMES[mode.name].checkpointing)

    def seconds(self, mode, layers, batch):
        self.runs.append((mode, layers, batch))
        return None if mode in self.without and layers > 2 else self.time(mode, self.work(layers, batch))

    def of(self, mode) -> set:
        """The runs of a mode after the first two, which are to find out how fast the device is."""
        return {(layers, batch) for one, layers, batch in self.runs[2:] if one is mode}


@pytest.fixture(scope="module")
def shapes():
    return {name: Shape(name) for name in ("llama-2-7b", "llama-3.2-1b")}


@pytest.fixture
def bench(shapes, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (80e9, 80e9))
    return lambda name="llama-2-7b": Clocked(shapes[name], ADAPTERS, GPU)


def exactly(bench, mode, batch):
    """Milliseconds of a micro-step of all layers."""
    return pytest.approx(1e3 * bench.time(mode, bench.work(bench.n, batch)))


@pytest.mark.parametrize("batch", [Batch(4, 512), Batch(1, 8192), Batch(1, 131072), Batch(4, 65536, 64)], ids=str)
def test_times_are_those_of_all_layers(bench, batch):
    one = bench()
    found = measure_modes(one, [GRAPHS, CHECKPOINTING], batch)
    for mode in (GRAPHS, CHECKPOINTING):
        assert found[mode.name].ms == exactly(one, mode, batch)
        assert max(layers for layers, _ in one.of(mode)) < one.n
    assert found[CHECKPOINTING.name].ms > found[GRAPHS.name].ms


def test_usual_rows_are_measured_as_they_are_at_two_depths(bench):
    one, batch = bench(), Batch(4, 512)
    measure_modes(one, [GRAPHS], batch)
    few, many = sorted(layers for layers, _ in one.of(GRAPHS))
    assert 2 * few <= many <= 2 * few + 1 and few >= 4 and {of for _, of in one.of(GRAPHS)} == {batch}


def test_long_rows_are_measured_at_three_lengths(bench):
    one, batch = bench(), Batch(1, 131072)
    measure_modes(one, [GRAPHS], batch)
    lengths = sorted({of.tokens for _, of in one.of(GRAPHS)})
    assert len(lengths) == 3 and lengths[0] == 2048 and 16384 <= lengths[-1] < batch.tokens
    assert lengths[1] ** 2 == pytest.approx(lengths[0] * lengths[2], rel=0.01)
    layers = {n: sorted(layers for layers, of in one.of(GRAPHS) if of.tokens == n) for n in lengths}
    assert layers[lengths[-1]] == [2, 4] and layers[2048][0] > 2  # the host is hidden beside many layers alone


def test_a_slow_device_runs_as_few_layers_as_will_do(bench):
    one = bench()
    one.speed = 100.0
    found = measure_modes(one, [GRAPHS], Batch(4, 512))
    assert {layers for layers, _ in one.of(GRAPHS)} == {2, 4}
    assert found[GRAPHS.name].ms == exactly(one, GRAPHS, Batch(4, 512))


def test_a_small_model_is_measured_whole(bench):
    one, batch = bench("llama-3.2-1b"), Batch(4, 512)
    assert measure_modes(one, [GRAPHS], batch)[GRAPHS.name].ms == exactly(one, GRAPHS, batch)
    assert one.of(GRAPHS) == {(16, batch)}


def test_layers_have_room_in_16_bit_before_they_are_packed(bench, monkeypatch):
    one = bench()
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (8e9, 8e9))
    measure_modes(one, [GRAPHS], Batch(4, 512))
    assert max(layers for layers, _ in one.of(GRAPHS)) * one.weights * 2 <= 4e9


def test_a_mode_without_room_is_unknown_and_left_alone(bench):
    one, batch = bench(), Batch(4, 512)
    one.without = (GRAPHS,)
    found = measure_modes(one, [GRAPHS, FOUR], batch)
    assert found[GRAPHS.name].ms is None and str(found[GRAPHS.name]) == f"unknown: {NO_ROOM}"
    assert found[FOUR.name].ms == exactly(one, FOUR, batch) and len(one.of(GRAPHS)) == 1
    one.without = (GRAPHS, FOUR)
    assert {time.why for time in measure_modes(one, [GRAPHS, FOUR], batch).values()} == {NO_ROOM}


def test_what_needs_a_gpu_is_unknown_without_one(shapes):
    one = Clocked(shapes["llama-3.2-1b"], ADAPTERS, CPU)
    found = measure_modes(one, [GRAPHS, NAMES["offloaded, layer by layer, 4 bit"], FOUR], Batch(1, 64))
    assert [time.why for time in found.values()] == [NO_GPU, NO_GPU, ""] and found[FOUR.name].ms
    assert [mode for mode, _, _ in one.runs] == [FOUR] * 3


@pytest.fixture
def small(tiny_llama_folder):
    return Bench(Shape(tiny_llama_folder, "bf16"), ADAPTERS, CPU)


@pytest.mark.parametrize("mode", [FOUR, EXACT, CHECKPOINTING, NAMES["resident layer inputs, layer by layer, 8 bit"]])
def test_a_mode_runs_as_it_is_set_and_the_model_is_stock_afterwards(small, mode, monkeypatch):
    seen = []

    def seconds_of(model, batch):
        again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        seen.append((patch_of(model).config, again, batch["input_ids"].shape))
        model(**batch).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        return 0.5

    monkeypatch.setattr(measuring, "seconds_of", seconds_of)
    assert small.seconds(mode, 1, Batch(2, 24)) == 0.5
    ((config, again, shape),) = seen
    assert (config.to_dict() | {"iteration_threshold": 5}) == mode.config.to_dict() and config.iteration_threshold == 1
    assert again == mode.checkpointing and shape == (2, 24)
    model = small.model(1)
    assert patch_of(model) is None and len(model.base_model.model.model.layers) == 1
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_has_the_first_layers_and_random_weights(tiny_llama_folder):
    """Whatever its files say of their own weights, and of each layer."""
    config = AutoConfig.from_pretrained(tiny_llama_folder)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    one = Bench(Shape(config, "bf16"), ADAPTERS, CPU)
    assert len(one.model(1).base_model.model.model.layers) == 1
    assert not hasattr(one.model(1).config, "quantization_config")
    mixed = qwen3().config
    mixed.layer_types = ["full_attention"] * mixed.num_hidden_layers
    assert Bench(Shape(mixed, "bf16"), ADAPTERS, CPU).model(1).config.layer_types == ["full_attention"]


def test_times_are_measured(small, monkeypatch):
    monkeypatch.setattr(measuring, "WINDOW", 0.0)
    found = measure_modes(small, [FOUR, CHECKPOINTING], Batch(1, 40))
    assert all(time.ms > 0 for time in found.values()) and len(found) == 2 and small._model is None


def test_out_of_memory_is_no_time_and_other_failures_are_told(small, monkeypatch):
    def fails(error):
        def seconds_of(model, batch):
            raise error

        monkeypatch.setattr(measuring, "seconds_of", seconds_of)

    fails(torch.OutOfMemoryError("CUDA out of memory"))
    assert small.seconds(FOUR, 1, Batch(1, 8)) is None and patch_of(small.model(1)) is None
    fails(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        small.seconds(FOUR, 1, Batch(1, 8))


def test_the_clock_runs_after_graphs_are_recorded_and_as_often_as_there_is_time(monkeypatch):
    asked = []

    class Step:
        def __init__(self, model, batch):
            asked.append((model, batch))

        def seconds(self, n):
            asked.append(n)
            return [0.1] * n if n == 1 else [0.3] * n

    monkeypatch.setattr(measuring, "MicroStep", Step)
    assert measuring.seconds_of("model", "batch") == 0.3 and asked == [("model", "batch"), 1, 4]
    monkeypatch.setattr(measuring, "WINDOW", 0.01)
    measuring.seconds_of("model", "batch")
    assert asked[-1] == 2  # some are timed in any case


def test_positions_tell_documents():
    packed = batch_of(Batch(2, 10, 5), 100, CPU)
    assert packed.keys() == {"input_ids", "labels", "position_ids"}
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert batch_of(Batch(2, 10), 100, CPU)["attention_mask"].all()


def test_advice_is_not_told_while_times_are_measured(caplog):
    with without_advice():
        measuring.logger.warning("shuffle the rows")
    measuring.logger.warning("again")
    assert caplog.messages == ["again"]


def test_few_tokens_calibrate_as_long_as_they_must(small, monkeypatch):
    """Before anything is timed: what calibrates runs unlike what does not."""
    calibrating = []
    real = measuring.MicroStep.seconds

    def seconds(step, n):
        calibrating.append(patch_of(step.model).step.calibrating)
        return real(step, n)

    monkeypatch.setattr(measuring.MicroStep, "seconds", seconds)
    monkeypatch.setattr(measuring, "WINDOW", 0.0)
    small.seconds(FOUR, 1, Batch(1, 4))
    assert calibrating == [False, False] and isinstance(small.model(1), nn.Module)


@pytest.mark.parametrize("documents", [None, 4])
def test_graphs_are_recorded_before_they_are_timed(small, any_dtype, monkeypatch, documents):
    """Anew for each mode, on a model that had others."""
    real = measuring.MicroStep.seconds
    recorded = []

    def apply(model, config):
        options = config.to_dict()
        assert options.pop("iteration_threshold") == 1
        graphed(model, options)

    def seconds(step, n):
        graphs = patch_of(step.model).graphs
        before = dict(graphs.recordings)
        found = real(step, n)
        recorded.append((len(before), graphs.recordings == before))
        return found

    monkeypatch.setattr(measuring, "apply_hyclora", apply)
    monkeypatch.setattr(measuring.MicroStep, "seconds", seconds)
    monkeypatch.setattr(measuring, "WINDOW", 0.0)
    monkeypatch.setattr("tests.helpers.replaying.CALIBRATION", 1)
    for mode in (FOUR, EXACT):
        small.seconds(mode, 2, Batch(2, 24, documents))
    assert recorded == [(1, True)] * 4
