"""The store: packed slots in host memory give the gradients that resident ones give, and nothing is left behind."""

import copy
import gc
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.config import POLICIES
from hyclora.models.layers import LayerBlock
from hyclora.models.patch import find_patch
from hyclora.operators import token_tiles
from hyclora.operators.reference import padded_rank
from hyclora.operators.savers import Step, base
from hyclora.operators.store import CudaCopies
from hyclora.utils.profiling import buffered_bytes
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import SLAB, equal, offloaded
from tests.helpers.small_models import gradients, llama, padded_batch

pytestmark = pytest.mark.usefixtures("deterministic_attention")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the computation need a GPU")


CONFIGS = {
    **{layer_type: {"layer_type": layer_type} for layer_type in POLICIES},
    "eager": {"attention": "eager", "layernorm_outlier_ratio": 0.05},
    "paper": {"scale_rule": "paper", "q_bit": 8},
    "3 bit": {"q_bit": 3},
    "overrides": {"slot_savers": {"gate": "exact", "mlp_in": "quant8", "hidden": "exact"}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_those_of_resident_slots(config):
    """Bit for bit, over steps that calibrate and steps that do not; steady memory; nothing left after a step."""
    model, batches = llama({"lora_dropout": 0.1}), [padded_batch(seed=seed) for seed in range(4)]
    config = HycloraConfig(iteration_threshold=2, **config)
    apply_hyclora(model, config)
    resident = [gradients(model, batch) for batch in batches]
    remove_hyclora(model)
    store = offloaded(model, config)
    pinned = []
    for batch, (loss, expected) in zip(batches, resident, strict=True):
        our_loss, ours = gradients(model, batch)
        assert our_loss == loss and equal(ours, expected)
        assert store.host_bytes == 0 and store.device_bytes == 0
        pinned.append(store.arena.pinned)
    assert 0 < pinned[0] == pinned[-1]


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter"])
def test_x_a_is_sent_where_it_is_large(layer_type, monkeypatch):
    """With dropout and tiles of an MLP too: gradients are the same bits, and hardly anything stays on the device."""
    monkeypatch.setattr(token_tiles, "TILE_TOKENS", 32)
    model, batch, found = llama({"r": 24, "lora_dropout": 0.1}, num_hidden_layers=4), padded_batch(), []
    batch["attention_mask"].fill_(1)
    xa_bytes = 4 * 4 * batch["attention_mask"].numel() * sum(padded_rank(24 * n) for n in (3, 1, 2, 1))
    for large in (2**40, 0):
        monkeypatch.setattr(base, "LARGE", large)
        store = offloaded(model, HycloraConfig(layer_type=layer_type, iteration_threshold=1), window=0)
        runs = [gradients(model, batch)[1] for _ in range(3)]
        kept = buffered_bytes(model, batch)
        loss = model(**batch).loss
        found.append((runs, kept, store.host_bytes))
        del loss
        remove_hyclora(model)
    (runs, kept, host), (theirs, kept_there, host_there) = found
    assert all(equal(one, other) for one, other in zip(runs, theirs, strict=True))
    assert xa_bytes <= host_there - host <= 1.2 * xa_bytes + 4 * 16 * 512
    assert kept - kept_there == pytest.approx(xa_bytes, rel=0.05)


@pytest.mark.parametrize("window, ahead", [(0, 0), (0, 3), (1, 1), (3, 0), (100, 100)])
@pytest.mark.parametrize("group", [{"group": 1}, {"group": 2}, {"group": 3}, {"group": 100}, {"group_bytes": 2**12}])
def test_any_window_and_group_give_the_same(window, ahead, group):
    model, batch = llama(), padded_batch()
    apply_hyclora(model)
    _, expected = gradients(model, batch)
    remove_hyclora(model)
    store = offloaded(model, None, window=window, ahead=ahead, **group)
    assert equal(gradients(model, batch)[1], expected)
    assert store.host_bytes == store.device_bytes == 0


def test_slots_leave_the_device_and_shared_ones_are_stored_once():
    """All packed bytes are on the host; the x_hat that a norm shares with the next block is there once."""
    model, batch = llama(num_hidden_layers=6), padded_batch()
    store = offloaded(model, HycloraConfig(layer_type="intra_inter", stream=False), window=2)
    gradients(model, batch)
    loss = model(**batch).loss
    packed = sum(
        sum(t.numel() * t.element_size() for t in saver.pack(torch.zeros(63, width, device=DEVICE), Step(1, 9))[:3])
        for block in find_patch(model).blocks
        for slot, saver in block.savers.items()
        if saver.stored and slot != "prob"
        for width in [saver.mean.numel()]
    )
    assert packed <= store.host_bytes < 1.2 * packed + 512 * 6 * 16
    assert 0 < store.device_bytes < store.host_bytes / 4
    del loss
    assert store.host_bytes == store.device_bytes == 0


@pytest.mark.parametrize("layers", [[0, 1], [0], [1]], ids=str)
def test_what_is_held_is_not_sent(layers, monkeypatch):
    """Nor is what stands open before and after held too: only units that are put inside stay on the device."""
    model, batch = llama(), padded_batch()
    store = offloaded(model, HycloraConfig(iteration_threshold=1), group=3)
    gradients(model, batch)
    _, expected = gradients(model, batch)
    held = [find_patch(model).blocks[5 * i + 4] for i in layers]
    run, sent = LayerBlock.run_layer, []

    def run_layer(self, *args, **kwargs):
        before = store.host_bytes
        with store.holding() if self in held else nullcontext():
            y = run(self, *args, **kwargs)
            if self in held:
                sent.append(store.host_bytes - before)
        return y

    monkeypatch.setattr(LayerBlock, "run_layer", run_layer)
    _, ours = gradients(model, batch)
    assert equal(ours, expected) and len(sent) == len(layers)
    # what stood open before is sent first
    assert sent[0] == 0 if layers[0] == 0 else sent[0] > 0
    assert not any(sent[1:])
    assert store.host_bytes == store.device_bytes == 0


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter"])
def test_buffered_bytes_counts_what_the_device_keeps(layer_type):
    model, batch = llama(num_hidden_layers=4), padded_batch()
    apply_hyclora(model, HycloraConfig(layer_type=layer_type))
    gradients(model, batch)
    resident = buffered_bytes(model, batch)
    remove_hyclora(model)
    store = offloaded(model, HycloraConfig(layer_type=layer_type), window=1000)
    gradients(model, batch)
    assert buffered_bytes(model, batch) == pytest.approx(resident, rel=0.1)
    store.window = 0
    assert buffered_bytes(model, batch) < 0.7 * resident
    assert store.host_bytes == 0


def abandoned(model, batch):
    model(**batch)


def failing_forward(model, batch):
    decoder = model.get_base_model().model
    hook = decoder.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    hook.remove()


def failing_backward(model, batch):
    decoder = model.get_base_model().model
    hook = decoder.layers[1].self_attn.register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch).loss.backward()
    hook.remove()


def evaluation(model, batch):
    with torch.no_grad():
        model.eval().generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False)
    model.train()


