"""Whoever reads what comes out at padding, hidden states or attention maps gets stock's; positions mean what they mean
to stock."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorWithFlattening,
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
from hyclora.models.patch import find_patch
from hyclora.operators.attention.flash import is_bounds
from hyclora.utils.args import LINEARS
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import gradients, llama, mistral, padded_batch, qwen2, qwen3
from tests.models.test_masks import masks_given
from tests.operators.attention.test_flash import Recorder

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
        assert expected.keys() - outputs.keys() <= {"past_key_values"} and outputs.keys() <= expected.keys()
        for name in outputs.keys() - {"past_key_values"}:
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
    assert is_bounds(masks_given(model, batch)[0])
    more = batch | {"labels": batch["labels"].clone()}
    end = int(batch["attention_mask"][1].sum())
    more["labels"][1, end] = 5  # predicted by the last real token
    assert is_bounds(masks_given(model, more)[0])
    more["labels"][1, end + 1] = 5
    assert not is_bounds(masks_given(model, more)[0])
    assert not is_bounds(masks_given(model, {k: t for k, t in batch.items() if k != "labels"})[0])
    assert is_bounds(masks_given(model, {"input_ids": batch["input_ids"]})[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_left_padding_is_bounds_where_stock_gives_zero(implementation):
    """The last padding in front predicts the first real token: so does stock; SDPA from 0, eager from a mean."""
    model = llama(attn_implementation=implementation)
    apply_hyclora(model)
    batch = {k: t.flip(1) for k, t in padded_batch().items()}
    assert is_bounds(masks_given(model, batch)[0]) == (implementation == "sdpa")
    batch["labels"][1:, :16] = -100
    assert is_bounds(masks_given(model, batch)[0])


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
    assert is_bounds(masks_given(model, batch)[0])


def test_global_hooks_see_what_they_see_in_stock():
    model, batch, seen = llama(), padded_batch(), []
    norm = model.get_base_model().model.norm
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, _, y: seen.append(y) if m is norm else None)
    try:
        model(**batch)
        apply_hyclora(model, BASELINE)
        model(**batch)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)


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
            setattr(model.get_base_model().config, name, value)
    else:
        batch |= asked

    def read(outputs):
        found = [t for name in ("hidden_states", "attentions") for t in getattr(outputs, name) or ()]
        assert found or implementation == "sdpa"
        return everywhere(outputs)

    assert_as_stock(model, batch, loss_of=read)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
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


def positions(kind: str, rows=3, width=24) -> torch.Tensor:
    """Position ids [1 or B, S]."""
    whole = torch.arange(width)[None]
    half = whole % (width // 2)
    return {
        "usual": whole,
        "above 0": whole + 7,
        "two documents": half,
        "a skip": whole + 60 * (whole >= width // 2),
        "of each row": torch.stack([whole[0], half[0], whole[0] % 5]),
        "backwards": torch.where(whole < 12, whole, width - whole),
        "all the same": whole.clamp_max(12).expand(rows, -1),
    }[kind].to(DEVICE)


POSITIONS = ["usual", "above 0", "two documents", "a skip", "of each row", "backwards", "all the same"]
ARGUMENTS = {
    "plain loop": {},
    "no cache": {"use_cache": False},
    "a cache": {"use_cache": True},
    "all real": {"attention_mask": torch.ones(3, 24, dtype=torch.long)},
    "padding": {"attention_mask": torch.ones(3, 24, dtype=torch.long).tril(20)},
    "four dimensions": {"attention_mask": torch.ones(24, 24, dtype=torch.bool).tril().tril(3).expand(3, 1, 24, 24)},
}


MODELS = [(llama, "flash", "eager"), (llama, "eager", "eager"), (llama, "flash", "sdpa"), (llama, "eager", "sdpa"),
          (mistral, "flash", "sdpa"), (mistral, "eager", "sdpa"), (qwen3, "flash", "sdpa")]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("family, attention, implementation", MODELS)
def test_positions(family, kind, arguments, attention, implementation):
    """Loss and gradients are stock's for every way to give them."""
    if arguments == "four dimensions" and implementation == "eager":
        pytest.skip("stock adds True and False to its scores")
    model = family(attn_implementation=implementation)
    ids = torch.randint(0, 128, (3, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions(kind)}
    batch |= {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in ARGUMENTS[arguments].items()}
    loss, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_with_other_settings(kind):
    """config.use_cache off as HF's Trainer has it, gradient checkpointing, embeddings and the decoder's own call."""
    ids = torch.randint(0, 128, (3, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions(kind)}

    def off(model):
        model.get_base_model().config.use_cache = False

    def checkpointed(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def embedded(model):
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()

    for setting in (off, checkpointed, embedded):
        model = llama()
        setting(model)
        loss, exact = gradients(model, batch)
        apply_hyclora(model, BASELINE)
        our_loss, ours = gradients(model, batch)
        assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5

    def by_position(model, _):
        return model.get_base_model().model(ids, None, positions(kind))

    assert_as_stock(llama(), batch, call=by_position)


def test_rows_are_cut_where_stock_cuts_them():
    """Bounds in a plain loop: whole rows; with the cache off: documents. Without a map of S x S either way."""
    model = llama(max_position_embeddings=2048, num_hidden_layers=1)
    ids = torch.randint(0, 128, (1, 1200), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions("two documents", 1, 1200)}
    apply_hyclora(model, BASELINE)
    for arguments, runs in (({}, 1), ({"use_cache": False}, 2)):
        (bounds,) = masks_given(model, batch | arguments)
        assert is_bounds(bounds) and bounds.shape[-1] == runs + 1
        with Recorder() as recorder:
            gradients(model, batch | arguments)
        assert recorder.largest < 1200**2


def test_flattened_rows_with_their_lengths():
    """What padding-free collators give beside position ids."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": list(range(n, 3 * n))} for n in (3, 9, 5)])
    batch = {k: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for k, t in batch.items()}
    for use_cache in (None, False):
        model = mistral()
        given = batch | {"use_cache": use_cache}
        loss, exact = gradients(model, given)
        apply_hyclora(model, BASELINE)
        our_loss, ours = gradients(model, given)
        assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5


@pytest.mark.parametrize("family", [qwen2, qwen3], ids=["qwen2", "qwen3"])
def test_masks_by_kind_of_layer(family):
    """Some families take a dictionary of masks."""
    model, batch = family(), padded_batch()
    triangle = torch.ones(21, 21, dtype=torch.bool, device=DEVICE).tril().expand(3, 1, 21, 21)
    batch["attention_mask"] = {"full_attention": triangle, "sliding_attention": triangle & ~triangle.tril(-4)}
    loss, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5


def test_a_cache_that_is_given():
    """Its keys and values are of the tokens before; a forward in training goes on from them, as in stock."""
    model, ids = llama(), padded_batch()["input_ids"]

    def run():
        with torch.no_grad():
            past = model(ids[:, :10], use_cache=True).past_key_values
        model.zero_grad()
        outputs = model(ids[:, 10:], past_key_values=past, labels=ids[:, 10:])
        outputs.loss.backward()
        return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, exact = run()
    apply_hyclora(model, BASELINE)
    outputs, ours = run()
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert apart(ours, exact) < 1e-5 and outputs.past_key_values.get_seq_length() == 21


def test_a_decoder_with_a_forward_of_its_own_gets_what_it_was_given():
    """Neither bounds nor a cache that is off: nobody knows what it does with them."""
    model, batch, seen = llama(), padded_batch(), []
    decoder = model.get_base_model().model
    apply_hyclora(model, BASELINE)
    stock = decoder.forward

    def forward(*args, **kwargs):
        seen.append(kwargs)
        return stock(*args, **kwargs)

    decoder.forward = forward
    loss, ours = gradients(model, batch)
    assert seen[0]["attention_mask"] is batch["attention_mask"] and seen[0].get("use_cache") is None
    del decoder.__dict__["forward"]
