"""NF4 weights of bitsandbytes back to floating point, nested absmax included, at the rate of a copy.

w = code[nibble] * absmax, absmax = code2[absmax_u8] * absmax2 + offset. A byte holds two weights, the high nibble
first; a block of weights (64) shares an absmax, a block of absmax (256) an absmax2. FP4 differs in the code alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from operators.dispatch import cdiv, device_guard, use_triton

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

BLOCK = 256


@triton.jit(do_not_specialize=["first", "stride", "n_words", "n_blocks"])
def _nf4_kernel(
    words_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, w_ptr, first, stride, n_words, n_blocks,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    words_ptr = words_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    row, start = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks * BLOCK
    index = tl.arange(0, BLOCK)
    lane = tl.arange(0, 8)
    mask = start + index < n_words
    word = (first + row.to(tl.int64) * stride + start) + index
    w_ptr += (row.to(tl.int64) * n_words + start) * 8
    words = tl.load(words_ptr + word, mask=mask, other=0)
    block = word // (BLOCKSIZE // 8)
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        absmax2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        absmax = tl.load(code2_ptr + absmax.to(tl.int32)) * absmax2 + tl.load(offset_ptr)
    nibble = (words[:, None] >> (lane // 2 * 8 + (1 - lane % 2) * 4)[None, :]) & 15
    w = tl.load(code_ptr + nibble) * absmax[:, None]
    tl.store(w_ptr + index[:, None] * 8 + lane[None, :], w.to(w_ptr.dtype.element_ty), mask=mask[:, None])


def is_4bit(weight: Tensor) -> bool:
    """Whether a weight is one of bitsandbytes' 4-bit parameters."""
    return bnb is not None and isinstance(weight, bnb.nn.Params4bit)


def dequantize_4bit(weight: Tensor, out: Tensor, row: int = 0, column: int = 0) -> Tensor:
    """W [N, K] of a Params4bit into out (contiguous), bit for bit what bitsandbytes makes of it.

    A smaller out [n, k] gets W[row : row + n, column : column + k]. Raises RuntimeError for a weight that bitsandbytes
    has repacked for CPU inference.
    """
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise RuntimeError(
            "bitsandbytes has repacked a weight for CPU inference; set support_avx512bf16_for_cpu = False on the "
            "Linear4bit modules before the first evaluation"
        )
    (n_rows, width), stride = out.shape, state.shape[1]
    if width == stride:  # whole rows are a single one
        n_rows, width = 1, out.numel()
    first = row * stride + column
    aligned = width % 8 == first % 8 == 0 and (n_rows == 1 or stride % 8 == 0)
    if not (use_triton(out) and state.dtype == out.dtype and aligned):
        # [N K / 2, 1] is the layout for which all bitsandbytes versions return [N, K] untransposed
        whole = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), state)
        return out.copy_(whole[row : row + out.shape[0], column : column + out.shape[1]])
    outer, n_words = state.state2 if state.nested else state, width // 8
    n_blocks = cdiv(n_words, BLOCK)
    # without fused multiply-add, absmax is rounded twice, as bitsandbytes rounds it
    with device_guard(out):
        _nf4_kernel[(n_rows * n_blocks,)](
            weight, state.code, state.absmax, outer.code, outer.absmax, state.offset if state.nested else outer.absmax,
            out, first // 8, stride // 8, n_words, n_blocks, NESTED=state.nested, BLOCKSIZE=state.blocksize,
            BLOCKSIZE2=outer.blocksize, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out
