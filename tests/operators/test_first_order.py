"""Gradients that are not dense in memory: of a sum, of rows that were turned, of a part of wider rows."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.patch import find_patch
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import llama, qwen3

SHAPE = 3, 7, 96
FORMS = {
    "of a sum": lambda: torch.ones(1, device=DEVICE).expand(SHAPE),
    "a row for all": lambda: torch.randn(1, 1, SHAPE[2], device=DEVICE).expand(SHAPE),
    "turned": lambda: torch.randn(SHAPE[1], SHAPE[0], SHAPE[2], device=DEVICE).transpose(0, 1),
    "part of wider rows": lambda: torch.randn(*SHAPE[:2], 2 * SHAPE[2], device=DEVICE)[..., : SHAPE[2]],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("family", [llama, qwen3], ids=lambda f: f.__name__)
def test_every_block_reads_them_as_dense_ones(kernels, family, form):
    """Each block of a layer and each norm, whose kernels go through rows."""
    model, met = family().train(), {}
    apply_hyclora(model, HycloraConfig(layer_type="baseline", cuda_graphs=False, stream=False))
    for block in find_patch(model).blocks:
        kind = type(block)
        block.module.register_forward_hook(lambda module, args, y, kind=kind: met.setdefault(kind, y))
    embeds = torch.randn(SHAPE, device=DEVICE).requires_grad_()
    model.get_decoder()(inputs_embeds=embeds)
    wanted = [embeds, *(p for p in model.parameters() if p.requires_grad)]
    assert len(met) >= 2
    for kind, y in met.items():
        y, dy = y[0] if isinstance(y, tuple) else y, form()
        given = dy.contiguous(), dy
        found = [torch.autograd.grad(y, wanted, d, retain_graph=True, allow_unused=True) for d in given]
        assert not dy.is_contiguous() and found[0][0] is not None, kind
        assert all(a is b is None or torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True)), kind
