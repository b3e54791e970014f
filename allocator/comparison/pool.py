"""All runs of a comparison, in processes of one core each.

In: runs of a study folder. Out: their files. Invariants: whatever is wrong and cheap to see is
said before the first run; a run that was stopped continues, a finished one is not run again; one
comparison at a time runs in a folder; when it ends, in whatever way, its workers end.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from allocator.app.estimate import seconds_per_token
from allocator.app.workers import begin_worker, end_children
from allocator.comparison.bench import N_POINTS, Bench
from allocator.comparison.runs import Run
from allocator.comparison.table import check_plot
from allocator.errors import AllocatorError, StudyError
from allocator.study.folder_lock import search_lock


@dataclass(frozen=True)
class CompareEstimate:
    """What a comparison will take.

    Attributes:
        runs: not finished yet.
        finished: runs that are.
        tokens: forward tokens still to run.
        seconds: wall-clock guess, from a timed forward pass.
    """

    runs: tuple[Run, ...]
    finished: int
    tokens: int
    seconds: float


def check_comparison(
    folder: Path, runs: Sequence[Run], *, text: Path | None, cache: Path | None
) -> None:
    """Reads everything that runs and their table need and that is cheap to read.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    check_plot()
    for target in dict.fromkeys(run.target for run in runs):
        mine = [run for run in runs if run.target == target]
        Bench(folder, target, text=text, cache=cache).check_inputs(mine)


def estimate_runs(
    folder: Path, runs: Sequence[Run], *, text: Path | None, cache: Path | None, workers: int
) -> CompareEstimate:
    """Prices the runs that are not finished."""
    waiting = [r for r in runs if not r.file(folder).exists()]
    seconds, tokens = 0.0, 0
    for target in dict.fromkeys(r.target for r in waiting):
        bench = Bench(folder, target, text=text, cache=cache)
        mine = [r for r in waiting if r.target == target]
        study_folder = bench.study_folder
        per_token = seconds_per_token(study_folder, documents=8, threads=1)
        n_held = sum(len(d.ids) for d in study_folder.scorers.selection.documents)
        n_held += sum(len(d.ids) for split in bench.splits.values() for d in split)
        searched = sum(r.tokens - study_folder.base_tokens for r in mine)
        tokens += searched
        seconds += per_token * (searched + len(mine) * N_POINTS * n_held)
    done = len(runs) - len(waiting)
    return CompareEstimate(tuple(waiting), done, tokens, seconds / workers)


def run_all(
    folder: Path,
    runs: Sequence[Run],
    *,
    text: Path | None,
    cache: Path | None,
    workers: int,
) -> Iterator[Run]:
    """Runs what is not finished, in order, in processes of one core each; yields as they end.

    Raises:
        StudyError: if another comparison runs in this folder, or a worker was killed.
        AllocatorError: of the first run that fails; the others are stopped.
    """
    waiting = [run for run in runs if not run.file(folder).exists()]
    if not waiting:
        return
    (folder / "runs").mkdir(exist_ok=True)
    with search_lock(folder / "runs", way_out="wait for it, or stop it") as lock:
        lock.ready()
        for target in dict.fromkeys(run.target for run in waiting):  # one profile before many runs
            bench = Bench(folder, target, cache=cache, threads=workers)
            _ = bench.study_folder.profile
            bench.check_importance([run for run in waiting if run.target == target])
        with _workers(workers) as pool:
            futures = {pool.submit(_run, folder, run, text, cache): run for run in waiting}
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            except BrokenProcessPool:
                raise StudyError(
                    f"{folder}: a worker was killed, most likely for want of memory: each of the "
                    f"{workers} may hold the model twice; give fewer --threads (finished runs stay)"
                ) from None


@contextmanager
def _workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block: a run that is stopped continues the next time."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        n, mp_context=context, initializer=begin_worker, initargs=(os.getpid(), 1)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        end_children()
        pool.shutdown()


_BENCHES: dict[tuple[Path, str], Bench] = {}  # of a worker process: a loaded model each


def _run(folder: Path, run: Run, text: Path | None, cache: Path | None) -> None:
    key = (folder, run.target)
    if key not in _BENCHES:
        _BENCHES[key] = Bench(folder, run.target, text=text, cache=cache, threads=1)
    try:
        _BENCHES[key].run(run)
    except AllocatorError as error:
        raise StudyError(f"{run.name}: {error}") from None
