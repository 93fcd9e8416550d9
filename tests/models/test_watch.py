"""What changes after the patch, or is not as it seems from the beginning, is seen: gradients are stock's."""

from dataclasses import replace
from functools import wraps
from types import MethodType

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.patch import find_patch
from hyclora.models.trust import is_known
from hyclora.utils.args import ROOT
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch, qwen2
from tests.models.test_trust import BASELINE, layers_of, look_alike, scaled, times


def assert_seen(change, make=llama, config=BASELINE) -> None:
    """A change to a model after a step of training has the effect that it has on stock code."""
    batch, found = padded_batch(), []
    for patched in (False, True):
        model = make()
        if patched:
            apply_hyclora(model, config)
        gradients(model, batch)
        change(model)
        found.append(gradients(model, batch))
    (loss, exact), (our_loss, ours) = found
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_a_step_that_changes_nothing_is_not_looked_at_again(monkeypatch):
    """Training, evaluation, checkpointing switched on and off: the reasons are found once."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    watch, looks = find_patch(model).watch, []
    monkeypatch.setattr(watch, "look", lambda: looks.append(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        gradients(model, batch)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(**batch)
        model.train()
    assert not looks


def test_a_hook_that_is_taken_off_again(caplog):
    """Its half of a layer runs stock as long as it is there, and is told of once."""
    model, batch = llama(), padded_batch()
    report = apply_hyclora(model, BASELINE)
    down, watch = layers_of(model)[1].mlp.down_proj.base_layer, find_patch(model).watch
    _, before = gradients(model, batch)
    handle = down.register_forward_hook(times(1.5))
    for _ in range(2):
        assert largest_error(gradients(model, batch)[1], before) > 0.01
        assert [block.reason is None for _, block in watch.halves] == [True, True, True, False] and not watch.whole
    handle.remove()
    assert largest_error(gradients(model, batch)[1], before) < 1e-6
    assert watch.whole and not any(block.reason for _, block in watch.halves)
    told = "layers.1.mlp.down_proj.base_layer: it has hooks"
    assert sum(told in line for line in report.not_patched) == caplog.text.count(told) == 1


def test_hooks_on_all_modules_are_refused_while_they_are_there():
    model, batch = llama(), padded_batch()
    apply_hyclora(model, BASELINE)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        for _ in range(2):  # as who runs a cell of a notebook again
            with pytest.raises(ValueError, match="hooks on all modules"):
                gradients(model, batch)
    finally:
        handle.remove()
    gradients(model, batch)
    assert find_patch(model).watch.whole


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_what_has_nothing_left_to_patch_evaluates(how):
    """Adapters were merged, or taken off, with the patch still on: stock code runs, with gradients on or off."""
    model, stock, batch = llama(), llama(), padded_batch()
    apply_hyclora(model, BASELINE)
    gradients(model, batch)
    model, stock = getattr(model, how)().eval(), getattr(stock, how)().eval()
    for _ in range(2):
        assert model(**batch).loss == stock(**batch).loss
    with pytest.raises(ValueError, match="no layer of this model can be patched"):
        model.train()(**batch)


def test_a_function_with_a_borrowed_name(monkeypatch):
    """Put where transformers' attention calls it, before the patch or after: nothing but its code tells it apart."""
    stock = modeling_llama.apply_rotary_pos_emb

    @wraps(stock)
    def louder(q, k, *args, **kwargs):
        return stock(2 * q, k, *args, **kwargs)

    assert louder.__module__ == stock.__module__ and not is_known(louder) and is_known(stock)
    model, batch = llama(), padded_batch()
    report = apply_hyclora(model, BASELINE)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", louder)
    _, exact = gradients(llama(), batch)
    _, ours = gradients(model, batch)
    assert largest_error(ours, exact) < 1e-5
    other = llama()
    for told in (report, apply_hyclora(other, BASELINE)):
        assert sum("apply_rotary_pos_emb, which its forward calls" in line for line in told.not_patched) == 2
    assert largest_error(gradients(other, batch)[1], exact) < 1e-5


