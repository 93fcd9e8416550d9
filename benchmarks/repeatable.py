"""Runs of drivers in processes of their own, of which two that are the same run can be compared.

On a CPU they are so bit by bit. On a GPU the backward of flash attention adds in whatever order comes, and a run that
goes on records its CUDA graphs anew, which fill rows up to other lengths. So a run is exact there with torch's
deterministic algorithms and without graphs; as it is by default it can be compared with the spread of such runs alone.
"""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

from benchmarks.ranks import environment_of, free_port
from benchmarks.workers import ENVIRONMENT, given, visible_gpus
from hyclora.utils.errors import UserError

EXACT = "HYCLORA_EXACT"  # in the environment of a run that is to be exact on a GPU
EXACT_ENVIRONMENT = {EXACT: "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # cuBLAS's condition for the same bits
EXACT_OPTIONS = ("--cuda_graphs", "False")


@dataclass
class Processes:
    """How the processes of a run are started, and how many; runs take turns on the GPUs, and may be side by side.

    serve(pipe, environment, ...): what a process does; pipe: where the first one tells of itself, None in others.
    """

    context: BaseContext
    serve: Callable
    n: int = 1
    gpus: tuple[str, ...] = ()
    exact: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turns: Iterator[int] = field(default_factory=itertools.count)
    _ports: set[int] = field(default_factory=set)

    def start(self, *args) -> tuple[list, Connection]:
        """All of a run, and what the first one says of itself."""
        ours, theirs = self.context.Pipe(duplex=False)
        pipes = [theirs, *[None] * (self.n - 1)]
        with self._lock:
            found = []
            for pipe, environment in zip(pipes, self._environments(), strict=True):
                process = self.context.Process(target=self.serve, args=(pipe, environment, *args))
                with given(environment):  # CUDA reads it before the process could set it
                    process.start()
                found.append(process)
        theirs.close()
        return found, ours

    def _environments(self) -> list[dict[str, str]]:
        """Of each process."""
        common = {}
        if self.gpus:
            groups = [self.gpus[i : i + self.n] for i in range(0, len(self.gpus) - self.n + 1, self.n)]
            common = {"CUDA_VISIBLE_DEVICES": ",".join(groups[next(self._turns) % len(groups)])}
            common |= EXACT_ENVIRONMENT if self.exact else {}
        port = 0
        while self.n > 1 and (not port or port in self._ports):
            port = free_port()
        self._ports.add(port)
        return [common | environment_of(i, self.n, port) for i in range(self.n)]


def settle(environment: dict[str, str]) -> None:
    """What a run's process does first."""
    os.environ |= environment
    if EXACT in environment:
        import torch

        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which takes time, and finds nothing here


def prepare(drivers: list[str], processes: int = 1) -> tuple[BaseContext, str, tuple[str, ...]]:
    """What starts runs of drivers, the device that they are on, and its GPUs; UserError if there are too few."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    # each run is forked from a process that has imported everything; CUDA does not survive that
    if not torch.cuda.is_available():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(drivers)
        return context, "cpu", ()
    gpus = tuple(visible_gpus(torch.cuda.device_count()))
    if len(gpus) < processes:
        raise UserError(f"--processes {processes}, a GPU each, and there are {len(gpus)}: lower --processes")
    return multiprocessing.get_context("spawn"), "cuda", gpus


def distance(found: bytes, expected: bytes) -> float:
    """|difference| / |expected| of all tensors of two safetensors files; infinite if they are not of a kind."""
    import torch
    from safetensors.torch import load

    ours, theirs = load(found), load(expected)
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in theirs):
        return float("inf")
    difference, whole = (
        torch.stack([t.double().norm() for t in tensors]).norm().item()
        for tensors in ([ours[n].double() - theirs[n].double() for n in theirs], list(theirs.values()))
    )
    return difference / whole


def spread(files: list[bytes]) -> float:
    """The largest distance of two of them."""
    return max(distance(a, b) for a, b in itertools.permutations(files, 2))
