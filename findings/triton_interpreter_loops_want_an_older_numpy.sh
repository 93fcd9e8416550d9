#!/usr/bin/env bash
# In triton 3.6.0's interpreter a loop up to a kernel's argument fails with numpy 2.4, which triton does not ask to avoid.
#
# triton 3.6.0, numpy 2.4.6 (TRITON_INTERPRET=1, torch 2.13.0 on a CPU): the end of `range(0, n, BLOCK)` is an array of
# one element in the interpreter, which numpy 2.4 does not turn into a number any more: "only 0-dimensional arrays can be
# converted to Python scalars". numpy 2.3.5 does with a warning, and triton 3.7.1 works with either. On a GPU the same
# kernel is compiled, and numpy has no part in it.
# Fails if the error goes, or one of the others comes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
cat > "$work/kernel.py" <<'EOF'
import torch
import triton
import triton.language as tl


@triton.jit
def add_up(x_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(sum_ptr, tl.sum(total, axis=0))


x, found = torch.arange(10.0), torch.zeros(1)
add_up[(1,)](x, found, 10, BLOCK=4)
print(found.item())
EOF
said() {
    "$work/env/bin/pip" install -q "triton==$1" "numpy==$2"
    (cd "$work" && TRITON_INTERPRET=1 env/bin/python -W ignore kernel.py 2>&1 || true) | tail -n 1
}
status=0
for versions in "3.6.0 2.4.6" "3.6.0 2.3.5" "3.7.1 2.4.6"; do
    # shellcheck disable=SC2086
    found=$(said $versions)
    echo "triton and numpy $versions: $found"
    if [[ $versions == "3.6.0 2.4.6" ]]; then
        [[ $found == *"only 0-dimensional arrays can be converted to Python scalars"* ]] || status=1
    else
        [[ $found == 45.0 ]] || status=1
    fi
done
[[ $status == 0 ]] || echo "it is otherwise now: this finding is out of date"
exit $status
