"""DataParallel's replicas of a patched model, which would run the weights of the first GPU, are refused."""

import copy
import sys

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.utils.args import LINEARS
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import llama, padded_batch

BASELINE = HycloraConfig(layer_type="baseline")


class Outer(nn.Module):
    """Somebody's module around the model, which may call its forward directly."""

    def __init__(self, model, direct: bool):
        super().__init__()
        self.model, self.direct = model, direct

    def forward(self, **batch):
        return self.model.forward(**batch) if self.direct else self.model(**batch)


def transformers_adapter():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama().config)
    # what model.add_adapter does; in transformers 5.24.0 that asks for a PEFT after 0.21.2, the newest that there is
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=LINEARS), model)
    return model.to(DEVICE).train()


REPLICATED = {
    "PeftModel": (llama, lambda model: model),
    "add_adapter": (transformers_adapter, lambda model: model),
    "outer": (llama, lambda model: Outer(model, direct=False)),
    "outer, direct": (llama, lambda model: Outer(model, direct=True)),
    "tuner": (llama, lambda model: model.base_model),
    "causal LM": (llama, lambda model: model.get_base_model()),
    "decoder": (llama, lambda model: model.get_base_model().model),
    "layer": (llama, lambda model: model.get_base_model().model.layers[1]),
}


def doubled(tensors, devices, detach=False) -> list:
    return [[t * 2 if t.is_floating_point() else t for t in tensors] for _ in devices]


def replicate(network, monkeypatch) -> list:
    """torch.nn.parallel.replicate on the CPU: parameters twice as large show whose are used."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", doubled)
    return module.replicate(network, [0, 1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", REPLICATED)
def test_data_parallel_is_refused_with_what_to_do(kind, training, monkeypatch):
    """Whatever of the model is replicated, in training and in evaluation; stock and removed models are."""
    make, part = REPLICATED[kind]
    model = make()
    network = part(model).train(training)
    assert len(replicate(network, monkeypatch)) == 2
    apply_hyclora(model, BASELINE)
    with pytest.raises(ValueError, match="DataParallel .* torchrun --nproc_per_node N.* CUDA_VISIBLE_DEVICES=0"):
        replicate(network, monkeypatch)
    with pytest.raises(ValueError, match="torchrun"):
        replicate(copy.deepcopy(model), monkeypatch)
    remove_hyclora(model)
    first, second = replicate(network, monkeypatch)
    if kind not in ("decoder", "layer"):
        batch = padded_batch()
        assert torch.equal(first(**batch).loss, second(**batch).loss) and first(**batch).loss != network(**batch).loss
