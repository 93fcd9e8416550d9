"""NF4 weights of bitsandbytes back to floating point, nested absmax included, at the rate of a copy.

w = code[nibble] * absmax, absmax = code2[absmax_u8] * absmax2 + offset. A byte holds two weights, the high nibble
first; a block of weights (64) shares an absmax, a block of absmax (256) an absmax2. FP4 differs in the code alone.
The bytes may have another dtype (bnb_4bit_quant_storage), by which fully_shard splits and gathers them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from hyclora.operators.dispatch import cdiv, device_guard, use_triton

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

BLOCK = 256


@triton.jit(do_not_specialize=["first", "stride", "n_words", "n_blocks", "n_programs"])
def _nf4_kernel(
    words_ptr, code_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, w_ptr, below_ptr, first, stride, n_words,
    n_blocks, n_programs, n_below, width, stride_below,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    words_ptr = words_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    if program < n_programs:
        row, start = program // n_blocks, program % n_blocks * BLOCK
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
    else:
        place = (program - n_programs) * (BLOCK * 8) + tl.arange(0, BLOCK * 8)
        below = tl.load(below_ptr + place // width * stride_below + place % width, mask=place < n_below, other=0.0)
        tl.store(w_ptr + n_programs // n_blocks * n_words.to(tl.int64) * 8 + place, below, mask=place < n_below)


def state_of(linear: nn.Module):
    """How bitsandbytes has packed a layer's weight; None if it has not.

    A weight that was pickled is a plain one with its state, one that fully_shard has gathered has none: its layer does.
    """
    state = getattr(linear.weight, "quant_state", None)
    return linear.__dict__.get("quant_state") if state is None else state


def is_4bit(linear: nn.Module) -> bool:
    """Whether a layer's weight is in 4 bit, or will be when it comes to its device."""
    return bnb is not None and (isinstance(linear.weight, bnb.nn.Params4bit) or state_of(linear) is not None)


def dequantize_4bit(
    weight: Tensor, out: Tensor, row: int = 0, column: int = 0, below: Tensor | None = None, state=None
) -> Tensor:  # fmt: skip
    """W [N, K] of a Params4bit into out (contiguous), bit for bit what bitsandbytes makes of it.

    state: of a weight that may not have it itself, as of state_of. A smaller out [n, k] gets
    W[row : row + n, column : column + k]. With below [R, K], in out's dtype, out has R rows more, which get
    below[:, column : column + k]. Allocates nothing; on a CPU, for another dtype than the weight's and
    for columns that are no whole words of 8, all of W. Raises RuntimeError for a weight that bitsandbytes has repacked
    for CPU inference, ValueError for one whose bytes were cast as if they were numbers.
    """
    state = weight.quant_state if state is None else state
    gathered = not isinstance(weight, bnb.nn.Params4bit)
    if gathered and weight.nbytes != cdiv(state.shape.numel(), 2):
        raise ValueError(
            f"the bytes of a 4-bit weight {list(state.shape)} were cast to {weight.dtype}: load the model with "
            "bnb_4bit_quant_storage of the dtype that the mixed precision of fully_shard (param_dtype) has"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise RuntimeError(
            "bitsandbytes has repacked a weight for CPU inference; set support_avx512bf16_for_cpu = False on the "
            "Linear4bit modules before the first evaluation"
        )
    n_rows, width, stride = len(out) - (0 if below is None else len(below)), out.shape[1], state.shape[1]
    below = out[n_rows:] if below is None else below[:, column : column + width]
    n_cols = width
    if width == stride:  # whole rows are a single one
        n_rows, n_cols = 1, n_rows * width
    first = row * stride + column
    aligned = n_cols % 8 == first % 8 == 0 and (n_rows == 1 or stride % 8 == 0)
    if not (use_triton(out) and state.dtype == out.dtype == below.dtype and aligned):
        # [N K / 2, 1] is the layout for which all bitsandbytes versions return [N, K] untransposed
        whole = bnb.functional.dequantize_4bit(weight.data.view(torch.uint8).view(-1, 1), state)
        n_rows = len(out) - len(below)
        out[:n_rows] = whole[row : row + n_rows, column : column + width]
        out[n_rows:] = below
        return out
    outer, n_words = state.state2 if state.nested else state, n_cols // 8
    n_blocks = cdiv(n_words, BLOCK)
    n_programs = n_rows * n_blocks
    # without fused multiply-add, absmax is rounded twice, as bitsandbytes rounds it
    with device_guard(out):
        _nf4_kernel[(n_programs + cdiv(below.numel(), BLOCK * 8),)](
            weight, state.code, state.absmax, outer.code, outer.absmax, state.offset if state.nested else outer.absmax,
            out, below, first // 8, stride // 8, n_words, n_blocks, n_programs, below.numel(), width, below.stride(0),
            NESTED=state.nested, BLOCKSIZE=state.blocksize, BLOCKSIZE2=outer.blocksize, BLOCK=BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
