"""The choices of least predicted loss under a budget.

In: a `Surrogate`, a budget. Out: complete params. Invariant: never over the budget; under a given
routing loss the solution is the exact optimum, where no limit on reading binds (see `solve`).

A sum of independent losses is a multiple-choice knapsack. With one retained count for all layers
every count is a knapsack of plain classes (`knapsack`); with a count per layer, layers are nested
classes (`nested_knapsack`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from allocator.decision.budget import Budget
from allocator.decision.costs import ChoiceBytes, Costs, check_budget
from allocator.decision.parameters import (
    EXPERTS_USED,
    KV_FORMAT,
    MICRO_BATCH,
    ExpertsOf,
    Params,
)
from allocator.files.progress import step
from allocator.prediction.knapsack import MAX_STATES, Floats, Ints, Options, lp_bound
from allocator.prediction.knapsack import solve as solve_plain
from allocator.prediction.nested_knapsack import Nested, solve_nested
from allocator.prediction.surrogate import Surrogate

_ROUNDS = 8  # of solving under the routing loss of the last solution; two or three are needed
_PRICES = 16  # of reading that are tried, each 8 times the last
_PRICE_TOLERANCE = 0.01
_PRICED_STATES = 2000  # of a knapsack whose losses are nearly linear in bytes: few suffice


ONE_START = (0.5,)
STARTS = (0.5, 0.1, 0.02)
"""Routing losses from which `solve` begins, over that of the smallest allocation."""


def solve(surrogate: Surrogate, budget: Budget, *, starts: Sequence[float] = ONE_START) -> Params:
    """Returns the complete params of least predicted loss within the budget.

    `sqrt(n)` is the least value of `n / (2 s) + s / 2` over s, so the optimum is also that of a sum
    of independent losses at the right `s`. Solving for one `s` exactly, then taking the routing
    loss of the solution as the next `s`, never raises the predicted loss. The rounds end where the
    loss stays. They may end in a local optimum: under a large routing loss errors look cheap beside
    pruning, under a small one dear. Several starts find the best of these.

    Args:
        surrogate: predicted losses.
        budget: the limit.
        starts: routing losses to begin from, over that of the smallest allocation.

    Raises:
        BudgetError: if no choice fits.
    """
    space, costs = surrogate.space, Costs(surrogate.space, budget)
    best: tuple[float, Params] | None = None
    with step("solving", brief=True) as shown:
        for start in starts:
            for solution in rounds(surrogate, costs, start=start):
                if solution is None:
                    check_budget(space, budget)
                    return space.complete(space.params(space.smallest))
                if best is None or solution[0] < best[0]:
                    best = solution
                shown.note(f"predicted loss {best[0]:.5f}")
    assert best is not None
    return best[1]


def rounds(
    surrogate: Surrogate, costs: Costs, *, start: float = ONE_START[0]
) -> Iterator[tuple[float, Params] | None]:
    """Yields the predicted loss and the params of every round of `solve` from one start.

    The last round lowers the predicted loss no further. None, and no more, where no choice fits.
    """
    space = surrogate.space
    smallest = space.complete(space.params(space.smallest))
    routing_loss = surrogate.routing_loss(surrogate.losses(smallest)) * start
    least = inf
    for _ in range(_ROUNDS):
        params = solve_under(surrogate, costs, max(routing_loss, 1e-12))
        if params is None:
            yield None
            return
        loss = surrogate.predict(params)
        yield loss, params
        if loss >= least:
            return
        least = loss
        routing_loss = surrogate.routing_loss(surrogate.losses(params))


def solve_under(surrogate: Surrogate, costs: Costs, routing_loss: float) -> Params | None:
    """Returns the optimum of the losses that are independent under a routing loss.

    Settings are few: each combination is solved by itself, in order of what it loses alone, until
    one loses more alone than the best in all. Micro-batches lose nothing: the solution takes the
    largest that fits.

    Returns:
        Complete params, or None if no choice fits.
    """
    knapsack = _Knapsack(surrogate, costs, surrogate.weighted_losses(routing_loss))
    space, best = surrogate.space, None
    least = knapsack.least
    for alone, used, kv in sorted(
        (
            surrogate.setting_loss(EXPERTS_USED.name, used)
            + surrogate.setting_loss(KV_FORMAT.name, kv),
            -used,
            kv,
        )
        for used in space.experts_used
        for kv in space.kv_formats
    ):
        if best is not None and alone + least >= best[0]:
            break
        settings = _setting_params(surrogate, -used, kv, space.micro_batches[-1])
        below = inf if best is None else best[0] - alone
        params = knapsack.solve(settings, below)
        if params is None:
            continue
        loss = alone + knapsack.loss(params)
        if best is None or loss < best[0]:
            best = loss, params
    if best is None:
        return None
    params = best[1]
    for batch in space.micro_batches if MICRO_BATCH.name in space.choices else ():
        if costs.fits({**params, MICRO_BATCH.name: batch}):
            return {**params, MICRO_BATCH.name: batch}
    return params


def _setting_params(
    surrogate: Surrogate, experts_used: int, kv_format: str, micro_batch: int | None
) -> Params:
    """Params of the settings that may be chosen."""
    values = {
        EXPERTS_USED.name: experts_used,
        KV_FORMAT.name: kv_format,
        MICRO_BATCH.name: micro_batch,
    }
    return {name: value for name, value in values.items() if name in surrogate.space.choices}


@dataclass(frozen=True, eq=False)
class _Knapsack:
    """Independent losses of every choice, and the bytes that they cost.

    Attributes:
        surrogate: whose losses of counts and settings count.
        costs: bytes under the budget.
        losses: by group, `counts x options`; one row for a group without routed experts.
    """

    surrogate: Surrogate
    costs: Costs
    losses: Mapping[str, Floats]

    @property
    def least(self) -> float:
        """A lower bound of `loss` for all params."""
        layers = self.surrogate.space.layout.layers
        return float(
            sum(rows.min() for rows in self.losses.values())
            + sum(self.surrogate.multiplied_count_losses(x).min() for x in layers)
        )

    def loss(self, params: Params) -> float:
        """Returns the sum that is solved for, of complete params, settings apart."""
        surrogate, space = self.surrogate, self.surrogate.space
        groups = (
            self.losses[g][surrogate.row(params, g), names.index(params[space.format_params[g]])]
            for g, names in space.formats.items()
        )
        counts = (
            surrogate.multiplied_count_losses(x)[space.counts.index(params[name])]
            for x, name in space.count_param_of.items()
        )
        return float(sum(groups) + sum(counts))

    def solve(self, settings: Params, below: float) -> Params | None:
        """Returns the optimum under some settings: exact, where reading is not limited.

        Where reading is limited, its price is the least (in loss per byte, to a percent) at which
        the optimum is within the limit (Everett, "Generalized Lagrange Multiplier Method", 1963). A
        solution that loses less within both limits, if there is one, reads more than this one and
        less than the limit.

        Args:
            settings: params of the settings that may be chosen.
            below: None is returned where even without the limit on reading the loss is not less.

        Returns:
            Complete params, or None if no choice fits.
        """
        costs, space = self.costs, self.surrogate.space
        all_settings = {**space.first_settings, **settings}
        runtime = space.runtime_settings(all_settings)
        capacity = np.array([costs.capacity(runtime, n) for n in space.counts], np.int64)
        params = self._optimum(settings, capacity, self.losses)
        if params is None or self.loss(params) >= below:
            return None
        limit = costs.budget.token_bytes
        if limit is None or costs.reads_fit(params):
            return params
        reads = self._choice_bytes.reads(costs, all_settings[EXPERTS_USED.name])
        first_row = 0  # smaller formats admit more experts, never fewer
        if space.tied:
            first_row = space.counts.index(params[ExpertsOf(None).name])

        def at(price: float) -> Params | None:
            priced = {g: rows + price * reads[g] for g, rows in self.losses.items()}
            solved = self._optimum(settings, capacity, priced, first_row, max_states=_PRICED_STATES)
            return solved if solved and costs.reads_fit(solved) else None

        scale = max(1e-12, *(float(rows.max()) for rows in self.losses.values()))
        low, high, best = 0.0, scale / limit, None
        for _ in range(_PRICES):  # up to where losses no longer count
            if best := at(high):
                break
            low, high = high, high * 8
        while best and high - low > _PRICE_TOLERANCE * high:
            middle = (low + high) / 2
            if solved := at(middle):
                best, high = solved, middle
            else:
                low = middle
        return best

    @property
    def _choice_bytes(self) -> ChoiceBytes:
        return self.surrogate.choice_bytes.of(self.costs)

    def _optimum(
        self,
        settings: Params,
        capacity: Ints,
        losses: Mapping[str, Floats],
        first_row: int = 0,
        max_states: int = MAX_STATES,
    ) -> Params | None:
        """The optimum of some losses under some settings.

        Args:
            settings: params of the settings that may be chosen.
            capacity: bytes for groups and routers where every layer retains a count, `counts`.
            losses: by group, `counts x options`.
            first_row: index of the least count, where all layers retain the same.
            max_states: of the knapsack.
        """
        space = self.surrogate.space
        solved = (
            self._tied(losses, capacity, first_row, max_states)
            if space.tied
            else self._untied(losses, int(capacity[-1]), max_states)
        )
        return None if solved is None else space.complete({**solved, **settings})

    def _tied(
        self, losses: Mapping[str, Floats], capacity: Ints, first_row: int, max_states: int
    ) -> Params | None:
        """The optimum with one count for all layers; arguments as of `_optimum`."""
        surrogate, space = self.surrogate, self.surrogate.space
        layers, nbytes = space.layout.layers, self._choice_bytes
        best: tuple[float, Params] | None = None
        pruned = np.sum([surrogate.multiplied_count_losses(x) for x in layers], axis=0)
        for row in range(first_row, len(space.counts))[::-1]:
            classes = [
                Options(nbytes.groups[g][min(row, len(v) - 1)], v[min(row, len(v) - 1)])
                for g, v in losses.items()
            ]
            routers = sum(int(nbytes.routers[x][row]) for x in layers)
            for_groups = int(capacity[row]) - routers
            if best is not None and lp_bound(classes, for_groups) + pruned[row] >= best[0]:
                continue
            solved = solve_plain(classes, for_groups, max_states=max_states)
            if solved is None:
                continue
            loss = solved.loss + float(pruned[row])
            if best is None or loss < best[0]:
                params = self._format_params(list(losses), solved.choice)
                best = loss, {**params, ExpertsOf(None).name: space.counts[row]}
        return None if best is None else best[1]

    def _untied(
        self, losses: Mapping[str, Floats], capacity: int, max_states: int
    ) -> Params | None:
        """The optimum with a count per layer, within the capacity of the largest count."""
        surrogate, space, nbytes = self.surrogate, self.surrogate.space, self._choice_bytes
        inside = {g for groups in space.expert_groups.values() for g in groups}
        plain = [g for g in losses if g not in inside]
        layers = space.layout.layers
        solved = solve_nested(
            [Options(nbytes.groups[g][0], losses[g][0]) for g in plain],
            [
                Nested(
                    tuple(nbytes.groups[g] for g in space.expert_groups[x]),
                    tuple(losses[g] for g in space.expert_groups[x]),
                    nbytes.routers[x],
                    surrogate.multiplied_count_losses(x),
                )
                for x in layers
            ],
            capacity,
            max_states=max_states,
        )
        if solved is None:
            return None
        params = self._format_params(plain, solved.plain)
        for x, (row, picks) in zip(layers, solved.nested, strict=True):
            params |= self._format_params(list(space.expert_groups[x]), picks)
            params[space.count_param_of[x]] = space.counts[row]
        return params

    def _format_params(self, groups: list[str], picks: tuple[int, ...]) -> Params:
        space = self.surrogate.space
        chosen = zip(groups, picks, strict=True)
        return {space.format_params[g]: space.formats[g][i] for g, i in chosen}
