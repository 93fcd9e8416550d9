#!/usr/bin/env bash
# The backward of torch's varlen_attn takes fp32 memory for 128 tokens more with each document, empty ones included.
#
# torch 2.11.0 on a Hopper GPU (needs a GPU from Ampere on). The gradient of q is summed up in fp32 memory for T + 128 N
# tokens, T in all N documents: a row of 2048 tokens that are packed of 64 short documents takes five times the memory
# of one that is a single document, and so does one whose last 63 documents are empty places. The function's
# documentation does not say so. Here: the peak of a backward over what was there before it, at 1, 16 and 64 documents.
# Fails if 63 more documents cost less than three quarters of that.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.11.0 numpy==2.4.1
"$work/env/bin/python" - <<'EOF'
import torch
from torch.nn.attention.varlen import varlen_attn

if not torch.cuda.is_available():
    raise SystemExit("this measures GPU memory and needs a GPU")
T, H, D = 2048, 32, 128


def peak_of_backward(ends):
    """MiB over what is there before the backward of documents that end at these tokens."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
    o = varlen_attn(q, k, v, starts, starts, T, T, window_size=(-1, 0))
    do = torch.randn_like(o)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(o, (q, k, v), do)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


peak_of_backward([T])  # whatever is set up once
found = {
    "1 document": peak_of_backward([T]),
    "16 documents": peak_of_backward(range(T // 16, T + 1, T // 16)),
    "64 documents": peak_of_backward(range(T // 64, T + 1, T // 64)),
    "1 document, 63 empty": peak_of_backward([T] * 64),
}
for name, mib in found.items():
    print(f"{name:<22}{mib:8.1f} MiB")
expected = 63 * 128 * H * D * 4 / 2**20
print(f"63 documents more by 128 tokens each in fp32: {expected:.1f} MiB")
least = min(found["64 documents"], found["1 document, 63 empty"]) - found["1 document"]
raise SystemExit(0 if least > 0.75 * expected else "documents cost no such memory now: this finding is out of date")
EOF
