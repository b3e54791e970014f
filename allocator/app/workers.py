"""Worker processes: each with its share of the cores, and none that outlives its parent.

In: a function, its request, and the number of processes that run it. Out: what each returned, as it
ends. Invariants: when the caller is done, in whatever way, the processes have ended; an error of
one is raised in the caller; one that was killed is reported, and the others continue.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import optuna

from allocator.errors import AllocatorError, StudyError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Ended:
    """A worker process that is gone.

    Attributes:
        pid: its number.
        result: what it returned; None if it was killed.
        killed: by this signal, else 0.
    """

    pid: int
    result: Any
    killed: int


def begin_worker(parent: int, threads: int) -> None:
    """Prepares this process: gives torch `threads` cores, and ends when `parent` does (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before it could be listened to
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a stopped process leaks
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def cores_each(threads: int) -> Iterator[None]:
    """Lets processes started within the block give `threads` cores to numerical libraries."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def end_children() -> None:
    """Ends all worker processes of this one."""
    for child in multiprocessing.active_children():
        child.terminate()


def run_workers(
    n: int, work: Callable[[T], Any], request: T, *, threads: int
) -> Generator[list[Ended], None, None]:
    """Runs `work(request)` in `n` processes; several times a second yields those that ended.

    Close it (`contextlib.closing`) to end the processes.

    Args:
        n: processes.
        work: a module's function.
        request: can be pickled.
        threads: cores for each.

    Raises:
        StudyError: of the first process that failed, in one line.
    """
    context = multiprocessing.get_context("spawn")
    living: dict[SpawnProcess, Connection] = {}
    try:
        with cores_each(threads):
            for _ in range(n):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run, args=(os.getpid(), threads, work, request, sender)
                )
                process.start()
                sender.close()  # the child's own copy is left: its end is the pipe's
                living[process] = receiver
        while living:
            wait([p.sentinel for p in living], timeout=_POLL_SECONDS)
            gone = [p for p in living if not p.is_alive()]
            yield [_outcome(p, living.pop(p)) for p in gone]
    finally:
        for process in living:
            process.terminate()
        for process in living:
            process.join()


def _run(
    parent: int,
    threads: int,
    work: Callable[[T], Any],
    request: T,
    outcome: Connection,
) -> None:
    begin_worker(parent, threads)
    try:
        result = work(request)
    except (AllocatorError, OSError) as error:
        outcome.send((str(error), None))
    else:
        outcome.send(("", result))


def _outcome(process: SpawnProcess, receiver: Connection) -> Ended:
    assert process.pid is not None
    assert process.exitcode is not None
    with receiver:
        if process.exitcode < 0:
            return Ended(process.pid, None, -process.exitcode)
        try:
            failure, result = receiver.recv()
        except EOFError:
            failure, result = f"worker {process.pid} failed; its traceback is above", None
    if failure:
        raise StudyError(failure)
    return Ended(process.pid, result, 0)
