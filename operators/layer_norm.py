"""LayerNorm of what a block gives, dropped, and the residual branch around it; backward reads x_hat from a saver.

So ends a block of a model whose norms come after the addition (BERT, RoBERTa): y = LayerNorm(residual + dropout(x)).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import as_output, as_rows, device_guard, next_power_of_2, use_triton
from hyclora.operators.first_order import first_order
from hyclora.operators.linear.dropout import draw_seed, dropout_tile
from hyclora.operators.packing.codebook import book_constants
from hyclora.operators.packing.layout import carve, packed_shapes
from hyclora.operators.packing.programs import row_constants
from hyclora.operators.packing.quantize import (
    dequantize_tile,
    load_channels,
    load_packed,
    quantize_tile,
    store_packed,
)
from hyclora.operators.savers import ChannelQuant, Keeper


@triton.jit
def _sum(x):
    """Of all elements [N, M]."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _load_sum(
    x_ptr, residual_ptr, seed_ptr, row, col, mask, least, scale, stride_x, stride_residual,
    DROPOUT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x) of a row at columns [N, 8] or [N, 1], fp32, 0 outside of mask."""
    x = tl.load(x_ptr + row.to(tl.int64) * stride_x + col, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        x *= dropout_tile(seed_ptr, col // 8, col % 8, row, 0, least, scale, ROUNDS)
    return x + tl.load(residual_ptr + row.to(tl.int64) * stride_residual + col, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["least"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, x_hat_ptr, rstd_ptr, least, scale, n_cols, stride_x,
    stride_residual, eps, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = col < n_cols
    x = _load_sum(
        x_ptr, residual_ptr, seed_ptr, row, col, mask, least, scale, stride_x, stride_residual, DROPOUT, ROUNDS
    )  # fmt: skip
    x = tl.where(mask, x - _sum(x) / n_cols, 0.0)
    rstd = tl.rsqrt(_sum(x * x) / n_cols + eps)
    x_hat = x * rstd
    y = x_hat * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * n_cols + col
    tl.store(x_hat_ptr + at, x_hat.to(x_hat_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["least"])
def _layer_norm_bwd_kernel(
    dy_ptr, x_hat_ptr, rstd_ptr, weight_ptr, seed_ptr, dresidual_ptr, dx_ptr, least, scale, n_cols, stride_dy,
    OWN_DX: tl.constexpr, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    eight, place = tl.arange(0, BLOCK)[:, None], tl.arange(0, 8)[None, :]
    col = eight * 8 + place
    mask = col < n_cols
    at = row.to(tl.int64) * n_cols + col
    g = tl.load(dy_ptr + row.to(tl.int64) * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
    g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    x_hat = tl.load(x_hat_ptr + at, mask=mask, other=0.0).to(tl.float32)
    ds = (g - _sum(g) / n_cols - x_hat * (_sum(g * x_hat) / n_cols)) * tl.load(rstd_ptr + row)
    tl.store(dresidual_ptr + at, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if OWN_DX:
        if DROPOUT:
            ds *= dropout_tile(seed_ptr, eight, place, row, 0, least, scale, ROUNDS)
        tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["least"])
def _layer_norm_pack_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, rstd_ptr, codes_ptr, scale_ptr, mean_ptr, inv_std_ptr,
    outliers_ptr, kept_ptr, least, scale, n_cols, n_groups, stride_x, stride_residual, n_outliers, eps,
    DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, CENTRE: tl.constexpr,
    GROUPED: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_OUTLIERS: tl.constexpr,
):  # fmt: skip
    row, one = tl.program_id(0), tl.arange(0, 1)
    col = tl.arange(0, BLOCK_GROUPS * GROUP // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = col < n_cols
    place = tl.arange(0, BLOCK_OUTLIERS)[:, None]
    outlier = tl.load(outliers_ptr + place, mask=place < n_outliers, other=0).to(tl.int32)
    kept = _load_sum(
        x_ptr, residual_ptr, seed_ptr, row, outlier, place < n_outliers, least, scale, stride_x, stride_residual,
        DROPOUT, ROUNDS,
    )  # fmt: skip
    x = _load_sum(
        x_ptr, residual_ptr, seed_ptr, row, col, mask, least, scale, stride_x, stride_residual, DROPOUT, ROUNDS
    )  # fmt: skip
    centre = _sum(x) / n_cols
    x = tl.where(mask, x - centre, 0.0)
    rstd = tl.rsqrt(_sum(x * x) / n_cols + eps)
    x_hat = x * rstd
    y = x_hat * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + row.to(tl.int64) * n_cols + col, y.to(dtype), mask=mask)
    tl.store(rstd_ptr + row, rstd)
    at = row.to(tl.int64) * n_outliers + place
    tl.store(kept_ptr + at, ((kept - centre) * rstd).to(dtype), mask=place < n_outliers)
    # as a tensor of its dtype it would be packed
    x_hat = tl.reshape(x_hat.to(dtype).to(tl.float32), (1, BLOCK_GROUPS, GROUP // 8, 8))
    channel = tl.arange(0, BLOCK_GROUPS * GROUP)
    mean = load_channels(mean_ptr, channel, channel < n_cols, GROUP)
    inv_std = load_channels(inv_std_ptr, channel, channel < n_cols, GROUP)
    code, group_scale = quantize_tile(x_hat, mean, inv_std, BITS, STEP, CENTRE, GROUPED)
    first, live = row.to(tl.int64), one >= 0
    store_packed(codes_ptr, scale_ptr, code, group_scale, first, one, 0, live, n_groups, BITS, GROUPED, GROUP)


@triton.jit(do_not_specialize=["least"])
def _layer_norm_unpack_bwd_kernel(
    dy_ptr, rstd_ptr, weight_ptr, seed_ptr, dresidual_ptr, dx_ptr, codes_ptr, scale_ptr, mean_ptr, std_ptr,
    outliers_ptr, kept_ptr, least, scale, n_cols, n_groups, stride_dy, n_outliers,
    OWN_DX: tl.constexpr, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
    CENTRE: tl.constexpr, GROUPED: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_OUTLIERS: tl.constexpr,
):  # fmt: skip
    row, one = tl.program_id(0), tl.arange(0, 1)
    first = row.to(tl.int64)
    channel = tl.arange(0, BLOCK_GROUPS * GROUP)
    mean = load_channels(mean_ptr, channel, channel < n_cols, GROUP)
    std = load_channels(std_ptr, channel, channel < n_cols, GROUP)
    code, group_scale = load_packed(
        codes_ptr, scale_ptr, first, one, 0, one >= 0, n_groups, BLOCK_GROUPS, BITS, GROUPED, GROUP
    )
    x_hat = dequantize_tile(code, group_scale, mean, std, BITS, STEP, CENTRE, GROUPED)
    x_hat = tl.reshape(x_hat, (BLOCK_GROUPS * GROUP // 8, 8))
    col = tl.arange(0, BLOCK_GROUPS * GROUP // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    place = tl.arange(0, BLOCK_OUTLIERS)[:, None]
    mask, exact = col < n_cols, place < n_outliers
    outlier = tl.load(outliers_ptr + place, mask=exact, other=0).to(tl.int32)
    kept = tl.load(kept_ptr + first * n_outliers + place, mask=exact, other=0.0).to(tl.float32)
    dy_ptr += first * stride_dy
    g = tl.load(dy_ptr + col, mask=mask, other=0.0).to(tl.float32)
    g *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    outlier_g = tl.load(dy_ptr + outlier, mask=exact, other=0.0).to(tl.float32)
    outlier_g *= tl.load(weight_ptr + outlier, mask=exact, other=0.0).to(tl.float32)
    # x_hat is 0 at the exact channels so far
    rstd = tl.load(rstd_ptr + row)
    mean_g, mean_gx = _sum(g) / n_cols, (_sum(g * x_hat) + _sum(outlier_g * kept)) / n_cols
    ds, outlier_ds = (g - mean_g - x_hat * mean_gx) * rstd, (outlier_g - mean_g - kept * mean_gx) * rstd
    dresidual_ptr += first * n_cols
    dx_ptr += first * n_cols
    tl.store(dresidual_ptr + col, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if OWN_DX:
        dx, outlier_dx = ds, outlier_ds
        if DROPOUT:
            dx *= dropout_tile(seed_ptr, col // 8, col % 8, row, 0, least, scale, ROUNDS)
            outlier_dx *= dropout_tile(seed_ptr, outlier // 8, outlier % 8, row, 0, least, scale, ROUNDS)
        tl.store(dx_ptr + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    # other threads write the exact channels once more
    tl.debug_barrier()
    tl.store(dresidual_ptr + outlier, outlier_ds.to(dresidual_ptr.dtype.element_ty), mask=exact)
    if OWN_DX:
        tl.store(dx_ptr + outlier, outlier_dx.to(dx_ptr.dtype.element_ty), mask=exact)


def _dropout_arguments(seed: Tensor | None, p: float, like: Tensor) -> tuple[Tensor, int, float, dict]:
    """A seed or what stands for one, what the mask is made by, and constants."""
    constants = {"DROPOUT": p > 0, "ROUNDS": reference.PHILOX_ROUNDS}
    return like if seed is None else seed, *reference.dropout_constants(p), constants


def _gradients(dy: Tensor, p: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Places for dresidual and dx, one where they are the same; dtype: of dx, None for dy's."""
    dtype = dtype or dy.dtype
    dresidual = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    return dresidual, torch.empty(dy.shape, dtype=dtype, device=dy.device) if p > 0 or dtype != dy.dtype else dresidual


