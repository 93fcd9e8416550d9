"""Modules, numbers and functions of somebody's in and around the layers: as in stock, or one sentence says why not."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers.masking_utils
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import record, replayed, train
from tests.helpers.small_models import gradients, largest_error, llama, our_map_dropout, padded_batch, qwen2, qwen3
from tests.models.test_trust import layers_of
from tests.models.test_watch import assert_seen

BASELINE = HycloraConfig(layer_type="baseline")


class Around(nn.Module):
    """A module around another one, whose input it uses once more."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.tensor(0.5, device=DEVICE))

    def forward(self, x, *args, **kwargs):
        return self.inner(x, *args, **kwargs) + self.gate * x


class Routed(nn.Module):
    """A gated MLP with a loss over all positions, those of padding too."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp
        torch.manual_seed(5)
        self.router = nn.Linear(96, 2, bias=False, device=DEVICE)

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        self.loss = gates.mean((0, 1)).square().sum()
        return self.mlp(x) * gates[..., :1] * 2


class Shifted(nn.Module):
    """An MLP that mixes each token with the one before it in the row."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x + F.pad(x, (0, 0, 1, 0))[:, :-1])


class Axial(nn.Module):
    """Angles of two axes: the halves of cos and sin differ."""

    def __init__(self, angles: nn.Module):
        super().__init__()
        self.angles = angles

    def forward(self, x, position_ids):
        found = position_ids[..., None].float() * self.angles.inv_freq
        found = torch.cat((found, found * 0.5), dim=-1)
        return found.cos().to(x.dtype), found.sin().to(x.dtype)


def each(change):
    """The change of a layer, in all layers of a model."""

    def changed(model):
        for layer in layers_of(model):
            change(layer)

    return changed


def own_mask(module, args, kwargs):
    if kwargs.get("attention_mask") is None:
        length = kwargs["hidden_states"].shape[1]
        kwargs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE).tril().triu(-3)
    return args, kwargs


def wrap_first(model):
    layers_of(model)[0] = Around(layers_of(model)[0])


def tie(model):
    for layer in layers_of(model)[1:]:
        layer.self_attn.q_proj.lora_A = layers_of(model)[0].self_attn.q_proj.lora_A


def reset(layer):
    layer.mlp.down_proj.lora_B = copy.deepcopy(layer.mlp.down_proj.lora_B)
    layer.mlp.down_proj.lora_B["default"].weight.data.mul_(2)


def drop(layer):
    layer.mlp.down_proj.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.5)})


def learn(layer):
    layer.self_attn.q_proj.s = nn.Parameter(torch.tensor(1.5, device=DEVICE))
    layer.self_attn.q_proj.scaling["default"] = layer.self_attn.q_proj.s


def steer(layer):
    """Past the version of the tensor."""
    factors = torch.linspace(0.1, 3, 96, device=DEVICE)
    layer.input_layernorm.register_forward_hook(lambda module, args, output: (output.data.mul_(factors), None)[1])
    layer.mlp.register_forward_pre_hook(lambda module, args: (args[0].data.add_(factors), None)[1])


def turn(model):
    decoder = model.get_base_model().model
    decoder.rotary_emb = Axial(decoder.rotary_emb)


def replace_head_norm(layer):
    layer.self_attn.q_norm = copy.deepcopy(layer.self_attn.q_norm)
    layer.self_attn.q_norm.weight.data.mul_(2)


def no_windows(model):
    model.get_base_model().config.layer_types = ["full_attention"] * 2


CHANGES = {
    "mask by a hook": (each(lambda m: m.self_attn.register_forward_pre_hook(own_mask, with_kwargs=True)), llama),
    "a wrapper around a layer": (wrap_first, llama),
    "tied lora_A": (tie, llama),
    "lora_B reset": (each(reset), llama),
    "dropout": (each(drop), llama),
    "a learnable scaling": (each(learn), llama),
    "attention's scaling": (each(lambda layer: setattr(layer.self_attn, "scaling", 0.9)), llama),
    "steering": (each(steer), llama),
    "angles of two axes": (turn, llama),
    "a norm of heads": (each(replace_head_norm), qwen3),
    "no windows": (no_windows, qwen2),
    "fewer layers": (lambda model: setattr(model.get_base_model().config, "num_hidden_layers", 1), llama),
    "a module around the MLP": (each(lambda layer: setattr(layer, "mlp", Shifted(layer.mlp))), llama),
}


