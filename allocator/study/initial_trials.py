"""What a study begins with: solutions of the knapsack, then what people do without a search.

In: a solved surrogate, a budget, baselines. Out: allocations of the space within the cap, and which
of them a study still lacks. Invariant: none is there twice, and the order does not depend on
anything else.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.parameters import Params
from allocator.decision.space import Space
from allocator.errors import SpaceError, StudyError
from allocator.prediction.solver import STARTS, solve
from allocator.prediction.surrogate import Surrogate
from allocator.study.trials import Key, key_of, not_abandoned


@dataclass(frozen=True)
class Queued:
    """A first trial: what it is called, and its allocation, which is in the space."""

    kind: str
    allocation: Allocation


def first_trials(
    surrogate: Surrogate,
    budget: Budget,
    baselines: Sequence[tuple[str, Allocation]],
    *,
    n_knapsack: int,
    pruning_factors: Sequence[float] = (),
) -> list[Queued]:
    """Returns the unperturbed knapsack solutions, at the cap first, then the baselines that fit.

    What pruning costs was measured layer by layer, in the original; what pruning all layers costs
    beside other errors may differ by a factor. So the solution at the cap is followed by those
    under other prices of pruning, where these prune otherwise. They take no forward pass to make,
    and once scored they teach a sampler the factor.

    Args:
        surrogate: solved.
        budget: the cap.
        baselines: names and allocations; those outside the space or over the cap are left out.
        n_knapsack: solutions, at byte targets spread between floor and cap.
        pruning_factors: of the losses of pruning, one more solution at the cap for each.
    """
    space = surrogate.space
    costs = Costs(space, budget)
    queue: dict[str, Queued] = {}

    def add(kind: str, allocation: Allocation) -> None:
        queue.setdefault(allocation.digest, Queued(kind, allocation))

    for i in range(n_knapsack):
        target = costs.budget_at(1 - i / max(1, n_knapsack))
        add("knapsack", space.allocation(solve(surrogate, target, starts=STARTS)))
        for factor in pruning_factors if i == 0 else ():
            add(
                "pruned",
                space.allocation(solve(surrogate.with_pruning(factor), budget, starts=STARTS)),
            )
    for name, allocation in baselines:
        if _is_in(space, allocation) and costs.fits(_complete(space, allocation)):
            add(name, allocation)
    return list(queue.values())


def _complete(space: Space, allocation: Allocation) -> Params:
    return space.complete(space.params(allocation))


def _is_in(space: Space, allocation: Allocation) -> bool:
    try:
        space.params(allocation)
    except SpaceError:
        return False
    return True


def enqueued_params(trial: FrozenTrial) -> Params:
    """Returns the params that a trial was enqueued with; none if it was not."""
    params: Params = trial.system_attrs.get("fixed_params", {})
    return params


class FirstTrials:
    """The first trials of a study, recognized by their params.

    Args:
        study: the Optuna study.
        space: of the allocations.
        queue: in order.
        budget: the cap.

    Raises:
        StudyError: if one is over the budget.
    """

    def __init__(
        self, study: optuna.Study, space: Space, queue: Sequence[Queued], budget: Budget
    ) -> None:
        self._study = study
        self._space = space
        self._queue = tuple(queue)
        self._keys = [key_of(space.params(queued.allocation)) for queued in self._queue]
        for queued in self._queue:
            if not queued.allocation.fits(space.layout, budget):
                raise StudyError(f"first trial {queued.kind} is over the budget")

    def missing(self) -> list[Queued]:
        """Returns the first trials that are in no trial yet, in order."""
        made = Counter(key_of(p) for t in not_abandoned(self._study) if (p := enqueued_params(t)))
        missing = []
        for queued, key in zip(self._queue, self._keys, strict=True):
            made[key] -= 1
            if made[key] < 0:
                missing.append(queued)
        return missing

    def enqueue_next(self) -> None:
        """Enqueues the next missing first trial, unless a trial waits already."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and (missing := self.missing()):
            self._study.enqueue_trial(self._space.params(missing[0].allocation))

    def kind(self, trial: FrozenTrial) -> str | None:
        """Returns which first trial this is, `proposal` if none.

        None for a first trial that an earlier trial is already.
        """
        if not (enqueued := enqueued_params(trial)):
            return "proposal"
        key: Key = key_of(enqueued)
        kinds = [q.kind for q, k in zip(self._queue, self._keys, strict=True) if k == key]
        if not kinds:
            return "proposal"  # enqueued by hand
        earlier = not_abandoned(self._study, before=trial.number)
        n_before = sum(key_of(p) == key for t in earlier if (p := enqueued_params(t)))
        return kinds[n_before] if n_before < len(kinds) else None
