"""Where layers are replayed, as apply_hyclora tells it: on one GPU, all of them patched."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models import patch as patch_module
from hyclora.models.patch import find_patch
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import SameMemory
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch
from tests.models.test_trust import layers_of


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU it is supported")
def test_needs_a_gpu():
    with pytest.raises(ValueError, match="cuda_graphs=True needs all layers on one GPU; the layers are on cpu"):
        apply_hyclora(llama(), HycloraConfig(cuda_graphs=True))
    model = llama()
    report = apply_hyclora(model)
    assert find_patch(model).graphs is None and report.no_graphs == "the layers are on cpu"
    assert "\n  cuda_graphs: off, the layers are on cpu\n" in str(report) and "are replayed" not in str(report)
    said = str(apply_hyclora(llama(), HycloraConfig(cuda_graphs=False)))
    assert "cuda_graphs" not in said and "are replayed" not in said


@pytest.fixture
def on_one_gpu(monkeypatch):
    """As far as apply_hyclora looks."""
    monkeypatch.setattr(patch_module, "_elsewhere", lambda layers: None)
    monkeypatch.setattr(patch_module, "CudaRecorder", lambda device: SameMemory())


def test_auto_is_on_where_it_can_be(on_one_gpu):
    model = llama()
    report = apply_hyclora(model)
    assert find_patch(model).graphs is not None and report.no_graphs is None and "are replayed" in str(report)
    assert "eager" in apply_hyclora(llama(), HycloraConfig(attention="eager")).no_graphs


def test_auto_is_off_where_layers_are_not_patched_whole(on_one_gpu):
    model = llama()
    layers_of(model)[1].mlp.act_fn = torch.nn.GELU()
    report = apply_hyclora(model)
    assert find_patch(model).graphs is None and report.no_graphs == "parts of layers run stock code"


@pytest.mark.parametrize("cuda_graphs", ["auto", True])
@pytest.mark.parametrize("half", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_half_that_is_stock_in_all_layers(on_one_gpu, half, cuda_graphs):
    """Nothing is left of it to ask, how much it drops, say; the other half is ours."""
    model, batch = llama(), padded_batch()
    _, exact = gradients(model, batch)
    for layer in layers_of(model):
        layer.get_submodule(half).base_layer.register_forward_hook(lambda *_: None)
    report = apply_hyclora(model, HycloraConfig(layer_type="baseline", cuda_graphs=cuda_graphs))
    assert report.drops == 0 and sum("it has hooks" in line for line in report.not_patched) == 2
    for _ in range(3):
        assert largest_error(gradients(model, batch)[1], exact) < 1e-5
