"""Whoever reads what comes out at padding, hidden states or attention maps gets what stock gives."""

from types import FunctionType, MethodType

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralConfig,
    MistralForTokenClassification,
    Qwen3Config,
    Qwen3ForQuestionAnswering,
)

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.graphs.recording import free_workspaces
from hyclora.models.patch import find_patch
from hyclora.operators.attention.flash import tells_runs
from hyclora.utils.args import LINEARS
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import gradients, llama, mistral, padded_batch, qwen2, qwen3, roberta
from tests.models.test_masks import masks_given

BASELINE = HycloraConfig(layer_type="baseline")
FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}
IMPLEMENTATIONS = ["sdpa", "eager"]


def padded(kind: str, rows=3, width=21) -> dict:
    """Tokens and a mask; padding is on one side, between tokens, or all of a row."""
    batch = {k: t.clone() for k, t in padded_batch(rows, width).items() if k != "labels"}
    if kind == "left":
        batch = {k: t.flip(1) for k, t in batch.items()}
    if kind == "between":
        batch["attention_mask"][:, 3:6] = 0
    if kind == "a row":
        batch["attention_mask"][1] = 0
    if kind == "both sides":
        batch["attention_mask"][:, :2] = 0
    return batch


CACHE = {"cache", "past_key_values"}  # the name from transformers 5.24 on, and that of before
PADDINGS = ["right", "left", "between", "a row", "both sides"]


def apart(ours: dict, theirs: dict) -> float:
    """Largest relative error; of gradients that are nothing but rounding, as a lone token's are, relative to others."""
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(g.norm() for g in theirs.values())
    return max(((ours[n] - g).norm() / g.norm().clamp_min(floor)).item() for n, g in theirs.items())


def everywhere(outputs) -> torch.Tensor:
    """A loss that reads each number of an output."""
    tensors = [t for value in outputs.to_tuple() for t in (value if isinstance(value, tuple) else [value])]
    tensors = [t.float() for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum((t * torch.linspace(-2, 2, t.numel(), device=DEVICE).view(t.shape)).sin().mean() for t in tensors)


def assert_as_stock(model, batch, config=BASELINE, loss_of=everywhere, call=lambda model, batch: model(**batch)):
    """Loss, all outputs and gradients, before the patch and after it; twice, as the first batch might be special."""

    def run():
        model.zero_grad()
        torch.manual_seed(1)
        outputs = call(model, batch)
        loss = loss_of(outputs)
        loss.backward()
        return outputs, loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, loss, exact = run()
    apply_hyclora(model, config)
    for _ in range(2):
        outputs, our_loss, ours = run()
        assert our_loss == pytest.approx(loss, abs=1e-5) and apart(ours, exact) < 1e-5
        assert expected.keys() - outputs.keys() <= CACHE and outputs.keys() <= expected.keys()
        for name in outputs.keys() - CACHE:
            torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=1e-5)


def with_head(model_class, config_class, **config):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 128, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_labels": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    }  # fmt: skip
    model = model_class(config_class(**shape | config))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=LINEARS))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(DEVICE).train()


HEADS = {
    "classification": (LlamaForSequenceClassification, LlamaConfig),
    "answering": (LlamaForQuestionAnswering, LlamaConfig),
    "tokens": (LlamaForTokenClassification, LlamaConfig),
    "tokens in windows": (MistralForTokenClassification, MistralConfig),
    "answering, head norms": (Qwen3ForQuestionAnswering, Qwen3Config),
    "none": (LlamaModel, LlamaConfig),
}


@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("head", HEADS)
def test_heads_that_are_not_ours(head, kind, implementation, attention):
    """They may read what they like."""
    extra = {"sliding_window": 8} if "windows" in head else {}
    model = with_head(*HEADS[head], attn_implementation=implementation, **extra)
    assert_as_stock(model, padded(kind), HycloraConfig(layer_type="baseline", attention=attention))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("labels", ["on padding", "at the end of rows", "shifted", "none"])
def test_labels_on_padding(labels, family, kind, implementation):
    """The loss of all tokens; of the token behind the real ones alone; or made by somebody else."""
    batch = padded(kind)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if labels == "on padding":
        batch["labels"] = ids.clone()
    elif labels == "at the end of rows":
        batch["labels"] = ids.masked_fill(mask.roll(2, 1) == 0, -100)
    elif labels == "shifted":
        batch |= {"labels": ids.masked_fill(mask == 0, -100), "shift_labels": ids.roll(-1, 1)}
    model = family(attn_implementation=implementation)
    if labels == "none":
        return assert_as_stock(model, batch)
    loss, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5


