"""Loss and gradients that are not finite: no optimizer takes them, and what is told of where they come from."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hyclora import FiniteGradients, HycloraConfig, NonFiniteCallback, apply_hyclora
from hyclora.models import finite as module
from hyclora.models import origin
from hyclora.models.patch import find_patch
from hyclora.operators.savers import ChannelQuant
from tests.helpers.offloading import equal
from tests.helpers.replaying import batches, starts, train
from tests.helpers.small_models import gradients, llama, padded_batch, roberta

POISON = 127  # a token whose embedding is infinite
MARK = 77.0
LAYER = "base_model.model.model.layers"
STOCK = "stock PEFT has it too"
BASELINE = {"layer_type": "baseline"}


def patched(make=llama, **config):
    model = make()
    apply_hyclora(model, HycloraConfig(iteration_threshold=1, **config))
    return model


def overflow_embedding(model):
    def poison(module, args, x):
        return x.masked_fill((args[0] == POISON)[..., None], math.inf)

    model.get_input_embeddings().register_forward_hook(poison)
    return model


def weights(model, path):
    return model.get_submodule(path).base_layer.weight.data


def overflow_product(model):
    for name in ("gate_proj", "up_proj"):
        weights(model, f"{LAYER}.1.mlp.{name}").mul_(1e25)


def overflow_queries(model):
    weights(model, f"{LAYER}.0.self_attn.q_proj").fill_(3e38)


def overflow_gradient(model):
    model.get_submodule(f"{LAYER}.1.mlp").register_full_backward_hook(
        lambda m, given, out: [g * math.inf for g in given]
    )


def break_adapter(model):
    next(p for name, p in model.named_parameters() if "layers.1" in name and "lora_A" in name).data[0, 0] = math.nan


def overflow_base(model):
    """The first weight of all, so that this is what is found."""
    model.get_input_embeddings().weight.data[0, 0] = math.inf


def saver_of(model, slot):
    """Of the last layer."""
    return [block.savers[slot] for block in find_patch(model).blocks if slot in block.savers][-1]


def break_scale(model):
    saver_of(model, "up").std[3] = math.inf


def mark_slot(model):
    saver = saver_of(model, "up")
    saver.statistics["total"].fill_(saver.statistics["count"].item() * MARK)
    saver._set_scales(saver.mean.device)


@pytest.fixture
def broken_unpacking(monkeypatch):
    """A slot whose statistics have the mark comes back as NaN, here and in every twin."""
    stock = ChannelQuant.unpack

    def unpack(self, packed, *args):
        return stock(self, packed, *args) * (math.nan if packed[3][0] == MARK else 1.0)

    monkeypatch.setattr(ChannelQuant, "unpack", unpack)


CAUSES = {
    "activation": (overflow_product, f"what goes into {LAYER}.1.mlp.down_proj (slot hidden) is not finite; {STOCK}"),
    "output": (overflow_queries, f"what comes out of {LAYER}.0.self_attn.q_proj (slot q) is not finite; {STOCK}"),
    "gradient": (overflow_gradient, f"the gradient of what comes out of {LAYER}.1.post_attention_layernorm"),
    "weight": (break_adapter, f"the weight {LAYER}.1.self_attn.q_proj.lora_A.default.weight is not finite before"),
    "scale": (break_scale, f"the calibrated scales of slot up of {LAYER}.1.mlp are not finite"),
    "slot": (mark_slot, f"slot up of {LAYER}.1.mlp in 4 bit, while stock PEFT is finite: keep it by slot_savers="),
}


@pytest.mark.usefixtures("broken_unpacking")
@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_not_finite_is_named(cause):
    model, (change, said) = patched(layer_type="intra_inter"), CAUSES[cause]
    gradients(model, padded_batch())
    change(model)
    finite = FiniteGradients(model)
    with finite.listening(), pytest.raises(FloatingPointError) as error:
        model(**padded_batch(seed=1)).loss.backward()
        finite.allows(7)
    told = str(error.value)
    assert told.startswith("step 7 has a loss or gradients that are not finite: ") and said in told


def test_a_frozen_weight_is_told_from_one_that_training_broke():
    model = patched()
    for change, kind in ((break_adapter, FloatingPointError), (overflow_base, module.BrokenWeight)):
        change(model)
        with pytest.raises(FloatingPointError, match="is not finite before the step") as error:
            FiniteGradients(model, "skip").allows(1, torch.tensor(math.nan))
        assert type(error.value) is kind


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_it_is_looked_for_too(reentrant, caplog):
    """Looks keep nothing for backward: a layer has to keep as many tensors when it is run again."""
    model = overflow_embedding(patched())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    batch, finite = padded_batch(), FiniteGradients(model, "skip")
    batch["input_ids"][0, 0] = POISON
    with finite.listening():
        model(**batch).loss.backward()
        assert not finite.allows(1)
    assert f"embed_tokens is not finite; {STOCK}" in caplog.text


def test_an_encoders_slots_have_names():
    model = patched(roberta)
    weights(model, "base_model.model.roberta.encoder.layer.1.intermediate.dense").fill_(3e38)
    finite = FiniteGradients(model)
    with finite.listening(), pytest.raises(FloatingPointError, match=r"layer\.1\.intermediate\.dense \(slot up\)"):
        model(**padded_batch()).loss.backward()
        finite.allows(1)


@pytest.mark.parametrize("config", [{}, {"layer_type": "baseline"}, {"layers": "input4"}], ids=str)
def test_a_skipped_step_leaves_all_as_it_was(config):
    """Weights, optimizer, random state, the patch and what it calibrated; the next gradients are the same."""
    found = []
    for poisoned in (False, True):
        model = overflow_embedding(llama({"lora_dropout": 0.1}))
        apply_hyclora(model, HycloraConfig(iteration_threshold=1, **config))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        finite = FiniteGradients(model, "skip")
        torch.manual_seed(3)
        with finite.listening():
            for step in (1, 2):
                batch = padded_batch(vocab=POISON, seed=step)
                if step == 2:
                    if not poisoned:
                        continue
                    batch["input_ids"][0, 0] = POISON
                    state, index = torch.get_rng_state(), find_patch(model).step.index
                model(**batch).loss.backward()
                drawn = torch.get_rng_state()
                assert finite.allows(step) is (step == 1)
                assert torch.equal(torch.get_rng_state(), drawn)
                optimizer.step()
                optimizer.zero_grad()
        if poisoned:
            assert find_patch(model).step.index == index + 1 and finite.skipped == 1 and finite.has_skipped
            torch.set_rng_state(state)
        moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
        found.append(([p.clone() for p in optimizer.param_groups[0]["params"]], moments))
        found[-1] += (list(gradients(model, padded_batch(vocab=POISON, seed=5))[1].values()),)
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_model_that_fails_at_every_step_is_not_skipped_for_ever(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 2)
    model, batch = overflow_embedding(patched()), padded_batch()
    batch["input_ids"][0, 0] = POISON
    finite = FiniteGradients(model, "skip")
    with finite.listening(), pytest.raises(FloatingPointError, match="step 3 .*; 2 steps before it were skipped"):
        for step in range(1, 5):
            model(**batch).loss.backward()
            assert not finite.allows(step)
    assert not model._forward_pre_hooks and finite.skipped == 2


def test_a_lasting_fault_is_not_skipped():
    model = patched()
    finite = FiniteGradients(model, "skip")
    break_adapter(model)
    with finite.listening(), pytest.raises(FloatingPointError, match="is not finite before the step"):
        model(**padded_batch()).loss.backward()
        finite.allows(1)


@pytest.mark.parametrize("change, said", [CAUSES["weight"], CAUSES["scale"]], ids=["weight", "scale"])
def test_what_no_scale_mends_is_not_left_to_a_grad_scaler(change, said):
    """At once, though the loss is finite; not while the scaler has but to find its scale."""
    model = patched(layer_type="intra_inter")
    gradients(model, padded_batch())
    callback, state = NonFiniteCallback("skip"), SimpleNamespace(global_step=6)
    callback.on_train_begin(None, state, None, model=model)

    def step():
        (model(**padded_batch(seed=1)).loss * math.inf).backward()
        callback.on_pre_optimizer_step(SimpleNamespace(fp16=True), state, None)
        model.zero_grad()

    step()
    assert not callback.finite.skipped
    change(model)
    with pytest.raises(FloatingPointError, match=f"^step 7 has .*: {re.escape(said)}"):
        step()


def test_broken_copies_of_statistics_are_named_too():
    """Where some channels are exact, backward has copies."""
    model = patched(layernorm_outlier_ratio=0.1)
    for seed in range(2):
        gradients(model, padded_batch(seed=seed))
    saver_of(model, "norm_in").restoring[0][3] = math.nan
    with pytest.raises(FloatingPointError, match=r"the calibrated scales of slot norm_in of .* are not finite"):
        FiniteGradients(model, "skip").allows(1, math.nan)


def test_a_grad_scaler_does_not_skip_for_ever(monkeypatch):
    monkeypatch.setattr(module, "SCALES", 2)
    model = patched()
    finite, hook = FiniteGradients(model, "skip"), model.get_submodule(f"{LAYER}.1.mlp").register_full_backward_hook
    hook(lambda m, given, out: [g * factors[-1] for g in given])
    factors = []

    def allows(step, factor):
        factors.append(factor)
        model(**padded_batch()).loss.backward()
        allowed = finite.allows(step, look_at_gradients=False)
        model.zero_grad()
        return allowed

    with finite.listening():
        for step, factor in enumerate((math.inf, math.inf, 1.0, math.inf, math.inf), 1):
            assert allows(step, factor)
        with pytest.raises(FloatingPointError, match="gradient of what .*; 2 steps before it were skipped by the Grad"):
            allows(6, math.inf)


class Pair(torch.nn.Module):
    """Two models, both trained."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = patched(layer_type="intra_inter"), patched(layer_type="intra_inter")

    def step(self, seed):
        for model in (self.actor, self.critic):
            model(**padded_batch(seed=seed)).loss.backward()