def _row_launch(n_cols: int) -> dict:
    block = max(1, next_power_of_2(n_cols) // 8)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 64))}


def layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, seed: Tensor | None = None, p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """reference.layer_norm_fwd on any device: y, x_hat and rstd are all that it allocates on a GPU."""
    if not use_triton(x):
        return reference.layer_norm_fwd(x, residual, weight, bias, eps, seed, p, dtype)
    x, residual = as_rows(x), as_rows(residual)
    n_rows, n_cols = x.shape
    dtype = dtype or torch.promote_types(x.dtype, residual.dtype)
    y, x_hat = (torch.empty(n_rows, n_cols, dtype=dtype, device=x.device) for _ in range(2))
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    seed, least, factor, constants = _dropout_arguments(seed, p, rstd)
    if n_rows:
        with device_guard(x):
            _layer_norm_fwd_kernel[(n_rows,)](
                x, residual, weight, bias, seed, y, x_hat, rstd, least, factor, n_cols, x.stride(0), residual.stride(0),
                eps, **constants, **_row_launch(n_cols),
            )  # fmt: skip
    return y, x_hat, rstd


def layer_norm_bwd(
    dy: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor | None = None, p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """reference.layer_norm_bwd on any device: dresidual and dx, one tensor where they are the same.

    They are all that it allocates on a GPU.
    """
    if not use_triton(dy):
        return reference.layer_norm_bwd(dy, x_hat, rstd, weight, seed, p, dtype)
    dy, x_hat = as_rows(dy), x_hat.contiguous()
    n_rows, n_cols = dy.shape
    dresidual, dx = _gradients(dy, p, dtype)
    seed, least, factor, constants = _dropout_arguments(seed, p, rstd)
    if n_rows:
        with device_guard(dy):
            _layer_norm_bwd_kernel[(n_rows,)](
                dy, x_hat, rstd, weight, seed, dresidual, dx, least, factor, n_cols, dy.stride(0),
                OWN_DX=dx is not dresidual, **constants, **_row_launch(n_cols),
            )  # fmt: skip
    return dresidual, dx


def layer_norm_pack(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, saver, seed: Tensor | None = None,
    p: float = 0.0, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """layer_norm_fwd with x_hat packed by a calibrated ChannelQuant on the way: y, rstd, its packed().

    Allocates these alone, the packed bytes in one piece: x_hat itself never exists.
    """
    x, residual = as_rows(x), as_rows(residual)
    saver.follow(x.device)
    n_rows, n_cols = x.shape
    dtype = dtype or torch.promote_types(x.dtype, residual.dtype)
    shapes = [*packed_shapes(n_rows, n_cols, saver.book), ((n_rows, saver.n_outliers), dtype)]
    codes, scale, kept = carve(shapes, x.device)
    y = torch.empty(n_rows, n_cols, dtype=dtype, device=x.device)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    seed, least, factor, constants = _dropout_arguments(seed, p, rstd)
    if n_rows:
        with device_guard(x):
            _layer_norm_pack_kernel[(n_rows,)](
                x, residual, weight, bias, seed, y, rstd, codes, scale, saver.mean, saver.inv_std, saver.outliers, kept,
                least, factor, n_cols, codes.shape[1], x.stride(0), residual.stride(0), saver.n_outliers, eps,
                **constants, **book_constants(saver.book),
                **row_constants(codes.shape[1], saver.book, saver.n_outliers),
            )  # fmt: skip
    return y, rstd, saver.packed(codes, scale, kept if saver.n_outliers else None)


def layer_norm_unpack_bwd(
    dy: Tensor, rstd: Tensor, weight: Tensor, packed: tuple[Tensor, ...], book, seed: Tensor | None = None,
    p: float = 0.0, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """layer_norm_bwd from x_hat as ChannelQuant.packed has it, book its code book; allocates its results alone."""
    codes, scale, kept, mean, std, outliers = packed
    dy = as_rows(dy)
    n_rows, n_cols = dy.shape
    n_outliers = kept.shape[1] if kept.numel() else 0
    dresidual, dx = _gradients(dy, p, dtype)
    seed, least, factor, constants = _dropout_arguments(seed, p, rstd)
    if n_rows:
        with device_guard(dy):
            _layer_norm_unpack_bwd_kernel[(n_rows,)](
                dy, rstd, weight, seed, dresidual, dx, codes, scale, mean, std, outliers, kept, least, factor,
                n_cols, codes.shape[1], dy.stride(0), n_outliers, OWN_DX=dx is not dresidual, **constants,
                **book_constants(book), **row_constants(codes.shape[1], book, n_outliers),
            )  # fmt: skip
    return dresidual, dx


class LayerNormFunction(torch.autograd.Function):
    """y = x_hat * w + b of residual + dropout(x); gradients by reference.layer_norm_bwd from slot norm_in (x_hat).

    x, residual [..., C], weight, bias [C]; p: of dropout, whose seed is drawn here; fused: a quantized x_hat is packed
    and restored inside the kernels; dtype: of y and x_hat, None for the wider one of x and residual. dw = sum over
    tokens of dy * x_hat, db = sum of dy. Keeps what the saver of norm_in does, 4 bytes a token (rstd), and a seed;
    weight and bias by reference. Temporary: x_hat each way unless fused; for dw fp32 dy, x_hat and their product, 12 C
    bytes a token.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, keeper: Keeper,
        fused: bool = False, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        rows, branch = (t.reshape(-1, t.shape[-1]) for t in (x, residual))
        seed = keeper.drawn(draw_seed, x.device) if p else None
        saver = keeper.savers["norm_in"]
        ctx.fused = fused and use_triton(x) and isinstance(saver, ChannelQuant)
        if ctx.fused and not keeper.step.calibrating and saver.mean is not None:
            y, rstd, packed = layer_norm_pack(rows, branch, weight, bias, eps, saver, seed, p, dtype)
            keeper.adopt("norm_in", packed, rows.shape, y.dtype)
        else:
            y, x_hat, rstd = layer_norm_fwd(rows, branch, weight, bias, eps, seed, p, dtype)
            keeper.keep("norm_in", x_hat)
        for name, tensor in (("rstd", rstd), ("weight", weight), ("seed", seed)):
            keeper.keep_exact(name, tensor)
        keeper.save(ctx)
        ctx.p, ctx.dtype, ctx.residual_dtype = p, x.dtype, residual.dtype
        return as_output(y, x.shape)

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor):
        keeper = Keeper.load(ctx)
        rstd, weight, seed = (keeper.exact(name) for name in ("rstd", "weight", "seed"))
        rows, drop = dy.reshape(-1, dy.shape[-1]), (seed, ctx.p, ctx.dtype)
        if ctx.fused and not ctx.needs_input_grad[2]:
            book = keeper.saver("norm_in").book
            dresidual, dx = layer_norm_unpack_bwd(rows, rstd, weight, keeper.take("norm_in"), book, *drop)
        else:
            x_hat = keeper.restore("norm_in")
            dresidual, dx = layer_norm_bwd(rows, x_hat, rstd, weight, *drop)
        dresidual = dresidual.view(dy.shape).to(ctx.residual_dtype)
        dweight = dbias = None
        exact = torch.promote_types(rows.dtype, torch.float32)
        if ctx.needs_input_grad[2]:
            dweight = (rows.to(exact) * x_hat.to(exact)).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            dbias = rows.sum(dim=0, dtype=exact).to(weight.dtype)
        return dx.view(dy.shape), dresidual, dweight, dbias, None, None, None, None, None