@pytest.mark.parametrize("how", ["replaced", "swapped", "left out", "one more", "shared"])
def test_other_layers_in_the_decoder(how):
    """After the patch: a layer that is a copy of another, two in another order, one less, one more, one twice."""
    found = []
    for patched in (False, True):
        model, batch = llama(num_hidden_layers=3), padded_batch() | {"use_cache": False}
        layers = layers_of(model)
        if patched:
            apply_hyclora(model, BASELINE)
            gradients(model, batch)
        if how in ("replaced", "one more"):
            fresh = layers_of(llama({"r": 4}, num_hidden_layers=3))[2]
            layers.append(fresh) if how == "one more" else layers.__setitem__(1, fresh)
            model.get_base_model().config.num_hidden_layers = len(layers)
        elif how == "swapped":
            layers[0], layers[2] = layers[2], layers[0]
        elif how == "shared":
            layers[2] = layers[0]
        else:
            del layers[1]
        found.append(gradients(model, batch)[1])
        assert not patched or not find_patch(model).watch.whole
    assert largest_error(*found) < 1e-5


def test_a_module_that_layers_share():
    """Before the patch: one attention in two layers; the first layers' norm before both halves."""
    found = []
    for patched in (False, True):
        model, batch = llama(num_hidden_layers=3), padded_batch() | {"use_cache": False}
        layers = layers_of(model)
        layers[1].self_attn = layers[0].self_attn
        layers[2].post_attention_layernorm = layers[2].input_layernorm
        report = apply_hyclora(model, BASELINE) if patched else None
        found.append(gradients(model, batch)[1])
    assert largest_error(*found) < 1e-5
    assert sum("several layers share it" in line for line in report.not_patched) == 4


