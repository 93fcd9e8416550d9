"""Layers that keep their input alone, and are run again in backward."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora, verify
from hyclora.models.blocks import MlpBlock
from hyclora.models.config import KEPT
from hyclora.models.patch import find_patch
from hyclora.models.state import load_calibration, save_calibration
from hyclora.operators.savers import ChannelQuant
from hyclora.operators.store import UNITS_A_LAYER
from hyclora.utils.profiling import buffered_bytes
from tests.helpers.offloading import equal, offloaded
from tests.helpers.small_models import (
    gradients,
    largest_error,
    llama,
    mean_cosine,
    mistral,
    padded_batch,
    qwen3,
    roberta,
)

pytestmark = pytest.mark.usefixtures("deterministic_attention")

DROPS = {"lora_dropout": 0.1}
WIDTH = 96
# measured with 4 layers: llama .99996 and .988, roberta .99998 and .994
NEAR = {"input8": 0.9998, "input4": 0.98}


def patched(model, offload: bool = False, **config):
    """The patch of a model."""
    config = HycloraConfig(**config)
    offloaded(model, config, window=0) if offload else apply_hyclora(model, config)
    return find_patch(model)


@pytest.mark.parametrize("lora", [{}, DROPS], ids=["plain", "dropout"])
@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("family", [llama, mistral, qwen3, roberta], ids=lambda f: f.__name__)
def test_an_exact_input_gives_pefts_gradients(family, offload, lora):
    """Rows of many lengths, grouped queries, windows; the second run drops what the first one did."""
    model, batch = family(lora), padded_batch()
    loss, expected = gradients(model, batch)
    patch = patched(model, offload, layers="input", stream=False)
    ours_loss, ours = gradients(model, batch)
    assert abs(ours_loss - loss) < 1e-5 and largest_error(ours, expected) < 1e-5
    if offload:
        last_norm = family is not roberta
        assert patch.store._serial == 2 * UNITS_A_LAYER + last_norm
        assert patch.store.arena.pinned and patch.store.host_bytes == patch.store.device_bytes == 0


@pytest.mark.usefixtures("any_dtype")
@pytest.mark.parametrize("lora", [{}, DROPS], ids=["plain", "dropout"])
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_a_stream_of_tokens(family, lora):
    """Without the padding that nobody reads; what is dropped is that of exact slots."""
    model, batch = family(lora), padded_batch()
    patched(model, layer_type="baseline")
    loss, expected = gradients(model, batch)
    remove_hyclora(model)
    patch, rows = patched(model, layers="input", cuda_graphs=False), []
    for checkpoint in patch.checkpoints:
        keep_input = checkpoint.keep_input
        checkpoint.keep_input = lambda run, x, *args, keep=keep_input, **kwargs: (
            rows.append(x.shape[:2]) or keep(run, x, *args, **kwargs)
        )
    ours_loss, ours = gradients(model, batch)
    assert ours_loss == pytest.approx(loss, abs=1e-6) and largest_error(ours, expected) < 1e-5
    assert rows == [(1, int(batch["attention_mask"].sum()))] * 2


def test_maps_that_drop():
    """The published attention is run twice as well, and drops the same of its map; so does torch's."""
    batch = padded_batch()
    for attention in ("eager", "flash"):
        model = llama(attention_dropout=0.2, attn_implementation="eager")
        layer_type = {"layer_type": "baseline", "attention": attention}
        patched(model, **layer_type, stream=False)
        loss, expected = gradients(model, batch)
        remove_hyclora(model)
        patched(model, layers="input", attention=attention, stream=False)
        ours_loss, ours = gradients(model, batch)
        assert ours_loss == pytest.approx(loss, abs=1e-6) and largest_error(ours, expected) < 1e-5


@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_quantized_inputs(family):
    """The forward is exact, and gradients are as near as the input's bits say, wherever it waits."""
    model, batch = family(num_hidden_layers=4), padded_batch()
    loss, exact = gradients(model, batch)
    for kind, near in NEAR.items():
        found = []
        for offload in (False, True):
            patched(model, offload, layers=kind, stream=False)
            ours_loss, ours = gradients(model, batch)
            found.append(ours)
            assert abs(ours_loss - loss) < 1e-6 and near < mean_cosine(ours, exact) < 1 - 1e-6
            remove_hyclora(model)
        assert equal(*found)


