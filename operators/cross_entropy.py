"""LM head and cross-entropy in one autograd Function, chunk by chunk of rows: whole logits never exist.

With z = h W^T + LoRA [T, V] the loss of a row is logsumexp(z) - z[label] and its gradient softmax(z) - onehot(label).
The gradient needs nothing from backward but a scalar, so forward computes it at once and keeps dh [N, C], not z [T, V].
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hyclora.operators import reference
from hyclora.operators.dispatch import as_rows, device_guard, next_power_of_2, use_triton
from hyclora.operators.first_order import first_order
from hyclora.operators.linear.lora import Projection
from hyclora.operators.reference import IGNORED

# large enough that reading W once a chunk hides behind the chunk's GEMM, small beside one layer's activations
CHUNK_BYTES = 64 * 2**20
# GEMM tiles are at most this high; a chunk of whole tiles wastes none
TILE_ROWS = 128
MAX_BLOCK = 8192


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, n_cols, stride_row, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    label = tl.load(labels_ptr + row)
    counted = label != IGNORED
    # a label outside of the vocabulary makes the loss NaN; torch's own kernel would abort the process
    label_logit = tl.load(logits_ptr + label, mask=(label >= 0) & (label < n_cols), other=float("nan")).to(tl.float32)
    # finite, so that a block of nothing but -inf is no -inf - -inf
    largest = tl.full((), -3.4e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + col, mask=col < n_cols, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), axis=0)
        largest = new
    tl.store(loss_ptr + row, tl.where(counted, tl.log(total) - (label_logit - largest), 0.0))
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + col, mask=col < n_cols, other=float("-inf")).to(tl.float32)
        grad = tl.exp(x - largest) / total - tl.where(col == label, 1.0, 0.0)
        grad = tl.where(counted, grad, 0.0)
        tl.store(logits_ptr + col, grad.to(logits_ptr.dtype.element_ty), mask=col < n_cols)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """reference.cross_entropy_ on any device: loss of each row (fp32 [R]); logits [R, V] become their gradient.

    Allocates 4 bytes a row on a GPU. ValueError for logits without unit stride along V.
    """
    if not use_triton(logits):
        return reference.cross_entropy_(logits, labels)
    n_rows, n_cols = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("logits must have unit stride along the vocabulary: they are overwritten in place")
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    block = min(next_power_of_2(n_cols), MAX_BLOCK)
    if n_rows:
        with device_guard(logits):
            _cross_entropy_kernel[(n_rows,)](
                logits, labels.contiguous(), loss, n_cols, logits.stride(0),
                IGNORED=IGNORED, BLOCK=block, num_warps=max(1, block // 512),
            )  # fmt: skip
    return loss


class Targets:
    """The labels that are in the loss and the rows they belong to; made before the decoder runs.

    labels: [..., S], each for the hidden state that is `ahead` positions before it. Which of them are in the loss
    reaches the host by a copy that is queued here, ahead of the decoder's kernels: waiting for it at the head leaves
    those kernels in the GPU's queue. Nothing else is done here, as the GPU may be waiting for those kernels.
    """

    def __init__(self, labels: Tensor, ahead: int = 0):
        self._labels = F.pad(labels, (0, ahead), value=IGNORED)[..., ahead:].reshape(-1)
        flags = self._labels != IGNORED
        self.count = flags.sum()
        self._host, self._copied = flags, None
        if labels.is_cuda:
            self._host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._host.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.current_stream(labels.device).record_event()

    def counted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row indices [N] and labels [N] that are in the loss."""
        # on the host: nonzero() on a GPU would wait for the decoder's kernels
        rows = self._flags().nonzero().flatten()
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        return rows, self._labels.to(device)[rows]

    def miss(self, rows: Tensor) -> bool:
        """Whether none of these rows, bool [B, S] on the host, is in the loss; waits for the copy."""
        flags = self._flags()
        return flags.numel() == rows.numel() and not (flags & rows.flatten()).any()

    def _flags(self) -> Tensor:
        """Which rows are in the loss, bool [T] on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def linear_cross_entropy(
    hidden: Tensor, targets: Targets, p: Projection, num_items: Tensor | int | None, places: Tensor | None = None
) -> Tensor:
    """HF's causal LM loss of hidden [..., C] under head p: the mean over targets, or their sum / num_items. fp32.

    places: where in hidden each row of the targets is, int64; None: they are in order.
    No target at all is 0 / 0 = NaN for the mean, as in torch; its gradient is 0. Keeps what the Function does; of rows
    8 bytes each that is counted, and 8 for the divisor.
    """
    hidden = as_rows(hidden)
    rows, labels = targets.counted(hidden.device)
    rows = rows if places is None else places[rows]
    total = LinearCrossEntropyFunction.apply(hidden, rows, labels, p, *p.parameters())
    divisor = targets.count if num_items is None else num_items
    return total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Sum of cross-entropies (fp32 scalar) of hidden[rows] W^T + LoRA against labels.

    hidden [T, C] in compute dtype, rows and labels int64 [N], p the head, parameters as p.parameters(). Gradients of
    the sum are computed in forward (linear/lora.py has the formulas; those of parameters are summed in fp32) and
    kept: dh of the N rows, in hidden's dtype, those of parameters (4 bytes an element), and rows (8 bytes each).
    Backward multiplies them by the scalar it gets. Temporary: W if it is NF4 or of another dtype, and logits of
    CHUNK_BYTES, twice that under an adapter. No errors; a label outside of the vocabulary makes the loss NaN on a GPU.
    """

    @staticmethod
    def forward(ctx, hidden, rows, labels, p: Projection, *parameters):
        need_hidden, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        grads = [
            torch.zeros_like(t, dtype=torch.float32) if n else None for t, n in zip(parameters, needs, strict=True)
        ]
        dhidden = torch.empty(len(rows), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        head = _Head(p, hidden, parameters)
        for part_rows, part_labels, part_dhidden in zip(
            *(t.split(_chunk_rows(head.weight)) for t in (rows, labels, dhidden)), strict=True
        ):
            logits = head.logits(hidden, part_rows)
            loss += cross_entropy_(logits, part_labels).sum()
            if need_hidden or any(needs):
                head.backward(logits, part_dhidden if need_hidden else None, grads)
            del logits  # before the next ones are made
        ctx.save_for_backward(dhidden if need_hidden else None, rows, *grads)
        ctx.n_rows, ctx.dtypes = len(hidden), [None if t is None else t.dtype for t in parameters]
        return loss

    @staticmethod
    @first_order
    def backward(ctx, dloss):
        dhidden, rows, *grads = ctx.saved_tensors
        if not len(rows):
            # the mean over no target has an infinite gradient, and 0 * inf is not 0
            dloss = torch.zeros_like(dloss)
        dx = None
        if dhidden is not None:
            dx = dhidden.new_zeros(ctx.n_rows, dhidden.shape[1]).index_copy_(0, rows, dhidden * dloss)
        return (
            dx,
            None,
            None,
            None,
            *(g if g is None else (g * dloss).to(d) for g, d in zip(grads, ctx.dtypes, strict=True)),
        )


def _chunk_rows(weight: Tensor) -> int:
    """Rows whose logits fill CHUNK_BYTES, in whole GEMM tiles where that many fit."""
    n = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    return n if n < TILE_ROWS else n - n % TILE_ROWS


class _Head:
    """The head during one forward: W cast or dequantized once, and one chunk's exact low-rank tensors."""

    def __init__(self, p: Projection, hidden: Tensor, parameters: tuple[Tensor | None, ...]):
        self.p, self.weight = p, p.weight(hidden.dtype)
        self.lora_A, self.lora_B, self.bias_B, bias = parameters
        self.bias = None if bias is None else bias.to(hidden.dtype)
        # drawn at once over all rows as PEFT draws it, whose code makes the logits that somebody looks at later
        self.factors = F.dropout(torch.ones_like(hidden, dtype=self.lora_A.dtype), p.dropout) if p.dropout else None

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """z [R, V] of the rows."""
        x = hidden.index_select(0, rows)
        frozen = F.linear(x, self.weight, self.bias)
        self.x, self.xa, self.mask = x, None, None
        if self.p.has_adapter:
            if self.factors is not None:
                self.mask = self.factors.index_select(0, rows)
                self.x = (x * self.mask).to(x.dtype)
            self.xa = self.x @ self.lora_A.to(x.dtype).t()
        return self.p.up(frozen, self.xa, self.lora_B, self.bias_B)

    def backward(self, dlogits: Tensor, dhidden: Tensor | None, grads: list[Tensor | None]) -> None:
        """Write dh [R, C] of the last chunk and add its gradients of the parameters to grads."""
        p, dtype = self.p, dlogits.dtype
        grad_A, grad_B, grad_bias_B, grad_bias = grads
        g = (dlogits @ self.lora_B.to(dtype)).mul_(p.scaling) if p.has_adapter else None
        if dhidden is not None:
            torch.mm(dlogits, self.weight, out=dhidden)
            if p.has_adapter and self.mask is None:
                dhidden.addmm_(g, self.lora_A.to(dtype))
            elif p.has_adapter:
                dhidden.add_((g @ self.lora_A.to(dtype)) * self.mask)
        if grad_A is not None:
            grad_A.add_(g.t() @ self.x)
        if grad_B is not None:
            grad_B.add_(dlogits.t() @ self.xa, alpha=p.scaling)
        if grad_bias_B is not None:
            grad_bias_B.add_(dlogits.sum(dim=0, dtype=torch.float32), alpha=p.scaling)
        if grad_bias is not None:
            grad_bias.add_(dlogits.sum(dim=0, dtype=torch.float32))
