"""One job on several GPUs: a process a GPU, data parallel as the Trainer and torchrun have it.

The process that a sweep starts is rank 0 and starts the others, so that they all end with the sweep.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

PARENT = "HYCLORA_SWEEP"
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def end_with_parent() -> None:
    """Have Linux end this process with the one that started it, however that ends: it would go on using the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if int(os.environ.get(PARENT, os.getppid())) != os.getppid():
        sys.exit("the process that started this one has ended")


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment_of(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of n on one machine; nothing if it is alone."""
    if n == 1:
        return {}
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    return {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def together(gpus: int, command: list[str], device: str) -> Iterator[None]:
    """This process as a rank of a process group; rank 0 starts `command` for the others first, and ends them."""
    if gpus == 1:
        yield
        return
    others = []
    if rank() == 0:
        port = free_port()
        for i in range(1, gpus):
            mine = environment_of(i, gpus, port) | {PARENT: str(os.getpid())}
            others.append(subprocess.Popen(command, env=os.environ | mine))
        os.environ |= environment_of(0, gpus, port)
    import torch

    try:
        if device == "cuda":
            torch.cuda.set_device(rank())
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        yield
        torch.distributed.barrier()
    finally:
        for process in others:
            process.kill()


def end_rank_0() -> None:
    """Another rank has failed, for which rank 0 would wait."""
    os.kill(os.getppid(), signal.SIGKILL)


def data_parallel(model, device: str):
    """The model as DistributedDataParallel. Its buffers are the same in all processes."""
    from torch.nn.parallel import DistributedDataParallel

    mine = [rank()] if device == "cuda" else None
    return DistributedDataParallel(model, device_ids=mine, broadcast_buffers=False, gradient_as_bucket_view=True)


def fully_sharded(model) -> None:
    """PEFT's model with its weights split between the processes by fully_shard: each layer by itself, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)


def exchanging(network, now: bool):
    """For a micro-step: whether its backward adds up the gradients of all processes, or keeps them for a later one."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(now)
    elif hasattr(network, "no_sync") and not now:
        return network.no_sync()
    return contextlib.nullcontext()
