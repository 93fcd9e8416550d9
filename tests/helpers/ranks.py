"""Processes that talk by NCCL where each of two has a GPU; elsewhere they see none and talk by gloo."""

import os
import traceback
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hyclora.operators import dispatch
from tests.helpers.forked import forked


def run_ranks(function, folder, *args, processes: int = 2) -> None:
    """function(rank, *args) in each of them; RuntimeError if one raises, with its traceback on stderr.

    On a GPU that two shared NCCL would refuse them, and FSDP2's streams over gloo have lost bytes and crashed. It is
    hidden before they import torch; one process by itself is where two would be, to be compared with them.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < 2 else {}
    with mock.patch.dict(os.environ, hidden):
        mp.start_processes(
            _run, (function, str(folder), args, processes), nprocs=processes, start_method=forked().get_start_method()
        )


def _run(rank: int, function, folder: str, args: tuple, processes: int) -> None:
    torch.set_num_threads(1)
    dispatch.INTERPRETING = False  # as in the tests' own process: fixtures.py
    failed = True
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
        function(rank, *args)
        dist.barrier()
        failed = False
    except Exception:
        traceback.print_exc()
    finally:
        # without destructors: DDP's joins gloo's thread while it holds the GIL, for which that thread may be waiting
        os._exit(failed)
