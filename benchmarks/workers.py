"""Runs side by side: each worker is a process that imports once, and does one run at a time.

Many small ones share a worker, which compiles once too. Where each is to be in a process of its own, the next process
imports while the one before it is at work.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing import connection, resource_tracker
from pathlib import Path

from benchmarks.ranks import PARENT, end_with_parent
from hyclora.utils.errors import RunStopped, UserError
from hyclora.utils.runs.script import PROGRAM

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
# A small run has few threads' worth of work on the host, and there are many of them.
THREADS = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
NOT_DONE = "not done after"
LONGEST_WAIT = 3600.0  # seconds; the system takes no more than some weeks


class Worker:
    """A process that runs drivers one after the other; what they print is in `log`. gpu: the one that it sees.

    first: a driver that it imports at once.
    """

    def __init__(self, log: Path, gpu: str | None, first: str | None = None):
        self.log = log
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, log, first), daemon=True)
        # what is imported may look for GPUs already
        seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with given(seen | {PARENT: str(os.getpid())}), deaf_to_interrupts():
            self.process.start()
        theirs.close()

    def begin(self, driver: str, argv: list[str]) -> None:
        self.pipe.send((driver, argv))

    def result(self) -> tuple[dict, bool]:
        """What the run found, or {"error": why not}, and whether the process can do another one."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            error = f"the process died (exit code {self.process.exitcode}), its output is in {self.log.name}"
            return {"error": error}, False

    def end(self, at_once: bool) -> None:
        """Have the process end, by itself if it is idle."""
        self.pipe.close()
        if at_once:
            self.process.kill()

    def join(self, wait: float) -> None:
        """Wait for its end, `wait` seconds until it is forced."""
        self.process.join(wait)
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def deaf_to_interrupts():
    """What is started inside never gets Ctrl-C, which a terminal sends to all: this process gets it, and ends it."""
    resource_tracker.ensure_running()  # the first start would have it running, which hears them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def require_gpus(option: str, n: int) -> None:
    """UserError if an option asks for more GPUs than there are."""
    import torch

    if torch.cuda.device_count() < n:
        raise UserError(f"{option} {n}, and there are {torch.cuda.device_count()}: lower it")


def visible_gpus(n: int) -> list[str]:
    """The first n of those that this process sees, by the names that CUDA_VISIBLE_DEVICES has for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))
    return visible.split(",")[:n]


@contextlib.contextmanager
def given(environment: dict[str, str]):
    """With these in this process' environment, which what is spawned meanwhile gets."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_all(
    jobs: list[tuple],
    n_workers: int,
    gpus: list[str | None],
    logs: Path,
    until: float,
    limit: float = float("inf"),
    alone: bool = False,
) -> Iterator[tuple]:
    """(job, what it found) of jobs as they end; a job is (anything, a driver's module, its options).

    Begun in their order, n_workers at a time, spread over gpus. A failure ends its worker alone, as it may have broken
    the GPU's state. At `until`, a time of time.monotonic(), those at work are ended, and no more are begun.

    limit: seconds that a job has. alone: each in a process of its own, of which one more a worker waits ready;
    they have as many threads as they like.
    """
    for name, value in (ENVIRONMENT if alone else ENVIRONMENT | THREADS).items():
        os.environ.setdefault(name, value)
    logs.mkdir(parents=True, exist_ok=True)
    waiting, free = deque(jobs), deque(range(n_workers))
    workers: dict[int, Worker] = {}
    ready: dict[int, Worker] = {}
    busy: dict[connection.Connection, tuple[int, tuple, float]] = {}

    def started(number: int) -> Worker:
        first = waiting[0][1] if alone and waiting else None
        return Worker(logs / f"worker{number}.txt", gpus[number % len(gpus)], first)

    try:
        while (waiting or busy) and time.monotonic() < until:
            while waiting and free:
                number, job = free.popleft(), waiting.popleft()
                if number not in workers:
                    workers[number] = ready.pop(number, None) or started(number)
                # busy first: an interrupt in between would have the end wait for a job as for an idle worker
                busy[workers[number].pipe] = number, job, time.monotonic() + limit
                workers[number].begin(*job[1:])
                if alone and waiting:
                    ready[number] = started(number)
            ends = min(until, *(end for *_, end in busy.values()))
            left = max(ends - time.monotonic(), 0)
            answered = connection.wait(list(busy), min(left, LONGEST_WAIT))
            late = [pipe for pipe, (*_, end) in busy.items() if pipe not in answered and time.monotonic() >= end]
            for pipe in [*answered, *late]:
                number, job, _ = busy.pop(pipe)
                found, usable = ({"error": f"{NOT_DONE} {limit:g} s"}, False)
                if pipe not in late:
                    found, usable = workers[number].result()
                if alone or not usable:
                    ended = workers.pop(number)
                    ended.end(at_once=pipe in late)
                    ended.join(10.0)
                free.append(number)
                yield job, found
    finally:
        at_work = {number for number, *_ in busy.values()}
        for number, worker in workers.items():
            worker.end(at_once=number in at_work)
        for worker in ready.values():
            worker.end(at_once=True)
        for worker in [*workers.values(), *ready.values()]:
            worker.join(10.0)


def _serve(pipe: connection.Connection, log: Path, first: str | None) -> None:
    """Run what comes through the pipe, until it is closed or something has failed, or the other end is gone."""
    end_with_parent()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if first is not None:
        importlib.import_module(first)
    usable = True
    with contextlib.suppress(EOFError):
        while usable:
            found, usable = _run(*pipe.recv())
            pipe.send((found, usable))


def _run(module: str, argv: list[str]) -> tuple[dict, bool]:
    """The content of the run's results file or its error, and whether it left the process as it was."""
    print(f"\n{module} {' '.join(argv)}", flush=True)
    try:
        driver = importlib.import_module(module).DRIVER
        with given({PROGRAM: module}):
            found = driver.run(driver.parse(argv), argv)
    except Exception as error:
        traceback.print_exc()
        mistake = isinstance(error, UserError) and not isinstance(error, RunStopped)
        return {"error": f"{type(error).__name__}: {error}"}, mistake
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found, True
