"""Milliseconds of attention, forward and both ways, by torch's kernels and by flash-attn-4's, of rows and of runs.

    python -m benchmarks.attention          # 32 heads of 128, bf16; needs a GPU of Hopper and flash-attn-4

Kernels alone: each call is recorded in a CUDA graph, so that what the host does does not count. Whole rows by cuDNN,
by torch's flash attention and by flash-attn-4; packed runs of tokens, and a window, by torch's kernel for them and by
flash-attn-4. A line a cell, with the error of what a kernel cannot do.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import RESULTS, record
from hyclora.operators.attention import flash, flash4
from hyclora.utils.disk import check_output, to_path
from hyclora.utils.errors import UserError, entry_point

NAME = "attention"
CUDNN, FLASH, VARLEN = "cuDNN", "torch's flash", "torch's, for runs"
SECONDS = 0.4  # of replays for each number
HEAD_DIM, SCALING = 128, 0.088


@dataclass(frozen=True)
class Cell:
    """A batch of rows, or, where it is one row, what runs it has; all of heads of 128."""

    rows: int = 1
    seq_len: int = 2048
    runs: int = 1
    kv_heads: int = 32
    window: int | None = None
    heads: int = 32

    @property
    def whole(self) -> bool:
        """Whether its rows are."""
        return self.runs == 1 and self.window is None

    def __str__(self) -> str:
        words = [f"{self.rows} x {self.seq_len} tokens"]
        words += [f"in {self.runs} runs"] * (self.runs > 1)
        words += [f"window of {self.window}"] * (self.window is not None)
        return ", ".join([*words, f"{self.heads} heads, {self.kv_heads} of k and v"])


CELLS = (
    *(Cell(rows, n) for rows, n in ((4, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (1, 32768))),
    Cell(seq_len=8192, kv_heads=8),
    Cell(seq_len=131072, heads=4, kv_heads=4),
    *(Cell(seq_len=n, runs=runs) for n, runs in ((856, 4), (2048, 4), (2048, 16), (4096, 8), (16384, 32), (16384, 4))),
    Cell(seq_len=16384, runs=32, kv_heads=8),
    Cell(seq_len=16384, window=4096, kv_heads=8),
)


def graph_ms(call: Callable) -> float:
    """Mean milliseconds of what call launches, over replays of its recording."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replays(n: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(n):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / n

    return replays(max(3, int(1000 * SECONDS / replays(2))))


def kernels(cell: Cell, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """By name, attention of whole rows, q [B, S, H, D], or of runs, q [T, H, D]; k and v have heads of their own."""
    if cell.whole:
        found = {
            name: lambda q, k, v, kind=kind: _sdpa(kind, q, k, v)
            for name, kind in ((CUDNN, SDPBackend.CUDNN_ATTENTION), (FLASH, SDPBackend.FLASH_ATTENTION))
        }
        return found | {flash4.PACKAGE: lambda q, k, v: flash4.of_rows(q, k, v, None, SCALING, True)}
    starts = torch.arange(cell.runs + 1, dtype=torch.int32, device=device) * (cell.seq_len // cell.runs)
    starts[-1], left = cell.seq_len, -1 if cell.window is None else cell.window - 1

    def torchs(q, k, v):
        longest = cell.seq_len  # as of a stream, of whose runs the host knows no more
        return flash.varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=SCALING, window_size=(left, 0), **flash.GROUPED
        )  # fmt: skip

    def theirs(q, k, v):
        return flash4.of_runs(q, k, v, starts, cell.seq_len, cell.window, SCALING, True)

    return {VARLEN: torchs, flash4.PACKAGE: theirs}


def _sdpa(kind, q, k, v) -> Tensor:
    with sdpa_kernel(kind):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, scale=SCALING, enable_gqa=q.shape[2] != k.shape[2]
        )
    return o.transpose(1, 2)


def measure(cell: Cell, device: str = "cuda") -> dict[str, dict]:
    """By kernel, forward_ms and both_ms, or the error."""
    shape = (cell.rows, cell.seq_len) if cell.whole else (cell.seq_len,)
    made = [torch.randn(*shape, n, HEAD_DIM, device=device) for n in (cell.heads, cell.kv_heads, cell.kv_heads)]
    q, k, v = (t.bfloat16().requires_grad_() for t in made)
    do = torch.randn_like(q)
    found = {}
    for name, attend in kernels(cell, device).items():

        def forward(attend=attend):
            with torch.no_grad():
                attend(q, k, v)

        def both(attend=attend):
            torch.autograd.grad(attend(q, k, v), (q, k, v), do)

        try:
            found[name] = {"forward_ms": round(graph_ms(forward), 4), "both_ms": round(graph_ms(both), 4)}
        except RuntimeError as error:
            found[name] = {"error": str(error).splitlines()[0][:200]}
    return found


@entry_point
def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=to_path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or not flash4.suits(torch.device("cuda"), torch.bfloat16, HEAD_DIM):
        raise UserError(
            f"this compares {flash4.PACKAGE} with torch's kernels: it needs a GPU of Hopper and {flash4.PACKAGE} "
            f"(pip install --pre '{flash4.PACKAGE}[cu13]')"
        )
    check_output(args.output_dir, needed=2**20)
    lines = []
    for cell in CELLS:
        found = measure(cell)
        lines.append(record(NAME, {"cell": asdict(cell), "kernels": found}, args.output_dir))
        told = "  ".join(f"{name} {' '.join(map(str, times.values()))}" for name, times in found.items())
        print(f"{cell}: {told}", flush=True)
    return lines


if __name__ == "__main__":
    main()
