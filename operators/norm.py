"""RMSNorm whose backward reads x_hat from a saver."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import as_output, as_rows, cdiv, device_guard, next_power_of_2, use_triton
from hyclora.operators.first_order import first_order
from hyclora.operators.packing.codebook import book_constants
from hyclora.operators.packing.layout import carve, packed_shapes
from hyclora.operators.packing.programs import row_constants
from hyclora.operators.packing.quantize import (
    ROWS_A_PROGRAM,
    dequantize_tile,
    load_channels,
    load_words,
    quantize_tile,
    store_packed,
    store_tile,
    to_float,
    to_words,
    unpack_words,
)
from hyclora.operators.savers import ChannelQuant, Keeper

# of the backward from packed rows, so that three of them fit into a multiprocessor; longer ones would spill
REGISTERS, CHANNELS_IN_REGISTERS = 40, 4096


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, x_hat_ptr, rstd_ptr, n_cols, stride_row, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < n_cols
    x = tl.load(x_ptr + row * stride_row + col, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / n_cols + eps)
    # HF rounds x_hat to the input's dtype before the weight multiplies it
    x_hat = (x * rstd).to(x_hat_ptr.dtype.element_ty)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0)
    y = x_hat.to(tl.float32) * weight.to(tl.float32)
    tl.store(x_hat_ptr + row * n_cols + col, x_hat, mask=mask)
    tl.store(y_ptr + row * n_cols + col, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_hat_ptr, rstd_ptr, weight_ptr, dresidual_ptr, dx_ptr, n_cols, stride_dy, stride_dresidual,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < n_cols
    dy = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
    x_hat = tl.load(x_hat_ptr + row * n_cols + col, mask=mask, other=0.0).to(tl.float32)
    g = dy * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dx = (g - x_hat * (tl.sum(g * x_hat) / n_cols)) * tl.load(rstd_ptr + row)
    if RESIDUAL:
        dx += tl.load(dresidual_ptr + row * stride_dresidual + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * n_cols + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_pack_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, codes_ptr, scale_ptr, mean_ptr, inv_std_ptr, outliers_ptr, kept_ptr,
    n_rows, n_cols, n_groups, stride_row, n_outliers, eps,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_OUTLIERS: tl.constexpr,
):  # fmt: skip
    one = tl.arange(0, 1)
    col = tl.arange(0, BLOCK_GROUPS * GROUP)
    inside = col < n_cols
    weight = load_channels(weight_ptr, col, inside, GROUP)
    mean, inv_std = load_channels(mean_ptr, col, inside, GROUP), load_channels(inv_std_ptr, col, inside, GROUP)
    place = tl.arange(0, BLOCK_OUTLIERS)
    outlier = tl.load(outliers_ptr + place, mask=place < n_outliers, other=0)
    dtype = x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS
    n_rows = tl.minimum(n_rows - first, ROWS).to(tl.int32)
    # a row is on its way while the one before is computed
    following = tl.load(x_ptr + first * stride_row + col[None, :], mask=inside[None, :] & (one < n_rows), other=0.0)
    for i in range(ROWS):
        row = first + i
        live = one + i < n_rows
        mask = (place < n_outliers) & live
        kept = tl.load(x_ptr + row * stride_row + outlier, mask=mask, other=0.0).to(tl.float32)
        x = to_words(following.to(tl.float32), GROUP)
        ahead = inside[None, :] & (one + i + 1 < n_rows)
        following = tl.load(x_ptr + (row + 1) * stride_row + col[None, :], mask=ahead, other=0.0)
        rstd = tl.rsqrt(tl.sum(tl.reshape(x * x, (x.numel,))) / n_cols + eps)
        # HF rounds x_hat to the input's dtype before the weight multiplies it
        x_hat = (x * rstd).to(dtype).to(tl.float32)
        store_tile(y_ptr + row * n_cols, x_hat * weight, one, col, n_cols, live, inside)
        tl.store(rstd_ptr + row, rstd, mask=i < n_rows)
        code, scale = quantize_tile(x_hat, mean, inv_std, BITS, STEP, CENTRE, GROUPED)
        store_packed(codes_ptr, scale_ptr, code, scale, row, one, 0, live, n_groups, BITS, GROUPED, GROUP)
        tl.store(kept_ptr + row * n_outliers + place, (kept * rstd).to(dtype), mask=mask)


@triton.jit
def _load_gradients(dy_ptr, dresidual_ptr, col, mask, RESIDUAL: tl.constexpr):
    """dy and dresidual (dy again if there is none) of a row at channels [C].

    Volatile, because ptxas puts loads off behind arithmetic that waits for others, but keeps volatile ones in order.
    """
    dy = tl.load(dy_ptr + col, mask=mask, other=0.0, volatile=True)
    dresidual = dy
    if RESIDUAL:
        dresidual = tl.load(dresidual_ptr + col, mask=mask, other=0.0, volatile=True)
    return dy, dresidual


@triton.jit
def _rms_norm_unpack_bwd_kernel(
    dy_ptr, rstd_ptr, weight_ptr, dresidual_ptr, dx_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr, outliers_ptr,
    kept_ptr, n_cols, n_groups, stride_dy, stride_dresidual, n_outliers, RESIDUAL: tl.constexpr,
    BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_OUTLIERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    col = tl.arange(0, BLOCK_GROUPS * GROUP)
    inside, live = col < n_cols, one >= 0
    place = tl.arange(0, BLOCK_OUTLIERS)
    exact = place < n_outliers
    dy_ptr += row * stride_dy
    dresidual_ptr += row * stride_dresidual
    dx_ptr += row * n_cols
    outlier = tl.load(outliers_ptr + place, mask=exact, other=0).to(tl.int32)
    rstd = tl.load(rstd_ptr + row, volatile=True)
    kept = tl.load(kept_ptr + row * n_outliers + place, mask=exact, other=0.0, volatile=True)
    dy, dresidual = _load_gradients(dy_ptr, dresidual_ptr, col[None, :], inside[None, :], RESIDUAL)
    outlier_dy, outlier_dresidual = _load_gradients(dy_ptr, dresidual_ptr, outlier, exact, RESIDUAL)
    # last, because these are used first: then everything is on its way
    words, scale = load_words(
        codes_ptr, scale_ptr, row, one, 0, live, n_groups, BLOCK_GROUPS, BITS, GROUPED, GROUP, IN_ORDER=True
    )
    outlier_weight = tl.load(weight_ptr + outlier, mask=exact, other=0.0)
    mean, std = load_channels(mean_ptr, col, inside, GROUP), load_channels(std_ptr, col, inside, GROUP)
    code, scale = unpack_words(words, scale, BITS, GROUP)
    x_hat = dequantize_tile(code, scale, mean, std, BITS, STEP, CENTRE, GROUPED)
    g = to_words(to_float(dy), GROUP) * load_channels(weight_ptr, col, inside, GROUP)
    kept, outlier_g = to_float(kept), to_float(outlier_dy) * to_float(outlier_weight)
    # x_hat is 0 at the exact channels so far; a thread adds one of these, so that there is one sum for both
    gx = tl.reshape(tl.sum(g * x_hat, axis=3), (BLOCK_GROUPS * GROUP // 8,))
    gx += tl.sum(tl.reshape(outlier_g * kept, (gx.shape[0], BLOCK_OUTLIERS // gx.shape[0])), axis=1)
    mean_gx = tl.sum(gx) / n_cols
    dx, outlier_dx = (g - x_hat * mean_gx) * rstd, (outlier_g - kept * mean_gx) * rstd
    if RESIDUAL:
        dx += to_words(to_float(dresidual), GROUP)
        outlier_dx += to_float(outlier_dresidual)
    store_tile(dx_ptr, dx, one, col, 0, live, inside)
    # other threads write the exact channels once more
    tl.debug_barrier()
    tl.store(dx_ptr + outlier, outlier_dx.to(dx_ptr.dtype.element_ty), mask=exact)


def _row_launch(n_cols: int) -> dict:
    block = next_power_of_2(n_cols)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """reference.rms_norm_fwd on any device: x [T, C] to y, x_hat, rstd (fp32 [T]), all that it allocates on a GPU."""
    if not use_triton(x):
        return reference.rms_norm_fwd(x, weight, eps)
    x = as_rows(x)
    n_rows, n_cols = x.shape
    x_hat = torch.empty(n_rows, n_cols, dtype=x.dtype, device=x.device)
    y = torch.empty_like(x_hat, dtype=torch.promote_types(x.dtype, weight.dtype))
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    with device_guard(x):
        _rms_norm_fwd_kernel[(n_rows,)](x, weight, y, x_hat, rstd, n_cols, x.stride(0), eps, **_row_launch(n_cols))
    return y, x_hat, rstd


def rms_norm_bwd(dy: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor, dresidual: Tensor | None = None) -> Tensor:
    """reference.rms_norm_bwd on any device: dx [T, C] in dy's dtype, all that it allocates on a GPU."""
    if not use_triton(dy):
        return reference.rms_norm_bwd(dy, x_hat, rstd, weight, dresidual)
    dy, x_hat = as_rows(dy), x_hat.contiguous()
    residual = dy if dresidual is None else as_rows(dresidual)
    n_rows, n_cols = dy.shape
    dx = torch.empty(n_rows, n_cols, dtype=dy.dtype, device=dy.device)
    with device_guard(dy):
        _rms_norm_bwd_kernel[(n_rows,)](
            dy, x_hat, rstd, weight, residual, dx, n_cols, dy.stride(0), residual.stride(0),
            RESIDUAL=dresidual is not None, **_row_launch(n_cols),
        )  # fmt: skip
    return dx


