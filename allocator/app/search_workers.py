"""A search in worker processes, watched by the process that was asked for it.

In: a search request. Out: trials in the study, and lines on workers that were killed. Invariant: no
trial of a killed worker stays RUNNING.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from allocator.app.request import SearchRequest
from allocator.app.search_setup import prepare
from allocator.app.study_folder import StudyFolder
from allocator.app.workers import run_workers
from allocator.study.folder_lock import search_lock
from allocator.study.leases import Leases, left_here
from allocator.study.outcomes import close_abandoned
from allocator.study.search import Search
from allocator.study.storages import reaching
from allocator.study.trials import not_abandoned


def work(request: SearchRequest) -> dict[str, float]:
    """Joins a search as one of its worker processes, and only searches.

    Returns:
        Seconds spent, by what they were spent on.
    """
    study_folder = StudyFolder(request.study, target=request.target, **request.resources.options)
    launch = study_folder.launch(request)
    with search_lock(study_folder.path, join=True) as lock, reaching(launch.storage):
        lock.ready()
        study = study_folder.study(launch)
        with Leases(study, study_folder.path, seconds=request.lease_seconds) as leases:
            search = prepare(study_folder, launch, study, leases=leases)
            search.run(launch.stop)
    return search.seconds


def search_in_workers(
    request: SearchRequest,
    study_folder: StudyFolder,
    search: Search,
    on_trial: Callable[[FrozenTrial], None],
) -> list[str]:
    """Runs `work` in `request.workers` processes to their end.

    Args:
        request: what each of them is asked for; its stop rule is started.
        study_folder: of the study, here.
        search: of this process, which only watches; the seconds of workers are added to its own.
        on_trial: called with every trial of the study that ends meanwhile.

    Returns:
        Lines to show.
    """
    threads = max(study_folder.threads // request.workers, 1)
    resources = replace(request.resources, threads=threads, progress=False)
    asked = replace(request, resources=resources)
    study, messages = search.study, []
    shown = {t.number for t in not_abandoned(study)}
    with (
        _closing_stopped(study, study_folder.path) as pids,
        closing(run_workers(request.workers, work, asked, threads=threads)) as ticks,
    ):
        for ended in ticks:
            pids |= {child.pid for child in multiprocessing.active_children() if child.pid}
            for worker in ended:
                for what, spent in (worker.result or {}).items():
                    search.seconds[what] += spent
                if worker.killed:
                    unfinished = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                    dead = left_here(unfinished, study_folder.path, pid=worker.pid)
                    messages.append(
                        f"worker {worker.pid} was killed (signal {worker.killed}); closed "
                        f"{close_abandoned(study, dead)} trial(s), which the others proposed again"
                    )
            for trial in not_abandoned(study):
                if trial.state.is_finished() and trial.number not in shown:
                    shown.add(trial.number)
                    on_trial(trial)
    return messages


@contextmanager
def _closing_stopped(study: optuna.Study, folder: Path) -> Iterator[set[int]]:
    """Yields a set for numbers of worker processes, whose trials a Ctrl-C closes at once."""
    pids: set[int] = set()
    try:
        yield pids
    except KeyboardInterrupt:  # the processes have ended
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for pid in pids:
            close_abandoned(study, left_here(running, folder, pid=pid))
        raise