def test_bounds_where_nobody_reads_padding():
    """The token that predicts behind the last real one is ignored in the usual labels, and read with one label more."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model)
    assert tells_runs(masks_given(model, batch)[0])
    more = batch | {"labels": batch["labels"].clone()}
    end = int(batch["attention_mask"][1].sum())
    more["labels"][1, end] = 5  # predicted by the last real token
    assert tells_runs(masks_given(model, more)[0])
    more["labels"][1, end + 1] = 5
    assert not tells_runs(masks_given(model, more)[0])
    assert not tells_runs(masks_given(model, {k: t for k, t in batch.items() if k != "labels"})[0])
    assert tells_runs(masks_given(model, {"input_ids": batch["input_ids"]})[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_left_padding_is_bounds_where_stock_gives_zero(implementation):
    """The last padding in front predicts the first real token: so does stock; SDPA from 0, eager from a mean."""
    model = llama(attn_implementation=implementation)
    apply_hyclora(model)
    batch = {k: t.flip(1) for k, t in padded_batch().items()}
    assert tells_runs(masks_given(model, batch)[0]) == (implementation == "sdpa")
    batch["labels"][1:, :16] = -100
    assert tells_runs(masks_given(model, batch)[0])


def test_bounds_are_asked_for_once_more_where_there_is_padding_alone():
    """The GPU is waited for once, and for labels only where a mask has padding behind."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model)
    step, asked = find_patch(model).step, []
    decoder = model.get_base_model().model
    whole = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    for b in (batch, whole, {k: t for k, t in batch.items() if k != "attention_mask"}):
        step.unread = lambda padding: asked.append(padding) or True
        decoder(**{k: t for k, t in b.items() if k != "labels"})
        step.unread = None
    assert len(asked) == 1 and torch.equal(asked[0].to(DEVICE), batch["attention_mask"] == 0)


WATCHED = {
    "decoder": lambda base: base.model,
    "layer": lambda base: base.model.layers[0],
    "norm of a layer": lambda base: base.model.layers[1].input_layernorm,
    "attention": lambda base: base.model.layers[0].self_attn,
    "mlp": lambda base: base.model.layers[1].mlp,
    "last norm": lambda base: base.model.norm,
}


@pytest.mark.parametrize("where", WATCHED)
def test_hooks_see_what_they_see_in_stock(where):
    model, batch, seen = llama(), padded_batch(), []
    module = WATCHED[where](model.get_base_model())

    def note(module, args, output):
        output = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(output)
        return None

    handle = module.register_forward_hook(note)
    loss, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    our_loss, ours = gradients(model, batch)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)
    assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5
    handle.remove()
    assert tells_runs(masks_given(model, batch)[0])


ASKED = {
    "maps": {"output_attentions": True},
    "states": {"output_hidden_states": True},
    "both": {"output_attentions": True, "output_hidden_states": True},
    "some states": {"output_hidden_states": [0, -1]},
    "one state": {"output_hidden_states": 1},
}


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["right", "left", "whole"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("labelled", [False, True])
def test_states_and_maps_that_are_asked_for(asked, kind, implementation, how, labelled):
    """Of all tokens, and differentiable."""
    model, batch = llama(attn_implementation=implementation), padded(kind)
    if kind == "whole":
        del batch["attention_mask"]
    if labelled:
        batch["labels"] = padded_batch()["labels"]
    if how == "config":
        if implementation == "sdpa" and "output_attentions" in asked:
            pytest.skip("Hugging Face refuses it")
        for name, value in asked.items():
            if type(value) is not bool and Version(transformers.__version__) < Version("5.23"):
                pytest.skip("a configuration takes no indices yet")
            setattr(model.get_base_model().config, name, value)
    else:
        batch |= asked

    def read(outputs):
        found = [t for name in ("hidden_states", "attentions") for t in getattr(outputs, name) or ()]
        assert found or implementation == "sdpa"
        return everywhere(outputs)

    assert_as_stock(model, batch, loss_of=read)


@pytest.mark.parametrize("family", [*FAMILIES.values(), roberta], ids=[*FAMILIES, "roberta"])
@pytest.mark.parametrize("config", [{}, {"q_bit": 8, "attention": "eager"}, {"q_bit": 2}], ids=str)
def test_maps_of_every_family_and_then_ours_again(family, config):
    model, batch = family(attn_implementation="eager"), padded_batch()
    expected = model(**batch, output_attentions=True, use_cache=False).attentions
    apply_hyclora(model, HycloraConfig(iteration_threshold=1, **config))
    gradients(model, batch)
    outputs = model(**batch, output_attentions=True)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.attentions, expected, atol=1e-4, rtol=1e-4)
    assert model(**batch).attentions is None and not find_patch(model).step.stock_attention


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_maps_under_gradient_checkpointing(use_reentrant):
    model, batch = llama(attn_implementation="eager"), padded_batch() | {"output_attentions": True}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    expected, (loss, exact) = model(**batch).attentions, gradients(model, batch)
    apply_hyclora(model, BASELINE)
    ours, (our_loss, our_gradients) = model(**batch).attentions, gradients(model, batch)
    assert len(ours) == len(expected) and abs(our_loss - loss) < 1e-5
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert apart(our_gradients, exact) < 1e-5