# in a stream dropout is drawn for another shape
PAIRS = [(name, stream) for name in CHANGES for stream in (False, True) if not (stream and name == "dropout")]


@pytest.mark.parametrize("name, stream", PAIRS)
def test_changed_later(name, stream):
    assert_seen(*CHANGES[name], HycloraConfig(layer_type="baseline", stream=stream))


@pytest.mark.parametrize("name, stream", PAIRS)
def test_changed_before(name, stream):
    """At 8 bit, with inputs that are derived from norms."""
    (change, make), batch, found = CHANGES[name], padded_batch(), []
    for patched in (False, True):
        model = make()
        change(model)
        if patched:
            apply_hyclora(model, HycloraConfig(iteration_threshold=1, q_bit=8, stream=stream))
            gradients(model, batch)
        found.append(gradients(model, batch))
    (loss, exact), (our_loss, ours) = found
    assert abs(our_loss - loss) < 1e-5
    assert largest_error(ours, exact) < 0.1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [Routed, Shifted])
def test_a_module_that_reads_padding(kind, stream):
    model = llama(base="float32").get_base_model().config
    torch.manual_seed(0)
    stock = LlamaForCausalLM(model).to(DEVICE)
    for layer in stock.model.layers:
        layer.mlp = kind(layer.mlp)
    stock = get_peft_model(stock, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).train()
    ours, found = copy.deepcopy(stock), []
    apply_hyclora(ours, HycloraConfig(layer_type="baseline", stream=stream))
    for model in (ours, stock):
        loss = model(**padded_batch()).loss
        (loss + sum(getattr(layer.mlp, "loss", 0) for layer in layers_of(model))).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert largest_error(*found) < 1e-5


@pytest.mark.parametrize(
    "name, value",
    [("scaling", 0.9), ("variance_epsilon", 0.5), ("num_hidden_layers", 1)],
)
def test_numbers_in_a_recording(name, value):
    """What was recorded is not replayed with others."""
    model, graphs, batch = record()
    stock = llama()
    for changed in (model, stock):
        for layer in layers_of(changed):
            owner = layer.input_layernorm if name == "variance_epsilon" else layer.self_attn
            setattr(owner if name != "num_hidden_layers" else changed.get_base_model().config, name, value)
        changed.last = train(changed, [batch])[0]["loss"]
    torch.testing.assert_close(model.last, stock.last, atol=1e-3, rtol=1e-3)
    assert replayed(model, graphs, batch) == (name in ("scaling", "variance_epsilon")), "with its own recording"


def ungrouped():
    return llama(num_key_value_heads=6)


@pytest.mark.usefixtures("deterministic_attention")
def test_dropout_of_attention_that_is_raised_after_a_recording():
    """Nothing is replayed: it is a run layer by layer from the same seed, and stock's.

    Other kernels of a GPU draw as their tiles go, and for grouped heads a call of ours has one of each group.
    """
    model, graphs, batch = record(ungrouped)
    (before,), stock, found = train(model, [batch]), ungrouped(), []
    for changed in (model, stock):
        for layer in layers_of(changed):
            layer.self_attn.attention_dropout = 0.9
    for run, around in ((model, nullcontext), (model, graphs.paused), (stock, nullcontext)):
        torch.manual_seed(3)
        with around():
            found.append(train(run, [batch])[0])
    ours, alone, theirs = found
    assert not replayed(model, graphs, batch)
    assert largest_error(ours, alone) < 1e-4 and largest_error(ours, before) > 0.1
    torch.testing.assert_close(ours["loss"], theirs["loss"], atol=1e-3, rtol=1e-3)


def test_dropout_of_attention_maps_that_is_raised_between_steps():
    """It is drawn as stock draws it with the same masks."""
    model, batch = llama(attn_implementation="eager"), padded_batch()
    apply_hyclora(model, HycloraConfig(layer_type="baseline", attention="eager"))
    gradients(model, batch)
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 0.9
    _, ours = gradients(model, batch)
    remove_hyclora(model)
    assert largest_error(ours, gradients(model, batch, dropping=our_map_dropout)[1]) < 1e-5


def test_layers_in_training_by_themselves():
    """model.eval(), then some layers in training: what changes is seen all the same."""

    def unfreeze(model):
        model.eval()
        for layer in layers_of(model)[1:]:
            layer.train()
        for layer in layers_of(model):
            layer.mlp.down_proj.base_layer.weight.requires_grad_()

    assert_seen(unfreeze)