@pytest.mark.usefixtures("broken_unpacking")
@pytest.mark.parametrize("cause", CAUSES)
def test_two_models_in_a_module_are_looked_after(cause):
    pair, (change, said) = Pair(), CAUSES[cause]
    pair.step(seed=0)
    pair.zero_grad()
    change(pair.critic)
    finite = FiniteGradients(pair)
    with finite.listening(), pytest.raises(FloatingPointError) as error:
        pair.step(seed=1)
        finite.allows(7)
    assert said.replace(LAYER, f"critic.{LAYER}") in str(error.value)
    assert not any(model._forward_pre_hooks for model in (pair.actor, pair.critic))


def test_a_loss_is_looked_at_where_it_is_noted():
    finite = FiniteGradients(patched(), "skip")
    assert finite.allows(1, torch.tensor(1.0)) and not finite.allows(2, math.nan)
    finite.note(torch.tensor(math.inf))
    assert not finite.allows(3, look_at_gradients=False) and finite.allows(4)


def test_what_cannot_be_run_again_is_told_by_its_gradient(monkeypatch):
    model = patched()
    finite = FiniteGradients(model)

    def fail(action, said):
        batch = padded_batch()
        with finite.listening():
            action(batch)
            name, p = next((n, p) for n, p in model.named_parameters() if p.grad is not None)
            p.grad[0, 0] = math.nan
            with pytest.raises(FloatingPointError, match=f"the gradient of {name}, one of 1.*{said}"):
                finite.allows(1)
        model.zero_grad()

    def without_labels(batch):
        labels = batch.pop("labels")
        logits = model(**batch).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()

    fail(without_labels, "no batch with labels was seen")
    fail(lambda batch: model(**batch).loss.backward(), "it is finite when the batch is run again")
    monkeypatch.setattr(origin, "_first", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    fail(lambda batch: model(**batch).loss.backward(), "plain LoRA has no room")


def test_replays_go_on_and_nothing_is_looked_for_while_all_is_finite(recorded, monkeypatch):
    model, graphs, _ = recorded
    monkeypatch.setattr(module, "origin", lambda *args: pytest.fail("looked for"))
    events, finite = starts(graphs), FiniteGradients(model)
    (batch,) = batches(1)
    theirs = train(model, [batch])[0]
    events.clear()
    with finite.listening():
        assert equal(train(model, [batch])[0], theirs) and events
        assert finite.allows(1)


ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, POISON, (8, 16)).tolist()]


