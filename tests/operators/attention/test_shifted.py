"""Shifted sparse attention: against LongLoRA's way of it, and what no token may see."""

import pytest
import torch

from hyclora.operators import reference
from hyclora.operators.attention.shifted import shifted_sparse_attention
from tests.operators.attention.test_flash import heads, results

SCALING = 0.3


@pytest.mark.parametrize("n_heads, kv_heads", [(6, 2), (6, 6), (9, 3), (4, 1)])
@pytest.mark.parametrize("group", [8, 5, 2, 40])
def test_it_is_the_reference_with_grouped_queries_and_odd_groups(group, n_heads, kv_heads):
    (q, k, v), do = heads(n_heads=n_heads, kv_heads=kv_heads)
    ours = results(lambda q, k, v: shifted_sparse_attention(q, k, v, group, SCALING), q, k, v, do)
    theirs = results(lambda q, k, v: reference.shifted_sparse_attention(q, k, v, group, SCALING), q, k, v, do)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [8, 5])
def test_a_token_sees_what_is_before_it_in_its_group_alone(group):
    """By the gradient of each output: LongLoRA's roll lets the first half group see the end of the row."""
    seq_len, n_heads = 40, 4
    (q, k, v), _ = heads(batch=1, n_heads=n_heads, kv_heads=n_heads)
    o = shifted_sparse_attention(q, k, v, group, SCALING)
    for head in range(n_heads):
        first = group // 2 if head >= n_heads // 2 else group
        bounds = [0, *range(first, seq_len, group), seq_len]
        for token in range(seq_len):
            (dv,) = torch.autograd.grad(o[0, token, head].sum(), v, retain_graph=True)
            begin = max(bound for bound in bounds if bound <= token)
            assert dv[0, :, head].abs().sum(-1).nonzero().flatten().tolist() == list(range(begin, token + 1))


def test_rows_that_are_no_multiple_of_a_group_are_those_with_more_behind_them():
    (q, k, v), _ = heads()
    whole = shifted_sparse_attention(q, k, v, 8, SCALING)
    cut = shifted_sparse_attention(*(t[:, :35] for t in (q, k, v)), 8, SCALING)
    torch.testing.assert_close(cut, whole[:, :35])


def test_where_groups_begin_is_read_without_waiting_for_the_tokens_device():
    """Where the kernel for runs cannot be had, as for fp32: a meta device has nothing that could be read."""
    q, k = (torch.empty(2, 24, n, 16, device="meta") for n in (4, 2))
    assert shifted_sparse_attention(q, k, k, 8, SCALING).shape == q.shape


def test_a_single_head_has_no_halves():
    (q, k, v), _ = heads(n_heads=1, kv_heads=1)
    with pytest.raises(ValueError, match="there is one: use full attention"):
        shifted_sparse_attention(q, k, v, 8, SCALING)