def twice_without_retaining(model, batch):
    loss = model(**batch).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def partial_gradients(model, batch):
    parameter = next(p for n, p in model.named_parameters() if "layers.1.mlp.down_proj.lora_B" in n)
    torch.autograd.grad(model(**batch).loss, parameter)


@pytest.mark.parametrize(
    "event", [abandoned, failing_forward, failing_backward, evaluation, twice_without_retaining, partial_gradients]
)
def test_nothing_is_left_behind(event):
    """Whatever happens between two steps, the next one is as it was and takes no more memory."""
    model, batch = llama({"lora_dropout": 0.1}), padded_batch()
    store = offloaded(model, HycloraConfig(iteration_threshold=1, stream=False))
    _, expected = gradients(model, batch)
    _, expected = gradients(model, batch)
    pinned = store.arena.pinned
    for _ in range(3):
        event(model, batch)
        gc.collect()  # a raised exception holds the frames it went through
        assert store.host_bytes == store.device_bytes == 0
    assert equal(gradients(model, batch)[1], expected)
    assert store.arena.pinned == pinned


def test_evaluation_between_forward_and_backward():
    model, batch = llama(), padded_batch()
    store = offloaded(model, HycloraConfig(iteration_threshold=1))
    gradients(model, batch)
    _, expected = gradients(model, batch)
    model.zero_grad()
    loss = model(**batch).loss
    evaluation(model, batch)
    loss.backward()
    assert equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    assert store.host_bytes == 0


@pytest.mark.parametrize("window", [0, 4])
def test_a_retained_graph_can_be_read_again(window):
    model, batch = llama(), padded_batch()
    store = offloaded(model, HycloraConfig(), window=window)
    _, expected = gradients(model, batch)
    model.zero_grad()
    find_patch(model).step.index = 0
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    assert store.host_bytes > 0
    model.zero_grad()
    loss.backward()
    assert equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    assert store.host_bytes == store.device_bytes == 0


def test_forwards_that_overlap_their_backwards_take_steady_memory():
    """Each backward runs after the next forward, so the store is never empty, and still the host memory is flat."""
    model, batches = llama(), [padded_batch(seed=seed) for seed in range(8)]
    store = offloaded(model, HycloraConfig(iteration_threshold=1))
    gradients(model, batches[0])
    expected = [gradients(model, batch)[1] for batch in batches]
    pinned, loss = [], model(**batches[0]).loss
    for i in range(7):
        following = model(**batches[i + 1]).loss
        model.zero_grad()
        loss.backward()
        assert equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected[i])
        loss = following
        pinned.append(store.arena.pinned)
    assert pinned[2] == pinned[-1]


def test_several_forwards_before_one_backward():
    model, batches = llama(), [padded_batch(seed=seed) for seed in range(3)]
    config = HycloraConfig(iteration_threshold=5)

    def together():
        model.zero_grad()
        torch.stack([model(**batch).loss for batch in batches]).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    apply_hyclora(model, config)
    expected = together()
    remove_hyclora(model)
    store = offloaded(model, config)
    assert equal(together(), expected)
    assert store.host_bytes == store.device_bytes == 0


