"""What was changed between a forward and its backward: refused where gradients would be others, and nowhere else."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch
from hyclora.models.switches import Switches
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import batches, graphed, train
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch, roberta

pytestmark = pytest.mark.usefixtures("deterministic_attention")

KINDS = {
    "slots": {"layer_type": "baseline"},
    "inputs": {"layers": "input"},
    "checkpointing": {"layer_type": "baseline", "slot_savers": {"layer_in": "quant8"}},
}


def forward(family, kind: str, lora: dict | None = None, batch: dict | None = None):
    """A patched model, its gradients for a batch, and the loss of another forward of that batch."""
    model, batch = family(lora or {}), batch or padded_batch()
    if kind == "checkpointing":
        model.gradient_checkpointing_enable()
    apply_hyclora(model, HycloraConfig(**KINDS[kind]))
    _, expected = gradients(model, batch)
    model.zero_grad()
    torch.manual_seed(1)
    return model, expected, model(**batch).loss


def backward(model, loss) -> dict:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(family, kind, safe):
    """PEFT changes W where torch's count of changes does not see it; stock's dx is silently wrong then."""
    model, _, loss = forward(family, kind)
    model.merge_adapter(safe_merge=safe)
    with pytest.raises(ValueError, match="weights? were changed between a forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_merged_and_unmerged_is_no_change(kind):
    model, expected, loss = forward(llama, kind)
    model.merge_adapter()
    model.unmerge_adapter()
    assert largest_error(backward(model, loss), expected) < 1e-5


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_merged_adapters_that_are_switched_off(family, kind):
    """PEFT unmerges them in the layer's forward, and so between the two runs of a layer."""
    found = []
    for merged in (True, False):
        model = family({})
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.1)
        if kind == "checkpointing":
            model.gradient_checkpointing_enable()
        if kind is not None:
            apply_hyclora(model, HycloraConfig(**KINDS[kind]))
        model.get_input_embeddings().weight.requires_grad_(True)
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            found.append(gradients(model, padded_batch())[1])
    assert found[0] and largest_error(*found) < (1e-5 if kind != "checkpointing" else 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_another_adapter_that_is_not_used_is_no_change(kind):
    model, expected, loss = forward(llama, kind, {"lora_dropout": 0.1})
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.5))
    assert largest_error(backward(model, loss), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q_proj.base_layer.weight", "down_proj.lora_A.default.weight"])
def test_weights_that_were_written_to(kind, name):
    """As autograd says of what it keeps, an optimizer's step for instance; a layer's input alone would not tell."""
    model, _, loss = forward(llama, kind)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(name)).mul_(2)
    with pytest.raises((ValueError, RuntimeError), match="weights? were changed|modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_a_mask_that_was_written_to(family, kind):
    """By whoever fills one for all batches, or adds to it; a layer that runs again would see other tokens."""
    batch = padded_batch()
    batch["attention_mask"] = torch.ones(3, 1, 21, 21, dtype=torch.bool, device=DEVICE).tril()
    model, expected, loss = forward(family, kind, batch=batch)
    assert largest_error(backward(model, loss), expected) < 1e-5
    loss = model(**batch).loss
    batch["attention_mask"].fill_(True)
    with pytest.raises((ValueError, RuntimeError), match="its mask was overwritten|modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_was_written_to_is_no_change(kind):
    """As where the next one is copied into the same memory while backward is still to run."""
    batch = padded_batch() | {"position_ids": torch.arange(21, device=DEVICE)[None] + 2}
    model, expected, loss = forward(llama, kind, batch=batch)
    for t in (batch["attention_mask"], batch["labels"], batch["position_ids"]):
        t.zero_()
    assert largest_error(backward(model, loss), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["before", "after"])
def test_weights_that_are_frozen_before_or_after_the_forward(kind, frozen):
    """They get no gradient either way, as in stock, and all others theirs; a layer that runs again finds them so."""
    model, expected, loss = forward(llama, kind)
    name = next(n for n in expected if n.endswith("1.mlp.down_proj.lora_A.default.weight"))
    weight, others = model.get_parameter(name), {n: g for n, g in expected.items() if n != name}
    weight.requires_grad_(False)
    if frozen == "before":
        loss = model(**padded_batch()).loss
        weight.requires_grad_(True)
    assert largest_error(backward(model, loss), others) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True], ids=["stock", "another patch"])
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_a_patch_that_is_taken_off(family, kind, again):
    """Slots that are kept are all that backward needs; a layer that is run again needs its blocks."""
    model, expected, loss = forward(family, kind, {"lora_dropout": 0.3})
    remove_hyclora(model)
    if again:
        apply_hyclora(model, HycloraConfig(**KINDS[kind]))
    if kind == "slots":
        assert largest_error(backward(model, loss), expected) < 1e-5
    else:
        with pytest.raises(ValueError, match=r"layers?\.1: the patch was taken off between a forward and its backward"):
            loss.backward()
    model.zero_grad()
    assert backward(model, model(**padded_batch()).loss)


