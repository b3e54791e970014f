"""What each decision of an allocation costs, and what the next step up or down would change.

In: an allocation, the space that holds it, predicted losses, perhaps a device budget. Out: a table,
one row per decision. Invariant: nothing is measured; losses are the surrogate's.
"""

from typing import Any

import pandas as pd

from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.mixes import canonical
from allocator.decision.parameters import FormatOf, is_setting, largest_first, parse
from allocator.decision.space import Space
from allocator.prediction.surrogate import Surrogate


def explanation(
    allocation: Allocation, space: Space, surrogate: Surrogate, budget: Budget | None = None
) -> pd.DataFrame:
    """Returns the table of `allocator.explain`.

    Args:
        allocation: the decision.
        space: what may be chosen.
        surrogate: predicts losses.
        budget: the device budget whose bytes are counted; None for those of the searched matrices.

    Raises:
        SpaceError: if the space does not hold the allocation.
    """
    costs = Costs(space, Budget(1 << 62, "weights") if budget is None else budget)
    params = space.complete(space.params(allocation))
    counts = space.layer_counts(params)
    loss, predicted = surrogate.loss_at(params), surrogate.predict(params)
    rows: list[dict[str, Any]] = []
    settings = (name for name in space.distributions if is_setting(name))
    for name in (*space.format_params.values(), *space.count_params, *settings):
        key, value, values = parse(name), params[name], list(space.choices[name])
        if isinstance(key, FormatOf):
            count = counts.get(space.layer_of[key.group], 0)
            values = [v for v in values if canonical(v, count) == v]
        if largest_first(name):  # the order of those that cost the same
            values.reverse()
        values.sort(key=lambda v: costs.affected({**params, name: v}, [name]))
        before = costs.affected(params, [name])
        row: dict[str, Any] = {
            "decision": name,
            "value": value,
            "bytes": before,
            "predicted_loss": loss(name, value),
        }
        if is_setting(name):  # beyond what cannot be saved
            row["bytes"] -= costs.affected({**params, name: values[0]}, [name])
        at = values.index(value)
        for label, index in (("up", at + 1), ("down", at - 1)):
            inside = 0 <= index < len(values)
            other = values[index] if inside else None
            row[label] = other
            row[f"{label}_bytes"] = (
                costs.affected({**params, name: other}, [name]) - before if inside else None
            )
            row[f"{label}_loss"] = (
                surrogate.predict({**params, name: other}) - predicted if inside else None
            )
        rows.append(row)
    return pd.DataFrame(rows)
