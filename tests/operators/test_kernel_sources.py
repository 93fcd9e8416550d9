"""What every Triton kernel must not do, read off the source."""

import ast
import os
import re
import subprocess
import sys

import pytest

from hyclora.utils.args import ROOT

# sizes of the model or of the tile, and fixed numbers; a number of rows or tokens here would compile a kernel for
# every sequence length
FORMAT = {"BITS", "STEP", "CENTRE", "GROUPED", "GROUP", "NESTED", "WHOLE"}
ALLOWED = FORMAT | {"SIGN", "RANK", "HALF", "OUTLIERS", "WEIGHTED", "PACK", "ROTATE", "IGNORED", "N", "ROWS", "LAST"}
ALLOWED |= {"RESIDUAL", "IN_ORDER", "NORM", "ROUNDS", "ADD", "DROPOUT", "OWN_DX", "IN_PLACE"}
KERNELS = [
    (file.name, node)
    for file in sorted((ROOT / "operators").rglob("*.py"))
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
]


@pytest.mark.parametrize("file, kernel", KERNELS, ids=[f"{file}:{kernel.name}" for file, kernel in KERNELS])
def test_no_kernel_is_compiled_for_a_sequence_length(file, kernel):
    """Defect of the original: a new autotune for each sequence length. Also no libdevice: the interpreter lacks it."""
    constants = {a.arg for a in kernel.args.args if a.annotation is not None}
    stems = {re.sub("^(GATE|UP|DOWN|Q|K|V)_|_BLOCK$", "", name) for name in constants}
    assert {name for name in stems if not name.startswith("BLOCK")} <= ALLOWED
    source = ast.unparse(kernel)
    assert "autotune" not in source and "libdevice" not in source
    lengths = {"n_rows", "n_elements", "seq_len"} & {a.arg for a in kernel.args.args}
    if kernel.name.endswith("_kernel") and lengths:
        assert all(f"'{name}'" in ast.unparse(kernel.decorator_list[0]) for name in lengths)


def test_the_kernels_are_found():
    assert len(KERNELS) > 15


def test_every_kernel_compiles_for_a_gpu():
    """In a process of its own: the interpreter is chosen when triton is imported, and takes what does not compile."""
    command = [sys.executable, "-m", "tests.helpers.compile_kernels"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == {kernel.name for _, kernel in KERNELS if kernel.name.endswith("_kernel")}
