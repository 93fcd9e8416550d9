"""RMSNorm whose backward reads x_hat from a saver."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from operators import reference
from operators.dispatch import as_rows, device_guard, use_triton
from operators.savers import Keeper


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
    dy_ptr, x_hat_ptr, rstd_ptr, weight_ptr, dx_ptr, n_cols, stride_dy, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < n_cols
    dy = tl.load(dy_ptr + row * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
    x_hat = tl.load(x_hat_ptr + row * n_cols + col, mask=mask, other=0.0).to(tl.float32)
    g = dy * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    dx = (g - x_hat * (tl.sum(g * x_hat) / n_cols)) * tl.load(rstd_ptr + row)
    tl.store(dx_ptr + row * n_cols + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _row_launch(n_cols: int) -> dict:
    block = triton.next_power_of_2(n_cols)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """reference.rms_norm_fwd on any device: x [T, C] to y, x_hat and rstd (fp32 [T])."""
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


def rms_norm_bwd(dy: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """reference.rms_norm_bwd on any device: dx [T, C] in dy's dtype."""
    if not use_triton(dy):
        return reference.rms_norm_bwd(dy, x_hat, rstd, weight)
    dy, x_hat = as_rows(dy), x_hat.contiguous()
    n_rows, n_cols = dy.shape
    dx = torch.empty(n_rows, n_cols, dtype=dy.dtype, device=dy.device)
    with device_guard(dy):
        _rms_norm_bwd_kernel[(n_rows,)](dy, x_hat, rstd, weight, dx, n_cols, dy.stride(0), **_row_launch(n_cols))
    return dx


class RMSNormFunction(torch.autograd.Function):
    """y = x_hat * w; dx by reference.rms_norm_bwd from slot norm_in (x_hat), dw = sum over tokens of dy * x_hat.

    x [..., C], weight [C]. Saves norm_in through its saver and rstd (fp32 [T]) exactly.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, keeper: Keeper) -> Tensor:
        y, x_hat, rstd = rms_norm_fwd(x.reshape(-1, x.shape[-1]), weight, eps)
        keeper.keep("norm_in", x_hat)
        keeper.keep_exact("rstd", rstd)
        keeper.keep_exact("weight", weight)
        keeper.save(ctx)
        ctx.x_dtype = x.dtype
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        keeper = Keeper.load(ctx)
        x_hat, rstd, weight = keeper.restore("norm_in"), keeper.exact("rstd"), keeper.exact("weight")
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = rms_norm_bwd(rows, x_hat, rstd, weight).view(dy.shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dweight = (rows.float() * x_hat.float()).sum(dim=0).to(weight.dtype)
        return dx, dweight, None, None
