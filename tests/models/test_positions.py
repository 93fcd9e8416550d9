"""Position ids, masks and caches mean what they mean to stock: rows are cut only where it cuts them."""

from inspect import signature

import pytest
import torch
from transformers import DataCollatorWithFlattening, LlamaModel

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.no_cache import NO_CACHE, NoCache
from hyclora.operators.attention.flash import is_bounds
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import gradients, llama, mistral, padded_batch, qwen2, qwen3
from tests.models.test_masks import masks_given
from tests.models.test_readers import BASELINE, apart, assert_as_stock
from tests.operators.attention.test_flash import Recorder

# of a cache; before transformers 5.24 the second alone
NAMES = [name for name in ("cache", "past_key_values") if name in signature(LlamaModel.forward).parameters]
NAMES += ["past_key_values"] if "past_key_values" not in NAMES else []


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


def test_numbers_that_are_added_to_the_scores():
    """A mask of integers is the user's own, not bounds."""
    model, batch = llama(attn_implementation="eager"), padded_batch()
    triangle = torch.ones(21, 21, dtype=torch.bool, device=DEVICE).tril().tril(3)
    batch["attention_mask"] = torch.where(triangle, 0, -10000).int().expand(3, 1, 21, 21)
    for attention in ("flash", "eager"):
        loss, exact = gradients(model, batch)
        apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
        our_loss, ours = gradients(model, batch)
        assert abs(our_loss - loss) < 1e-5 and apart(ours, exact) < 1e-5
        remove_hyclora(model)


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


@pytest.mark.parametrize("attention", ["flash", "eager"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", [llama, mistral, qwen3], ids=["llama", "mistral", "qwen3"])
def test_a_cache_that_is_given(family, name, attention):
    """Its keys and values are of the tokens before; a forward in training goes on from them, as in stock."""
    model, ids = family(), padded_batch()["input_ids"]

    def run():
        with torch.no_grad():
            past = model(ids[:, :10], use_cache=True)[NAMES[0]]
        model.zero_grad()
        outputs = model(ids[:, 10:], **{name: past}, labels=ids[:, 10:])
        outputs.loss.backward()
        return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, exact = run()
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention=attention))
    outputs, ours = run()
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert apart(ours, exact) < 1e-5 and outputs[NAMES[0]].get_seq_length() == 21


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_cache_that_is_asked_for(checkpointing):
    """It holds the keys and values of all tokens, as in stock; under gradient checkpointing there is none."""
    model, batch = llama(), padded_batch() | {"use_cache": True}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = model(**batch)[NAMES[0]] if not checkpointing else model(**batch).get(NAMES[0])
    apply_hyclora(model, BASELINE)
    outputs = model(**batch)
    outputs.loss.backward()
    found = outputs.get(NAMES[0])
    assert (found is None) == (expected is None) == checkpointing
    for ours, theirs in zip(found.layers if found else (), expected.layers if expected else (), strict=True):
        torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), atol=1e-5, rtol=1e-5)
    assert outputs.loss is not None and isinstance(model(**padded_batch()).get(NAMES[0], NO_CACHE), NoCache)


def whole() -> dict:
    """Rows without padding."""
    ids = padded_batch()["input_ids"]
    return {"input_ids": ids, "labels": ids}


CARRIED = {
    "to the next forward": lambda model, cache: model(**whole(), past_key_values=cache),
    "to an evaluation": lambda model, cache: model.eval()(**whole(), past_key_values=cache),
    "by hand": lambda model, cache: cache.get_seq_length(),
    "length": lambda model, cache: len(cache),
    "layer": lambda model, cache: cache[0],
}


@pytest.mark.parametrize("carry", CARRIED.values(), ids=CARRIED)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_cache_that_is_carried_on(labelled, carry):
    """Stock would see the tokens before; a model without any, and with none of it said, would not."""
    model, batch = llama(), whole() if labelled else {"input_ids": whole()["input_ids"]}
    apply_hyclora(model, BASELINE)
    outputs = model(**batch)
    with pytest.raises(ValueError, match="makes no cache .* use_cache=True"):
        carry(model, outputs.past_key_values)


def test_a_cache_that_was_asked_for_is_carried_on():
    model = llama()

    def both():
        first = model(**whole(), use_cache=True)
        return model(**whole(), past_key_values=first.past_key_values).loss

    expected = both()
    apply_hyclora(model, BASELINE)
    torch.testing.assert_close(both(), expected)
    model.gradient_checkpointing_enable()
    assert model(**whole()).past_key_values is None, "as in stock"


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
