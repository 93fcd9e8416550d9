"""FlashAttention-4 of the package flash-attn-4, where it is installed and takes less time than torch's kernels.

torch has cuDNN's kernel for whole rows, and for runs of tokens and windows its flash kernel, which is of before Hopper.
benchmarks/attention.py measures them beside flash-attn-4, which takes more of the host: so few tokens are left to
torch. What is kept is the same, and a step takes 1 MiB more (benchmarks/README.md).
"""

import logging
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

PACKAGE = "flash-attn-4"
HALF = (torch.bfloat16, torch.float16)
CAPABILITY = (9, 0)
HEAD_DIMS = (64, 96, 128)
# tokens of a row, or of all runs, from which the host has time enough
LEAST = 4096

logger = logging.getLogger("hyclora")
_compiled: set[tuple] = set()


@cache
def package():
    """The module flash_attn.cute, None where the package is not installed; a broken one is told of once."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        return None
    # of an argument that is not given, once a kernel that its compiler (nvidia-cutlass-dsl 4.8.1) makes
    warnings.filterwarnings("ignore", "Argument aux_data .*cannot be converted", UserWarning)
    try:
        return import_module("flash_attn.cute")
    except Exception as error:  # whatever its compiler raises where it does not fit torch, CUDA or Python
        logger.warning(
            f"HyC-LoRA: {PACKAGE} {found} cannot be imported ({type(error).__name__}: {error}), so attention runs "
            "torch's kernels: install what it needs, or uninstall it"
        )
        return None


def suits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels are there for such heads, and were measured on such a GPU; it imports the package."""
    return (
        device.type == "cuda"
        and dtype in HALF
        and head_dim in HEAD_DIMS
        and torch.cuda.get_device_capability(device) == CAPABILITY
        and package() is not None
    )


def takes(q: Tensor, dropout: float, n_tokens: int, *kind) -> bool:
    """Whether attention of n_tokens runs so; q [..., D]; kind: what else another kernel is compiled for.

    Not with dropout, which it does not do; where deterministic algorithms are asked for, as its dq is added up in any
    order; nor where torch's flash attention is switched off, as sdpa_kernel and the like do. In a recording of a CUDA
    graph, where nothing should be compiled, only if it has run before.
    """
    taken = (
        n_tokens >= LEAST
        and dropout == 0
        and torch.backends.cuda.flash_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
        and suits(q.device, q.dtype, q.shape[-1])
    )
    kernel = (q.device, q.dtype, q.shape[-1], *kind)
    if taken and not torch.cuda.is_current_stream_capturing():
        _compiled.add(kernel)
    return taken and kernel in _compiled


def of_rows(q: Tensor, k: Tensor, v: Tensor, window: int | None, scaling: float, causal: bool) -> Tensor:
    """o = softmax(scaling q k^T) v of each row, as flash_attention has it; q, o [B, S, H, D], k, v [B, S, H_kv, D].

    Gradients by the package's own autograd function, which keeps q, k, v, o and 4 H bytes a token for lse.
    """
    with torch.cuda.device_of(q):
        return package().flash_attn_func(
            q, k, v, softmax_scale=scaling, causal=causal, window_size=_sides(window, causal)
        )[0]  # fmt: skip


def of_runs(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, window: int | None, scaling: float, causal: bool
) -> Tensor:
    """The same of each run; q, o [T, H, D], k, v [T, H_kv, D]; starts: int32 [N + 1] on their device."""
    with torch.cuda.device_of(q):
        return package().flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
            softmax_scale=scaling, causal=causal, window_size=_sides(window, causal),
        )[0]  # fmt: skip


def _sides(window: int | None, causal: bool) -> tuple[int | None, int | None]:
    """Tokens that are seen to the left and to the right of a token; None: all."""
    return (None, None) if window is None else (window - 1, 0 if causal else None)


def told(device: torch.device, head_dim: int) -> str | None:
    """What a report says of it, None where it is never taken."""
    if not suits(device, torch.bfloat16, head_dim):
        return None
    return f"{PACKAGE} {version(PACKAGE)} for rows, or packed ones, of {LEAST} tokens or more"