def test_a_loop_of_ones_own_over_the_layers():
    """It keeps what goes from one to the next, and gives them a mask in which the first token sees itself alone."""
    found = []
    for patched in (False, True):
        model, batch, kept = llama(), padded_batch(), []
        decoder = model.get_base_model().model

        def forward(self, input_ids=None, attention_mask=None, _kept=kept, **kwargs):
            assert attention_mask.dtype == torch.long and kwargs.get("use_cache") is None
            x = self.embed_tokens(input_ids)
            angles = self.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
            for layer in self.layers:
                _kept.append(x)
                x = layer(x, attention_mask=attention_mask[:, None, None].bool(), position_embeddings=angles)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

        decoder.forward = MethodType(forward, decoder)
        if patched:
            apply_hyclora(model, BASELINE)
        found.append((gradients(model, batch)[1], [x.detach().clone() for x in kept]))
    (exact, seen), (ours, ours_seen) = found
    assert largest_error(ours, exact) < 1e-5
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(seen, ours_seen, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("what", ["model", "layers"])
def test_torch_compile(what, checkpointing):
    """Of all, and of each layer: what is patched runs as it is, and dynamo does not spend a minute on looking inside.

    Nor does it tell of its limit of recompilations, which it came to at the ninth patched module.
    """
    model, batch, compiled = llama(), padded_batch(), []
    _, exact = gradients(model, batch)
    apply_hyclora(model, BASELINE)
    if checkpointing:  # a compiled step is the first one
        model.gradient_checkpointing_enable()
    else:
        gradients(model, batch)

    def backend(graph, inputs):
        compiled.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    for module in [model] if what == "model" else layers_of(model):
        module.compile(backend=backend)
    assert largest_error(gradients(model, batch)[1], exact) < 1e-5
    assert not any(f"{ROOT / folder}" in trace for trace in compiled for folder in ("models", "operators"))


@pytest.mark.parametrize("name", ["create_causal_mask", "cross_entropy"])
def test_what_makes_masks_and_losses(name, monkeypatch):
    """What the decoder's forward calls, and what the loss calls, for all models from then on."""
    mask, loss = modeling_llama.create_causal_mask, nn.functional.cross_entropy

    def first_four(**kwargs):
        return mask(**kwargs | {"or_mask_function": lambda batch, head, q, kv: kv < 4})

    def smooth(*args, **kwargs):
        return loss(*args, **kwargs | {"label_smoothing": 0.1})

    patched, stock, batch = llama(), llama(), padded_batch()
    apply_hyclora(patched, BASELINE)
    before, _ = gradients(patched, batch)
    owner, other = {"create_causal_mask": (modeling_llama, first_four), "cross_entropy": (nn.functional, smooth)}[name]
    monkeypatch.setattr(owner, name, other)
    (loss, exact), (our_loss, ours) = gradients(stock, batch), gradients(patched, batch)
    assert abs(our_loss - loss) < 1e-5 < abs(loss - before) and largest_error(ours, exact) < 1e-5


def test_a_window_in_the_configuration():
    def narrow(model):
        model.get_base_model().config.sliding_window = 4

    assert_seen(narrow, qwen2)


def test_a_pre_hook_of_the_decoder_that_changes_the_mask():
    def shorter(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[:, :3] = 0
        return args, kwargs | {"attention_mask": mask}

    def hook(model):
        model.get_base_model().model.register_forward_pre_hook(shorter, with_kwargs=True)

    assert_seen(hook)


def test_hooks_put_in_a_new_dictionary():
    """As those do who take all hooks off a module; the next one is seen, after a step without."""

    def rid(model):
        linear = layers_of(model)[0].self_attn.q_proj
        linear._forward_hooks = type(linear._forward_hooks)()
        gradients(model, padded_batch())
        linear.register_forward_hook(times(1.5))

    assert_seen(rid)


def test_a_last_norm_of_another_class():
    def swap(model):
        norm = model.get_base_model().model.norm
        look_alike(norm, scaled(type(norm).forward))

    assert_seen(swap)
    model = llama()
    report = apply_hyclora(model, BASELINE)
    swap(model)
    gradients(model, padded_batch())
    assert sum("model.norm: " in line for line in report.not_patched) == 1


@pytest.mark.parametrize("inputs", [{}, {"slot_savers": {"layer_in": "quant8"}}], ids=["exact", "8 bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mask_that_is_trained(checkpointing, inputs):
    """Its gradient is stock's."""
    found = []
    for patched in (False, True):
        model, batch = llama(), padded_batch()
        if patched:
            apply_hyclora(model, replace(BASELINE, **inputs))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        causal = torch.full((21, 21), float("-inf")).triu(1).expand(3, 1, 21, 21)
        mask = causal.clone().to(batch["input_ids"].device).requires_grad_()
        model(**batch | {"attention_mask": mask, "use_cache": False}).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"mask": mask.grad})
    assert largest_error(*found) < 1e-5


def test_a_mask_of_another_width():
    """HF makes a cache and takes the mask's first keys; a training forward without one would fail."""
    found = []
    for patched in (False, True):
        model, batch = llama(), padded_batch()
        if patched:
            apply_hyclora(model, BASELINE)
        batch["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 4))
        found.append(gradients(model, batch)[1])
    assert largest_error(*found) < 1e-5


@pytest.mark.parametrize("switch", ["scaling", "dropout", "dropout that was off"])
def test_an_adapter_switched_between_forward_and_backward(switch):
    """What backward would read is not what forward computed with: refused."""
    model, batch = llama({"lora_dropout": 0.1}), padded_batch()
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for drop in drops:
        drop.p = 0.0 if switch == "dropout that was off" else 0.1
    apply_hyclora(model, BASELINE)
    loss = model(**batch).loss
    if switch == "scaling":
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(2.0)
    else:
        for drop in drops:
            drop.p = 0.2
    other = model(**batch).loss
    with pytest.raises(ValueError, match="changed between a forward and its backward"):
        (loss + other).backward()


@pytest.mark.parametrize("layer_type", ["baseline", "intra_inter_full_fuse"])
def test_gradients_of_gradients_are_refused(layer_type):
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig(layer_type=layer_type, iteration_threshold=1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="create_graph=True: a patched model has no second-order gradients"):
        torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
    gradients(model, batch)


def test_a_forward_that_overflows_is_not_calibrated_on():
    """As its step is skipped, later gradients are those of a model that never saw it."""
    found = []
    for overflows in (False, True):
        model = llama()
        apply_hyclora(model, HycloraConfig(q_bit=4, iteration_threshold=3))
        for seed in range(2):
            gradients(model, padded_batch(seed=seed))
        embeddings = model.get_input_embeddings()
        if overflows:
            handle = embeddings.register_forward_hook(lambda module, args, x: x + float("inf"))
            gradients(model, padded_batch(seed=2))
            handle.remove()
        found.append(gradients(model, padded_batch(seed=3))[1])
    assert all(torch.isfinite(g).all() for g in found[1].values())
