"""A decoder layer whose residual branches go through its blocks, and who may still look at what is inside."""

import copy

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.layers import LayerBlock
from tests.helpers.replaying import graphed
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch


def decoder_layers(model):
    return model.get_base_model().model.layers


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter_full_fuse"])
def test_branches_are_added_inside(layer_type):
    """No addition of tensors is left to autograd between the first norm and the last."""
    model, added = llama(), []
    apply_hyclora(model, HycloraConfig(layer_type=layer_type))
    decoder_layers(model)[-1].register_forward_hook(lambda module, args, output: added.append(output.grad_fn.name()))
    gradients(model, padded_batch())
    assert added == ["MlpFunctionBackward"]


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"])
def test_a_hook_sees_what_stock_gives(name):
    """A module's output alone, though the layer is then put together by Hugging Face's code."""
    model, batch, seen = llama(), padded_batch(), []
    real = batch["attention_mask"].bool()
    module = getattr(decoder_layers(model)[0], name)

    def look(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output)[real].detach())
        assert isinstance(output, tuple) == (name == "self_attn")

    handle = module.register_forward_hook(look)
    _, stock = gradients(model, batch)
    handle.remove()
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    module.register_forward_hook(look)
    _, ours = gradients(model, batch)
    torch.testing.assert_close(*seen)
    assert largest_error(ours, stock) < 1e-5


@pytest.mark.parametrize("owner", ["layer", "mlp"])
def test_somebody_elses_forward_is_called(owner):
    """What replaced a module's forward before the patch is not left out."""
    model, batch, calls = llama(), padded_batch(), []
    layer = decoder_layers(model)[0]
    module = layer if owner == "layer" else layer.mlp
    stock = module.forward

    def noted(*args, **kwargs):
        calls.append(len(args))
        return stock(*args, **kwargs)

    module.forward = noted
    _, expected = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    _, ours = gradients(model, batch)
    assert largest_error(ours, expected) < 1e-5
    assert len(calls) == 2


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_was_asked_for_once_is_not_looked_at_for_ever(asked, monkeypatch):
    """Hugging Face leaves its hooks on the layers; the layers run as a whole again as soon as nobody asks."""
    model, batch, whole = llama(attn_implementation="eager"), padded_batch(), []
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    run = LayerBlock.run
    monkeypatch.setattr(LayerBlock, "run", lambda *args, **kwargs: (whole.append(1), run(*args, **kwargs))[1])
    _, expected = gradients(model, batch)
    assert len(whole) == 2
    model.eval()
    with torch.no_grad():
        assert model(**batch, **{asked: True})[1] is not None
    model.train()
    whole.clear()
    _, ours = gradients(model, batch)
    assert len(whole) == 2 and largest_error(ours, expected) < 1e-6


def test_autocast_of_a_wider_residual_stream():
    """fp32 embeddings under bf16 autocast: the sums stay fp32, as Hugging Face's do."""
    model, batch, dtypes = llama(), padded_batch(), []
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        model(**batch).loss.backward()
    assert dtypes == [torch.float32] * 2


def places(model, batch, monkeypatch) -> list[int]:
    """Where the embeddings and the outputs of the layers are."""
    found, run = [], LayerBlock.run
    monkeypatch.setattr(LayerBlock, "run", lambda layer, x, **kw: found.append(x.data_ptr()) or run(layer, x, **kw))
    norm = model.get_base_model().model.norm
    norm.register_forward_pre_hook(lambda module, args: found.append(args[0].data_ptr()))
    model(**batch)
    return found


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter_full_fuse"])
def test_all_layers_have_one_residual_stream(layer_type, monkeypatch):
    model = llama()
    apply_hyclora(model, HycloraConfig(layer_type=layer_type))
    found = places(model, padded_batch(), monkeypatch)
    assert len(found) == 3 and len(set(found)) == 1


def test_another_loop_over_the_layers_may_keep_what_it_likes(monkeypatch):
    """One of a subclass, or put in the place of the decoder's forward: each layer's output stays as it was."""
    for own in ("subclass", "instance"):
        model, batch = llama(), padded_batch() | {"use_cache": False}
        decoder = model.get_base_model().model
        if own == "subclass":
            decoder.__class__ = type("Own", (type(decoder),), {"__module__": "own"})
        else:
            decoder.forward = decoder.forward
        apply_hyclora(model, HycloraConfig(layer_type="baseline"))
        with monkeypatch.context() as patch:
            found = places(model, batch, patch)
        assert len(set(found)) == len(found) == 3


def test_embeddings_of_the_caller_are_not_overwritten():
    """Given ones, and those that a hook on the embedding has seen; gradients are those of stock."""
    model, batch = llama(), padded_batch()
    embeddings = model.get_input_embeddings()
    given = {"inputs_embeds": embeddings(batch["input_ids"]).detach()} | {
        n: batch[n] for n in ("attention_mask", "labels")
    }
    _, stock = gradients(model, given)
    kept = given["inputs_embeds"].clone()
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    _, ours = gradients(model, given)
    assert largest_error(ours, stock) < 1e-5
    assert torch.equal(given["inputs_embeds"], kept)
    seen = []
    embeddings.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    gradients(model, batch)
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("index, kind", [(0, "forward_pre_hook"), (0, "forward_hook"), (1, "forward_pre_hook")])
def test_what_one_hook_keeps_is_not_overwritten(index, kind):
    """The input or the output of one layer, the others having no hooks."""
    model, kept = llama(), []
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))

    def keep(module, args, output=None):
        tensor = args[0] if output is None else output
        kept.append((tensor, tensor.clone()))

    getattr(decoder_layers(model)[index], f"register_{kind}")(keep)
    gradients(model, padded_batch())
    assert torch.equal(*kept[0])


def test_hidden_states_that_are_asked_for_are_not_overwritten():
    model, batch = llama(), padded_batch()
    real = batch["attention_mask"].bool()
    stock = [h[real] for h in model(**batch, output_hidden_states=True).hidden_states]
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    ours = model(**batch, output_hidden_states=True).hidden_states
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a[real], b)


def by_hand(model, ids):
    """A loss of what single layers give, of which the first one's input is read too."""
    decoder = model.get_base_model().model
    first = decoder.embed_tokens(ids)
    angles = decoder.rotary_emb(first, torch.arange(ids.shape[1], device=ids.device)[None])
    hidden = decoder.layers[0](first, position_embeddings=angles)
    return hidden.square().mean() + (hidden - first).square().mean()


@pytest.mark.parametrize("settings", [{"layer_type": "baseline"}, {"q_bit": 8}], ids=["exact", "8 bit"])
@pytest.mark.parametrize("before", [0, 1, 6])
def test_a_layer_that_is_called_by_itself(before, settings):
    """Neither is its input overwritten, nor is an adapter that was switched meanwhile missed; replays are for decoders.

    before: forwards of the model before, of which the later ones are replayed.
    """
    stock, ids = llama(), padded_batch()["input_ids"]
    stock.add_adapter("other", stock.peft_config["default"])
    for name, p in stock.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(p, std=0.02)
    ours = copy.deepcopy(stock)
    graphed(ours, settings)
    for _ in range(before):
        ours(input_ids=ids, labels=ids).loss.backward()
    for adapter in ("default", "other"):
        found = []
        for model in (stock, ours):
            model.zero_grad()
            model.set_adapter(adapter)
            by_hand(model, ids).backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        assert largest_error(found[1], found[0]) < (1e-5 if "layer_type" in settings else 0.05)