@pytest.fixture
def fit(tmp_path):
    """Train a model on ROWS, of which one may have the poison; the trainer and the adapters."""

    def fit(action, poisoned):
        model = overflow_embedding(llama())
        rows = [{name: list(ids) for name, ids in row.items()} for row in ROWS]
        if poisoned:
            rows[5]["input_ids"][2] = POISON
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=1, use_cpu=True, seed=1,
            gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        callback = NonFiniteCallback(action)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        apply_hyclora(model, HycloraConfig(iteration_threshold=1))
        trainer.train()
        assert not model._forward_pre_hooks
        return callback.finite, [p.clone() for p in model.parameters() if p.requires_grad]

    return fit


def test_in_a_trainer_a_step_is_skipped(fit, caplog):
    finite, adapters = fit("skip", poisoned=True)
    assert finite.skipped == 1 and all(p.isfinite().all() for p in adapters)
    assert "what comes out of base_model.model.model.embed_tokens is not finite" in caplog.text
    assert caplog.text.count("the step is skipped") == 1
    assert fit("skip", poisoned=False)[0].skipped == 0


def test_in_a_trainer_the_run_stops(fit):
    with pytest.raises(FloatingPointError, match=r"step \d has .*embed_tokens is not finite"):
        fit("stop", poisoned=True)


def test_another_action_is_refused():
    for make in (NonFiniteCallback, lambda action: FiniteGradients(llama(), action)):
        with pytest.raises(ValueError, match="non_finite='ignore' is not one of stop, skip"):
            make("ignore")