def rms_norm_pack(x: Tensor, weight: Tensor, eps: float, saver, step) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """rms_norm_fwd with x_hat packed by a calibrated ChannelQuant on the way: x [T, C] to y, rstd, its packed().

    Allocates these alone, the packed bytes in one piece: x_hat itself never exists.
    """
    saver.prepare(x, step)
    x = as_rows(x)
    n_rows, n_cols = x.shape
    shapes = [*packed_shapes(n_rows, n_cols, saver.book), ((n_rows, saver.n_outliers), x.dtype)]
    codes, scale, kept = carve(shapes, x.device)
    y = torch.empty(n_rows, n_cols, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    with device_guard(x):
        _rms_norm_pack_kernel[(cdiv(n_rows, ROWS_A_PROGRAM),)](
            x, weight, y, rstd, codes, scale, saver.mean, saver.inv_std, saver.outliers, kept,
            n_rows, n_cols, codes.shape[1], x.stride(0), saver.n_outliers, eps, ROWS=ROWS_A_PROGRAM,
            **book_constants(saver.book), **row_constants(codes.shape[1], saver.book, saver.n_outliers),
        )  # fmt: skip
    return y, rstd, saver.packed(codes, scale, kept if saver.n_outliers else None)


def rms_norm_unpack_bwd(
    dy: Tensor, rstd: Tensor, weight: Tensor, packed: tuple[Tensor, ...], book, dresidual: Tensor | None = None
) -> Tensor:
    """rms_norm_bwd from x_hat as ChannelQuant.packed has it, book its code book: dx [T, C] in dy's dtype.

    Allocates dx alone.
    """
    codes, scale, kept, mean, std, outliers = packed
    dy = as_rows(dy)
    residual = dy if dresidual is None else as_rows(dresidual)
    n_rows, n_cols = dy.shape
    n_outliers = kept.shape[1] if kept.numel() else 0
    n_words = codes.shape[1] * book.group // 8
    dx = torch.empty(n_rows, n_cols, dtype=dy.dtype, device=dy.device)
    with device_guard(dy):
        _rms_norm_unpack_bwd_kernel[(n_rows,)](
            dy, rstd, weight, residual, dx, codes, scale, mean, std, outliers, kept, n_cols, codes.shape[1],
            dy.stride(0), residual.stride(0), n_outliers, RESIDUAL=dresidual is not None,
            maxnreg=REGISTERS if n_cols <= CHANNELS_IN_REGISTERS else None,
            **book_constants(book), **row_constants(codes.shape[1], book, max(n_outliers, n_words)),
        )  # fmt: skip
    return dx


class RMSNormFunction(torch.autograd.Function):
    """y = x_hat * w; dx by reference.rms_norm_bwd from slot norm_in (x_hat), dw = sum over tokens of dy * x_hat.

    x [..., C], weight [C]. Saves norm_in through its saver and rstd (fp32 [T]) exactly. fused: a quantized x_hat is
    packed and restored inside the kernels. residual: (y, x) is returned, and the gradient of this x is added to dx.
    Keeps what the saver of norm_in does and 4 bytes a token; weight by reference. Temporary: x_hat each way unless
    fused; for dw fp32 dy, x_hat and their product, 12 C bytes a token.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, eps: float, keeper: Keeper, fused: bool = False, residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows, saver = x.reshape(-1, x.shape[-1]), keeper.savers["norm_in"]
        ctx.fused = fused and use_triton(x) and isinstance(saver, ChannelQuant)
        if ctx.fused and not keeper.step.calibrating:
            y, rstd, packed = rms_norm_pack(rows, weight, eps, saver, keeper.step)
            keeper.adopt("norm_in", packed, rows.shape, rows.dtype)
        else:
            y, x_hat, rstd = rms_norm_fwd(rows, weight, eps)
            keeper.keep("norm_in", x_hat)
        keeper.keep_exact("rstd", rstd)
        keeper.keep_exact("weight", weight)
        keeper.save(ctx)
        ctx.x_dtype = x.dtype
        y = as_output(y, x.shape)
        return (y, x) if residual else y

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor, dresidual: Tensor | None = None):
        keeper = Keeper.load(ctx)
        rstd, weight = keeper.exact("rstd"), keeper.exact("weight")
        rows = dy.reshape(-1, dy.shape[-1])
        if dresidual is not None:
            dresidual = dresidual.reshape(rows.shape)
        dx = dweight = None
        if ctx.fused and not ctx.needs_input_grad[1]:
            book = keeper.saver("norm_in").book
            dx = rms_norm_unpack_bwd(rows, rstd, weight, keeper.take("norm_in"), book, dresidual)
            return dx.view(dy.shape).to(ctx.x_dtype), None, None, None, None, None
        x_hat = keeper.restore("norm_in")
        if ctx.needs_input_grad[0]:
            dx = rms_norm_bwd(rows, x_hat, rstd, weight, dresidual).view(dy.shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dweight = (rows.float() * x_hat.float()).sum(dim=0).to(weight.dtype)
        return dx, dweight, None, None, None, None
