"""Peers that a plan is compared with: their count against a step of PEFT, by hand, and what is said of them."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hyclora.plan import plan
from hyclora.utils.args import LINEARS
from hyclora.utils.planning import Shape
from hyclora.utils.planning.fitting import LONGEST
from hyclora.utils.planning.peers import PEERS, most_tokens, peer_of
from tests.helpers.counting import Live, Uncomputed, step_of

RANK, BATCH = 4, 2
SIZES = {
    "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 256, "use_cache": False,
}  # fmt: skip


@pytest.fixture
def autocast_of_a_gpu():
    """PEFT asks for that alone, and else has inputs in fp32."""
    torch.set_autocast_enabled("cuda", True)
    with Uncomputed():
        yield
    torch.set_autocast_enabled("cuda", False)


def in_4bit(linear: nn.Linear) -> nn.Module:
    found = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16)
    found.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return found.to("cpu")


def peak(config, length: int, checkpointing: bool) -> int:
    """Bytes alive at the peak of a step of PEFT on NF4, beside what is there before it."""
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    linears = [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        model.model.set_submodule(name, in_4bit(model.model.get_submodule(name)))
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS)).train()
    step, ids = step_of(model, BATCH, length, checkpointing)
    step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Live(ids, *model.parameters(), *model.buffers(), *gradients) as live:
        step()
    return live.peak


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "kept"])
@pytest.mark.parametrize(
    "config, length, where",
    [
        (LlamaConfig(**SIZES), 256, "backward of an MLP: gate times up"),
        (LlamaConfig(**SIZES), 64, "backward of an MLP: down"),
        (LlamaConfig(**SIZES | {"num_key_value_heads": 1, "vocab_size": 8192}), 128, "loss"),
        (Qwen3Config(**SIZES), 256, "backward of an MLP: gate times up"),
    ],
    ids=["MLP", "down", "loss", "norms of heads"],
)
def test_the_peak_of_a_step_of_peft(autocast_of_a_gpu, config, length, where, checkpointing):
    need = peer_of("PEFT LoRA, checkpointing" if checkpointing else "PEFT LoRA").need(
        Shape(config, "nf4", RANK), BATCH, length, steps=False
    )
    assert need.peak == where
    assert 0.97 <= need.dyn / peak(config, length, checkpointing) <= 1.01


@pytest.mark.parametrize("kind, norms", [(LlamaConfig, 0), (Qwen3Config, 2 * 2**18 + 512 * 4 * 4)])
def test_unsloth_by_hand(kind, norms):
    """C = 256, F = 2048, heads of 128 elements, 512 tokens: 2 x 512 x 256 bytes are an x."""
    x, f, layers = 2**18, 2**21, SIZES["num_hidden_layers"]
    need = peer_of("Unsloth, offloaded checkpointing").need(Shape(kind(**SIZES), "nf4", RANK), BATCH, 256)
    scales, adapters = 512 * 4 * (2 + 2), 2 * RANK * 3 * (256 + 2048)
    kept = 9 * x + 2 * f + scales + norms
    assert need.moments["backward of an MLP: activation"] == kept + 3 * x + 4 * f + adapters
    assert need.moments["backward of an MLP: gate, up"] == kept + 4 * x + 2 * f + adapters + 2 * 256 * 2048
    assert need.moments["loss"] == 5 * x + 512 * 4 * 256 + 4 * x
    assert need.static["staging buffers"] == 2 * x
    assert need.host == need.on_host == layers * x + 200 * 2**18


@pytest.mark.parametrize(
    "shape, tokens, rows, columns", [("llama-2-7b", 1024, 1024, 32000), ("llama-3-8b", 2048, 512, 128256),
    ("llama-3-8b", 8192, 4096, 16384)],
)  # fmt: skip
def test_logits_of_unsloth_are_a_chunk(shape, tokens, rows, columns):
    shape = Shape(shape)
    x = 2 * shape.hidden
    loss = peer_of("Unsloth, offloaded checkpointing").need(shape, 1, tokens).moments["loss"]
    assert loss == 5 * tokens * x + rows * (4 * columns + 4 * x)


def test_they_are_counted_for_what_was_read_alone():
    assert most_tokens(Shape("llama-2-7b")) == LONGEST and most_tokens(Shape("mistral-7b")) == 4096
    assert most_tokens(Shape("llama-3.2-1b", "bf16")) == most_tokens(Shape("llama-3.2-1b", dropout=True)) == 0
    assert most_tokens(Shape("llama-3.2-1b", targets=["q_proj"])) == 0
    assert plan("llama-3.2-1b", "24GiB", "64GiB", documents=8).peers == []
    assert "for comparison" not in str(plan("llama-3.2-1b", "24GiB", "64GiB", base="bf16"))


def test_a_plan_tells_them_apart_and_chooses_none():
    found = plan("llama-2-7b", "7GiB", "64GiB", (4, 512))
    modes, peers = found.details().split("for comparison, counted, and never chosen:\n")
    assert [row.mode for row in found.peers] == PEERS and [row.fits for row in found.peers] == [False, True, True]
    assert not any(peer.name in modes for peer in PEERS) and all(peer.name in peers for peer in PEERS)
    assert found.chosen in found.rows and "within 0.2 % of 3 measured lines" in peers
    assert str(found.peers[2].time).endswith("ms (H100)")


def test_other_shapes_and_longer_rows_are_marked():
    found = plan("mistral-7b", "20GiB", "64GiB", (1, 2048))
    assert found.peers[2].near == "no line of this shape here; of others within 0.2 % of 3 measured lines"
    assert found.peers[1].near == "within 0.0 % of 1 measured line" and str(found.peers[1].time) == "unknown"
    assert [row.or_more for row in found.peers] == [False, True, True]
    assert "4096 tokens or more" in found.details() and " 4096+" in str(found)
