"""Processes that are forked from one that has imported everything: spawned ones would import for seconds each."""

import multiprocessing
import os
from multiprocessing import forkserver
from unittest import mock

import torch

PRELOADED = ["tests.helpers.drivers", "tests.helpers.replaying", "benchmarks.memory_throughput"]


def forked():
    """The context of such processes; where there is a GPU they are spawned, as CUDA does not survive a fork."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)  # kernels are for the tests' own process
        forkserver.ensure_running()
    return context