def test_what_is_read_is_found_anew_with_other_modules():
    """Lists are made once, and again when an adapter that came later is used."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig(layers="input"))
    gradients(model, batch)
    checkpoint = find_patch(model).checkpoints[0]
    before = checkpoint.switches
    gradients(model, batch)
    assert checkpoint.switches is before
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.5))
    model.set_adapter("other")
    loss = model(**batch).loss
    assert checkpoint.switches is not before
    trained = [p for p in checkpoint.module.parameters() if p.requires_grad]
    assert set(map(id, checkpoint.switches.trained())) == set(map(id, trained))
    checkpoint.module.self_attn.q_proj.lora_dropout["other"].p = 0.1
    with pytest.raises(ValueError, match="dropout or weights were changed"):
        loss.backward()


def test_a_layer_is_not_walked_through_in_each_step(monkeypatch):
    """That costs the host more than all that is read."""
    model, batch, walks = llama(), padded_batch(), []
    apply_hyclora(model, HycloraConfig(layers="input"))
    find = Switches.__init__
    monkeypatch.setattr(Switches, "__init__", lambda self, layer: walks.append(layer) or find(self, layer))
    for _ in range(3):
        gradients(model, batch)
    assert len(walks) == 2


@pytest.mark.parametrize("change", ["merged", "written to", "unmerged", "patch taken off"])
@pytest.mark.parametrize("layers", ["slots", "input4"])
def test_before_the_backward_of_a_replay(layers, change):
    """It reads all weights again, where they were, and nothing else: what was recorded may be forgotten by then."""
    model, (*first, batch) = llama(), batches(6)
    graphs = graphed(model, {"layers": layers})
    train(model, first)
    (expected,) = train(model, [batch])
    model.zero_grad()
    loss = model(**batch).loss
    assert graphs._pending() is not None
    if change == "patch taken off":
        remove_hyclora(model)
    elif change == "written to":
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight.mul_(2)
    else:
        model.merge_adapter()
    if change == "unmerged":
        model.unmerge_adapter()
    refused = change in ("merged", "written to")
    with pytest.raises(ValueError, match="weights were changed between") if refused else nullcontext():
        found = backward(model, loss)
        assert largest_error(found, {name: g for name, g in expected.items() if name != "loss"}) < 1e-5


@pytest.mark.parametrize("kept", [{}, KINDS["checkpointing"]], ids=["exact", "quant8"])
@pytest.mark.parametrize("family", [llama, roberta], ids=lambda f: f.__name__)
def test_a_checkpointed_layer_is_not_walked_in_each_forward(family, kept, monkeypatch):
    """What was listed of its modules holds until these are others."""
    model, walks = family(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    apply_hyclora(model, HycloraConfig(**kept, cuda_graphs=False))
    gradients(model, padded_batch())
    layers = {checkpoint.module for checkpoint in find_patch(model).checkpoints}
    walk = torch.nn.Module.named_modules

    def counted(module, memo=None, *args, **kwargs):
        if module in layers and memo is None:  # not in a walk through the model, which HF does
            walks.append(module)
        return walk(module, memo, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    model(**padded_batch()).loss.backward()
    assert not walks
