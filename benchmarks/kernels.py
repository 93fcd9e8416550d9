"""Bandwidth of every kernel against the machine's copy rate.

    python -m benchmarks.kernels              # at Llama-2-7B's widths, 2048 tokens, bf16; needs a GPU

Bytes are the fewest that the operator must read and write; GB/s is those over the median time on the GPU: a call waits
in the queue behind other work, so that the host's part of it, which is often longer, does not count. share: of the rate
of the first row, a copy of [n_rows, ffn]; same_bytes: of that of a copy that moves as many bytes, as a kernel's start
and end weigh more in short ones. One JSON line a kernel.
"""

import argparse
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.record import record
from hyclora.operators.attention.rope import rope, rope_bwd
from hyclora.operators.layer_norm import layer_norm_bwd, layer_norm_fwd, layer_norm_pack, layer_norm_unpack_bwd
from hyclora.operators.linear.dropout import add_dropped, draw_seed, dropped
from hyclora.operators.linear.low_rank_grad import low_rank_grads
from hyclora.operators.linear.nf4 import bnb, dequantize_4bit
from hyclora.operators.linear.residual import add_residual
from hyclora.operators.mlp.activation import gelu_bwd, gelu_fwd, silu_mul_bwd, silu_mul_fwd
from hyclora.operators.mlp.fused_mlp import fused_mlp_bwd, fused_mlp_fwd
from hyclora.operators.norm import rms_norm_bwd, rms_norm_fwd, rms_norm_pack, rms_norm_unpack_bwd
from hyclora.operators.packing.codebook import CODEBOOKS, GROUP
from hyclora.operators.packing.quantize import dequantize, quantize
from hyclora.operators.savers import ChannelQuant, Keeper, Step
from hyclora.utils.errors import UserError, entry_point

RANK = 16


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def gpu_ms(call: Callable, repeat: int = 20) -> float:
    """Median milliseconds of the kernels that call launches, with nothing of its inputs in the L2 cache.

    The cache is filled by reading: what is written stays there until the next kernel drives it out, at its expense.
    """
    flush = torch.zeros(2**26, dtype=torch.float32, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat + 3)]
    for start, stop in events:
        flush.sum()
        torch.cuda._sleep(400_000)
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events[3:])


def copy_ms(nbytes: int) -> float:
    """Milliseconds of a copy that reads and writes nbytes in all."""
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
    return gpu_ms(source.clone)


def fused_mlp(y: Tensor, xa: Tensor, B: Tensor, dhidden: Tensor, group: int) -> tuple[Callable, Callable, int, int]:
    """The kernel between gate, up and down at 2 bit: forward, forward and backward, and the bytes of each."""
    n_rows, ffn = dhidden.shape
    projections = SimpleNamespace(
        projections=[SimpleNamespace(rank=RANK)] * 2, columns=[slice(ffn), slice(ffn, 2 * ffn)], xa_name="xa",
        buffer=lambda n_rows, low_rank, like: like.new_empty(n_rows, 2 * ffn),
    )  # fmt: skip
    spec, adapters, step = SimpleNamespace(gate_up=projections), SimpleNamespace(B=B), Step(threshold=1, index=1)
    savers = {name: ChannelQuant(2, "channel_group", 0.0, group) for name in ("gate", "up")}

    def forward() -> Keeper:
        keeper = Keeper(savers, step)
        keeper.keep_exact("xa", xa)
        fused_mlp_fwd(spec, y, adapters, keeper)
        return keeper

    def both():
        fused_mlp_bwd(spec, dhidden, None, adapters, forward())

    forward()
    step.index = 2
    packed = sum(n_rows * saver.bits(ffn) / 8 for saver in savers.values())
    moved = int(size(y, dhidden) + packed)
    return forward, both, moved, int(moved + packed + size(dhidden, y, dhidden))


