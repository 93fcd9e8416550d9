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
from hyclora.operators.savers import Keeper


@triton.jit
def _sum(x):
    """Of all elements [N, 8]."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit(do_not_specialize=["least"])
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, x_hat_ptr, rstd_ptr, least, scale, n_cols, stride_x,
    stride_residual, eps, DROPOUT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    eight, place = tl.arange(0, BLOCK)[:, None], tl.arange(0, 8)[None, :]
    col = eight * 8 + place
    mask = col < n_cols
    x = tl.load(x_ptr + row.to(tl.int64) * stride_x + col, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        x *= dropout_tile(seed_ptr, eight, place, row, 0, least, scale, ROUNDS)
    x += tl.load(residual_ptr + row.to(tl.int64) * stride_residual + col, mask=mask, other=0.0).to(tl.float32)
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


def _launch(n_cols: int, p: float) -> dict:
    block = max(1, next_power_of_2(n_cols) // 8)
    constants = {"DROPOUT": p > 0, "ROUNDS": reference.PHILOX_ROUNDS, "BLOCK": block}
    return constants | {"num_warps": min(16, max(1, block // 64))}


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
    if n_rows:
        with device_guard(x):
            _layer_norm_fwd_kernel[(n_rows,)](
                x, residual, weight, bias, rstd if seed is None else seed, y, x_hat, rstd,
                *reference.dropout_constants(p), n_cols, x.stride(0), residual.stride(0), eps, **_launch(n_cols, p),
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
    dtype = dtype or dy.dtype
    dresidual = torch.empty(n_rows, n_cols, dtype=dy.dtype, device=dy.device)
    own = p > 0 or dtype != dy.dtype
    dx = torch.empty(n_rows, n_cols, dtype=dtype, device=dy.device) if own else dresidual
    if n_rows:
        with device_guard(dy):
            _layer_norm_bwd_kernel[(n_rows,)](
                dy, x_hat, rstd, weight, rstd if seed is None else seed, dresidual, dx,
                *reference.dropout_constants(p), n_cols, dy.stride(0), OWN_DX=own, **_launch(n_cols, p),
            )  # fmt: skip
    return dresidual, dx


class LayerNormFunction(torch.autograd.Function):
    """y = x_hat * w + b of residual + dropout(x); gradients by reference.layer_norm_bwd from slot norm_in (x_hat).

    x, residual [..., C], weight, bias [C]; p: of dropout, whose seed is drawn here; dtype: of y and x_hat, None for the
    wider one of x and residual. dw = sum over tokens of dy * x_hat, db = sum of dy. Keeps what the saver of norm_in
    does, 4 bytes a token (rstd), and a seed; weight and bias by reference. Temporary: x_hat each way; for dw fp32 dy,
    x_hat and their product, 12 C bytes a token.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, keeper: Keeper,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        rows, branch = (t.reshape(-1, t.shape[-1]) for t in (x, residual))
        seed = draw_seed(x.device) if p else None
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
        rows, x_hat = dy.reshape(-1, dy.shape[-1]), keeper.restore("norm_in")
        dresidual, dx = layer_norm_bwd(rows, x_hat, rstd, weight, seed, ctx.p, ctx.dtype)
        dresidual = dresidual.view(dy.shape).to(ctx.residual_dtype)
        dweight = dbias = None
        exact = torch.promote_types(rows.dtype, torch.float32)
        if ctx.needs_input_grad[2]:
            dweight = (rows.to(exact) * x_hat.to(exact)).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            dbias = rows.sum(dim=0, dtype=exact).to(weight.dtype)
        return dx.view(dy.shape), dresidual, dweight, dbias, None, None, None, None
