"""The causal LM's block against stock HF + PEFT: same loss and gradients, and logits only when looked at."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainingArguments

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.config import POLICIES
from hyclora.models.head import HeadBlock, HeadLinear
from hyclora.models.patch import find_patch
from hyclora.operators import cross_entropy
from hyclora.utils.args import LINEARS
from tests.helpers.small_models import gradients, is_late, largest_error, llama, padded_batch

BASELINE = HycloraConfig(layer_type="baseline")
ON_HEAD = [*LINEARS, "lm_head"]
VARIANTS = {
    "frozen head": {},
    "tied": {"tie_word_embeddings": True},
    "lora on head": {"lora": {"target_modules": ON_HEAD}},
    "lora on head, dropout": {"lora": {"target_modules": ON_HEAD, "lora_dropout": 0.2}},
    "lora on head, rslora": {"lora": {"target_modules": ON_HEAD, "use_rslora": True}},
    "lora on head, lora bias": {"lora": {"target_modules": ON_HEAD, "lora_bias": True}},
    "lora on head alone": {"lora": {"target_modules": ["lm_head"]}},
    "odd vocabulary": {"vocab_size": 131},
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Seven rows of the small model's fp32 logits a chunk."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 128 * 4)


def is_chunked(model) -> bool:
    return any(isinstance(block, HeadBlock) for block in find_patch(model).blocks)


def prompts(batch: dict, length: int) -> dict:
    """The batch with the first tokens of every row out of the loss."""
    labels = batch["labels"].clone()
    labels[:, :length] = -100
    return batch | {"labels": labels}


BATCHES = {
    "right padding": padded_batch(),
    "left padding": {name: t.flip(1) for name, t in padded_batch().items()},
    "prompts": prompts(padded_batch(), 9),
    "number of items": padded_batch() | {"num_items_in_batch": 57},
    "number of items on the device": padded_batch() | {"num_items_in_batch": torch.tensor(57)},
    "shift_labels": padded_batch() | {"shift_labels": padded_batch(seed=4)["labels"]},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equals_stock(variant, batch):
    """Loss and every adapter's gradient within 1e-5 in fp32."""
    model = llama(**variant)
    loss, exact = gradients(model, batch)
    # in a stream dropout is drawn for another shape
    dropped = "lora_dropout" in variant.get("lora", {})
    apply_hyclora(model, replace(BASELINE, stream=False) if dropped else BASELINE)
    assert is_chunked(model) and is_late(model(**batch))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5
    assert largest_error(ours, exact) < 1e-5