@pytest.mark.parametrize("kind", [kind for kind in KEPT if kind != "slots"])
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_bytes_kept(family, kind):
    """A layer more keeps its input more, in as many bits as the report says, and the quantizer's statistics."""
    sizes, bits = [], []
    # of 48 tokens all parts are a multiple of 16 bytes
    batch = {name: t[:, :16].contiguous() for name, t in padded_batch().items()}
    n_tokens = batch["input_ids"].numel()
    for n_layers in (2, 3):
        model = family(num_hidden_layers=n_layers)
        report = apply_hyclora(model, HycloraConfig(layers=kind, stream=False))
        sizes.append(buffered_bytes(model, batch))
        bits.append(report.slot_bits["layer_in"])
        assert set(report.slot_bits) - {"norm_in"} == {"layer_in"}
        assert f"{n_layers} of {n_layers} layers keep their input alone" in str(report)
    quantizer = find_patch(model).checkpoints[0].savers["layer_in"]
    if kind == "input":
        assert bits[1] - bits[0] == 16 * WIDTH and sizes[1] - sizes[0] == 4 * WIDTH * n_tokens  # in fp32
    else:
        exact = quantizer.n_outliers
        told = (bits[1] - bits[0]) / 8 + 2 * exact  # fp32 ones again
        assert sizes[1] - sizes[0] == n_tokens * told + 8 * WIDTH + 8 * exact


def test_layers_of_both_kinds():
    """Where slots are exact all gradients are; each layer keeps what it is told to."""
    model, batch = llama(num_hidden_layers=4), padded_batch()
    _, expected = gradients(model, batch)
    exact = {slot: "exact" for slot in ("norm_in", "attn_in", "mlp_in", "q", "k", "v", "gate", "up")}
    report = apply_hyclora(model, HycloraConfig(layers="1*input,2*slots,input", slot_savers=exact))
    assert largest_error(gradients(model, batch)[1], expected) < 1e-5
    assert report.kept == {"input": 2, "slots": 2} and report.savers["q"] == ["exact"] * 2
    assert report.savers["layer_in"] == ["exact"] * 2


def test_an_encoders_layer_after_one_that_is_run_again_keeps_its_own_input():
    """What it would derive it from is not there."""
    model, batch = roberta(num_hidden_layers=3), padded_batch()
    _, expected = gradients(model, batch)
    report = apply_hyclora(model, HycloraConfig(layers="1*slots,1*input,slots", q_bit=8))
    assert report.savers["attn_in"] == ["8 bit"] * 2 and report.savers["mlp_in"] == ["derived"] * 2
    assert mean_cosine(gradients(model, batch)[1], expected) > 0.999


@pytest.mark.parametrize("savers", [{}, {"gate": "quant4", "q": "quant8"}], ids=["exact", "quantized"])
def test_calibration_counts_each_forward_once(savers):
    """Of the input, and of slots that slot_savers has quantized while a layer is run again."""
    model, n_steps = llama(), 3
    patch = patched(model, layers="input8", slot_savers=savers, iteration_threshold=2)
    expected = 0
    for seed in range(n_steps):
        batch = padded_batch(seed=seed)
        gradients(model, batch)
        expected += int(batch["attention_mask"].sum()) if seed < 2 else 0
    blocks = [*patch.checkpoints, *patch.blocks]
    quantizers = [s for block in blocks for s in block.savers.values() if isinstance(s, ChannelQuant)]
    assert len(quantizers) == 2 + 1 + 2 * len(savers) and patch.step.index == n_steps
    assert [(int(s.statistics["count"]), int(s.statistics["steps"])) for s in quantizers] == [(expected, 2)] * len(
        quantizers
    )


