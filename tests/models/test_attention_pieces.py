"""Attention whose backward goes in pieces of heads, as it does in long rows."""

import pytest
import torch

from hyclora import HycloraConfig, apply_hyclora
from hyclora.models.config import POLICIES
from hyclora.operators.attention import attention as attention_module
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch


@pytest.mark.parametrize(
    "settings",
    [*({"layer_type": name} for name in POLICIES), {"slot_savers": {"v": "exact"}}, {"layers": "input"}],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_attention_goes_back_in_pieces_of_heads(kv_heads, settings, monkeypatch):
    """To the same gradients: heads know nothing of each other."""
    expected, found = [], []
    for pieces, steps in ((1, expected), (2, found)):
        model, batch = llama(num_key_value_heads=kv_heads), padded_batch()
        apply_hyclora(model, HycloraConfig(**settings, stream=False, iteration_threshold=1))
        monkeypatch.setattr(attention_module, "backward_pieces", lambda *_, n=pieces: n)
        steps += [gradients(model, batch)[1] for _ in range(2)]
    assert all(largest_error(ours, theirs) < 1e-5 for ours, theirs in zip(found, expected, strict=True))


def test_gradients_of_pieces_are_where_q_k_and_v_were(kernels, monkeypatch):
    """Of the fused kernels, which leave room for them."""
    sizes = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    found, turned, rope_bwd = [], [], attention_module.rope_bwd

    def turn(dq, dk, dv, cos, sin, dy, norms):
        turned.append([t.data_ptr() - dy.data_ptr() for t in (dq, dk, dv)])
        return rope_bwd(dq, dk, dv, cos, sin, dy, norms)

    monkeypatch.setattr(attention_module, "rope_bwd", turn)
    for pieces in (1, 2):
        model, batch = llama(**sizes), padded_batch(rows=2, width=9)
        apply_hyclora(model, HycloraConfig(stream=False, iteration_threshold=1))
        monkeypatch.setattr(attention_module, "backward_pieces", lambda *_, n=pieces: n)
        found.append([gradients(model, batch)[1] for _ in range(2)])
    assert turned[-1] == [0, 4 * 256, 4 * 512] and 0 not in turned[0]
    assert all(largest_error(ours, theirs) < 1e-5 for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"layer_type": "baseline"}, {"slot_savers": {"v": "exact"}}, {"layers": "input"}, {"layers": "input4"}],
    ids=str,
)
def test_pieces_of_heads_leave_kept_slots_alone(settings, monkeypatch):
    """A graph that is kept gives the same gradients once more."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, HycloraConfig(**settings, stream=False, iteration_threshold=1))
    gradients(model, batch)
    monkeypatch.setattr(attention_module, "backward_pieces", lambda *_: 2)
    loss, parameters = model(**batch).loss, [p for p in model.parameters() if p.requires_grad]
    once, again = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@pytest.mark.parametrize("settings", [{}, {"slot_savers": {"attn_out": "quant8"}}], ids=str)
def test_what_a_graph_of_a_piece_keeps_changes_no_bit(settings, monkeypatch):
    """o is read as a part of all heads' or, where a graph cannot do without its own, from there."""
    found, record = [], attention_module.record
    for recorded in (record, lambda *args: (record(*args)[0], None, [])):
        model, batch = llama(num_key_value_heads=6), padded_batch()
        apply_hyclora(model, HycloraConfig(**settings, stream=False, iteration_threshold=1))
        monkeypatch.setattr(attention_module, "backward_pieces", lambda *_: 3)
        monkeypatch.setattr(attention_module, "record", recorded)
        found.append([gradients(model, batch)[1] for _ in range(2)])
    assert all(torch.equal(ours[n], theirs[n]) for ours, theirs in zip(*found, strict=True) for n in ours)


@pytest.mark.parametrize("settings, runs", [({"layer_type": "baseline"}, 1), ({"layers": "input"}, 2)], ids=str)
def test_backward_records_no_piece_that_forward_could_not(settings, runs, monkeypatch):
    """Forward has seen that its pieces have no such graph: to record one of them again would be in vain."""
    tried, record = [], attention_module.record

    def in_vain(*args):
        tried.append(1)
        return record(*args)[0], None, []

    model, batch = llama(num_key_value_heads=6), padded_batch()
    apply_hyclora(model, HycloraConfig(**settings, stream=False, iteration_threshold=1))
    monkeypatch.setattr(attention_module, "backward_pieces", lambda *_: 3)
    monkeypatch.setattr(attention_module, "record", in_vain)
    gradients(model, batch)
    assert len(tried) == 3 * runs * model.config.num_hidden_layers
