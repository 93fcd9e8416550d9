"""LoRA by hand, and the step of the plain loop: what a step of accumulated gradients is, with and without HyC-LoRA."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.state import save_calibration
from hyclora.utils.checkpointing import checkpoint_layers
from hyclora.utils.data.tokens import IGNORED, Collator
from run_alpaca import train_step

RANK, ALPHA = 4, 12
OFF = torch.amp.GradScaler("cpu", enabled=False)
EXACT = {"layer_type": "baseline", "iteration_threshold": 1}
QUANTIZED = {"q_bit": 8, "iteration_threshold": 1}


@pytest.fixture
def make(tiny_llama_folder):
    """A LoRA model, always the same one, whose B are not zero; patched if there is a setting."""

    def make(setting: dict | None = None):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        if setting is not None:
            apply_hyclora(model, HycloraConfig(**setting))
        return model.train()

    return make


class Held:
    """An optimizer that keeps gradients as they are."""

    def step(self):
        pass

    def zero_grad(self):
        pass


def rows_of(*sizes: tuple[int, int]) -> list[dict]:
    """Rows of (tokens of the prompt, tokens of the response)."""
    torch.manual_seed(2)
    rows = []
    for prompt, response in sizes:
        ids = torch.randint(2, 500, (prompt + response,)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


UNEQUAL = rows_of((5, 40), (30, 2), (3, 9), (17, 17))
COLLATE = Collator(pad_token_id=1)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trained(model).values()])


def step_gradients(model, batches, scaler=OFF, autocast=nullcontext) -> tuple[torch.Tensor, float]:
    loss, _ = train_step(model, batches, Held(), scaler, autocast)
    return gradients(model), float(loss)


def test_a_layer_is_the_frozen_one_and_the_scaled_product(make):
    layer = make().base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    a, b, weight = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    assert (a.shape, b.shape) == ((RANK, 64), (64, RANK))
    by_hand = x @ weight.T + (x @ a.T) @ b.T * ALPHA / RANK
    torch.testing.assert_close(layer(x), by_hand)


@pytest.mark.parametrize("setting", [None, QUANTIZED], ids=["stock", "hyclora"])
def test_merged_weights_give_the_same_and_come_apart_again(make, setting):
    model = make(setting)
    ids = torch.tensor([UNEQUAL[0]["input_ids"]])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before, weight = model.eval()(input_ids=ids).logits, layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * ALPHA / RANK
    torch.testing.assert_close(layer.base_layer.weight, weight + product)
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)
    if setting is not None:
        remove_hyclora(model)
        model = model.merge_and_unload()
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("setting", [None, EXACT, QUANTIZED], ids=["stock", "exact", "8 bit"])
def test_only_adapters_are_trained(make, setting):
    model = make(setting)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train_step(model, [COLLATE(UNEQUAL)], optimizer, OFF, nullcontext)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("setting", [None, EXACT], ids=["stock", "exact"])
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up_to_the_big_batch(make, setting, size):
    """Padding and unequal responses: 40, 2, 9 and 17 tokens."""
    big, loss = step_gradients(make(setting), [COLLATE(UNEQUAL)])
    parts = [COLLATE(UNEQUAL[i : i + size]) for i in range(0, len(UNEQUAL), size)]
    added, mean = step_gradients(make(setting), parts)
    torch.testing.assert_close(added, big, atol=1e-6, rtol=1e-4)
    assert mean == pytest.approx(loss, rel=1e-5)

    model = make(setting)
    for part in parts:
        (model(**part).loss / len(parts)).backward()
    off = (gradients(model) - big).norm() / big.norm()
    assert off > 0.1, "the mean of the means is another gradient"


def test_the_mean_of_means_is_right_where_responses_are_equally_long(make):
    rows = rows_of((5, 10), (9, 10))
    big, _ = step_gradients(make(), [COLLATE(rows)])
    model = make()
    for row in rows:
        (model(**COLLATE([row])).loss / 2).backward()
    torch.testing.assert_close(gradients(model), big, atol=1e-6, rtol=1e-4)


def test_compressed_micro_batches_add_up_too(make):
    """Quantization sees other ranges in other batches: as near as 8 bit is to exact."""
    exact, _ = step_gradients(make(), [COLLATE(UNEQUAL)])
    model = make(QUANTIZED)
    step_gradients(model, [COLLATE(UNEQUAL)])  # calibrates
    model.zero_grad()
    added, _ = step_gradients(model, [COLLATE([row]) for row in UNEQUAL])
    assert torch.cosine_similarity(added, exact, dim=0) > 0.999


@pytest.mark.parametrize("leave_out", [None, 2])
@pytest.mark.parametrize("setting", [None, EXACT], ids=["stock", "exact"])
def test_checkpointing_changes_no_gradient(make, setting, leave_out):
    plain, _ = step_gradients(make(), [COLLATE(UNEQUAL)])
    model = make(setting)
    checkpoint_layers(model, leave_out)
    asked = [layer.gradient_checkpointing for layer in model.base_model.model.model.layers]
    assert asked == ([True, True] if leave_out is None else [False, True])
    found, _ = step_gradients(model, [COLLATE(UNEQUAL)])
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [None, QUANTIZED], ids=["stock", "hyclora"])
def test_16_bit_computes_nearly_the_same(make, setting, dtype):
    exact, _ = step_gradients(make(), [COLLATE(UNEQUAL)])
    autocast = partial(torch.autocast, "cpu", dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=dtype == torch.float16)
    model = make(setting)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = torch.cat([p.detach().flatten() for p in trained(model).values()])
    train_step(model, [COLLATE([row]) for row in UNEQUAL], optimizer, scaler, autocast)
    moved = before - torch.cat([p.detach().flatten() for p in trained(model).values()])
    assert torch.cosine_similarity(moved, exact, dim=0) > 0.999
    assert moved.norm() == pytest.approx(exact.norm().item(), rel=0.02), "the scale is taken out again"


def test_a_step_that_overflows_changes_nothing_but_the_scale(make, tmp_path):
    """Neither weights, nor the optimizer, nor what was calibrated; the next step goes on."""
    batches, autocast = [COLLATE([row]) for row in UNEQUAL], partial(torch.autocast, "cpu", torch.float16)
    calibrated = {}
    for name, scale in (("fits", 128.0), ("overflows", 2.0**40)):
        model = make({"q_bit": 4, "iteration_threshold": 8})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = {key: p.detach().clone() for key, p in trained(model).items()}
        loss, _ = train_step(model, batches, optimizer, scaler, autocast)
        unmoved = all(torch.equal(p, before[key]) for key, p in trained(model).items())
        assert loss.isfinite() and unmoved == (name == "overflows")
        assert bool(optimizer.state) == (name == "fits") and (scaler.get_scale() < scale) == (name == "overflows")
        calibrated[name] = load_file(save_calibration(model, tmp_path / name))
    assert calibrated["fits"] and calibrated["fits"].keys() == calibrated["overflows"].keys()
    # nan is what calibration has not come to yet
    torch.testing.assert_close(calibrated["overflows"], calibrated["fits"], rtol=0, atol=0, equal_nan=True)
    for _ in range(40):
        train_step(model, batches[:1], optimizer, scaler, autocast)
        if optimizer.state:
            break
    assert all(p.isfinite().all() for p in trained(model).values()) and optimizer.state
