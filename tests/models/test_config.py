"""HycloraConfig, the slot table, and bits within an average."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.bits import PAYING, allocate_bits, widened
from hyclora.models.building import slot_widths
from hyclora.models.config import POLICIES, PRESETS, SLOTS
from hyclora.models.families import FAMILIES
from hyclora.models.patch import find_patch
from hyclora.operators.savers import ChannelQuant
from hyclora.utils.args import LINEARS
from hyclora.utils.planning.shape import SHAPES
from tests.helpers.small_models import gradients, llama, padded_batch

BAD = {
    "q_bit=5": {"q_bit": 5},
    "layer_type='none'": {"layer_type": "none"},
    "softmax_outlier_ratio=1.5": {"softmax_outlier_ratio": 1.5},
    "layernorm_outlier_ratio=-0.1": {"layernorm_outlier_ratio": -0.1},
    "iteration_threshold=0": {"iteration_threshold": 0},
    "attention='sdpa'": {"attention": "sdpa"},
    "scale_rule='best'": {"scale_rule": "best"},
    "slot_savers slot='gates'": {"slot_savers": {"gates": "exact"}},
    "slot_savers['gate']='quant5'": {"slot_savers": {"gate": "quant5"}},
    "slot_savers['gate']='recompute'": {"slot_savers": {"gate": "recompute"}},
    "slot_savers['prob']='quant4'": {"slot_savers": {"prob": "quant4"}},
    "slot_savers['lse']='quant4'": {"slot_savers": {"lse": "quant4"}},
    "slot_savers['lse']='exact'": {"slot_savers": {"lse": "exact"}, "attention": "eager"},
    "stream=True needs attention=flash": {"stream": True, "attention": "eager"},
    "slot_savers['attn_out']='recompute'": {"slot_savers": {"attn_out": "recompute", "lse": "exact"}},
    "q_bit=auto": {"q_bit": "auto", "scale_rule": "paper"},
    "cuda_graphs='yes' is not one of True, False, auto": {"cuda_graphs": "yes"},
    "stream='yes' is not one of True, False, auto": {"stream": "yes"},
    "offload='auto' is not one of True, False": {"offload": "auto"},
    "offload_embeddings='auto' is not one of True, False": {"offload_embeddings": "auto"},
    "iteration_threshold=1.5 is not a whole number": {"iteration_threshold": 1.5},
    "layernorm_outlier_ratio='0.1' is not a number": {"layernorm_outlier_ratio": "0.1"},
    "average_bits=None is not a number": {"average_bits": None},
    "average_bits=2.5 has no effect with q_bit=4: set auto": {"average_bits": 2.5},
    "slot_savers='gate' is not a dict": {"slot_savers": "gate"},
    f"layers='{'9' * 5000}.slots,input': ": {"layers": f"{'9' * 5000}*slots,input"},
    "layers='input5': 'input5' is not one of slots, input,": {"layers": "input5"},
    "layers='0.slots,input': '0.slots' is not one of": {"layers": "0*slots,input"},
    "layers='slots,input': only one part can be without a number": {"layers": "slots,input"},
    "slot_savers['layer_in']: layers='input4' says already": {"layers": "input4", "slot_savers": {"layer_in": "exact"}},
}


@pytest.mark.parametrize("named, setting", BAD.items(), ids=lambda one: str(one)[:60])
def test_impossible_settings_are_refused_by_name(named, setting):
    with pytest.raises(ValueError, match="^" + named.replace("[", r"\[").replace("]", r"\]")):
        HycloraConfig(**setting)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_defaults_with_its_changes(name):
    config, default = HycloraConfig.preset(name), HycloraConfig()
    assert config.to_dict() == default.to_dict() | PRESETS[name].settings
    assert (config == default) == (name == "default")
    changed = HycloraConfig.preset(name, q_bit=8, offload=False)
    assert changed.to_dict() == config.to_dict() | {"q_bit": 8, "offload": False}


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(
        ValueError, match="^preset='quick' is not one of fastest, least_memory, longest, paper, default$"
    ):
        HycloraConfig.preset("quick")


def test_q_bit_from_a_command_line():
    assert HycloraConfig(q_bit="2").q_bit == 2 and type(HycloraConfig(q_bit=4.0).q_bit) is int
    assert HycloraConfig(q_bit="auto").q_bit == "auto"


@pytest.mark.parametrize("layer_type", list(POLICIES))
@pytest.mark.parametrize("attention", ["flash", "eager"])
def test_the_slot_table(layer_type, attention):
    """What each layer type stores: all exact, all packed, or derived and recomputed where that is free."""
    config = HycloraConfig(layer_type=layer_type, attention=attention)
    names = {slot: config.saver_name(slot, 4) for slot in SLOTS}
    flash_in_baseline = attention == "flash" and layer_type == "baseline"
    assert names.pop("lse") == ("exact" if flash_in_baseline else "recompute")
    if layer_type == "baseline":
        assert set(names.values()) == {"exact"}
    elif layer_type == "intra":
        assert {slot for slot, name in names.items() if name != "quant4"} == {"prob", "layer_in"}
    else:
        assert names["attn_in"] == names["mlp_in"] == "derived"
        assert names["act"] == names["hidden"] == "recompute"
        assert names["attn_out"] == ("recompute" if attention == "flash" else "quant4")


@pytest.mark.parametrize(
    "layers, kept",
    [
        ("slots", ["slots"] * 4),
        ("input8", ["input8"] * 4),
        ("1*slots, input4", ["slots", "input4", "input4", "input4"]),
        ("input,2*slots,1*input2", ["input", "slots", "slots", "input2"]),
        ("2*input8,2*input4", ["input8", "input8", "input4", "input4"]),
        ("4*input4,slots", ["input4"] * 4),
    ],
)
def test_what_each_layer_keeps(layers, kept):
    assert HycloraConfig(layers=layers).kept(4) == kept


@pytest.mark.parametrize("layers, n", [("3*input4", 3), ("3*slots,3*input", 6), ("5*input4,slots", 5)])
def test_layers_of_another_number_are_refused(layers, n):
    with pytest.raises(ValueError, match=rf"^layers='.*' is of {n} layers, and the model has 4: give one part"):
        apply_hyclora(llama(num_hidden_layers=4), HycloraConfig(layers=layers))


def test_auto_bits_are_of_the_layers_that_keep_slots():
    """The budget is theirs; without any there is nothing to choose."""
    model = llama(num_hidden_layers=3)
    report = apply_hyclora(model, HycloraConfig(q_bit="auto", average_bits=4.0, layers="2*slots,input8"))
    assert len(report.savers["gate"]) == 2 and report.savers["layer_in"] == ["8 bit (exact channels 0.005)"]
    remove_hyclora(model)
    assert set(apply_hyclora(model, HycloraConfig(q_bit="auto", layers="input8")).savers) == {"layer_in"}


def test_a_kept_lse_brings_8_bit_with_it():
    """For what has to fit to it, unless something else is said."""
    config = HycloraConfig(q_bit=2, slot_savers={"lse": "exact", "v": "exact"})
    names = {slot: config.saver_name(slot, 2) for slot in SLOTS}
    assert [names[slot] for slot in ("q", "k", "v", "attn_out")] == ["quant8", "quant8", "exact", "quant8"]
    assert names["gate"] == names["norm_in"] == "quant2"


def test_slot_savers_override_single_slots():
    model = llama()
    report = apply_hyclora(model, HycloraConfig(slot_savers={"gate": "exact", "mlp_in": "quant2", "hidden": "quant8"}))
    assert set(report.savers["gate"]) == {"exact"}
    assert set(report.savers["mlp_in"]) == {"2 bit"} and set(report.savers["hidden"]) == {"8 bit"}
    model(**padded_batch()).loss.backward()


SHARED = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
WIDE_K = {"k": "4 bit", "gate": "2 bit (groups of 128)", "up": "2 bit (groups of 128)"}
PLAIN = dict.fromkeys(WIDE_K, "2 bit")


def kept(sizes: dict, **config) -> tuple[dict, dict]:
    """How the slots of WIDE_K are kept in each layer, and bits a token of all slots."""
    report = apply_hyclora(
        llama(**SHARED | {"intermediate_size": 1024} | sizes), HycloraConfig(**{"q_bit": 2} | config)
    )
    return {slot: report.savers[slot] for slot in WIDE_K}, report.slot_bits


@pytest.mark.parametrize(
    "sizes, config, expected",
    [
        ({}, {}, WIDE_K),
        ({}, {"layer_type": "intra"}, WIDE_K),
        # 4 groups of 128 save 64 bits in gate and up each, as many as k takes more
        ({"intermediate_size": 512}, {}, WIDE_K),
        ({"intermediate_size": 500}, {}, WIDE_K),
        ({"intermediate_size": 448}, {}, PLAIN),  # the last group is half empty
        ({"intermediate_size": 256}, {}, PLAIN),
        ({"num_key_value_heads": 4}, {}, PLAIN),
        ({}, {"scale_rule": "paper", "layer_type": "intra_inter"}, PLAIN),
        ({}, {"q_bit": 4}, dict.fromkeys(PLAIN, "4 bit")),
        ({}, {"slot_savers": {"lse": "exact"}}, PLAIN | {"k": "8 bit"}),
        ({}, {"slot_savers": {"gate": "quant4"}}, WIDE_K | {"gate": "4 bit (groups of 128)"}),
        ({}, {"slot_savers": {"up": "exact"}}, WIDE_K | {"up": "exact"}),
        ({}, {"slot_savers": {"k": "quant3"}}, WIDE_K | {"k": "3 bit"}),
        ({}, {"layer_type": "baseline"}, dict.fromkeys(PLAIN, "exact")),
    ],
    ids=str,
)
def test_k_is_wider_where_groups_of_gate_and_up_pay_for_it(sizes, config, expected):
    """slot_savers changes the slots alone that it names."""
    assert kept(sizes, **config)[0] == {slot: [name] * 2 for slot, name in expected.items()}


@pytest.mark.parametrize("width", [512, 500, 1024, 1100, 2000])
def test_a_wider_k_takes_no_bits_more(width):
    """Than 2 bit in groups of 64 would, which is 16 bits of scales for each."""
    savers, bits = kept({"intermediate_size": width})
    assert savers["k"] == ["4 bit"] * 2
    plain = {"gate": -(-width // 64) * 144, "up": -(-width // 64) * 144, "k": 144}
    assert sum(bits[slot] for slot in plain) <= 2 * sum(plain.values())


@pytest.mark.parametrize(
    "name, is_wider",
    [
        *((name, True) for name in ("llama-2-70b", "llama-3-8b", "llama-3.2-1b", "mistral-7b", "qwen2.5-7b")),
        ("qwen3-8b", True),
        *((name, False) for name in ("llama-2-7b", "llama-2-13b")),  # each head has its own k
    ],
)
def test_groups_pay_for_k_in_models_whose_heads_share_it(name, is_wider):
    config = LlamaConfig(**json.loads((SHAPES / name / "config.json").read_text()))
    with torch.device("meta"):
        layer = LlamaForCausalLM(config).model.layers[0]
    halves = (slot_widths(FAMILIES["llama"], layer, half) for half in ("attention", "mlp"))
    widths = {slot: width for half in halves for slot, width in half.items()}

    def packed_bits(width, bits, group):
        return ChannelQuant(bits, "channel_group", 0.0, group).bits(width)

    assert widened(widths, {"k": 4}, 2, packed_bits) == (({"k": 4}, PAYING) if is_wider else ({}, {}))


def test_layers_that_keep_their_input_have_no_wider_k():
    savers, _ = kept({"num_hidden_layers": 3}, layers="1*slots,input4")
    assert savers == {slot: [name] for slot, name in WIDE_K.items()}


@pytest.mark.parametrize("average", [2.3, 2.5, 3.0, 3.7, 5.0, 8.0])
def test_auto_bits_stay_within_the_average(average):
    """Scales and exact channels are in the average; a larger budget never takes a bit away."""
    model = llama(hidden_size=128, intermediate_size=256, num_attention_heads=4)
    report = apply_hyclora(model, HycloraConfig(q_bit="auto", average_bits=average))
    remove_hyclora(model)
    assert average - 0.5 < report.average_bits <= average
    wider = apply_hyclora(model, HycloraConfig(q_bit="auto", average_bits=average + 0.5))
    assert wider.average_bits > report.average_bits


def test_auto_bits_go_to_the_sensitive_slots_first():
    """With one upgrade affordable for equal sizes, gate gets it before up, up before norm_in."""
    sizes = dict.fromkeys([(0, "mlp", "gate"), (0, "mlp", "up"), (0, "norm", "norm_in")], 64)

    def plain(key, width):
        return sizes[key] * width

    upgraded = [allocate_bits(sizes, 2 + n / 3, plain) for n in (1, 2)]
    assert [b[0, "mlp", "gate"] for b in upgraded] == [3, 3]
    assert [b[0, "mlp", "up"] for b in upgraded] == [2, 3]
    with pytest.raises(ValueError, match="average_bits=1.9 is below"):
        allocate_bits(sizes, 1.9, plain)


def test_unsupported_models_are_refused_by_name():
    from peft import get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = get_peft_model(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=10)), LoraConfig())
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"):
        apply_hyclora(gpt2)
    shape = {
        "vocab_size": 10,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    plain = LlamaForCausalLM(LlamaConfig(**shape))
    with pytest.raises(ValueError, match="no LoRA layers"):
        apply_hyclora(plain)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: LoRA variant Dora.* is not supported"):
        apply_hyclora(llama({"use_dora": True}))


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({}, {"use_dora": True}, "layers.0.self_attn.q_proj: LoRA variant Dora.* is not supported"),
        ({"target_modules": ["v_proj"]}, {"target_modules": LINEARS}, "layers.0.self_attn.q_proj was replaced"),
    ],
)
def test_adapters_added_later_are_refused_as_well(first, second, message):
    """When they are active and trained: what the blocks do not compute is not left out in silence."""
    model, batch = llama(first), padded_batch()
    apply_hyclora(model, HycloraConfig(layer_type="intra_inter_full_fuse"))
    gradients(model, batch)
    model.add_adapter("later", LoraConfig(**{"target_modules": LINEARS} | second))
    model.set_adapter("later")
    with pytest.raises(ValueError, match=message):
        gradients(model, batch)
    remove_hyclora(model)
    gradients(model, batch)


def test_adapters_that_were_unloaded_are_not_applied():
    model, batch = llama(), padded_batch()
    apply_hyclora(model)
    base = model.unload().train()
    base.lm_head.weight.requires_grad_()
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj was replaced after apply_hyclora"):
        base(**batch)


@pytest.mark.parametrize("config", ["least_memory", {"q_bit": 2}, {}, HycloraConfig])
def test_settings_of_another_type_are_refused(config):
    with pytest.raises(ValueError, match=r"no HycloraConfig: give one, such as HycloraConfig.preset\("):
        apply_hyclora(llama(), config)


def test_whoever_trains_nothing_is_told_so_once(caplog):
    model, batch = llama(), padded_batch()
    apply_hyclora(model)
    model(**batch).loss.backward()
    assert "no weight of the decoder is trained" not in caplog.text
    remove_hyclora(model)
    model.requires_grad_(False)
    apply_hyclora(model)
    with torch.no_grad():
        model(**batch)
    assert "no weight of the decoder is trained" not in caplog.text
    for _ in range(2):
        model(**batch)
    assert caplog.text.count("no weight of the decoder is trained") == 1 and "is_trainable=True" in caplog.text


def test_patching_twice_or_removing_nothing_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="not patched"):
        remove_hyclora(model)
    apply_hyclora(model)
    with pytest.raises(ValueError, match="patched already"):
        apply_hyclora(model)
    remove_hyclora(model)
    apply_hyclora(model)


def test_a_refused_model_is_left_untouched():
    model = llama({"use_dora": True})
    with pytest.raises(ValueError):
        apply_hyclora(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_the_report_names_blocks_that_are_not_fused():
    """Whose savers, heads or biases the fused kernels do not take."""
    wide = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
    assert apply_hyclora(llama(**wide)).single_kernels == []
    found = apply_hyclora(llama(**wide), HycloraConfig(slot_savers={"up": "exact"})).single_kernels
    assert found == ["mlp x2"]
    biased = apply_hyclora(llama({"lora_bias": True}, **wide))
    assert biased.single_kernels == ["self_attn x2", "mlp x2"] and "kernels do not take: self_attn x2" in str(biased)
    assert apply_hyclora(llama(**wide), HycloraConfig(layer_type="intra_inter")).single_kernels == []


def test_checkpointing_is_told_once_at_the_first_step(caplog):
    model, batch = llama(), padded_batch()
    apply_hyclora(model)
    gradients(model, batch)
    assert "checkpointing" not in caplog.text
    remove_hyclora(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    apply_hyclora(model)
    for _ in range(2):
        gradients(model, batch)
    assert caplog.text.count("gradient_checkpointing=False") == 1


def test_the_report_names_what_was_patched_and_what_not():
    model = llama({"target_modules": ["q_proj", "up_proj"]})
    text = str(apply_hyclora(model, HycloraConfig(q_bit=2)))
    assert "intra_inter" in text and "patched 2 layers" in text
    assert "q_proj x2, up_proj x2" in text and "rotary_emb" in text and "lm_head: chunked cross-entropy" in text
    assert len(find_patch(model).blocks) == 2 * 5 + 3  # the last norm, the head and its linear layer
    assert torch.is_tensor(model(**padded_batch()).loss)
