"""How trials end: each is closed once, by the first process that reports its result.

In: verdicts, and trials whose worker died. Out: closed trials. Invariant: how trials that ended
together did is written in one piece (`VERDICTS`) before the first of them is told. A trial of a
dead worker is told by its verdict, if it has one, and is otherwise abandoned: proposed and made
again.
"""

from collections.abc import Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from allocator.study.optuna_private import set_user_attr, trial_id
from allocator.study.trials import ABANDONED

VERDICTS = "verdicts"
"""Beginning of user attributes of a study: verdicts of trials that ended together, by number. One
attribute for each worker, of its last batch or generation."""
Verdict = tuple[str, list[float] | None]
"""A trial's state by name, and its values."""


def close(study: optuna.Study, number: int, verdict: Verdict) -> bool:
    """Tells a trial; returns False if another process has closed it."""
    state, values = verdict
    try:
        study.tell(number, values, state=TrialState[state])
    except (UpdateFinishedTrialError, ValueError):  # the latter where Optuna sees it beforehand
        if not study.get_trials(deepcopy=False)[number].state.is_finished():
            raise
        return False
    return True


def abandon(study: optuna.Study, id_: int, number: int, why: str | bool = True) -> bool:
    """Closes a trial so that its proposal is made again.

    Args:
        study: of the trial.
        id_: of the trial, in the storage.
        number: of the trial.
        why: `DOUBLED` where another worker is scoring the same.

    Returns:
        False if another process has closed it.
    """
    try:
        set_user_attr(study, id_, ABANDONED, why)
    except UpdateFinishedTrialError:
        return False
    return close(study, number, (TrialState.FAIL.name, None))


def close_abandoned(study: optuna.Study, dead: Sequence[FrozenTrial] | None = None) -> int:
    """Closes RUNNING trials of dead workers.

    Args:
        study: of the trials.
        dead: all that are RUNNING by default, which is right only where no other search lives.

    Returns:
        How many were abandoned; trials that had a verdict are not among them.
    """
    if dead is None:
        dead = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    verdicts = _verdicts(study)
    ended = [t for t in dead if str(t.number) in verdicts]
    for trial in ended:
        close(study, trial.number, verdicts[str(trial.number)])
    return sum(abandon(study, trial_id(t), t.number) for t in dead if t not in ended)


def _verdicts(study: optuna.Study) -> dict[str, Verdict]:
    written = (v for key, v in study.user_attrs.items() if key.startswith(VERDICTS))
    return {number: verdict for verdicts in written for number, verdict in verdicts.items()}