def test_resumed_gradients_are_bit_equal(tmp_path):
    model, config = llama(), {"layers": "input4", "iteration_threshold": 2}
    patched(model, **config)
    for seed in range(2):
        gradients(model, padded_batch(seed=seed))
    save_calibration(model, tmp_path)
    expected = gradients(model, padded_batch(seed=9))[1]
    resumed = llama()
    patched(resumed, **config)
    load_calibration(resumed, tmp_path)
    assert equal(gradients(resumed, padded_batch(seed=9))[1], expected)
    other = llama()
    patched(other, layers="input8", iteration_threshold=2)
    with pytest.raises(ValueError, match="other settings of layers; use the same"):
        load_calibration(other, tmp_path)


def test_gradients_add_up_over_forwards_that_overlap():
    """Two forwards before their backwards: each layer is run again from its own input, with its own dropout."""
    model, batches = llama(DROPS), [padded_batch(seed=seed) for seed in range(2)]
    found = []
    for config in ({"layer_type": "baseline"}, {"layers": "input"}):
        patched(model, **config, stream=False)
        model.zero_grad()
        torch.manual_seed(3)
        losses = [model(**batch).loss for batch in batches]
        for loss in losses:
            loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        remove_hyclora(model)
    assert largest_error(found[1], found[0]) < 1e-5


def double_scaling(model):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 2


CHANGES = {
    "scaling": double_scaling,
    "other adapter": lambda model: model.set_adapter("other"),
    "no adapter": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "dropout": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_adapters_that_change_before_the_backward_are_refused(family, checkpointing, change):
    """The second run would read others than the first did; what was set back in time is no change."""
    model, batch = family(DROPS), padded_batch()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "query"], init_lora_weights=False))
    model.set_adapter("default")
    if checkpointing:
        model.gradient_checkpointing_enable()
    patched(model, **({"slot_savers": {"layer_in": "quant8"}} if checkpointing else {"layers": "input"}))
    _, expected = gradients(model, batch)
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        model.eval()(**batch)
    model.train()
    loss.backward(retain_graph=True)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name in expected}
    assert largest_error(found, expected) < 1e-5
    change(model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    with pytest.raises(ValueError, match=r"layers?\.1: adapter, scaling, dropout or weights were changed"):
        loss.backward()


def test_a_dropout_of_maps_that_is_off_before_the_backward_is_refused():
    """But evaluation in between is none without any dropout."""
    for p in (0.0, 0.3):
        model = llama(attention_dropout=p)
        patched(model, layers="input")
        loss = model(**padded_batch()).loss
        model.eval()
        with pytest.raises(ValueError, match="dropout or weights were changed") if p else nullcontext():
            loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_runs_twice_with_checkpointing_of_hugging_face_too(checkpointing):
    model, batch, runs = llama(), padded_batch(), Counter()
    _, expected = gradients(model, batch)
    patch = patched(model, layers="input")
    if checkpointing:
        model.gradient_checkpointing_enable()
    for block in [block for block in patch.blocks if isinstance(block, MlpBlock)]:
        block.run = lambda *a, run=block.run, name=block.name, **kw: runs.update([name]) or run(*a, **kw)
    assert largest_error(gradients(model, batch)[1], expected) < 1e-5
    assert len(runs) == 2 and set(runs.values()) == {2}


def test_gradients_outside_of_training_are_stock():
    """In evaluation, and where the adapters are off, nothing is run again."""
    model, batch = llama(), padded_batch()
    model.eval()
    _, expected = gradients(model, batch)
    patched(model.train(), layers="input4")
    gradients(model, batch)
    model.eval()
    assert equal(gradients(model, batch)[1], expected)


def test_verify_prices_the_input():
    model = llama()
    patched(model, layers="input4", iteration_threshold=1)
    found = verify(model, [padded_batch(seed=seed) for seed in range(2)])
    assert {slot.slot for slot in found.slots} == {"layer_in", "norm_in"} and not found.wrong


def test_a_layer_with_stock_parts_is_refused():
    model = llama()
    layers = model.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(ValueError, match=r"layers='input8': .*layers\.0 cannot keep its input alone.*several layers"):
        apply_hyclora(model, HycloraConfig(layers="input8"))