def test_a_head_with_another_base():
    def change(model):
        head = model.get_base_model().lm_head
        head.base_layer = copy.deepcopy(head.base_layer)
        head.base_layer.weight.data.mul_(2)
        head.lora_A = copy.deepcopy(head.lora_A)

    assert_seen(change, lambda: llama({"target_modules": ["q_proj", "lm_head"]}))


def prefix_sees_all(batch, head, query, key):
    return (key <= query) | (key < 5)


def test_the_function_of_causal_masks(monkeypatch):
    def change(model):
        monkeypatch.setattr(transformers.masking_utils, "causal_mask_function", prefix_sees_all)

    model, batch = llama(), {k: t for k, t in padded_batch().items() if k != "attention_mask"}
    apply_hyclora(model, BASELINE)
    gradients(model, batch)
    change(model)
    loss, exact = gradients(llama(), batch)
    our_loss, ours = gradients(model, batch)
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


@pytest.mark.parametrize("name, half", [("silu", "mlp"), ("scaled_dot_product_attention", "self_attn")])
def test_functions_of_torch(name, half, monkeypatch):
    stock = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **kwargs: stock(*args, **kwargs) * 1.2)
    model = llama()
    loss, exact = gradients(model, padded_batch())
    report = apply_hyclora(model, BASELINE)
    assert sum(f"{half}: torch.nn.functional.{name} was replaced" in line for line in report.not_patched) == 2
    our_loss, ours = gradients(model, padded_batch())
    assert abs(our_loss - loss) < 1e-5 and largest_error(ours, exact) < 1e-5


def test_base_weights_that_are_others_in_backward():
    """W is read again in backward, where functional_call has put the first one back."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, BASELINE)
    other = {
        name: nn.Parameter(p.detach() * 1.5, requires_grad=False)
        for name, p in model.named_parameters()
        if "base_layer.weight" in name
    }
    loss = functional_call(model, other, (), batch).loss
    with pytest.raises(ValueError, match="base weight were changed between a forward and its backward"):
        loss.backward()
    loss = model(**batch).loss
    with torch.no_grad():
        layers_of(model)[0].mlp.down_proj.base_layer.weight.mul_(2)
    with pytest.raises(ValueError, match="base weight were changed"):
        loss.backward()


@pytest.mark.parametrize("where", ["layer", "decoder"])
def test_a_module_around_before_the_patch(where):
    model = llama()
    base = model.get_base_model()
    if where == "layer":
        base.model.layers[0] = Around(base.model.layers[0])
        report = apply_hyclora(model, BASELINE)
        assert sum("Around is not supported, only LlamaDecoderLayer" in line for line in report.not_patched) == 2
        assert not find_patch(model).watch.stock
    else:
        base.model = Around(base.model)
        with pytest.raises(ValueError, match="model: Around is not supported, only LlamaModel"):
            apply_hyclora(model, BASELINE)


def write_past_the_version(model, batch):
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1)


def fill_the_buffers(model, batch):
    batch["input_ids"].copy_(batch["input_ids"].flip(0))


@pytest.mark.parametrize("change", [write_past_the_version, fill_the_buffers])
def test_logits_that_cannot_be_had_any_more(change):
    model, batch = llama(), {name: t.clone() for name, t in padded_batch().items()}
    apply_hyclora(model, BASELINE)
    outputs = model(**batch)
    outputs.loss.backward()
    change(model, batch)
    with pytest.raises(ValueError, match=r"trained or switched over since the forward, or its inputs overwritten"):
        outputs.logits  # noqa: B018


def test_forwards_that_failed_calibrate_nothing():
    """Out of memory, and again with fewer rows."""
    model, batch = llama(), padded_batch()
    _, exact = gradients(model, batch)
    apply_hyclora(model, HycloraConfig(q_bit=8, iteration_threshold=2))
    handle = layers_of(model)[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            model(**batch)
    handle.remove()
    assert find_patch(model).step.index == 0
    gradients(model, batch)
    assert largest_error(gradients(model, batch)[1], exact) < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_forwards_before_their_backward(reentrant):
    """More than calibrate, one of them with attention maps: each is run again as it was."""
    found = []
    for config in (None, BASELINE, HycloraConfig(q_bit=8, iteration_threshold=1)):
        model = llama(attn_implementation="eager")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if config is not None:
            apply_hyclora(model, config)
        losses = [model(**padded_batch(seed=seed), output_attentions=seed == 1).loss for seed in range(3)]
        sum(losses).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    exact, ours, packed = found
    assert largest_error(ours, exact) < 1e-5 and largest_error(packed, exact) < 0.1
