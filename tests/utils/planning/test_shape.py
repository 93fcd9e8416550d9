"""Bytes of weights and of what is trained, against models that are there; and configurations that are not."""

import bitsandbytes as bnb
import pytest
import torch

from hyclora.models.blocks import projection
from hyclora.operators.linear.lora import ProjectionGroup
from hyclora.utils.errors import UserError
from hyclora.utils.planning import Shape
from hyclora.utils.planning.shape import aligned, nf4_bytes
from tests.helpers.small_models import llama, qwen2, qwen3

RANK = 4
MODELS = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
LORA = {"r": RANK, "lora_alpha": RANK}


def shape_of(model, **options) -> Shape:
    return Shape(model.config, rank=RANK, **options)


@pytest.mark.parametrize("numel", [64 * 64, 1000 * 64, 300 * 300])
def test_nf4_has_the_bytes_of_bitsandbytes(numel):
    weight = bnb.nn.Params4bit(torch.ones(1, numel), quant_type="nf4", compress_statistics=True, requires_grad=False)
    weight = weight.to("cpu") if weight.bnb_quantized else weight._quantize("cpu")
    state = weight.quant_state
    parts = [weight, state.absmax, state.state2.absmax]
    tables = 4 * (state.code.numel() + state.state2.code.numel() + 1)
    assert nf4_bytes(numel) == sum(aligned(t.numel() * t.element_size()) for t in parts) + tables


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_what_is_trained(name):
    model = MODELS[name]({"r": RANK})
    shape = shape_of(model, base="bf16")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert shape.weights == sum(aligned(2 * p.numel()) for p in frozen)
    assert shape.trained == 4 * sum(aligned(4 * p.numel()) for p in trained)


def test_the_largest_piece_of_w_is_what_a_projection_group_makes():
    model = llama(LORA, "nf4", hidden_size=128, num_attention_heads=4, intermediate_size=320)
    shape, layer = shape_of(model), model.base_model.model.model.layers[0]
    for name, half, parts in (("qkv", layer.self_attn, "qkv"), ("gate_up", layer.mlp, ("gate", "up"))):
        group = ProjectionGroup([projection(half, name, f"{part}_proj") for part in parts])
        made = max(w.untyped_storage().nbytes() for _, _, w in group.weights(torch.bfloat16, 9))
        assert shape.groups[name].piece(9, by_rows=True, below=False) == made


def test_windows_are_those_of_each_layer():
    assert shape_of(qwen2()).windows == [None, 8]


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_of_a_model_that_is_there(base):
    """Rank, targets, base and dropout are read off its adapters."""
    model = llama({**LORA, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}, base)
    model.get_base_model().get_input_embeddings().to(torch.bfloat16)
    shape = Shape.of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert shape.trained == 4 * sum(aligned(4 * p.numel()) for p in trained)
    assert (shape.base, shape.rank) == ("nf4" if base == "nf4" else "bf16", RANK)
    qkv, out, gate_up, down = shape.groups.values()
    assert (qkv.R, out.R, gate_up.R, down.R) == (16, 0, 0, 16)  # 8 and 4 columns, filled up to 16
    assert out.grads == gate_up.grads == 0 < down.grads
    assert (qkv.dropped, gate_up.dropped) == (qkv.n_in, 0) and qkv.beside == 0


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lora": LORA}, "a plan counts weights of 16 bit or NF4, and these are torch.float32"),
        (
            {"lora": {**LORA, "modules_to_save": ["embed_tokens"]}},
            "a plan counts LoRA adapters alone, and .* is trained",
        ),
        (
            {"lora": {**LORA, "target_modules": ["q_proj", "lm_head"]}},
            "on linear layers of the decoder, and .*lm_head is",
        ),
        ({"lora": {**LORA, "target_modules": ["embed_tokens"]}}, "linear layers of the decoder, and .*embed_tokens is"),
        ({"lora": False}, "a plan counts LoRA adapters alone"),
    ],
)
def test_a_model_that_cannot_be_counted(options, said):
    with pytest.raises(UserError, match=said):
        Shape.of(llama(**options))


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_model_without_config(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no config.json: name a folder"):
        Shape(tmp_path / name)


def test_no_name_is_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^\. has no config.json"):
        Shape("")


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not the configuration of a model"),
        ("[]", "is not the configuration of a model"),
        ("[" * 100_000, "is not the configuration of a model"),
        ('{"model_type": "llama", "num_hidden_layers": 2001}', "cannot work: num_hidden_layers is 2001: copy"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "cannot work: num_hidden_layers is 0: copy"),
        ('{"model_type": "llama", "hidden_size": 1099511627776}', "cannot work: hidden_size is 1099511627776: copy"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config.json cannot work: "),
        ('{"model_type": "llama", "vocab_size": -5}', "cannot work: vocab_size is -5: copy"),
        ('{"model_type": "llama", "intermediate_size": 0}', "cannot work: intermediate_size is 0: copy"),
        (
            '{"model_type": "llama", "num_key_value_heads": 5}',
            "cannot work: num_attention_heads is 32, no multiple of num_key_value_heads, 5: copy",
        ),
        ('{"model_type": "llama", "dtype": "float99"}', "config.json cannot work: .*float99"),
        ('{"model_type": "llama", "hidden_act": "foo"}', "a model of its config.json cannot be made .*foo"),
        ('{"model_type": "gpt2"}', "is of a gpt2 model: supported are"),
        ('{"model_type": "roberta"}', "is of no model that a plan can be made for"),
    ],
)
def test_a_config_that_is_of_no_use(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UserError, match=said):
            Shape(source)


@pytest.mark.parametrize(
    "options, said", [({"base": "int8"}, "base 'int8' is not one of"), ({"rank": 0}, "lora_rank 0")]
)
def test_settings_that_cannot_work(options, said):
    with pytest.raises(UserError, match=said):
        Shape("llama-2-7b", **options)
