"""verify(): gradients beside exact LoRA's, what is wrong with them, and a model that trains as if nothing had been."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora, verify
from hyclora.models import building
from hyclora.models.patch import find_patch
from hyclora.models.verification import ALWAYS_ZERO, AT_START, MISSING, NOT_FINITE, ROUNDING, UNUSED, ZERO
from hyclora.models.verify import _Measurement
from hyclora.operators.linear.lora import ProjectionGroup
from hyclora.operators.savers import ChannelQuant
from hyclora.utils.checkpointing import checkpoint_layers
from tests.helpers.calibrating import statistics
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import record
from tests.helpers.small_models import gradients, llama, mistral, padded_batch, qwen2, qwen3, roberta

FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "roberta": roberta}
CALIBRATION = 3


def batches(count=CALIBRATION + 1) -> list[dict]:
    return [padded_batch(seed=seed) for seed in range(count)]


def patched(make=llama, config=None, **options):
    model = make(**options)
    apply_hyclora(model, HycloraConfig(iteration_threshold=CALIBRATION, **(config or {})))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_it_finds_what_training_would(family):
    """The cosines are those of gradients from a model that was calibrated and run by hand."""
    model = patched(FAMILIES[family])
    found = verify(model, batches())
    for batch in batches()[:-1]:
        model(**batch)
    ours = gradients(model, batches()[-1])[1]
    remove_hyclora(model)
    loss, exact = gradients(model, batches()[-1])
    assert {g.name for g in found.gradients} == set(exact) and not found.wrong
    for g in found.gradients:
        expected = torch.cosine_similarity(ours[g.name].flatten(), exact[g.name].flatten(), dim=0).item()
        assert g.cosine == pytest.approx(expected, abs=1e-4) and 0.95 < g.cosine
        assert g.error == pytest.approx(((ours[g.name] - exact[g.name]).norm() / exact[g.name].norm()).item(), abs=1e-2)
    assert {g.layer for g in found.gradients} - {None} == {0, 1}
    assert found.loss == pytest.approx(loss, rel=1e-5) and found.exact_loss == pytest.approx(loss, rel=1e-6)
    assert max(g.error for g in found.rounding) < 1e-3 and found.exact == "stock PEFT"
    slots = {slot.slot: slot for slot in found.slots}
    rest = {"attn_in"} if family == "roberta" else {"gate"}
    assert slots.keys() == {"norm_in", "q", "k", "v", "up", *rest}
    errors = [slot.summary.error for slot in found.slots]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 1e-4
    # of other slots the error is a part of the whole
    assert errors[0] < found.summary.error < sum(errors)
    text = str(found)
    assert all(f"{slot} alone" in text for slot in slots) and f"{found.slots[0].slot} hurts most" in text


@pytest.mark.parametrize(
    "config, saver, more",
    [
        ({"q_bit": 2}, "quant4", 2 * 2 * 4 * 64 / 8),
        ({"q_bit": 4}, "quant8", 2 * 4 * 4 * 64 / 8),
        ({"q_bit": 8}, "exact", 2 * (16 * 200 - 4 * (8 * 64 + 16)) / 8),
        ({"q_bit": 4, "scale_rule": "paper", "layer_type": "intra_inter"}, "quant8", None),
        ({"q_bit": "auto", "average_bits": 4.0}, None, None),
    ],
)
def test_prices_are_those_of_the_savers(config, saver, more):
    """gate has 200 channels in two layers, which are four groups of 64."""
    model = patched(config=config)
    found = verify(model, batches())
    gate = next(slot for slot in found.slots if slot.slot == "gate")
    report_bits = apply_again(model, config).slot_bits
    assert gate.n_bytes == pytest.approx(report_bits["gate"] / 8)
    if saver is not None:
        assert next(iter(gate.better)) == saver
        other = apply_again(model, config | {"slot_savers": {"gate": saver}}).slot_bits["gate"]
        assert gate.better[saver] == pytest.approx(other / 8 - gate.n_bytes)
    if more is not None:
        assert gate.better[saver] == pytest.approx(more)


def test_prices_of_slots_whose_groups_pay_for_a_wider_k():
    """Each is what slot_savers then takes: the other slots stay as they are."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 512}
    model = patched(config={"q_bit": 2}, **sizes)
    found = {slot.slot: slot for slot in verify(model, batches()).slots}
    before = apply_again(model, {"q_bit": 2}).slot_bits
    for name in ("k", "gate"):
        saver, price = next(iter(found[name].better.items()))
        after = apply_again(model, {"q_bit": 2, "slot_savers": {name: saver}}).slot_bits
        assert sum(after.values()) - sum(before.values()) == pytest.approx(8 * price)


