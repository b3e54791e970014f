"""What this package uses of Optuna that Optuna does not document; nothing else names it.

In: a study and a trial. Out: the same trial, read and written by its id in the storage. Invariant:
no other module of `allocator` names a private attribute of Optuna; a new version of Optuna is
checked here.
"""

import copy
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileSymlinkLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

AnyTrial = Trial | FrozenTrial


def trial_id(trial: AnyTrial) -> int:
    """Returns the id of a trial in its storage.

    Numbers are public, ids are not; yet a storage writes attributes by id only, and a database
    that several studies share has ids that differ from the numbers.
    """
    return trial._trial_id


def frozen_trial(study: Study, trial: AnyTrial) -> FrozenTrial:
    """Returns a trial as its storage has it now.

    `Study.get_trials` would copy or at least list all trials; and `Trial.system_attrs`, which says
    what a sampler wrote, is deprecated in Optuna.
    """
    return study._storage.get_trial(trial._trial_id)


def set_user_attr(study: Study, id_: int, name: str, value: Any) -> None:
    """Writes a user attribute of a trial that another process may have asked for.

    `Trial.set_user_attr` needs the `Trial` that `Study.ask` gave, which only its own process has.

    Raises:
        UpdateFinishedTrialError: if the trial has ended.
    """
    study._storage.set_trial_user_attr(id_, name, value)


def set_system_attr(study: Study, trial: AnyTrial, name: str, value: Any) -> None:
    """Writes a system attribute of a trial, as Optuna's own samplers do while they sample.

    A sampler is given a `FrozenTrial`, which cannot be written to; and user attributes would show
    in every table of the study.
    """
    study._storage.set_trial_system_attr(trial._trial_id, name, value)


def report(study: Study, trial: AnyTrial, value: float, *, step: int) -> None:
    """Writes an intermediate value of a trial; one that the step has is replaced.

    `Trial.report` refuses a study of several objectives: Optuna's pruners compare one value.
    Storages, the dashboard and `plot_intermediate_values` take the values of any study.

    Raises:
        UpdateFinishedTrialError: if the trial has ended.
    """
    study._storage.set_trial_intermediate_value(trial._trial_id, step, value)


class WithoutReports(Study):
    """A study whose pruned trials show no intermediate values.

    Optuna's `TPESampler` ranks pruned trials by theirs, and fails where there are two objectives.

    Args:
        study: with the same storage, sampler and caches.
    """

    def __init__(self, study: Study) -> None:
        self.__dict__.update(study.__dict__)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, states, use_cache)
        return [_without_reports(t) if t.state is TrialState.PRUNED else t for t in trials]


def _without_reports(trial: FrozenTrial) -> FrozenTrial:
    trial = copy.copy(trial)
    trial.intermediate_values = {}
    return trial


def end_session(study: Study) -> None:
    """Closes this thread's connection to the storage.

    Optuna closes connections of threads only within `Study.optimize`, which is not used here.
    """
    study._storage.remove_session()


class JournalLink(JournalFileSymlinkLock):
    """Optuna's journal lock, a symbolic link `<journal>.lock`, with a target of our own spelling.

    Optuna's class keeps both paths private. They are needed to tell a link of ours from one of
    stock Optuna: whoever holds our flock may remove the former at once.

    Args:
        journal: absolute path of the journal.
        grace_seconds: a link that is older counts as left by a dead process.
    """

    def __init__(self, journal: Path, *, grace_seconds: int) -> None:
        super().__init__(str(journal), grace_period=grace_seconds)
        self._lock_target_file = f"{journal.parent}/./{journal.name}"

    @property
    def link(self) -> str:
        """Path of the link."""
        return str(self._lock_file)

    @property
    def is_ours(self) -> bool:
        """Whether the link that exists was made by a process of ours.

        Raises:
            FileNotFoundError: if there is none.
        """
        return os.readlink(self.link) == self._lock_target_file
