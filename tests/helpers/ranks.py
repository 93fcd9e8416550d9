"""Two processes that talk by gloo, or by NCCL where each has a GPU."""

import os
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hyclora.operators import dispatch
from tests.helpers.forked import forked


def run_ranks(function, folder, *args) -> None:
    """function(rank, *args) in each of two processes; RuntimeError if one raises, with its traceback on stderr."""
    mp.start_processes(_run, (function, str(folder), args), nprocs=2, start_method=forked().get_start_method())


def _run(rank: int, function, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dispatch.INTERPRETING = False  # as in the tests' own process: fixtures.py
    failed = True
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() > 1 else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        function(rank, *args)
        dist.barrier()
        failed = False
    except Exception:
        traceback.print_exc()
    finally:
        # without destructors: DDP's joins gloo's thread while it holds the GIL, for which that thread may be waiting
        os._exit(failed)