def apply_again(model, config):
    remove_hyclora(model)
    return apply_hyclora(model, HycloraConfig(iteration_threshold=CALIBRATION, **config))


def test_more_bits_are_closer():
    errors = [verify(patched(config={"q_bit": bits}), batches()).summary.error for bits in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 20 * errors[2] > 0


def test_without_compression_there_is_nothing_but_rounding():
    found = verify(patched(config={"layer_type": "baseline"}), batches())
    assert found.slots == [] and found.summary.worst.cosine > 0.99999 and "all slots are kept exactly" in str(found)


def break_slot(monkeypatch, broken: str, layer: int, do) -> None:
    """Have one slot of a layer restored otherwise."""
    make = building.Builder._saver

    class Broken(ChannelQuant):
        def unpack(self, *args, **kwargs):
            return do(super().unpack(*args, **kwargs))

    def saver(self, index, half, slot, gauged=False):
        made = make(self, index, half, slot, gauged)
        if slot == broken and index == layer:
            made = Broken(made.book.bits, made.scale_rule, made.outlier_ratio)
        return made

    monkeypatch.setattr(building.Builder, "_saver", saver)


@pytest.mark.parametrize("slot", ["up", "v"])
def test_a_slot_of_zeros_is_found(monkeypatch, slot):
    break_slot(monkeypatch, slot, 1, torch.zeros_like)
    found = verify(patched(config={"layer_type": "intra"}), batches())
    assert found.slots[0].slot == slot
    assert found.slots[1].summary.worst.cosine > 0.9
    with pytest.raises(ValueError, match=rf'less than the threshold 0.9.*slot_savers={{"{slot}": "quant8"}}'):
        found.check(0.9)
    with pytest.raises(ValueError, match="less than the threshold 0.9"):
        verify(patched(config={"layer_type": "intra"}), batches(), threshold=0.9)
    found.check(-1)


def test_a_gradient_of_zeros_behind_a_slot_is_told(monkeypatch):
    """hidden is the input of down, whose lora_A gets nothing from zeros."""
    break_slot(monkeypatch, "hidden", 0, torch.zeros_like)
    found = verify(patched(config={"layer_type": "intra"}), batches())
    (wrong,) = found.wrong
    assert wrong.name.endswith("layers.0.mlp.down_proj.lora_A.default.weight") and wrong.note == ZERO
    assert (wrong.cosine, wrong.error) == (0.0, 1.0) and found.slots[0].slot == "hidden"
    assert f"WRONG: the gradient of model.layers.0.mlp.down_proj.lora_A is {ZERO}" in str(found)
    with pytest.raises(ValueError, match=r"down_proj.lora_A is 0, with exact LoRA it is not, less than the threshold"):
        found.check(0.3)


@pytest.mark.parametrize(
    "do, note",
    [
        (lambda grad: None, MISSING),
        (torch.zeros_like, ZERO),
        (lambda grad: grad * float("nan"), NOT_FINITE),
    ],
)
def test_a_gradient_that_an_operator_loses_is_told(monkeypatch, do, note):
    """Also if it is lost with exact slots too."""
    stock = ProjectionGroup.backward_parameters

    def backward_parameters(self, *args):
        grads = list(stock(self, *args))
        if self.projections[0].where.endswith("layers.1.mlp.down_proj"):
            grads = [None if grad is None else do(grad) for grad in grads]
        return grads

    monkeypatch.setattr(ProjectionGroup, "backward_parameters", backward_parameters)
    found = verify(patched(), batches())
    assert {g.name.rpartition("layers.")[2] for g in found.wrong} == {
        f"1.mlp.down_proj.lora_{letter}.default.weight" for letter in "AB"
    }
    assert {g.note for g in found.wrong} == {note}


def test_adapters_at_their_start_are_no_alarm():
    """PEFT's B is 0, so A's gradient is."""
    model = llama()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    apply_hyclora(model, HycloraConfig(iteration_threshold=CALIBRATION))
    before = copy.deepcopy(model.state_dict())
    found = verify(model, batches(), threshold=0.3)
    notes = (
        {g.note for g in found.gradients if "lora_A" in g.name},
        {g.note for g in found.gradients if "lora_B" in g.name},
    )
    assert notes == ({AT_START}, {""}) and not found.wrong and f"the gradient is {AT_START}" in str(found)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_that_the_loss_does_not_need_are_no_alarm():
    model = llama()
    model.base_model.model.extra = torch.nn.Linear(2, 2, bias=False).to(DEVICE)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers.1.self_attn.o_proj.lora_A" in name:
                p.zero_()
    apply_hyclora(model, HycloraConfig(iteration_threshold=CALIBRATION))
    found = verify(model, batches(), threshold=0.3)
    notes = {g.name: g.note for g in found.gradients if g.note}
    assert list(notes.values()).count(UNUSED) == 1 and notes["base_model.model.extra.weight"] == UNUSED
    assert [note for name, note in notes.items() if "o_proj.lora_B" in name] == [ALWAYS_ZERO]


def test_rounding_is_no_alarm():
    """A bias of keys moves all scores of a query alike."""
    found = verify(patched(roberta, lora={"bias": "all"}), batches(), threshold=0.3)
    told = {g.name for g in found.gradients if g.note == ROUNDING}
    assert told == {g.name for g in found.gradients if ".self.key." in g.name and g.name.endswith("bias")} and told


TWINS = {
    "dropout": (llama, {"lora": {"lora_dropout": 0.1}}, {}),
    "encoder": (roberta, {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}, {}),
    "2 bit": (mistral, {}, {"q_bit": 2}),
}


def train(model, count: int, when: int | None) -> list:
    """Losses, and with them all that a step leaves; verified before the step `when`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    left = []
    for step, batch in enumerate(batches(count)):
        loss = model(**batch).loss
        loss.backward()
        if step == when:
            kept = [p.grad for p in model.parameters()]
            found = verify(model, batches(CALIBRATION + 1))
            assert all(p.grad is grad for p, grad in zip(model.parameters(), kept, strict=True)) and found.slots
        optimizer.step()
        optimizer.zero_grad()
        left.append(loss.item())
    return [*left, torch.rand(1).item(), *(p.detach().clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("when", [1, 6])
@pytest.mark.parametrize("kind", TWINS)
def test_training_goes_on_bit_by_bit(kind, when, deterministic_attention):
    """Before calibration is over, and long after it."""
    make, options, config = TWINS[kind]
    left, states = [], []
    for at in (None, when):
        model = patched(make, config, **options)
        left.append(train(model, 9, at))
        patch = find_patch(model)
        states.append((statistics(patch), patch.calibration.state_dict()[0], patch.step.index))
        assert all(block.bound is None or block.bound.block is block for block in patch.blocks)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*left, strict=True))
    (theirs, *numbers), (ours, *same) = states
    assert numbers == same and theirs.keys() == ours.keys()
    assert all(torch.equal(t, ours[key][name]) for key, state in theirs.items() for name, t in state.items())


def test_a_trained_model_is_measured_as_it_is_calibrated():
    model = patched()
    for batch in batches(CALIBRATION):
        gradients(model, batch)
    calibrated = verify(model, batches()[-1:])
    fresh = verify(patched(), batches())
    assert calibrated.n_calibrating == 0 and "calibrated on: what was trained on" in str(calibrated)
    assert calibrated.n_batches == fresh.n_batches == 1 and f"calibrated on: {CALIBRATION} other ones;" in str(fresh)
    same = zip(calibrated.gradients, fresh.gradients, strict=True)
    assert all(a.cosine == pytest.approx(b.cosine, abs=1e-6) for a, b in same)


def test_recordings_go_on():
    model, graphs, batch = record()
    recordings, index = dict(graphs.recordings), graphs.step.index
    before = gradients(model, batch)
    verify(model, [batch])
    assert graphs.recordings == recordings and graphs.step.index == index + 1
    after = gradients(model, batch)
    assert graphs.recordings == recordings
    assert before[0] == after[0] and all(torch.equal(g, after[1][name]) for name, g in before[1].items())


def test_hooks_of_others_stay_in_their_place():
    model = patched()
    decoder = find_patch(model).decoder
    calls = []
    decoder.register_forward_pre_hook(lambda *_: calls.append("before"))
    order = [list(hooks) for hooks in (decoder._forward_pre_hooks, decoder._forward_hooks)]
    verify(model.eval(), batches())
    assert [list(hooks) for hooks in (decoder._forward_pre_hooks, decoder._forward_hooks)] == order
    assert calls and not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "make, config",
    [(llama, {}), (llama, {"slot_savers": {"layer_in": "quant4"}}), (roberta, {})],
    ids=["llama", "layer_in", "roberta"],
)
def test_with_gradient_checkpointing(make, config):
    model = patched(make, config)
    checkpoint_layers(model)
    found = verify(model, batches())
    slots = {slot.slot for slot in found.slots}
    assert not found.wrong and ("layer_in" in slots) == bool(config) and {"norm_in", "q", "up"} <= slots
    assert 0.9 < found.summary.cosine < 0.9999 and max(g.error for g in found.rounding) < 1e-3


def test_a_sparse_map_has_no_price():
    found = verify(patched(config={"attention": "eager", "layer_type": "intra_inter"}), batches())
    prob = next(slot for slot in found.slots if slot.slot == "prob")
    assert (prob.n_bytes, prob.better) == (None, {}) and prob.summary.error > 0.01 and "sparse" in str(found)


@pytest.mark.parametrize("make", [llama, roberta])
def test_in_bfloat16(make):
    with torch.autocast(DEVICE, torch.bfloat16):
        autocast = verify(patched(make), batches(), threshold=0.8)
    whole = verify(patched(lambda: make().bfloat16()), batches(), threshold=0.8)
    for found in (autocast, whole):
        rounding = sum(g.error for g in found.rounding) / len(found.rounding)
        assert 1e-4 < rounding < found.summary.error and not found.wrong


def test_weights_that_an_autocast_has_cast_before_a_step_are_not_those_compared():
    model = llama()
    lora_B = [p for name, p in model.named_parameters() if "lora_B" in name]
    with torch.autocast(DEVICE, torch.bfloat16):
        model(**batches()[0])
        with torch.no_grad():
            torch._foreach_neg_(lora_B)
        apply_hyclora(model, HycloraConfig(iteration_threshold=CALIBRATION))
        assert not verify(model, batches(), threshold=0.8).wrong


def test_dropout_is_the_same_with_exact_slots():
    """Other masks would be an error of about 0.4."""
    found = verify(patched(config={"q_bit": 8}, lora={"lora_dropout": 0.1}), batches())
    assert found.summary.error < 0.02 and found.rounding is None and found.exact == "LoRA with exact slots"


@pytest.mark.parametrize("count", [1, CALIBRATION])
def test_what_calibrated_is_not_called_another_one(count):
    found = verify(patched(), batches(count))
    assert found.n_batches == 1 and found.n_calibrating == count
    assert f"batches measured: 1, calibrated on: {count}, this one among them;" in str(found)


def test_memory_that_is_not_there_is_told(monkeypatch):
    model = patched()
    forward = type(model).forward

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model), "forward", fail)
    with pytest.raises(ValueError, match=r"a batch of \[3, 21\] tokens has no room in plain LoRA"):
        verify(model, batches())
    monkeypatch.setattr(type(model), "forward", forward)
    assert all(p.grad is None for p in model.parameters()) and find_patch(model).step.index == 0
    assert verify(model, batches()).slots


class Reads(TorchDispatchMode):
    """Counts how often a number of a tensor is waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_a_gpu_is_not_waited_for_at_each_weight():
    model = patched()
    before, weights = gradients(model, batches()[0])[1], 100
    measurement = _Measurement(model, find_patch(model), batches(), rewind=lambda: None)
    found = {str(i): g for i, g in enumerate(list(before.values()) * (weights // len(before) + 1))}
    measurement.trained = list(found)
    measurement.layers = dict.fromkeys(found)
    with Reads() as reads:
        told = measurement._tell([(0.0, found)], [(0.0, found)], None)
    assert len(told) >= weights and all(g.cosine == pytest.approx(1) for g in told) and reads.count < 10
