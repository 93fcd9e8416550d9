"""The counted peak against that of a step of a patched model, on the way that a GPU goes: no kernel is launched.

The MLP is wide, so that the peak is there: attention on a CPU has other memory than flash's kernels.
"""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime.jit import KernelInterface

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.calibration import BUCKETS, Calibration
from hyclora.models.patch import find_patch
from hyclora.operators import dispatch
from hyclora.operators.linear import lora
from hyclora.utils.args import LINEARS
from hyclora.utils.planning import Savers, Shape, count, live
from tests.helpers.counting import Live, Uncomputed, step_of
from tests.helpers.offloading import offloaded
from tests.helpers.replaying import Recorder

RANK, BATCH, LENGTH = 4, 2, 128
SIZES = LlamaConfig(
    hidden_size=256, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=2, vocab_size=256, use_cache=False
)
LAYER_IN = {"slot_savers": {"layer_in": "quant8"}}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """A GEMM gives fp32 without copies of its factors, and what kernels would write is left as it is.

    So are statistics, which may say that they are of no token. And a CPU has no GEMM workspaces.
    """
    monkeypatch.setattr(Calibration, "_is_of_nothing", lambda calibration: False)
    monkeypatch.setattr(live, "WORKSPACE", 0)
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    monkeypatch.setattr(lora, "_mm32", lambda a, b: a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32))
    with Uncomputed():
        yield


class Once(Recorder):
    """Records by running, of which a peak is taken, and replays nothing."""

    def record(self, run):
        return run(), lambda: None


def peak(
    config: HycloraConfig, checkpointing: bool = False, targets=LINEARS, dropout: float = 0.0, sizes=SIZES,
    rows: tuple[int, int] = (BATCH, LENGTH),
) -> int:  # fmt: skip
    """Bytes alive at the peak of a step after calibration, beside what is there before it, on the host and else.

    With CUDA graphs the step is that which records them, the second after calibration.
    """
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=dropout)
    model = get_peft_model(LlamaForCausalLM(sizes).to(torch.bfloat16), lora)
    without = replace(config, offload=False, cuda_graphs=False)
    slabs = []
    if config.offload:
        slabs = offloaded(model, without).arena.slabs
    else:
        apply_hyclora(model, without)
    model.train()
    patch = find_patch(model)
    if config.cuda_graphs:
        patch.add_graphs(Once())
    step, ids = step_of(model, *rows, checkpointing)
    for _ in range(config.iteration_threshold + 1 if config.cuda_graphs else 3):
        step()
    savers = [saver for block in [*patch.blocks, *patch.checkpoints] for saver in block.savers.values()]
    owned = [value for saver in savers for value in vars(saver).values()]
    owned += [value for pair in owned if isinstance(pair, tuple) for value in pair]
    tensors = [t for t in owned if isinstance(t, torch.Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Live(ids, *model.parameters(), *model.buffers(), *tensors, *gradients, *slabs) as alive:
        step()
    assert not config.cuda_graphs or patch.graphs.recordings
    return alive.peak


@pytest.mark.parametrize(
    "settings, checkpointing",
    [
        ({"q_bit": 8}, False),
        (LAYER_IN, True),
        ({"layers": "input8"}, False),
        ({"layers": "1*slots,input"}, False),
        ({"layers": "1*slots,input8", "offload": True}, False),
        ({"layer_type": "baseline"}, False),
        ({"slot_savers": {"q": "exact"}}, False),
        ({"slot_savers": {"gate": "exact", "up": "exact"}}, False),
    ],
    ids=[
        "8 bit",
        "checkpointing, 8 bit",
        "inputs, 8 bit",
        "slots, exact input",
        "slots, input, offloaded",
        "exact",
        "exact q",
        "exact gate, up",
    ],
)
def test_the_peak_of_a_step(settings, checkpointing):
    config = HycloraConfig(cuda_graphs=False, iteration_threshold=1, **settings)
    counted = count(Savers(Shape(SIZES, "bf16", RANK), config), BATCH, LENGTH, checkpointing)
    measured = peak(config, checkpointing)
    # at so few tokens what has no term of its own weighs: ids, positions, sums of a token
    assert 0.99 <= counted.dyn / measured <= 1.1


@pytest.mark.parametrize("settings", [{}, {"q_bit": 8}, {"layers": "input8"}, {"scale_rule": "paper"}], ids=str)
@pytest.mark.parametrize("heads", [2, 8])
def test_the_peak_with_a_map_of_attention(settings, heads):
    """Of few heads the MLP's backward or attention's, of many the softmax."""
    sizes = LlamaConfig(**{**SIZES.to_dict(), "num_attention_heads": heads, "intermediate_size": 512, "head_dim": None})
    config = HycloraConfig(cuda_graphs=False, iteration_threshold=1, attention="eager", **settings)
    counted = count(Savers(Shape(sizes, "bf16", RANK), config), BATCH, LENGTH)
    assert 0.99 <= counted.dyn / peak(config, sizes=sizes) <= 1.1
    assert heads == 2 or counted.peak == "forward of attention: softmax"


def test_calibration_adds_its_statistics_alone():
    """And one table of which contexts were seen (models/calibration.py)."""
    savers = Savers(Shape(SIZES, "bf16", RANK), HycloraConfig(cuda_graphs=False))
    counted = count(savers, BATCH, LENGTH).dyn + savers.statistics + BUCKETS
    assert 0.99 <= counted / peak(HycloraConfig(cuda_graphs=False, iteration_threshold=100)) <= 1.1


@pytest.mark.parametrize("targets, dropout", [(["q_proj", "v_proj"], 0.0), (LINEARS, 0.1)], ids=["two", "dropout"])
def test_the_peak_with_other_adapters(targets, dropout):
    config = HycloraConfig(cuda_graphs=False, iteration_threshold=1)
    shape = Shape(SIZES, "bf16", RANK, targets, dropout > 0)
    measured = peak(config, targets=targets, dropout=dropout)
    assert 0.99 <= count(Savers(shape, config), BATCH, LENGTH).dyn / measured <= 1.1


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize(
    "layers, checkpointing",
    [
        ("slots", False),
        ("input", False),
        ("input8", False),
        ("2*slots,input8", False),
        ("1*slots,input", False),
        ("slots", True),
    ],
)
def test_the_peak_of_a_recording(layers, checkpointing, offload):
    """Exact inputs keep the place of the graph's; below those of a store slots may be asked for."""
    sizes = LlamaConfig(**SIZES.to_dict() | {"num_hidden_layers": 4})
    config = HycloraConfig(cuda_graphs=True, iteration_threshold=1, layers=layers, offload=offload)
    counted = count(Savers(Shape(sizes, "bf16", RANK), config), BATCH, LENGTH, checkpointing)
    measured = peak(config, checkpointing, sizes=sizes)
    assert 0.99 <= counted.dyn / measured <= 1.1
