"""What a trial records: the names of its attributes, and what samplers and studies read of them.

In: Optuna's trials. Out: the allocation that one scored, its cost, the best of several. Invariant:
an abandoned trial (its process died) counts for nothing; its proposal is made again.
"""

from collections.abc import Iterable
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from allocator.decision.allocation import Allocation
from allocator.errors import StudyError

ALLOCATION, KIND, LOSSES, RESULT = "allocation", "kind", "losses", "result"
SEARCHED = {"knapsack": "knapsack", "pruned": "knapsack", "proposal": "proposal"}
"""Series by kind, of trials that are not baselines; a baseline's kind is its name."""
ABANDONED = "abandoned"
"""User attribute of a trial whose process died, or gave it up; see `is_abandoned`."""
DOUBLED = "doubled"
"""Value of `ABANDONED` where another worker was scoring the same: the next try has other random
numbers."""
PROPOSAL = "proposal"
"""System attribute of a trial: the number that its random state is from; an abandoned trial frees
its number."""
GRADIENT_TOKENS = "auto:forward_tokens"
"""System attribute of a trial that a gradient step was taken for: forward tokens of the step."""

Key = tuple[tuple[str, Any], ...]


def allocation_of(trial: FrozenTrial) -> Allocation:
    """Returns the allocation that a trial scored; nothing else reads a trial's decision.

    Raises:
        StudyError: if the trial scored nothing.
    """
    if ALLOCATION not in trial.user_attrs:
        raise StudyError(f"trial {trial.number} scored no allocation ({trial.state.name})")
    return Allocation.from_json(trial.user_attrs[ALLOCATION])


def is_abandoned(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts as no proposal, because its process died or gave it up.

    A trial that has the attribute and ended otherwise was told just before another worker would
    have taken it over.
    """
    return trial.state == TrialState.FAIL and ABANDONED in trial.user_attrs


def not_abandoned(study: Study, *, before: int | None = None) -> list[FrozenTrial]:
    """Returns the trials before a number (all by default) that were not abandoned."""
    trials = study.get_trials(deepcopy=False)[:before]
    return [t for t in trials if not is_abandoned(t)]


def forward_tokens(trial: FrozenTrial) -> int:
    """Returns the tokens through all layers that a trial took, its gradient step included.

    An allocation that was looked up counts like one that was scored, so that a limit of tokens ends
    a search that proposes nothing new.
    """
    scored: int = trial.user_attrs.get(RESULT, {}).get("tokens", 0)
    gradient: int = trial.system_attrs.get(GRADIENT_TOKENS, 0)
    return scored + gradient


def best_complete(
    trials: Iterable[FrozenTrial], *, nbytes: float = float("inf")
) -> FrozenTrial | None:
    """Returns the COMPLETE trial of least loss within `nbytes`; of equal ones the first."""
    done = (t for t in trials if t.state == TrialState.COMPLETE and t.values[1] <= nbytes)
    return min(done, key=lambda t: (t.values[0], t.number), default=None)


def key_of(params: dict[str, Any]) -> Key:
    """Returns what tells proposals apart."""
    return tuple(sorted(params.items()))


def proposed(study: Study) -> set[Key]:
    """Returns the keys of all proposals so far."""
    return {key_of(t.params) for t in not_abandoned(study)}


def trial_counts(study: Study) -> dict[str, int]:
    """Returns the number of trials by state; abandoned ones are left out."""
    states = [t.state for t in not_abandoned(study)]
    return {
        s.name: states.count(s) for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }


def complete_trials(study: Study) -> list[FrozenTrial]:
    """Returns the trials scored on the full search split, best loss first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda t: (t.values[0], t.values[1], t.number))
