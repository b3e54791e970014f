"""Batches of a model that run at once, each on one core, with results as of one after the other.

Most of a small model's time goes to operations too short to split between cores, so batches side by
side use them better than one batch on all of them. Invariant: results come in the order of the
items, whatever the number of threads.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from allocator.files.machine import free_memory
from allocator.scoring.swap_model import device_of

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """Yields `work` of every item, in order; `threads` run at once, and one more result waits.

    An item begins only after all before it have begun. Inference mode and gradients are a thread's
    own: `work` has to set them. Meanwhile torch's operations in the caller's thread have one core.

    Args:
        work: called from any thread.
        items: what to work on.
        threads: items at once; with 1 no thread is started.
    """
    if threads == 1 or len(items) < 2:
        yield from map(work, items)
        return
    running: deque[Future[R]] = deque()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the caller's operations too, which would fight for the cores
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            torch.set_num_threads(before)
            for future in running:
                future.cancel()


def affordable_threads(model: Any, threads: int, nbytes: int = 0) -> int:
    """Returns how many batches of a model may run at once: one on a GPU, which has cores enough.

    Args:
        model: of transformers.
        threads: that are wanted.
        nbytes: that a batch keeps until its turn has come; half of the free memory is for these.
    """
    if device_of(model).type != "cpu":
        return 1
    fit = free_memory() / 2 // nbytes - 1 if nbytes else threads
    return int(max(1, min(threads, fit)))
