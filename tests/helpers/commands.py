"""Commands of this repository in the test's own process: one of its own imports for seconds before it does anything."""

import contextlib
import io
import runpy
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

from benchmarks import ranks

NOBODY = 2**30  # no process has such a number


def _run(command, stdout=None, **_) -> SimpleNamespace:
    """`python script.py ...` or `python -m module ...`, which has ended when this returns."""
    module, code, said = command[1] == "-m", 0, io.StringIO()
    words = list(command[2 if module else 1 :])
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(ranks, "end_with_parent"),  # the tests' own process stays
        contextlib.redirect_stdout(stdout or io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        try:
            (runpy.run_module if module else runpy.run_path)(words[0], run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
    return SimpleNamespace(returncode=code, stderr=said.getvalue(), pid=NOBODY, wait=lambda timeout=None: code)


# in place of the module of that name
IN_PROCESS = SimpleNamespace(**vars(subprocess) | {"run": _run, "Popen": _run})