def operators(n_rows: int, hidden: int, ffn: int, head_dim: int) -> dict[str, tuple[Callable, int]]:
    """name -> (a call, bytes it must move)."""
    x, dy = (torch.randn(n_rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate, up, dhidden = (torch.randn(n_rows, ffn, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16)
    mean, std = torch.randn(ffn, device="cuda"), torch.rand(ffn, device="cuda") + 0.5
    heads = x.view(1, n_rows, -1, head_dim)
    cos, sin = (torch.randn(1, n_rows, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    y, x_hat, rstd = rms_norm_fwd(x, weight, 1e-5)
    saver, step = ChannelQuant(4, "channel_group", 0.005), Step(threshold=1, index=1)
    slot = saver.pack(x_hat, step)
    step.index, packed = 2, size(*slot[:3])
    dy_wide, xa = (torch.randn(n_rows, n, device="cuda", dtype=torch.bfloat16) for n in (2 * ffn, 2 * RANK))
    seed = draw_seed(x.device)
    B = torch.block_diag(*torch.randn(2, ffn, RANK, device="cuda")).bfloat16()

    def by_parts():
        parts = zip(dy_wide.split(ffn, dim=1), xa.split(RANK, dim=1), strict=True)
        return [torch.mm(part.t(), own, out_dtype=torch.float32) for part, own in parts]

    found = {
        "copy": (lambda: gate.clone(), 2 * size(gate)),
        "rms_norm_fwd": (lambda: rms_norm_fwd(x, weight, 1e-5), size(x, y, x_hat)),
        "rms_norm_bwd": (lambda: rms_norm_bwd(dy, x_hat, rstd, weight), size(dy, x_hat, dy)),
        "rms_norm_pack 4 bit": (lambda: rms_norm_pack(x, weight, 1e-5, saver, step), size(x, y) + packed),
        "rms_norm_unpack_bwd 4 bit": (
            lambda: rms_norm_unpack_bwd(dy, rstd, weight, slot, saver.book),
            size(dy, dy) + packed,
        ),
        "rms_norm_unpack_bwd 4 bit + residual": (
            lambda: rms_norm_unpack_bwd(dy, rstd, weight, slot, saver.book, x),
            size(dy, dy, x) + packed,
        ),
        "add_residual": (lambda: add_residual(dy, xa[:, :RANK], B[:hidden, :RANK], x, overwrite=True), size(dy, x, x)),
        "low_rank_grad": (
            lambda: low_rank_grads(dy_wide, xa, B, [ffn] * 2, [RANK] * 2, torch.empty_like(xa)),
            size(dy_wide),
        ),
        "low_rank_grad, torch": (lambda: (dy_wide @ B, *by_parts()), size(dy_wide)),
        "dropout": (lambda: dropped(x, seed, 0, 0.05), 2 * size(x)),
        "dropout, torch": (lambda: torch.nn.functional.dropout(x, 0.05), 2 * size(x)),
        "dropout, added": (lambda: add_dropped(x, dy, seed, 0, 0.05), 3 * size(x)),
        "rope": (lambda: rope(heads, cos, sin), 2 * size(x)),
        "rope_bwd": (lambda: rope_bwd(heads, heads, heads, cos, sin), 6 * size(x)),
        "silu_mul_fwd": (lambda: silu_mul_fwd(gate, up), 3 * size(gate)),
        "silu_mul_bwd": (lambda: silu_mul_bwd(dhidden, gate, up), 6 * size(gate)),
        "gelu_fwd": (lambda: gelu_fwd(up), 2 * size(up)),
        "gelu_bwd": (lambda: gelu_bwd(dhidden, up), 4 * size(up)),
    }
    for p in (0.0, 0.1):  # the seed of a mask costs next to nothing, the mask does
        drop, told = (seed, p), " + dropout" if p else ""

        def norm(drop=drop):
            return layer_norm_fwd(x, dy, weight, weight, 1e-5, *drop)

        def norm_bwd(drop=drop):
            return layer_norm_bwd(dy, x_hat, rstd, weight, *drop)

        def norm_pack(drop=drop):
            return layer_norm_pack(x, dy, weight, weight, 1e-5, saver, *drop)

        def norm_unpack_bwd(drop=drop):
            return layer_norm_unpack_bwd(dy, rstd, weight, slot, saver.book, *drop)

        gradients = (3 if p else 2) * size(dy)  # dy, dresidual, and dx if that is another
        found |= {
            f"layer_norm_fwd{told}": (norm, 4 * size(x)),
            f"layer_norm_bwd{told}": (norm_bwd, gradients + size(x_hat)),
            f"layer_norm_pack 4 bit{told}": (norm_pack, 3 * size(x) + packed),
            f"layer_norm_unpack_bwd 4 bit{told}": (norm_unpack_bwd, gradients + packed),
        }
    if bnb is not None:
        nf4 = bnb.nn.Params4bit(torch.randn(ffn, hidden).bfloat16(), requires_grad=False, quant_type="nf4").to("cuda")
        out = torch.empty(ffn, hidden, dtype=torch.bfloat16, device="cuda")
        moved = out.numel() // 2 + size(out, nf4.quant_state.absmax)
        found["nf4 dequantize"] = lambda: dequantize_4bit(nf4, out), moved
        found["nf4 dequantize, bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(nf4.data, nf4.quant_state), moved
    for bits, book in CODEBOOKS["channel_group"].items():
        codes, scale = quantize(gate, mean, 1 / std, book)
        moved = size(gate, codes, scale)

        def pack(book=book):
            return quantize(gate, mean, std, book)  # any numbers will do for inv_std

        def unpack(codes=codes, scale=scale, book=book):
            return dequantize(codes, scale, mean, std, book, torch.bfloat16)

        found |= {f"quantize {bits} bit": (pack, moved), f"dequantize {bits} bit": (unpack, moved)}
    for group in (GROUP, 2 * GROUP):
        forward, both, moved, moved_by_both = fused_mlp(dy_wide, xa, B, dhidden, group)
        told = f"fused MLP 2 bit, groups of {group}"
        found |= {f"{told}: forward": (forward, moved), f"{told}: both ways": (both, moved_by_both)}
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
        ms = gpu_ms(call)
        rate = moved / ms / 1e6
        copy_rate = copy_rate or rate
        shares = {"share": rate / copy_rate, "same_bytes": copy_ms(moved) / ms}
        record("kernels", {"setting": name, "ms": ms, "gb_s": rate, **shares, "arguments": vars(args)})
        words = "{share:8.0%} of the copy rate{same_bytes:8.0%} of a copy of as many bytes".format(**shares)
        print(f"{name:<20}{1e3 * ms:9.1f} us{rate:9.0f} GB/s{words}", flush=True)


if __name__ == "__main__":
    main()
