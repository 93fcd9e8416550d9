"""Logits of a training forward: stock's for whoever looks at them, and none for whoever does not."""

import copy
import gc
import io
import weakref

import pytest
import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import Trainer, TrainingArguments

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.late_logits import LateLogits
from hyclora.models.outputs import Deferred
from hyclora.models.patch import find_patch
from hyclora.operators.attention.flash import tells_runs
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import largest_error, llama, mistral, our_dropout, padded_batch, qwen2, qwen3
from tests.models.test_head import ON_HEAD, VARIANTS, prompts
from tests.models.test_masks import masks_given

BASELINE = HycloraConfig(layer_type="baseline")
ROWS = HycloraConfig(layer_type="baseline", stream=False)  # whose dropout is drawn as in stock
WHOLE = {k: t for k, t in padded_batch().items() if k != "attention_mask"} | {"labels": padded_batch()["input_ids"]}
EMPTY_ROW = {k: t.clone() for k, t in padded_batch().items()}
EMPTY_ROW["attention_mask"][1], EMPTY_ROW["labels"][1] = 0, -100
BATCHES = {
    "whole": WHOLE,
    "right padding": padded_batch(),
    "left padding": {name: t.flip(1) for name, t in padded_batch().items()},
    "prompts": prompts(padded_batch(), 9),
    "empty row": EMPTY_ROW,
    "shift_labels": padded_batch() | {"shift_labels": padded_batch()["labels"].roll(-1, 1)},
}
FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def distil(outputs) -> torch.Tensor:
    """A loss made of all logits, those of padded tokens too, and the model's own."""
    return outputs.loss + outputs.logits.float().log_softmax(-1).square().mean()


def results(model, batch, loss_of=distil, seed=1):
    """Loss, logits and gradients."""
    model.zero_grad()
    torch.manual_seed(seed)
    with our_dropout(model):
        outputs = model(**batch)
        loss = loss_of(outputs)
        loss.backward()
    return loss.item(), outputs.logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    assert largest_error(ours[2], theirs[2]) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_loss_made_of_logits(family, batch, attention, implementation):
    """Loss, logits at all positions and gradients, from the first step on."""
    model = family(attn_implementation=implementation)
    expected = results(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    for _ in range(2):
        assert_equal(results(model, batch), expected)
    assert find_patch(model).step.index == 2


@pytest.mark.parametrize("batch", ["whole", "right padding"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_head(variant, batch):
    """Adapters, biases, tied weights, and the dropout of the loss in the logits."""
    model = llama(**variant)
    expected = results(model, BATCHES[batch])
    apply_hyclora(model, ROWS if "lora_dropout" in variant.get("lora", {}) else BASELINE)
    assert_equal(results(model, BATCHES[batch]), expected)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.3}, {"lora_dropout": 0.3, "target_modules": ON_HEAD}], ids=str)
