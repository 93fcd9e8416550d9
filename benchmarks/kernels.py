"""Bandwidth of every kernel against the machine's copy rate.

    python -m benchmarks.kernels              # at Llama-2-7B's widths, 2048 tokens, bf16; needs a GPU

Bytes are the fewest that the operator must read and write; GB/s is those over the median time. One JSON line a kernel.
"""

import argparse
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from benchmarks.record import record
from operators.activation import silu_mul_bwd, silu_mul_fwd
from operators.codebook import CODEBOOKS
from operators.norm import rms_norm_bwd, rms_norm_fwd
from operators.quantize import dequantize, quantize
from operators.rope import rope
from utils.errors import UserError, entry_point


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def operators(n_rows: int, hidden: int, ffn: int, head_dim: int) -> dict[str, tuple[Callable, int]]:
    """name -> (a call, bytes it must move)."""
    x, dy = (torch.randn(n_rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate, up, dhidden = (torch.randn(n_rows, ffn, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16)
    mean, std = torch.randn(ffn, device="cuda"), torch.rand(ffn, device="cuda") + 0.5
    heads = x.view(1, n_rows, -1, head_dim)
    cos, sin = (torch.randn(1, n_rows, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    y, x_hat, rstd = rms_norm_fwd(x, weight, 1e-5)
    found = {
        "copy": (lambda: gate.clone(), 2 * size(gate)),
        "rms_norm_fwd": (lambda: rms_norm_fwd(x, weight, 1e-5), size(x, y, x_hat)),
        "rms_norm_bwd": (lambda: rms_norm_bwd(dy, x_hat, rstd, weight), size(dy, x_hat, dy)),
        "rope": (lambda: rope(heads, cos, sin), 2 * size(x)),
        "silu_mul_fwd": (lambda: silu_mul_fwd(gate, up), 3 * size(gate)),
        "silu_mul_bwd": (lambda: silu_mul_bwd(dhidden, gate, up), 6 * size(gate)),
    }
    for bits, book in CODEBOOKS["channel_group"].items():
        codes, scale = quantize(gate, mean, std, book)
        moved = size(gate, codes, scale)

        def pack(book=book):
            return quantize(gate, mean, std, book)

        def unpack(codes=codes, scale=scale, book=book):
            return dequantize(codes, scale, mean, std, book, torch.bfloat16)

        found |= {f"quantize {bits} bit": (pack, moved), f"dequantize {bits} bit": (unpack, moved)}
    return found


@entry_point
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"n_rows": 2048, "hidden": 4096, "ffn": 11008, "head_dim": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("benchmarks.kernels measures GPU bandwidth: it needs a GPU")
    copy_rate = None
    for name, (call, moved) in operators(**vars(args)).items():
        ms = triton.testing.do_bench(call, return_mode="median")
        rate = moved / ms / 1e6
        copy_rate = copy_rate or rate
        share = rate / copy_rate
        record("kernels", {"setting": name, "ms": ms, "gb_s": rate, "share": share, "arguments": vars(args)})
        print(f"{name:<20}{1e3 * ms:9.1f} us{rate:9.0f} GB/s{share:8.0%} of the copy rate", flush=True)


if __name__ == "__main__":
    main()
