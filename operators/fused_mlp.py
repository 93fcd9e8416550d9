"""The MLP's element-wise middle in one kernel each way: LoRA add, SiLU, product and packing.

Forward reads the frozen paths of gate and up once and writes hidden and the packed gate and up; backward reads the
packed slots and dhidden once and writes dgate, dup and hidden. The packed bytes are those of operators/quantize.py,
so either direction can be paired with the unfused other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from operators import reference
from operators.activation import silu_mul_grad_tile, silu_mul_tile
from operators.dispatch import device_guard, use_triton
from operators.quantize import (
    as_words,
    book_constants,
    dequantize_tile,
    empty_packed,
    load_scale,
    load_words,
    quantize_tile,
    store_scale,
    store_words,
    tile_index,
)
from operators.savers import Keeper

BLOCK_ROWS = 32


@triton.jit
def _lora_tile(xa_ptr, b_ptr, row, col, n_rows, n_cols, scaling, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """scaling * xa B^T, fp32 [R, C], for xa [T, r] and B [F, r] contiguous."""
    rank = tl.arange(0, RANK_BLOCK)
    xa_mask = (row < n_rows)[:, None] & (rank < RANK)[None, :]
    b_mask = (col < n_cols)[None, :] & (rank < RANK)[:, None]
    xa = tl.load(xa_ptr + row[:, None].to(tl.int64) * RANK + rank[None, :], mask=xa_mask, other=0.0)
    b = tl.load(b_ptr + col[None, :].to(tl.int64) * RANK + rank[:, None], mask=b_mask, other=0.0)
    # half-precision operands are exact in tf32, so they go through the tensor cores without a rounding
    precision: tl.constexpr = "ieee" if xa_ptr.dtype.element_ty == tl.float32 else "tf32"
    return tl.dot(xa.to(tl.float32), b.to(tl.float32), input_precision=precision) * scaling


@triton.jit(do_not_specialize=["n_rows"])
def _fused_mlp_fwd_kernel(
    gate_ptr, gate_mean_ptr, gate_std_ptr, gate_codes_ptr, gate_scale_ptr, gate_xa_ptr, gate_b_ptr, gate_scaling,
    up_ptr, up_mean_ptr, up_std_ptr, up_codes_ptr, up_scale_ptr, up_xa_ptr, up_b_ptr, up_scaling,
    hidden_ptr, n_rows, n_cols, n_groups,
    GATE_BITS: tl.constexpr, GATE_STEP: tl.constexpr, GATE_CENTRE: tl.constexpr,
    UP_BITS: tl.constexpr, UP_STEP: tl.constexpr, UP_CENTRE: tl.constexpr,
    GROUPED: tl.constexpr, GROUP: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) + tl.arange(0, 1)
    col = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    offset = row[:, None].to(tl.int64) * n_cols + col[None, :]
    word, unit = tile_index(row, group, n_groups, GROUP)
    unit_mask = (row < n_rows)[:, None]
    gate = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    _pack_tile(gate, gate_mean_ptr, gate_std_ptr, gate_codes_ptr, gate_scale_ptr, col, n_cols, word, unit,
               unit_mask, GATE_BITS, GATE_STEP, GATE_CENTRE, GROUPED, GROUP, BLOCK_ROWS)  # fmt: skip
    _pack_tile(up, up_mean_ptr, up_std_ptr, up_codes_ptr, up_scale_ptr, col, n_cols, word, unit,
               unit_mask, UP_BITS, UP_STEP, UP_CENTRE, GROUPED, GROUP, BLOCK_ROWS)  # fmt: skip
    if GATE_RANK > 0:
        gate += _lora_tile(gate_xa_ptr, gate_b_ptr, row, col, n_rows, n_cols, gate_scaling, GATE_RANK, RANK_BLOCK)
    if UP_RANK > 0:
        up += _lora_tile(up_xa_ptr, up_b_ptr, row, col, n_rows, n_cols, up_scaling, UP_RANK, RANK_BLOCK)
    # the unfused path rounds gate and up to their dtype before the product
    gate = gate.to(gate_ptr.dtype.element_ty).to(tl.float32)
    up = up.to(up_ptr.dtype.element_ty).to(tl.float32)
    tl.store(hidden_ptr + offset, silu_mul_tile(gate, up).to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pack_tile(
    x, mean_ptr, std_ptr, codes_ptr, scale_ptr, col, n_cols, word, unit, unit_mask,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    mean = tl.load(mean_ptr + col, mask=col < n_cols, other=0.0)
    inv_std = 1.0 / tl.load(std_ptr + col, mask=col < n_cols, other=1.0)
    words, exponent, middle = quantize_tile(
        tl.reshape(x, (BLOCK_ROWS, 1, GROUP // 8, 8)), tl.reshape(mean, (1, 1, GROUP // 8, 8)),
        tl.reshape(inv_std, (1, 1, GROUP // 8, 8)), BITS, STEP, CENTRE, GROUPED,
    )  # fmt: skip
    store_words(codes_ptr, word, words, unit_mask[:, :, None], BITS)
    store_scale(scale_ptr, unit, exponent, middle, unit_mask, GROUPED)


@triton.jit
def _unpack_tile(
    mean_ptr, std_ptr, codes_ptr, scale_ptr, col, n_cols, word, unit, unit_mask,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    mean = tl.reshape(tl.load(mean_ptr + col, mask=col < n_cols, other=0.0), (1, 1, GROUP // 8, 8))
    std = tl.reshape(tl.load(std_ptr + col, mask=col < n_cols, other=1.0), (1, 1, GROUP // 8, 8))
    words = load_words(codes_ptr, word, unit_mask[:, :, None], BITS)
    exponent, middle = load_scale(scale_ptr, unit, unit_mask, GROUPED)
    x = dequantize_tile(words, exponent, middle, mean, std, BITS, STEP, CENTRE, GROUPED)
    return tl.reshape(x, (BLOCK_ROWS, GROUP))


@triton.jit(do_not_specialize=["n_rows"])
def _fused_mlp_bwd_kernel(
    gate_mean_ptr, gate_std_ptr, gate_codes_ptr, gate_scale_ptr, gate_xa_ptr, gate_b_ptr, gate_scaling,
    up_mean_ptr, up_std_ptr, up_codes_ptr, up_scale_ptr, up_xa_ptr, up_b_ptr, up_scaling,
    dhidden_ptr, dgate_ptr, dup_ptr, hidden_ptr, n_rows, n_cols, n_groups,
    GATE_BITS: tl.constexpr, GATE_STEP: tl.constexpr, GATE_CENTRE: tl.constexpr,
    UP_BITS: tl.constexpr, UP_STEP: tl.constexpr, UP_CENTRE: tl.constexpr,
    GROUPED: tl.constexpr, GROUP: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1) + tl.arange(0, 1)
    col = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    offset = row[:, None].to(tl.int64) * n_cols + col[None, :]
    word, unit = tile_index(row, group, n_groups, GROUP)
    unit_mask = (row < n_rows)[:, None]
    dtype = hidden_ptr.dtype.element_ty
    gate = _unpack_tile(
        gate_mean_ptr, gate_std_ptr, gate_codes_ptr, gate_scale_ptr, col, n_cols, word, unit, unit_mask,
        GATE_BITS, GATE_STEP, GATE_CENTRE, GROUPED, GROUP, BLOCK_ROWS,
    )  # fmt: skip
    up = _unpack_tile(
        up_mean_ptr, up_std_ptr, up_codes_ptr, up_scale_ptr, col, n_cols, word, unit, unit_mask,
        UP_BITS, UP_STEP, UP_CENTRE, GROUPED, GROUP, BLOCK_ROWS,
    )  # fmt: skip
    if GATE_RANK > 0:
        gate += _lora_tile(gate_xa_ptr, gate_b_ptr, row, col, n_rows, n_cols, gate_scaling, GATE_RANK, RANK_BLOCK)
    if UP_RANK > 0:
        up += _lora_tile(up_xa_ptr, up_b_ptr, row, col, n_rows, n_cols, up_scaling, UP_RANK, RANK_BLOCK)
    dhidden = tl.load(dhidden_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    dgate, dup, hidden = silu_mul_grad_tile(dhidden, gate, up)
    tl.store(dgate_ptr + offset, dgate.to(dtype), mask=mask)
    tl.store(dup_ptr + offset, dup.to(dtype), mask=mask)
    tl.store(hidden_ptr + offset, hidden.to(dtype), mask=mask)


class _Branch:
    """gate or up as the kernels take it: statistics, packed bytes, low-rank factors."""

    def __init__(self, projection, codes, scale, mean, std, book, keeper: Keeper):
        self.codes, self.scale, self.mean, self.std, self.book = codes, scale, mean, std, book
        self.xa = keeper.exact(f"{projection.name}_xa")
        lora_B = keeper.exact(f"{projection.name}_B")
        self.b = None if lora_B is None else lora_B.to(self.xa.dtype).contiguous()
        self.scaling = projection.scaling

    @property
    def rank(self) -> int:
        return 0 if self.xa is None else self.xa.shape[1]

    def arguments(self) -> tuple:
        low_rank = (self.mean, self.mean) if self.xa is None else (self.xa, self.b)
        return self.mean, self.std, as_words(self.codes, self.book), self.scale, *low_rank, float(self.scaling)


def _constants(gate: _Branch, up: _Branch) -> dict:
    shared = {"GROUPED", "GROUP"}
    constants = {f"GATE_{k}" if k not in shared else k: v for k, v in book_constants(gate.book).items()}
    constants |= {f"UP_{k}" if k not in shared else k: v for k, v in book_constants(up.book).items()}
    rank_block = max(16, triton.next_power_of_2(max(gate.rank, up.rank)))
    return constants | {
        "GATE_RANK": gate.rank, "UP_RANK": up.rank, "RANK_BLOCK": rank_block, "BLOCK_ROWS": BLOCK_ROWS,
    }  # fmt: skip


def _lora_add(frozen: Tensor, branch: _Branch) -> Tensor:
    return frozen if branch.xa is None else torch.addmm(frozen, branch.xa, branch.b.t(), alpha=branch.scaling)


def fused_mlp_fwd(spec, frozen: list[Tensor], keeper: Keeper) -> Tensor:
    """hidden = silu(gate + LoRA) * (up + LoRA), [T, F]; packs the frozen gate and up into their slots on the way."""
    branches = []
    for projection, x, name in zip(spec.gate_up.projections, frozen, ("gate", "up"), strict=True):
        saver = keeper.savers[name]
        saver.prepare(x, keeper.step)
        if use_triton(x):
            codes, scale = empty_packed(*x.shape, saver.book, x.device)
        else:
            codes, scale = reference.quantize(x, saver.mean, saver.std, saver.book)
        branches.append(_Branch(projection, codes, scale, saver.mean, saver.std, saver.book, keeper))
        keeper.adopt(name, saver.packed(codes, scale), x.shape, x.dtype)
    gate, up = (x.contiguous() for x in frozen)
    if not use_triton(gate):
        return reference.silu_mul_fwd(_lora_add(gate, branches[0]), _lora_add(up, branches[1]))
    hidden = torch.empty_like(gate)
    n_rows, n_cols = gate.shape
    n_groups = branches[0].codes.shape[1]
    with device_guard(gate):
        _fused_mlp_fwd_kernel[(triton.cdiv(n_rows, BLOCK_ROWS), n_groups)](
            gate, *branches[0].arguments(), up, *branches[1].arguments(), hidden, n_rows, n_cols, n_groups,
            **_constants(*branches),
        )  # fmt: skip
    return hidden


def fused_mlp_bwd(spec, dhidden: Tensor, keeper: Keeper) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup and hidden [T, F] from dhidden and the packed gate and up."""
    branches = []
    for projection, name in zip(spec.gate_up.projections, ("gate", "up"), strict=True):
        book = keeper.saver(name).book
        codes, scale, _, mean, std, _ = keeper.take(name)
        branches.append(_Branch(projection, codes, scale, mean, std, book, keeper))
    if not use_triton(dhidden):
        gate, up = (
            _lora_add(reference.dequantize(b.codes, b.scale, b.mean, b.std, b.book, dhidden.dtype), b) for b in branches
        )
        return reference.silu_mul_bwd(dhidden, gate, up)
    dhidden = dhidden.contiguous()
    dgate, dup, hidden = (torch.empty_like(dhidden) for _ in range(3))
    n_rows, n_cols = dhidden.shape
    n_groups = branches[0].codes.shape[1]
    with device_guard(dhidden):
        _fused_mlp_bwd_kernel[(triton.cdiv(n_rows, BLOCK_ROWS), n_groups)](
            *branches[0].arguments(), *branches[1].arguments(), dhidden, dgate, dup, hidden, n_rows, n_cols, n_groups,
            **_constants(*branches),
        )  # fmt: skip
    return dgate, dup, hidden