@pytest.mark.parametrize("config", [{}, {"attention_dropout": 0.2}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_the_second_forward_of_a_padded_batch_drops_what_the_first_one_did(lora, config, stream):
    model, batch = llama(lora, attn_implementation="eager", **config), BATCHES["right padding"]
    model.get_base_model().config.attention_dropout = config.get("attention_dropout", 0.0)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", stream=stream))
    torch.manual_seed(3)
    outputs = model(**batch)
    after = torch.rand(4)
    real = batch["attention_mask"].bool()
    if stream or not config:  # attention draws by other shapes where it gets a mask
        logits = outputs.logits[:, :-1][real[:, 1:]]
        loss = F.cross_entropy(logits, batch["labels"][:, 1:][real[:, 1:]])
        torch.testing.assert_close(loss, outputs.loss, atol=1e-5, rtol=1e-5)
    torch.manual_seed(3)
    again = model(**batch)
    assert not isinstance(again.logits, Deferred) and (stream or torch.equal(torch.rand(4), after))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(dtype, base):
    """Stock's dtype, also where somebody looks after autocast has ended; and fp32 as Accelerate has them."""
    model, batch = llama(), BATCHES["whole"]
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(base)

    def outputs():
        with torch.autocast(DEVICE, dtype):
            return model(**batch)

    expected = outputs().logits
    apply_hyclora(model, BASELINE)
    assert outputs().logits.dtype == expected.dtype
    torch.testing.assert_close(outputs().logits, expected, atol=0.05, rtol=0.05)
    ours = convert_to_fp32(outputs())
    assert ours.logits.dtype == torch.float32
    torch.testing.assert_close(ours.logits, expected.float(), atol=0.05, rtol=0.05)


LOOKS = {
    "attribute": lambda outputs: outputs.logits,
    "key": lambda outputs: outputs["logits"],
    "get": lambda outputs: outputs.get("logits"),
    "index": lambda outputs: outputs[1],
    "slice": lambda outputs: outputs[1:][0],
    "tuple": lambda outputs: outputs.to_tuple()[1],
    "dict": lambda outputs: {**outputs}["logits"],
    "shallow copy": lambda outputs: copy.copy(outputs).logits,
    "fp32": lambda outputs: convert_to_fp32(outputs).logits,
    "device": lambda outputs: send_to_device(outputs, DEVICE).logits,
    "pytree": lambda outputs: pytree.tree_map(lambda leaf: leaf, outputs).logits,
    "method of an item": lambda outputs: dict(outputs.items())["logits"].clone(),
    "function of an item": lambda outputs: torch.add(dict(outputs.items())["logits"], 0),
    "saved": lambda outputs: saved(outputs).logits,
}


def saved(outputs):
    file = io.BytesIO()
    torch.save(outputs, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_ways_to_look(look):
    model, batch = llama(), BATCHES["whole"]
    expected = model(**batch)
    apply_hyclora(model, BASELINE)
    outputs = model(**batch)
    torch.testing.assert_close(look(outputs), look(expected), atol=1e-5, rtol=1e-5)
    assert outputs.logits is outputs.logits is outputs["logits"] is outputs[1], "made once"
    assert list(outputs) == list(expected) and not isinstance(dict(outputs.items())["logits"], Deferred)


@pytest.mark.parametrize("batch", ["whole", "right padding"])
def test_a_tuple_has_them(batch):
    model = llama()
    asked = {"return_dict": False, "output_hidden_states": True}
    expected = model(**BATCHES[batch], **asked)
    apply_hyclora(model, BASELINE)
    outputs = model(**BATCHES[batch], **asked)
    assert type(outputs) is tuple and len(outputs) == len(expected) == 4
    for i in (0, 1, 3):
        torch.testing.assert_close(outputs[i], expected[i], atol=1e-5, rtol=1e-5)


LEFT_ALONE = {
    "loss": lambda outputs: outputs.loss,
    "key": lambda outputs: outputs["loss"],
    "index": lambda outputs: outputs[0],
    "slice": lambda outputs: outputs[:1][0],
    "fp32": lambda outputs: convert_to_fp32(outputs).loss,
    "device": lambda outputs: send_to_device(outputs, DEVICE)["loss"],
    "pytree": lambda outputs: pytree.tree_map(lambda leaf: leaf, outputs)[0],
    "items": lambda outputs: dict(outputs.items())["loss"],
    "names": lambda outputs: outputs["loss"] if "logits" in outputs and len(outputs) == 3 else None,
}


@pytest.mark.parametrize("use", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_nobody_looks(use, monkeypatch):
    model, batch = llama(), BATCHES["right padding"]
    apply_hyclora(model, BASELINE)
    monkeypatch.setattr(LateLogits, "__call__", lambda self: pytest.fail("logits were made"))
    use(model(**batch)).backward()
    assert tells_runs(masks_given(model, batch)[0])


def test_whoever_keeps_the_loss_alone_keeps_no_hidden_states(monkeypatch):
    model, batch, found = llama(), BATCHES["whole"], []
    apply_hyclora(model, BASELINE)
    defer = LateLogits.defer
    monkeypatch.setattr(LateLogits, "defer", lambda self: (found.append(weakref.ref(self.hidden)), defer(self))[1])
    outputs = model(**batch)
    gc.collect()
    assert found[0]() is not None
    loss = outputs.loss
    del outputs
    gc.collect()
    assert found[0]() is None and loss.requires_grad


def step(model) -> None:
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def test_after_an_optimizer_step():
    """As stock's, which exist since the forward: the hidden states are those of then, and the head is frozen."""
    model, batch = llama(), BATCHES["whole"]
    expected = model(**batch).logits
    apply_hyclora(model, BASELINE)
    outputs = model(**batch)
    outputs.loss.backward()
    step(model)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    assert outputs.logits.requires_grad


CHANGES = {
    "trained": step,
    "evaluation": lambda model: model.eval(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ["head that trains", "padding"])
def test_what_cannot_be_had_any_more_is_refused(case, change):
    """Never logits of another model than the forward's."""
    model = llama({"target_modules": ON_HEAD, "lora_dropout": 0.1} if case == "head that trains" else {})
    batch = BATCHES["right padding" if case == "padding" else "whole"]
    apply_hyclora(model, BASELINE)
    outputs = model(**batch)
    outputs.loss.backward()
    CHANGES[change](model)
    with pytest.raises(ValueError, match="outputs.logits are computed when they are first looked at.* Look at them"):
        outputs.logits  # noqa: B018


def test_one_look_and_padding_is_as_in_stock_from_then_on():
    """Also after the optimizer's step; and the mask of S x S costs nobody else anything."""
    model, batch = llama(), BATCHES["right padding"]
    stock = copy.deepcopy(model)
    apply_hyclora(model, BASELINE)
    assert tells_runs(masks_given(model, batch)[0])
    for i in range(3):
        ours, theirs = model(**batch), stock(**batch)
        if i == 0:
            assert ours.logits is not None
        for outputs, trained in ((ours, model), (theirs, stock)):
            trained.zero_grad()
            outputs.loss.backward()
            step(trained)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    assert not tells_runs(masks_given(model, batch)[0]) and tells_runs(masks_given(model, BATCHES["whole"])[0])


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_two_forwards_then_looks_then_one_backward(use_reentrant):
    """The second forward of a padded batch is not counted, calibrates nothing, and is of its own batch."""
    model, batches = llama({"lora_dropout": 0.1}), [BATCHES["right padding"], padded_batch(width=17, seed=5)]
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()

    def together():
        model.zero_grad()
        torch.manual_seed(2)
        with our_dropout(model):
            outputs = [model(**batch) for batch in batches]
            sum(distil(o) for o in outputs).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    exact = together()
    apply_hyclora(model, ROWS)
    assert largest_error(together(), exact) < 1e-5
    assert find_patch(model).step.index == 2
    remove_hyclora(model)
    apply_hyclora(model, HycloraConfig(q_bit=8, iteration_threshold=2))
    together()
    statistics = [s.state_dict() for block in find_patch(model).blocks for s in block.savers.values() if s.state_dict()]
    # checkpointed layers calibrate in backward, here once
    assert statistics and all(s["steps"] <= 2 for s in statistics) and (use_reentrant or statistics[0]["steps"] == 2)


class Distilling(Trainer):
    """Adds a term made of all logits, of padded tokens too."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        with torch.no_grad(), model.disable_adapter():
            teacher = model(**inputs).logits
        kl = F.kl_div(outputs.logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True)
        self.dtypes = {outputs.loss.dtype, outputs.logits.dtype}
        return (outputs.loss + kl, outputs) if return_outputs else outputs.loss + kl


class Preferring(Trainer):
    """A loss of two sequences' log probabilities, with no labels given to the model."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        log_probs = outputs.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0]
        chosen, rejected = (log_probs * (labels[:, 1:] >= 0)).sum(-1).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        return (loss, outputs) if return_outputs else loss


def loss_of_outputs(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"][:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("trainer, options", [
    (Trainer, {}), (Distilling, {}), (Preferring, {}), (Trainer, {"compute_loss_func": loss_of_outputs}),
], ids=["own loss", "distilling", "preferring", "compute_loss_func"])  # fmt: skip
def test_trainers(tmp_path, trainer, options, padded, bf16):
    """Training and evaluation losses are those of the stock model."""
    rows = [{k: t[i].cpu() for k, t in padded_batch(rows=4).items()} for i in range(4)]
    if not padded:
        rows = [{k: v for k, v in row.items() if k != "attention_mask"} | {"labels": row["input_ids"]} for row in rows]
    losses = []
    for patched in (False, True):
        model = llama()
        if patched:
            apply_hyclora(model, BASELINE)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, eval_steps=2,
            eval_strategy="steps", save_strategy="no", report_to=[], disable_tqdm=True, bf16=bf16,
            use_cpu=DEVICE == "cpu", learning_rate=1e-2, dataloader_pin_memory=False,
        )  # fmt: skip
        done = trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows,
            compute_metrics=lambda p: {"spread": float(p.predictions.std())}, **options,
        )  # fmt: skip
        done.train()
        kept = ("loss", "eval_loss", "eval_spread")
        losses.append([v for entry in done.state.log_history for k, v in entry.items() if k in kept])
        assert not hasattr(done, "dtypes") or done.dtypes == {torch.float32}
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=2e-2 if bf16 else 1e-4)


def test_deferred_is_a_tensor_when_it_is_used():
    made = []

    def make():
        made.append(1)
        return torch.arange(3, dtype=torch.bfloat16)

    deferred = Deferred(make, torch.bfloat16)
    wide = deferred.float()
    assert (deferred.dtype, wide.dtype, deferred.to("cpu").dtype, made) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        [],
    )
    assert torch.equal(wide.look(), torch.arange(3.0)) and torch.equal(torch.neg(deferred), -deferred.look())
    assert deferred.shape == (3,) and deferred.look() is deferred.look() and made == [1]
    with pytest.raises(AttributeError):
        deferred.nothing_of_this_name  # noqa: B018
