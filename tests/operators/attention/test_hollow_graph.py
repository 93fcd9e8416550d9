"""Attention's own graph without q, k, v and o: what it holds, and its gradients from restored tensors."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.operators.attention import flash
from hyclora.operators.attention.hollow_graph import record
from tests.helpers.kernel_checks import DEVICE, rand
from tests.helpers.small_models import gradients, largest_error, llama, mean_cosine, mistral, padded_batch, qwen3

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # what flash takes


def attend(q, k, v):
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def heads_in(y, batch=2, n_heads=4, head_dim=64):
    """q, k, v side by side, as after their projections."""
    return [t.view(batch, -1, n_heads, head_dim) for t in y.split(n_heads * head_dim, dim=1)]


def test_gradients_from_tensors_of_other_strides():
    """Restored q, k, v, o lie in other memory, with other strides, and are used as those of the forward were."""
    wide, narrow = rand(2 * 65, 3 * 256 + 16, dtype=HALF)[:, : 3 * 256], rand(2 * 65, 3 * 256, dtype=HALF, seed=1)
    do = rand(2, 65, 4, 64, dtype=HALF, seed=2)
    _, graph, rest = record(attend, *heads_in(wide))
    q, k, v = (t.detach().requires_grad_() for t in heads_in(wide))
    expected = torch.autograd.grad(attend(q, k, v), (q, k, v), do)
    exact = [t.contiguous() for t in (q, k, v, attend(q, k, v))]
    for ours, theirs in zip(graph.backward(exact, rest, do), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    others = [*heads_in(narrow), exact[-1]]
    assert not torch.allclose(graph.backward(others, rest, do)[2], expected[2], atol=1e-2)


def test_nothing_large_is_held():
    """Neither by the graph, before and after a backward, nor by what is left for the caller."""
    owners = [np.random.default_rng(0).standard_normal((2 * 65, 3 * 256), dtype=np.float32) for _ in range(2)]
    y, others = (torch.from_numpy(owner) for owner in owners)  # a tensor's memory lives as long as its owner
    o, graph, rest = record(attend, *heads_in(y))
    assert sum(t.numel() for t in rest) < o.numel() / 16
    alive = [weakref.ref(owner) for owner in owners]
    owners.clear()
    del y
    assert alive[0]() is None
    graph.backward([*heads_in(others), o], rest, torch.ones_like(o))
    del others
    assert alive[1]() is None


@pytest.mark.parametrize("groups", [1, 3])
def test_other_kernels_of_torch(groups):
    """Whatever it chooses: gradients are those of stock, from a kept lse or from another forward."""
    shape = {"num_attention_heads": 6, "num_key_value_heads": 6 // groups, "hidden_size": 96}
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for dtype in (torch.float32, torch.bfloat16):
            model, batch = llama(**shape), padded_batch()
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32), sdpa_kernel([backend, SDPBackend.MATH]):
                _, exact = gradients(model, batch)
                apply_hyclora(model, HycloraConfig(layer_type="baseline"))
                _, ours = gradients(model, batch)
            assert largest_error(ours, exact) < (1e-4 if dtype == torch.float32 else 0.1)


def test_parts_and_maps_are_not_kept():
    """Chunks of a window share memory with q, k, v; a map is larger than they are; lse is one tensor, not several."""
    q, k, v = heads_in(rand(2 * 130, 3 * 256))

    def by_halves(q, k, v):
        return torch.cat([attend(*(t[:, part] for t in (q, k, v))) for part in (slice(65), slice(65, 130))], dim=1)

    def by_hand(q, k, v):
        return torch.einsum("bhst,bthd->bshd", torch.einsum("bshd,bthd->bhst", q, k).softmax(-1), v)

    def with_gates(q, k, v):
        return attend(q, k, v) + q[..., :1].exp() + k[..., :1].exp()

    for run in (by_halves, by_hand, with_gates):
        o, graph, rest = record(run, q, k, v)
        assert graph is None and rest == []
        torch.testing.assert_close(o, run(q, k, v))


FAMILIES = {"llama": llama, "mistral": mistral, "qwen3": qwen3}
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "down_proj"]}], ids=["all", "without o_proj"])
@pytest.mark.parametrize("layer_type", ["intra", "intra_inter", "intra_inter_full_fuse"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_kept_lse_is_as_good_as_another_forward(family, layer_type, lora):
    """Windows and all: gradients with lse kept are nearer to the exact ones than with q, k, v at 4 bit."""
    model, batch = family(lora, **SHAPE), padded_batch()
    _, exact = gradients(model, batch)
    found = {}
    for saver in ("recompute", "exact"):
        apply_hyclora(model, HycloraConfig(layer_type=layer_type, q_bit=4, slot_savers={"lse": saver}))
        found[saver] = mean_cosine(gradients(model, batch)[1], exact)
        remove_hyclora(model)
    assert found["exact"] > found["recompute"] > 0.9


def test_attention_runs_once(monkeypatch):
    """A kept lse is what spares the second forward."""
    calls = []
    sdpa = flash._sdpa
    monkeypatch.setattr(flash, "_sdpa", lambda *args: calls.append(1) or sdpa(*args))
    model, batch = llama(**SHAPE), padded_batch()
    for saver, times in (("recompute", 2), ("exact", 1)):
        apply_hyclora(model, HycloraConfig(slot_savers={"lse": saver}, stream=False))
        calls.clear()
        gradients(model, batch)
        assert len(calls) == 2 * times
        remove_hyclora(model)


def test_attention_dropout_is_replayed():
    """The graph keeps what its kernel dropped; twice the same seed is twice the same gradient."""
    model, batch = llama(attention_dropout=0.2, **SHAPE), padded_batch()
    apply_hyclora(model, HycloraConfig(layer_type="baseline"))
    assert largest_error(gradients(model, batch)[1], gradients(model, batch)[1]) < 1e-5
    loss = gradients(model, batch)[0]
    name, p = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    ours = gradients(model, batch)[1][name].flatten()[0].item()
    shifted = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            p.view(-1)[0] += step
        shifted.append(gradients(model, batch)[0])
        with torch.no_grad():
            p.view(-1)[0] -= step
    assert abs((shifted[0] - shifted[1]) / 2e-2 - ours) < 2e-2 * max(abs(ours), 1e-2), loss