@pytest.mark.parametrize("slabs", [0, 3])
def test_a_short_host_keeps_the_rest_on_the_device(slabs):
    """One warning, the same gradients."""
    model, batches = llama(), [padded_batch(seed=seed) for seed in range(3)]
    apply_hyclora(model)
    expected = [gradients(model, batch)[1] for batch in batches]
    remove_hyclora(model)
    store = offloaded(model, None)
    pin, given = store.arena._pin, []

    def short(nbytes):
        if len(given) == slabs:
            raise RuntimeError("CUDA error: out of memory")
        given.append(pin(nbytes))
        return given[-1]

    store.arena._pin = short
    with pytest.warns(UserWarning, match="offload: the host has no memory for another .* stays on the GPU") as caught:
        for batch, theirs in zip(batches, expected, strict=True):
            assert equal(gradients(model, batch)[1], theirs)
            assert store.host_bytes == store.device_bytes == 0
    assert len([w for w in caught if "offload" in str(w.message)]) == 1
    assert store.arena.pinned == slabs * SLAB


def test_a_deep_copy_has_a_store_of_its_own():
    model, batch = llama(), padded_batch()
    store = offloaded(model, None)
    loss = model(**batch).loss
    clone = copy.deepcopy(find_patch(model))
    assert clone.store is not store and {id(b.store) for b in clone.blocks} == {id(clone.store)}
    assert clone.store.host_bytes == 0 < store.host_bytes and clone.store.arena.slab == SLAB
    loss.backward()


def test_a_hook_that_copies_saved_tensors_is_refused():
    model = llama()
    offloaded(model, None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = model(**padded_batch()).loss
    with pytest.raises(RuntimeError, match="one kind of offloading at a time"):
        loss.backward()


def test_a_cpu_model_has_nothing_to_offload():
    model = llama().cpu()
    with pytest.raises(ValueError, match="offload=True needs all layers on one GPU; the layers are on cpu"):
        apply_hyclora(model, HycloraConfig(offload=True))
    assert not any("forward" in m.__dict__ for m in model.modules())


@needs_gpu
@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_late_copies_on_the_gpu(layer_type):
    """Copies that lag far behind the computation give the same gradients, while other work reuses freed memory."""

    class Late(CudaCopies):
        def copy(self, pairs):
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(20_000_000)
            return super().copy(pairs)

    model, batches = llama({"lora_dropout": 0.1}, num_hidden_layers=6), [padded_batch(seed=s) for s in range(3)]
    # the hooks below see rows as they come
    config = HycloraConfig(layer_type=layer_type, iteration_threshold=1, cuda_graphs=False, stream=False)

    def overwrite_free_memory(*_):
        for size in (2**12, 2**14, 2**16, 2**18):
            torch.full((size,), float("nan"), device="cuda")

    for layer in model.get_base_model().model.layers:  # before the first run too: layers with hooks have other kernels
        layer.register_forward_hook(overwrite_free_memory)
        layer.register_full_backward_hook(overwrite_free_memory)
    apply_hyclora(model, config)
    expected = [gradients(model, batch)[1] for batch in batches]
    remove_hyclora(model)
    offloaded(model, config, Late(torch.device("cuda", 0)), slab=2**20)
    for batch, theirs in zip(batches, expected, strict=True):
        assert equal(gradients(model, batch)[1], theirs)


@needs_gpu
def test_memory_is_flat_on_the_gpu():
    """Allocated bytes are the same after every step, exceptions and abandoned graphs included; peak below resident."""
    model, batch = llama(num_hidden_layers=8), padded_batch(rows=8, width=64)
    peaks, after = {}, {}
    gc.collect()  # models and patches of before are cycles, which must not go between two of these steps

    def step(key):
        torch.cuda.reset_peak_memory_stats()
        gradients(model, batch)
        torch.cuda.synchronize()
        peaks[key], after[key] = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()

    config = HycloraConfig(layer_type="baseline", cuda_graphs=False)
    apply_hyclora(model, config)
    for i in range(2):
        step(("resident", i))
    remove_hyclora(model)
    gc.collect()
    apply_hyclora(model, replace(config, offload=True))
    store = find_patch(model).store
    for i in range(6):
        step(i)
        if i == 2:
            failing_forward(model, batch)
            failing_backward(model, batch)
            abandoned(model, batch)
            gc.collect()
    assert len({after[i] for i in range(1, 6)}) == 1
    assert peaks[5] == peaks[1] < peaks["resident", 1]
    assert store.arena.pinned == store.arena.slab and store.host_bytes == 0


@needs_gpu
def test_offload_on_the_gpu_through_the_option():
    model, batches = llama(), [padded_batch(seed=seed) for seed in range(4)]
    config = {"iteration_threshold": 2, "q_bit": 4}
    apply_hyclora(model, HycloraConfig(**config))
    expected = [gradients(model, batch)[1] for batch in batches]
    remove_hyclora(model)
    report = apply_hyclora(model, HycloraConfig(offload=True, **config))
    assert "pinned host memory" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(equal(gradients(model, b)[1], e) for b, e in zip(batches, expected, strict=True))