@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("kind", ["right", "left", "whole"])
@pytest.mark.parametrize("how", ["argument", "config"])
def test_attention_that_looks_ahead(how, kind, attention):
    model, batch = llama(), padded(kind)
    if kind == "whole":
        del batch["attention_mask"]
    batch["labels"] = padded_batch()["labels"]
    if how == "config":
        model.get_base_model().config.is_causal = False
    else:
        batch["is_causal"] = False
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5


def _fused_forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, **kwargs):
    """What TRL's trainers put in place of a causal LM's forward, as far as it matters here."""
    if not fused_lm_head:
        return type(self).forward(self, *args, labels=labels, **kwargs)
    hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
    shifted = labels.roll(-1, 1).index_fill(1, torch.tensor(20, device=DEVICE), -100)
    shifted = shifted if shift_labels is None else shift_labels
    logits = self.lm_head(hidden[shifted != -100])
    return {"loss": torch.nn.functional.cross_entropy(logits, shifted[shifted != -100])}


def fuse_head(model, home: str) -> None:
    """As a trainer of that module does."""
    forward = FunctionType(_fused_forward.__code__, {**globals(), "__name__": home})
    forward.__kwdefaults__ = _fused_forward.__kwdefaults__
    base = model.get_base_model()
    base.forward = MethodType(forward, base)


@pytest.mark.parametrize("labels", ["real", "shifted", "on padding"])
@pytest.mark.parametrize("home, known", [("trl.trainer.utils", True), ("elsewhere", False)])
def test_a_head_that_is_known_to_read_labelled_positions(home, known, labels):
    """TRL's own; of any other nothing is known, and it gets Hugging Face's mask."""
    model, batch = llama(), padded_batch()
    if labels == "shifted":
        batch["shift_labels"] = batch["labels"].roll(-1, 1)
        batch["shift_labels"][:, -1] = -100
    if labels == "on padding":
        batch["labels"] = batch["input_ids"]
    fuse_head(model, home)

    def run(**options):
        model.zero_grad()
        loss = model(**batch, **options)["loss"]
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = [run(fused_lm_head=True), run() if labels != "shifted" else None]
    report = apply_hyclora(model, BASELINE)
    assert any("lm_head" in line for line in report.not_patched)
    for (loss, exact), options in zip(filter(None, expected), ({"fused_lm_head": True}, {}), strict=False):
        our_loss, ours = run(**options)
        assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5
    (mask,) = masks_given(model, batch | {"fused_lm_head": True})
    assert tells_runs(mask) == (known and labels != "on padding") and find_patch(model).step.unread is None


@pytest.mark.skipif(DEVICE == "cpu", reason="cuBLAS takes workspaces on a GPU alone")
def test_a_workspace_lies_unused_in_neither_direction():
    """A forward does not begin with that of the backward before, nor a backward with that of the head's forward."""

    def given_back() -> int:
        before = torch.cuda.memory_allocated()
        free_workspaces()
        return before - torch.cuda.memory_allocated()

    model, batch, found = llama(), padded_batch() | {"fused_lm_head": True}, []
    given_back()
    torch.ones(64, 64, device=DEVICE) @ torch.ones(64, 64, device=DEVICE)
    one = given_back()
    fuse_head(model, "trl.trainer.utils")
    apply_hyclora(model, BASELINE)
    model(**batch)["loss"].backward()
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *_: found.append(given_back()))
    model(**batch)
    assert one > 0 and len(found) == 1 and found[0] <= one and given_back() == 0
