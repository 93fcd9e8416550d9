"""Ctrl-C ends a program in one line from its first import on: torch and transformers take seconds, before any main.

A program imports this in front of all else, which the linter sees to. Inside of main entry_point (errors.py) ends it.
"""

import sys
from functools import partial

from hyclora.utils.errors import end_interrupted


def _hook(otherwise, kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        return otherwise(kind, error, trace)
    end_interrupted()


sys.excepthook = partial(_hook, sys.excepthook)
