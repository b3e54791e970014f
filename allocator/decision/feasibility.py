"""Feasible proposals from samplers that do not know the budget.

In: params of any allocation of a space, and what is predicted of each choice. Out: params within
the budget. Invariant: a proposal within it comes back as it is, so repairing again changes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

from allocator.decision.parameters import Params
from allocator.decision.space import Costs, Loss, Space, largest_first


def make_feasible(space: Space, costs: Costs, params: Mapping[str, Any], loss: Loss) -> Params:
    """Makes a proposal feasible: steps down, cheapest predicted loss per byte saved first.

    Deterministic; a proposal within the budget comes back as it is.

    Raises:
        SpaceError: if a param is outside the space.
        BudgetError: if not even the smallest allocation fits.
    """
    now = space.complete(params)
    for each in costs.each[::-1]:  # what a device gives up raises no file's bytes
        now = _lowered(each, now, loss, each.affected, each.budget.nbytes - each.constant)
    if costs.budget.token_bytes is not None:
        now = _lowered(costs, now, loss, costs.affected_reads, costs.budget.token_bytes)
    return now


_Measure = Callable[[Params, list[str]], int]
"""Bytes of what some of the params decide."""


def _lowered(costs: Costs, params: Params, loss: Loss, measure: _Measure, limit: int) -> Params:
    """Steps down until the bytes of all params are within a limit."""
    now, space = dict(params), costs.space
    total = measure(now, list(space.choices))
    while total > limit:
        best: tuple[float, str, Any, int] | None = None
        for name, values in space.choices.items():
            found = _step_down(measure, now, name, values)
            if found is None:
                continue
            step, saved = found
            price = (loss(name, step) - loss(name, now[name])) / saved
            if best is None or price < best[0]:
                best = (price, name, step, saved)
        if best is None:
            space.check_budget(costs.budget)
            break  # the smallest fits exactly, only its bound does not
        now[best[1]], total = best[2], total - best[3]
    return now


def _step_down(
    measure: _Measure, now: Params, name: str, values: tuple[Any, ...]
) -> tuple[Any, int] | None:
    """The next smaller value that saves bytes (padding may hide a step), and how many it saves."""
    at = values.index(now[name])
    before = measure(now, [name])
    for value in values[at + 1 :] if largest_first(name) else values[:at][::-1]:
        saved = before - measure({**now, name: value}, [name])
        if saved > 0:
            return value, saved
    return None
