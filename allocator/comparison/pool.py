"""All runs of a comparison, in processes of one core each.

In: runs of a study folder. Out: their files. Invariants: whatever is wrong and cheap to see is
said before the first run; a run that was stopped continues, a finished one is not run again; one
comparison at a time runs in a folder; when it ends, in whatever way, its workers end.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from allocator.app.estimate import seconds_per_token
from allocator.app.workers import begin_worker, end_children
from allocator.comparison.bench import N_POINTS, Bench, bench_of
from allocator.comparison.runs import CompareRequest, Run, results
from allocator.comparison.table import check_plot
from allocator.errors import AllocatorError, StudyError
from allocator.files.progress import step, waiting
from allocator.study.folder_lock import search_lock


@dataclass(frozen=True)
class CompareEstimate:
    """What a comparison will take.

    Attributes:
        runs: not finished yet.
        finished: runs that are.
        tokens: forward tokens of these runs.
        baselines: beside them, whose loss is not known yet.
        baseline_tokens: the most forward tokens of these.
        seconds: wall-clock guess of all, from a timed forward pass.
    """

    runs: tuple[Run, ...]
    finished: int
    tokens: int
    baselines: int
    baseline_tokens: int
    seconds: float


@contextmanager
def worker_processes(n: int) -> Iterator[Executor]:
    """Starts processes that end with the block: a stopped run continues the next time."""
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


def check_comparison(request: CompareRequest, runs: Sequence[Run]) -> None:
    """Reads everything that runs and their table need and that is cheap to read.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    check_plot()
    for target in dict.fromkeys(run.target for run in runs):
        mine = [run for run in runs if run.target == target]
        bench_of(request, target).check_inputs(mine)


def estimate_runs(request: CompareRequest, runs: Sequence[Run]) -> CompareEstimate:
    """Prices the runs that are not finished, and the baselines of all."""
    to_run = [r for r in runs if not r.file(request.folder).exists()]
    shown = [*runs, *(r.run for r in results(request.folder))]  # in the table
    seconds, tokens, n_baselines, baseline_tokens = 0.0, 0, 0, 0
    for target in dict.fromkeys(r.target for r in shown):
        bench = bench_of(request, target)
        mine = [r for r in to_run if r.target == target]
        n_beside, beside = 0, 0
        if request.baselines != "none":
            budgets = {r.weights for r in shown if r.target == target}
            with waiting("pricing baselines"):
                n_beside, beside = bench.baseline_costs(sorted(budgets))
        if not mine and not n_beside:
            continue
        study_folder = bench.study_folder
        with waiting("timing a forward pass"):
            per_token = seconds_per_token(study_folder, documents=8, threads=1)
        n_reported = sum(len(d.ids) for d in study_folder.scorers.selection.documents)
        n_reported += sum(len(d.ids) for split in bench.splits.values() for d in split)
        searched = sum(r.tokens - study_folder.base_tokens for r in mine)
        tokens, n_baselines = tokens + searched, n_baselines + n_beside
        baseline_tokens += beside
        seconds += per_token * (searched + len(mine) * N_POINTS * n_reported + beside)
    done = len(runs) - len(to_run)
    return CompareEstimate(
        tuple(to_run), done, tokens, n_baselines, baseline_tokens, seconds / request.workers
    )


def run_all(
    request: CompareRequest,
    runs: Sequence[Run],
    *,
    processes: Callable[[int], AbstractContextManager[Executor]] = worker_processes,
) -> Iterator[Run]:
    """Runs what is not finished, in order, in processes of one core each; yields as they end.

    Args:
        request: of the comparison.
        runs: of the study.
        processes: makes this number of them.

    Raises:
        StudyError: if another comparison runs in this folder, or a worker was killed.
        AllocatorError: of the first run that fails; the others are stopped.
    """
    folder = request.folder
    to_run = [run for run in runs if not run.file(folder).exists()]
    if not to_run:
        return
    (folder / "runs").mkdir(exist_ok=True)
    with search_lock(folder / "runs", way_out="wait for it, or stop it") as lock:
        lock.ready()
        for target in dict.fromkeys(run.target for run in to_run):  # one profile before many runs
            bench = bench_of(replace(request, text=None), target, threads=request.workers)
            _ = bench.study_folder.profile
            bench.check_importance([run for run in to_run if run.target == target])
        n_before, alone = len(runs) - len(to_run), replace(request, progress=False)
        with (
            step("comparing", len(runs), initial=n_before, unit="runs") as shown,
            processes(request.workers) as pool,
        ):
            futures = {pool.submit(_run, alone, run): run for run in to_run}
            try:
                for future in as_completed(futures):
                    future.result()
                    shown.update()
                    yield futures[future]
            except BrokenProcessPool:
                raise StudyError(
                    f"{folder}: a worker was killed, most likely for want of memory: each of the "
                    f"{request.workers} may hold the model twice; give fewer --threads "
                    "(finished runs stay)"
                ) from None


_BENCHES: dict[tuple[Path, str], Bench] = {}  # of a worker process: a loaded model each


def _run(request: CompareRequest, run: Run) -> None:
    key = (request.folder, run.target)
    if key not in _BENCHES:
        _BENCHES[key] = bench_of(request, run.target)
    try:
        _BENCHES[key].run(run)
    except AllocatorError as error:
        raise StudyError(f"{run.name}: {error}") from None
