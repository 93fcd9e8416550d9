"""LM head with cross-entropy: time, memory and exactness of ours against stock torch and other chunked versions.

    python -m benchmarks.cross_entropy        # [2048, 4096] x 32000 and x 128256, bf16, frozen head; needs a GPU

ms: median of a forward with backward. peak_mib: most allocated during one, over the inputs. gradient_error: relative,
of the gradient of the hidden states, against stock torch in fp32. Ours counts its targets inside the measured call, so
it waits for the GPU there; in a model that wait is covered by the decoder. One JSON line a row; an implementation that
is not installed says so.
"""

import argparse
import importlib
from collections.abc import Callable

import torch
import triton
from torch import Tensor, nn

from benchmarks.record import record
from hyclora.operators.cross_entropy import Targets, linear_cross_entropy
from hyclora.operators.linear.lora import Projection
from hyclora.operators.reference import IGNORED
from hyclora.utils.errors import UserError, entry_point

Loss = Callable[[Tensor, nn.Linear, Tensor], Tensor]


def stock(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """As HF computes it: whole logits, then in fp32."""
    return nn.functional.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED)


def ours(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, Targets(labels), Projection(head, "lm_head"), None)


def torch_chunked() -> Loss:
    from torch.nn import LinearCrossEntropyOptions  # torch 2.13 and later

    options = LinearCrossEntropyOptions()
    return lambda hidden, head, labels: nn.functional.linear_cross_entropy(
        hidden, head.weight, labels, ignore_index=IGNORED, options=options
    )


def liger() -> Loss:
    function = importlib.import_module(
        "liger_kernel.ops.fused_linear_cross_entropy"
    ).LigerFusedLinearCrossEntropyFunction

    def loss(hidden, head, labels):
        out = function.apply(hidden, head.weight, labels)
        return out[0] if isinstance(out, tuple) else out

    return loss


def cut(**options) -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, head, labels: function(hidden, head.weight, labels, **options)


# by default cut_cross_entropy leaves out the gradients of small probabilities; filter_eps=None computes all
IMPLEMENTATIONS: dict[str, Callable[[], Loss]] = {
    "stock": lambda: stock,
    "ours": lambda: ours,
    "torch chunked": torch_chunked,
    "liger": liger,
    "cut_cross_entropy": cut,
    "cut_cross_entropy, exact": lambda: cut(filter_eps=None),
}


def gradient(loss_of: Loss, hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss_of(hidden, head, labels), hidden)
    return grad


def measure(loss_of: Loss, hidden: Tensor, head: nn.Linear, labels: Tensor, truth: Tensor) -> dict:
    """ms, peak_mib and gradient_error of one implementation."""
    difference = gradient(loss_of, hidden, head, labels).float() - truth
    error = (difference.norm() / truth.norm()).item()
    del difference
    ms = triton.testing.do_bench(lambda: gradient(loss_of, hidden, head, labels), return_mode="median")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradient(loss_of, hidden, head, labels)
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": round(ms, 3), "peak_mib": round(peak / 2**20, 1), "gradient_error": error}


def outcome(make: Callable[[], Loss], *inputs: Tensor | nn.Linear) -> dict:
    """measure(), or why there is no measurement."""
    try:
        return measure(make(), *inputs)
    except ImportError:
        return {"error": "not installed"}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        # a package that does not fit this machine's versions must not cost the other rows
        return {"error": f"{type(error).__name__}: {error}"[:200]}


@entry_point
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"n_rows": 2048, "hidden": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.0, 0.6], help="share of labels that are -100")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("benchmarks.cross_entropy measures GPU time and memory: it needs a GPU")
    for vocab in args.vocab:
        torch.manual_seed(0)
        head = nn.Linear(args.hidden, vocab, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        hidden = torch.randn(args.n_rows, args.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for ignored in args.ignored:
            labels = torch.randint(0, vocab, (args.n_rows,), device="cuda")
            labels[torch.rand(args.n_rows, device="cuda") < ignored] = IGNORED
            wide = nn.Linear(args.hidden, vocab, bias=False, device="meta").requires_grad_(False)
            wide.weight = nn.Parameter(head.weight.float(), requires_grad=False)
            truth = gradient(stock, hidden.detach().float().requires_grad_(), wide, labels)
            del wide
            for name, make in IMPLEMENTATIONS.items():
                result = outcome(make, hidden, head, labels, truth)
                setting = {"implementation": name, "vocab": vocab, "ignored": ignored}
                record("cross_entropy", {"setting": setting, **result, "arguments": vars(args)})
                values = "  ".join(f"{key} {value}" for key, value in result.items())
                print(f"{name:<26}V {vocab:<8}{ignored:>4.0%} ignored  {values}", flush=True)


if __name__ == "__main__":
    main()
