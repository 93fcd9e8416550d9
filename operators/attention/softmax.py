"""Softmax backward from a kept probability map."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import device_guard, use_triton


@triton.jit(do_not_specialize=["seq_len"])
def _softmax_bwd_kernel(dprob_ptr, prob_ptr, dscore_ptr, seq_len, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * seq_len
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, seq_len, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < seq_len
        dprob = tl.load(dprob_ptr + row + col, mask=mask, other=0.0).to(tl.float32)
        total += dprob * tl.load(prob_ptr + row + col, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total)
    for start in range(0, seq_len, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < seq_len
        dprob = tl.load(dprob_ptr + row + col, mask=mask, other=0.0).to(tl.float32)
        prob = tl.load(prob_ptr + row + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dscore_ptr + row + col, (prob * (dprob - mean)).to(dscore_ptr.dtype.element_ty), mask=mask)


def softmax_bwd(dprob: Tensor, prob: Tensor) -> Tensor:
    """reference.softmax_bwd on any device, over the last dim of [..., S]; allocates its result alone on a GPU."""
    if not use_triton(prob):
        return reference.softmax_bwd(dprob, prob)
    dprob, prob = dprob.contiguous(), prob.contiguous()
    dscore = torch.empty_like(prob)
    seq_len = prob.shape[-1]
    with device_guard(prob):
        _softmax_bwd_kernel[(prob.numel() // seq_len,)](dprob, prob, dscore, seq_len, BLOCK=1024)
    return dscore