@pytest.mark.parametrize(
    "base, dtype",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_autocast_is_no_worse_than_stock(variant, base, dtype):
    """Error against fp32 truth at most 1.5 times stock's, the head alone being ours: dropout is PEFT's."""
    model, batch = llama(**variant), padded_batch()
    _, exact = gradients(model, batch, dropping=nullcontext)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(base)

    def autocast_gradients():
        with torch.autocast(batch["input_ids"].device.type, dtype=dtype):
            return gradients(model, batch, dropping=nullcontext)[1]

    stock = autocast_gradients()
    apply_hyclora(model, BASELINE)
    for block in find_patch(model).blocks:
        if not isinstance(block, (HeadBlock, HeadLinear)):
            block.unbind()
    ours = autocast_gradients()
    assert all(ours[name].dtype == g.dtype for name, g in stock.items())
    errors = [torch.stack([(g[n].float() - e).norm() / e.norm() for n, e in exact.items()]) for g in (ours, stock)]
    assert errors[0].mean() <= 1.5 * errors[1].mean()
    assert errors[0].max() <= 1.5 * errors[1].max()


@pytest.mark.parametrize("layer_type", list(POLICIES))
def test_every_layer_type_has_it(layer_type):
    """The forward is exact whatever is compressed, so the loss is too."""
    model, batch = llama({"target_modules": ON_HEAD}), padded_batch()
    loss, _ = gradients(model, batch)
    report = apply_hyclora(model, HycloraConfig(layer_type=layer_type))
    assert abs(gradients(model, batch)[0] - loss) < 1e-5
    assert report.head == "base_model.model.lm_head" and report.adapters["lm_head"] == 1
    assert "base_model.model.lm_head: chunked cross-entropy" in str(report)
    assert not any("lm_head" in name for name in report.not_patched)


def test_accumulated_micro_batches_equal_the_whole_batch():
    """With num_items_in_batch the micro-batches' gradients add up to the batch's, of unequal targets too."""
    model, whole = llama(), prompts(padded_batch(rows=4, seed=2), 3)
    apply_hyclora(model, BASELINE)
    count = (whole["labels"][:, 1:] != -100).sum()
    loss, together = gradients(model, whole)
    model.zero_grad()
    losses = []
    for part in (slice(0, 1), slice(1, 4)):
        losses.append(model(**{name: t[part] for name, t in whole.items()}, num_items_in_batch=count).loss)
        losses[-1].backward()
    apart = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert abs(sum(losses).item() - loss) < 1e-5
    assert largest_error(apart, together) < 1e-5


@pytest.mark.parametrize("num_items", [None, 5])
def test_all_labels_ignored(num_items):
    """As stock: NaN for a mean over nothing, 0 for a sum; no gradient either way."""
    model, batch = llama({"target_modules": ON_HEAD}), padded_batch()
    batch = batch | {"labels": torch.full_like(batch["labels"], -100)}
    batch = batch if num_items is None else batch | {"num_items_in_batch": num_items}
    results = []
    for patched in (False, True):
        if patched:
            apply_hyclora(model, BASELINE)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append(loss)
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert torch.equal(results[0], results[1]) or all(r.isnan() for r in results)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("part", [(slice(None), slice(-1)), (slice(-1), slice(None))], ids=["columns", "rows"])
def test_labels_of_another_shape_are_refused(name, part):
    """Rows of another length would move every target behind the first."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model)
    labels = batch.pop("labels")
    given = {"labels": labels} | {name: labels[part]}
    with pytest.raises(ValueError, match=r"labels of shape .* do not belong to tokens of shape \[3, 21\]"):
        model(**batch, **given)


def test_stock_where_logits_are_asked_for():
    """Evaluation, no grad, no labels, single positions, disabled adapters: the stock forward, logits of real tokens."""
    model, batch = llama(), padded_batch()
    unlabelled = {name: t for name, t in batch.items() if name != "labels"}
    calls = {
        "no labels": lambda: model(**unlabelled, use_cache=False),
        "last position": lambda: model(**unlabelled, logits_to_keep=1, use_cache=False),
        "shift_labels alone": lambda: model(**unlabelled, shift_labels=batch["labels"], use_cache=False),
        "no grad": lambda: torch.no_grad()(model)(**batch, use_cache=False),
        "evaluation": lambda: model.eval()(**batch),
    }
    expected = {name: call() for name, call in calls.items()}
    apply_hyclora(model.train(), BASELINE)
    for name, call in calls.items():
        out = call()
        real = batch["attention_mask"].bool()[:, -out.logits.shape[1] :]
        assert torch.allclose(out.logits[real], expected[name].logits[real], atol=1e-5), name
        assert (out.loss is None) == (expected[name].loss is None)
    with model.train().disable_adapter():
        assert not is_late(model(**batch))


def test_outputs_other_than_logits():
    """Hidden states, tuples and the signature are stock's."""
    import inspect

    model, batch = llama(), padded_batch()
    base = model.get_base_model()
    signature = inspect.signature(base.forward)
    stock = model(**batch, output_hidden_states=True)
    apply_hyclora(model, BASELINE)
    assert inspect.signature(base.forward) == signature
    ours = model(**batch, output_hidden_states=True)
    assert ours.keys() == stock.keys() and len(ours.hidden_states) == len(stock.hidden_states)
    real = batch["attention_mask"].bool()
    for a, b in zip(ours.hidden_states, stock.hidden_states, strict=True):
        assert torch.allclose(a[real], b[real], atol=1e-5)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 3 and torch.equal(as_tuple[0], ours.loss)


class Largest(TorchDispatchMode):
    """Notes the most elements of any floating-point tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("variant", ["frozen head", "lora on head, dropout"])
def test_logits_never_exist_as_a_whole(monkeypatch, variant):
    """The largest tensor of a step is smaller than T x V; stock's is not."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 40 * 2048 * 4)
    model, batch = llama(**VARIANTS[variant], vocab_size=2048, hidden_size=48), padded_batch(rows=3, width=80)
    whole = batch["input_ids"].numel() * 2048

    def largest():
        with Largest() as mode:
            model(**batch).loss.backward()
        return mode.elements

    assert largest() >= whole
    apply_hyclora(model, BASELINE)
    model(**batch)
    # W and its like [V, C] and the rank-r gradients are what is left
    assert largest() <= max(2048 * 48, 240 * 200) < whole / 4


def stay_stock():
    """What keeps the stock head, with the reason that the report gives."""
    saved = llama({"modules_to_save": ["lm_head"]})
    tied = llama(tie_word_embeddings=True)
    tied.get_base_model().model.embed_tokens.weight.requires_grad_()
    replaced = llama()
    replaced.get_base_model().forward = replaced.get_base_model().forward
    other = llama()
    other.get_base_model().loss_function = lambda logits, labels, **kwargs: logits[labels != -100].square().mean()
    subclass = llama()
    subclass.get_base_model().__class__ = type("Mine", (LlamaForCausalLM,), {})
    return {
        "modules_to_save": (saved, "ModulesToSaveWrapper is not supported"),
        "trainable through a tie": (tied, "the base weight is trainable"),
        "replaced forward": (replaced, "its forward was replaced"),
        "another loss": (other, "the loss is not ForCausalLMLoss"),
        "subclass": (subclass, "Mine is not supported, only LlamaForCausalLM"),
        "DoRA": (llama({"target_modules": ["lm_head"], "use_dora": True}), "LoRA variant Dora"),
    }


@pytest.mark.parametrize("name", ["modules_to_save", "trainable through a tie", "replaced forward", "another loss",
                                  "subclass", "DoRA"])  # fmt: skip
def test_a_head_that_stays_stock_is_reported_with_the_reason(name):
    model, reason = stay_stock()[name]
    batch = padded_batch()
    loss, exact = gradients(model, batch)
    report = apply_hyclora(model, BASELINE)
    assert report.head is None and not is_chunked(model)
    assert any("lm_head" in line and reason in line for line in report.not_patched)
    assert not is_late(model(**batch))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_a_head_or_loss_that_changes_later_runs_stock():
    """A weight that starts to train gets its gradient; a loss set on the model is used."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, BASELINE)
    head = model.get_base_model().lm_head
    head.weight.requires_grad_()
    assert "base_model.model.lm_head.weight" in gradients(model, batch)[1]
    head.weight.requires_grad_(False)
    assert is_late(model(**batch))
    model.get_base_model().loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    out = model(**batch)
    assert torch.equal(out.loss, out.logits.square().mean())


def test_remove_and_deep_copies():
    model, batch = llama(), padded_batch()
    base = model.get_base_model()
    loss, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    clone = copy.deepcopy(model)
    remove_hyclora(model)
    assert "forward" not in base.__dict__ and not is_late(model(**batch))
    assert gradients(model, batch)[0] == loss
    assert is_late(clone(**batch)) and largest_error(gradients(clone, batch)[1], exact) < 1e-5
    assert largest_error(gradients(model, batch)[1], exact) == 0


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 2}], ids=str)
def test_hf_trainer(tmp_path, settings):
    """Losses of the HF Trainer, of training and evaluation, are those of the stock model; its inputs are all found."""
    rows = [
        {"input_ids": list(range(n, n + 9)), "labels": [-100] * (n % 5) + list(range(n + n % 5, n + 9))}
        for n in range(12)
    ]
    logs = []
    for patched in (False, True):
        model = llama()
        if patched:
            apply_hyclora(model, BASELINE)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, eval_steps=3,
            eval_strategy="steps", save_strategy="no", report_to=[], disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=DataCollatorForSeq2Seq(Pad()),
            compute_metrics=lambda p: {"vocab": p.predictions.shape[-1]},
        )  # fmt: skip
        trainer.train()
        kept = ("loss", "eval_loss", "eval_vocab")
        logs.append([v for entry in trainer.state.log_history for k, v in entry.items() if k in kept])
    assert len(logs[0]) == 5 and 128 in logs[0]
    assert logs[1] == pytest.approx(logs[0], abs=1e-4)


class Pad:
    """What DataCollatorForSeq2Seq asks of a tokenizer, for rows of one length."""

    padding_side = "right"

    def pad(self, rows, **kwargs):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_gradient_checkpointing_and_nf4_head():
    """A checkpointed decoder and a quantized head give stock's loss and gradients."""
    bnb = pytest.importorskip("bitsandbytes")
    model, batch = llama(hidden_size=128, num_attention_heads=4, intermediate_size=192), padded_batch()
    base = model.get_base_model()
    head = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    head.weight = bnb.nn.Params4bit(base.lm_head.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    base.lm_head = head.to(base.device)
    head.support_avx512bf16_for_cpu = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    assert is_chunked(model) and isinstance(base.lm_head, nn.Linear)
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-4
