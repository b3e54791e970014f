"""The search stage: from a request to a study and its pick.

In: a search request. Out: an Optuna study, `front.json`, `allocations/pick.json`,
`allocations/knapsack.json` and the importance vectors they need. Invariant: whatever is wrong with
the input is said before anything is measured.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from allocator.app.outcome import Outcome
from allocator.app.pick import check_tokens, pick_among, pick_tokens
from allocator.app.request import SearchRequest
from allocator.app.search_setup import prepare
from allocator.app.search_workers import search_in_workers
from allocator.app.study_folder import StudyFolder
from allocator.app.trial_table import write_front
from allocator.decision.allocation_record import AllocationRecord
from allocator.decision.budget import Budget
from allocator.decision.costs import budget_notes
from allocator.files.progress import say, step
from allocator.study.folder_lock import search_lock
from allocator.study.leases import Leases, left_here
from allocator.study.outcomes import close_abandoned
from allocator.study.search import Search
from allocator.study.storages import journal_path, mend_storage, reaching
from allocator.study.trials import complete_trials, trial_counts
from allocator.targets.device_memory import DeviceMemory


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes:
        study: the Optuna study.
        budget: the limits that held.
        pick: the allocation file of the pick.
        knapsack: the allocation file of the unperturbed knapsack at the budget, if it was finished.
        outcome: loss, size, and distance to the best baseline of the pick.
        seconds: spent in this run on scoring, gradient steps, sampler and storage.
        trials: trials by state.
        messages: lines to show: what was mended or closed on the way.
        calibration: records and windows by split, and how many each stage read, as two lines.
        memory: of the pick, itemised, where the budget is a device's.
    """

    study: optuna.Study
    budget: Budget
    pick: Path
    knapsack: Path | None
    outcome: Outcome
    seconds: dict[str, float]
    trials: dict[str, int]
    messages: tuple[str, ...]
    calibration: tuple[str, str]
    memory: DeviceMemory | None = None


def search(request: SearchRequest) -> SearchResult:
    """Launches or resumes a study, then picks among its front on the selection split.

    Several searches may work on one study, on one machine or many: no trial is lost or made twice,
    and each returns when the trials that the others have at its end have ended, too.

    Raises:
        AllocatorError: one line on whatever is wrong, before anything is written.
    """
    study_folder = StudyFolder(request.study, target=request.target, **request.resources.options)
    launch = study_folder.launch(request)
    journal_path(launch.storage, study_folder.path)
    stop = launch.stop
    if stop.tokens is not None:
        check_tokens(study_folder, stop.tokens, "raise --tokens")
        stop = replace(stop, tokens=stop.tokens - pick_tokens(study_folder))
    with search_lock(study_folder.path, join=request.join) as lock, reaching(launch.storage):
        calibration = study_folder.calibration.summary, study_folder.calibration.use
        if study_folder.progress and lock.exclusive_start:  # workers of this search stay silent
            say("\n".join(f"text: {line}" for line in calibration))
        messages = mend_storage(launch.storage, study_folder.path) if lock.exclusive_start else []
        study = study_folder.study(launch)
        if lock.exclusive_start and (
            closed := close_dead(study, launch.storage, study_folder.path)
        ):
            messages.append(f"closed {closed} trial(s) of a search that died; proposing them again")
        lock.ready()
        with (
            Leases(study, study_folder.path, seconds=request.lease_seconds) as leases,
            _closing_own(study, study_folder.path),
        ):
            running = prepare(study_folder, launch, study, leases=leases)
            stop = stop.started()
            before = running.n_proposals()
            with _TrialBar(stop.trials, running, shown=study_folder.progress) as bar:
                if request.workers > 1 and (stop.trials is None or before < stop.trials):
                    asked = replace(request, stop=stop)
                    messages += search_in_workers(asked, study_folder, running, bar)
                running.run(stop, on_trial=bar)  # proposals that dead workers left, if any
        if before and running.n_proposals() == before:
            messages.append(f"no new trial: {before} were made before, which is what was asked for")
        pick, knapsack, outcome = pick_among(study_folder, running)
        write_front(study_folder, study)
    stored = AllocationRecord.read(pick).decision.stored(study_folder.layout)
    return SearchResult(
        study=study,
        budget=launch.budget,
        pick=pick,
        knapsack=knapsack,
        outcome=outcome,
        seconds=dict(running.seconds),
        trials=trial_counts(study),
        messages=(
            *budget_notes(study_folder.unranked_space, launch.budget),
            *study_folder.importance_notes,
            *messages,
        ),
        calibration=calibration,
        memory=launch.budget.memory(stored),
    )


def close_dead(study: optuna.Study, storage: str | None, folder: Path) -> int:
    """Closes RUNNING trials that searches of a folder left; returns how many were abandoned.

    Call it only while no search of this folder lives on this machine. A storage that others may
    share holds trials of theirs, too: they are left to their leases.

    Args:
        study: the Optuna study.
        storage: None for the folder's own journal.
        folder: of the study.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return close_abandoned(study, running if storage is None else left_here(running, folder))


@contextmanager
def _closing_own(study: optuna.Study, folder: Path) -> Iterator[None]:
    """Closes the trials of this process at once where a Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        close_abandoned(study, left_here(running, folder, pid=os.getpid()))
        raise


class _TrialBar:
    """A step over trials, with the least loss so far."""

    def __init__(self, n_trials: int | None, running: Search, *, shown: bool) -> None:
        self._bar = step(
            "search", n_trials, initial=running.n_proposals(), unit="trials", shown=shown
        )
        self._best = min((t.values[0] for t in complete_trials(running.study)), default=math.inf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, trial: FrozenTrial) -> None:
        if trial.state == TrialState.COMPLETE:
            self._best = min(self._best, trial.values[0])
        self._bar.note(f"least loss {self._best:.5f}")
        self._bar.update()
