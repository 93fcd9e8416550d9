"""A program's processes on one machine, one a GPU: torchrun's own, ended with one sentence in place of its report."""

import logging
import os
import signal
import sys
from dataclasses import fields

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hyclora.utils.errors import UserError
from hyclora.utils.runs.script import LAUNCHED, again

PATIENCE = 3600  # seconds that a process has after Ctrl-C to end its step and to write a checkpoint


def check_processes(n: int, use_cpu: bool) -> None:
    """UserError unless there are n GPUs, or CPU processes are asked for, and no launcher has started another number."""
    present, launched = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if n < 1:
        raise UserError(f"num_gpus must be 1 or more, not {n}")
    if n > max(present, 1) and not use_cpu:
        instead = "" if present else ", or add --use_cpu True for as many processes on the CPU"
        there = f"{'is' if present == 1 else 'are'} {present or 'none'}"
        raise UserError(f"num_gpus={n}, and there {there}: lower num_gpus{instead}")
    if is_launched() and n not in (1, launched):
        raise UserError(f"num_gpus={n}, and a launcher has started {launched} processes here: drop num_gpus")


def is_launched() -> bool:
    """Whether torchrun, or what does as it does, has started this process."""
    return "RANK" in os.environ


def launch(n: int, program: str, argv: list[str]) -> None:
    """Run the program n times with the options argv, each process knowing of the others as torchrun tells it.

    Ctrl-C and SIGTERM are handed on once; torch before 2.13 gives the processes 30 seconds then. SystemExit with the
    exit code of the first process that fails, after which the others are ended.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what there is to say
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or n) // n, 1)))
    waits = {"shutdown_timeout": PATIENCE} if "shutdown_timeout" in {f.name for f in fields(LaunchConfig)} else {}
    alone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid()), "max_restarts": 0}
    config = LaunchConfig(1, 1, n, **alone, **waits)
    try:
        elastic_launch(config, sys.executable)(program, *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name, resume = signal.Signals(-failure.exitcode).name, again(argv, "--resume_from_checkpoint", True)
            print(f"error: process {rank} was ended by {name}; go on with: {resume}", file=sys.stderr)
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
