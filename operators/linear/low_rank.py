"""The adapters of several projections with one input as a single adapter.

Stacked A [R, in] and block-diagonal B [N, R], R the sum of ranks and N the sum of widths, turn the low-rank products of
a group into one GEMM each. The stack is made anew for every use, in the compute dtype: kept for all layers it would
cost as much memory as the activations that this project saves.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import cdiv, device_guard, use_triton

BLOCK = 1024
SLOTS = 3


@dataclass
class LowRank:
    """y += (x A^T) B^T: A [R, in] with the scalings folded in, B [N, R] block-diagonal, both in the compute dtype.

    R is the sum of ranks, padded with zeros to a multiple of 16: rows of 16 bytes are what GEMMs need to be fast, and
    strides of 16 elements what Triton needs to load several at once.
    """

    A: Tensor
    B: Tensor


@triton.jit
def _stack_kernel(
    a0_ptr, a1_ptr, a2_ptr, b0_ptr, b1_ptr, b2_ptr, a_ptr, b_ptr, scaling0, scaling1, scaling2,
    rank0, rank1, rank2, width0, width1, n_cols, a_blocks, rank, n_out, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rank01, width01 = rank0 + rank1, width0 + width1
    if program < a_blocks:
        index = program * BLOCK + tl.arange(0, BLOCK)
        row = index // n_cols
        first, second = row < rank0, (row >= rank0) & (row < rank01)
        third = (row >= rank01) & (row < rank01 + rank2)
        a = tl.load(a0_ptr + index, mask=first, other=0.0).to(tl.float32) * scaling0
        a += tl.load(a1_ptr + index - rank0 * n_cols, mask=second, other=0.0).to(tl.float32) * scaling1
        a += tl.load(a2_ptr + index - rank01 * n_cols, mask=third, other=0.0).to(tl.float32) * scaling2
        tl.store(a_ptr + index, a.to(a_ptr.dtype.element_ty), mask=row < rank)
    else:
        index = (program - a_blocks) * BLOCK + tl.arange(0, BLOCK)
        row, col = index // rank, index % rank
        first = (row < width0) & (col < rank0)
        second = (row >= width0) & (row < width01) & (col >= rank0) & (col < rank01)
        third = (row >= width01) & (row < n_out) & (col >= rank01) & (col < rank01 + rank2)
        b = tl.load(b0_ptr + row * rank0 + col, mask=first, other=0.0).to(tl.float32)
        b += tl.load(b1_ptr + (row - width0) * rank1 + col - rank0, mask=second, other=0.0).to(tl.float32)
        b += tl.load(b2_ptr + (row - width01) * rank2 + col - rank01, mask=third, other=0.0).to(tl.float32)
        tl.store(b_ptr + index, b.to(b_ptr.dtype.element_ty), mask=row < n_out)


def stack_adapters(
    adapters: list[tuple[Tensor, Tensor] | None], scalings: list[float], widths: list[int], dtype: torch.dtype
) -> LowRank:
    """reference.stack_adapters on any device: (lora_A, lora_B) or None a projection to one LowRank in dtype.

    Allocates its R (in + N) elements alone on a GPU, whatever the number of tokens.
    """
    lora_A = next(a for a in adapters if a is not None)[0]
    if not use_triton(lora_A) or len(adapters) > SLOTS:
        return LowRank(*reference.stack_adapters(adapters, scalings, widths, dtype))
    n_cols, missing = lora_A.shape[1], SLOTS - len(adapters)
    ranks = [0 if a is None else a[0].shape[0] for a in adapters] + [0] * missing
    pairs = [(lora_A, lora_A) if a is None else a for a in adapters]
    pairs += [(lora_A, lora_A)] * missing
    rank, n_out = reference.padded_rank(sum(ranks)), sum(widths)
    A = torch.empty(rank, n_cols, dtype=dtype, device=lora_A.device)
    B = torch.empty(n_out, rank, dtype=dtype, device=lora_A.device)
    a_blocks = cdiv(rank * n_cols, BLOCK)
    with device_guard(A):
        _stack_kernel[(a_blocks + cdiv(n_out * rank, BLOCK),)](
            *(a for a, _ in pairs), *(b for _, b in pairs), A, B, *(float(s) for s in [*scalings, *[0.0] * missing]),
            *ranks, *[*widths, 0, 0][:2], n_cols, a_blocks, rank, n_out, BLOCK=BLOCK,
        )  # fmt: skip
    return LowRank(A, B)
