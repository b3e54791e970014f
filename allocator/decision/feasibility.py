"""Feasible proposals from samplers that do not know the budget.

In: params of any allocation of a space, and the predicted loss of each choice. Out: params within
the budget. Invariant: a proposal within the budget comes back unchanged, so making a proposal
feasible twice is making it feasible once.
"""

from collections.abc import Mapping
from typing import Any

from allocator.decision.costs import Costs, Limit, Measure, check_budget
from allocator.decision.parameters import Loss, Params, largest_first
from allocator.decision.space import Space


def make_feasible(space: Space, costs: Costs, params: Mapping[str, Any], loss: Loss) -> Params:
    """Makes a proposal feasible: steps down, cheapest predicted loss per byte saved first.

    The result depends on the arguments alone. A proposal within the budget comes back unchanged.

    Args:
        space: of the proposal.
        costs: of the space under the budget.
        params: the proposal; choices with one possible value may be missing.
        loss: predicted loss of every value.

    Raises:
        SpaceError: if a param is outside the space.
        BudgetError: if not even the smallest allocation fits.
    """
    now = space.complete(params)
    for limit in costs.limits:
        now = _lowered(space, now, loss, limit)
    return now


def _lowered(space: Space, params: Params, loss: Loss, limit: Limit) -> Params:
    """Steps down until the bytes of all params are within a limit."""
    now, measure = dict(params), limit.measure
    total = measure(now, list(space.choices))
    while total > limit.nbytes:
        best: tuple[float, str, Any, int] | None = None
        for name, values in space.choices.items():
            smaller = _step_down(measure, now, name, values)
            if smaller is None:
                continue
            step, saved = smaller
            price = (loss(name, step) - loss(name, now[name])) / saved
            if best is None or price < best[0]:
                best = (price, name, step, saved)
        if best is None:
            check_budget(space, limit.budget)
            break  # the smallest fits exactly, only its bound does not
        now[best[1]], total = best[2], total - best[3]
    return now


def _step_down(
    measure: Measure, now: Params, name: str, values: tuple[Any, ...]
) -> tuple[Any, int] | None:
    """Returns the next smaller value that saves bytes (padding may hide a step), and the bytes."""
    at = values.index(now[name])
    before = measure(now, [name])
    for value in values[at + 1 :] if largest_first(name) else values[:at][::-1]:
        saved = before - measure({**now, name: value}, [name])
        if saved > 0:
            return value, saved
    return None
