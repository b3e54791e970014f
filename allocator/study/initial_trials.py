"""What a study begins with: the knapsack's solutions, then what people do without a search.

In: a solved surrogate, a budget, baselines. Out: allocations that the space holds, within the cap.
Invariant: none is there twice, and the order does not depend on anything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.parameters import Params
from allocator.decision.space import Space
from allocator.errors import SpaceError
from allocator.prediction.solver import solve
from allocator.prediction.surrogate import Surrogate


@dataclass(frozen=True)
class Queued:
    """A first trial: what it is, and its allocation; the space must hold it."""

    kind: str
    allocation: Allocation


def first_trials(
    surrogate: Surrogate,
    budget: Budget,
    baselines: Sequence[tuple[str, Allocation]],
    *,
    n_knapsack: int,
) -> list[Queued]:
    """The unperturbed knapsack solutions, at the cap first, then the baselines that fit.

    Args:
        surrogate: solved.
        budget: the cap.
        baselines: names and allocations; those the space does not hold, or over the cap, are left
            to the committed references.
        n_knapsack: solutions, at byte targets spread between floor and cap.
    """
    space = surrogate.space
    costs = Costs(space, budget)
    queue: dict[str, Queued] = {}

    def add(kind: str, allocation: Allocation) -> None:
        queue.setdefault(allocation.digest, Queued(kind, allocation))

    for i in range(n_knapsack):
        target = costs.budget_at(1 - i / max(1, n_knapsack))
        add("knapsack", space.allocation(solve(surrogate, target)))
    for name, allocation in baselines:
        if _held(space, allocation) and costs.fits(_full(space, allocation)):
            add(name, allocation)
    return list(queue.values())


def _full(space: Space, allocation: Allocation) -> Params:
    return space.complete(space.params(allocation))


def _held(space: Space, allocation: Allocation) -> bool:
    try:
        space.params(allocation)
    except SpaceError:
        return False
    return True
