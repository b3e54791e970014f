"""The additive prediction of the proxy loss, and its exact optimum under a budget.

In: a profile and a space. Out: a loss per choice (format of a group, retained count of a layer),
and `solve`: the choices of least total loss within the bytes. Invariant: the solution is the
optimum of the (multiplied) surrogate, never over the budget.

A group's loss in a format follows from its importance-weighted error: through the measured formats
as a power law (log loss linear in log error), and below the smallest measured error proportional to
it, which is the second-order expansion of the KL around the original. (Measured on the reference
model: extending the power law there instead costs 2-5 % of the knapsack's loss.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from allocator.knapsack import Options, combine, solve, union
from allocator.memory import Budget
from allocator.profile import Profile
from allocator.space import Costs, Params, Space

_EXPONENTS = (0.5, 2.0)  # what two noisy measurements may say about the power law


@dataclass(frozen=True)
class Surrogate:
    """Predicted losses, nats per token.

    Attributes:
        space: whose choices are priced.
        formats: loss by group and format.
        counts: loss by MoE layer and retained count.
    """

    space: Space
    formats: Mapping[str, Mapping[str, float]]
    counts: Mapping[int, Mapping[int, float]]

    def loss(self, param: str, value: object) -> float:
        """Predicted loss of one param's value."""
        if param.startswith("format."):
            return self.formats[param.removeprefix("format.")][str(value)]
        if param == "experts_used":
            return 0.0
        return sum(self.counts[x][int(str(value))] for x in self.space.count_params[param])

    def predict(self, params: Params) -> float:
        """Predicted loss of complete params."""
        return sum(self.loss(name, value) for name, value in params.items())

    @cached_property
    def multiplied_names(self) -> tuple[str, ...]:
        """What a sampler may multiply: every group, and every layer's counts."""
        return (*self.space.formats, *(f"experts.{x}" for x in self.space.layout.layers))

    def multiplied(self, multipliers: Mapping[str, float]) -> "Surrogate":
        """The same with each group's and each layer's losses multiplied."""
        return Surrogate(
            self.space,
            {
                g: {f: v * multipliers.get(g, 1.0) for f, v in row.items()}
                for g, row in self.formats.items()
            },
            {
                x: {n: v * multipliers.get(f"experts.{x}", 1.0) for n, v in row.items()}
                for x, row in self.counts.items()
            },
        )

    def solve(self, budget: Budget) -> Params:
        """The complete params of least predicted loss within the budget.

        Raises:
            BudgetError: if no choice fits.
        """
        costs = self.space.costs(budget)
        params = self._solve_tied(costs) if self.space.tied else self._solve_untied(costs)
        if params is None:
            self.space.check_budget(budget)
            return self.space.complete(self.space.params(self.space.smallest))
        return params

    def _options(self, costs: Costs, group: str, count: int) -> Options:
        names = self.space.formats[group]
        return Options(
            np.array([costs.group(group, f, count) for f in names], np.int64),
            np.array([self.formats[group][f] for f in names], np.float64),
        )

    def _plain(self, costs: Costs) -> tuple[list[str], list[Options]]:
        inside = {g for groups in self.space.expert_groups.values() for g in groups}
        names = [g for g in self.space.formats if g not in inside]
        return names, [self._options(costs, g, 0) for g in names]

    def _solve_tied(self, costs: Costs) -> Params | None:
        plain_names, plain = self._plain(costs)
        expert_names = [g for groups in self.space.expert_groups.values() for g in groups]
        best: tuple[float, Params] | None = None
        for count in self.space.counts:
            classes = plain + [self._options(costs, g, count) for g in expert_names]
            routers = sum(costs.layer(x, count) for x in self.space.layout.layers)
            found = solve(classes, costs.budget.nbytes - costs.constant - routers)
            if found is None:
                continue
            loss = found.loss + self.loss("experts.all", count)
            if best is None or loss < best[0]:
                names = plain_names + expert_names
                chosen = {
                    f"format.{g}": self.space.formats[g][i]
                    for g, i in zip(names, found.choice, strict=True)
                }
                best = loss, chosen | {"experts.all": count}
        return None if best is None else self._finish(best[1])

    def _solve_untied(self, costs: Costs) -> Params | None:
        names, classes = self._plain(costs)
        tables = {x: self._layer_class(costs, x) for x in self.space.layout.layers}
        found = solve(
            classes + [t[0] for t in tables.values()], costs.budget.nbytes - costs.constant
        )
        if found is None:
            return None
        params: Params = {
            f"format.{g}": self.space.formats[g][i]
            for g, i in zip(names, found.choice[: len(names)], strict=True)
        }
        for (x, (_, rows)), i in zip(tables.items(), found.choice[len(names) :], strict=True):
            count, *picks = rows[i]
            params[f"experts.{x}"] = int(count)
            for group, pick in zip(self.space.expert_groups[x], picks, strict=True):
                params[f"format.{group}"] = self.space.formats[group][pick]
        return self._finish(params)

    def _layer_class(self, costs: Costs, layer: int) -> tuple[Options, np.ndarray]:
        """A layer's retained count and formats as one class; rows are `(count, pick per group)`."""
        classes, rows = [], []
        for count in self.space.counts:
            joint, picks = _joint(
                [self._options(costs, g, count) for g in self.space.expert_groups[layer]]
            )
            classes.append(
                Options(
                    joint.nbytes + costs.layer(layer, count), joint.loss + self.counts[layer][count]
                )
            )
            rows.append(np.column_stack([np.full(len(picks), count), picks]))
        merged, where = union(classes)
        return merged, np.array([rows[c][i] for c, i in where])

    def _finish(self, params: Params) -> Params:
        return self.space.complete({**params, "experts_used": self.space.experts_used[-1]})


def _joint(classes: list[Options]) -> tuple[Options, np.ndarray]:
    """The Pareto-optimal combinations of some classes; rows are picks per class."""
    joint, picks = classes[0], np.arange(len(classes[0].nbytes))[:, None]
    for other in classes[1:]:
        joint, pairs = combine(joint, other)
        picks = np.column_stack([picks[pairs[:, 0]], pairs[:, 1]])
    return joint, picks


def from_profile(profile: Profile, space: Space) -> Surrogate:
    """The surrogate that measurements give; the profile must be of the space's layout."""
    return Surrogate(
        space,
        {g: _format_losses(profile, g, names) for g, names in space.formats.items()},
        {x: _count_losses(profile, x, space) for x in space.layout.layers},
    )


def _format_losses(profile: Profile, group: str, names: tuple[str, ...]) -> dict[str, float]:
    errors, measured = profile.errors[group], profile.measured[group]
    points = sorted(
        (math.log(errors[f]), math.log(max(kl, 1e-12)))
        for f, kl in measured.items()
        if errors[f] > 0
    )

    def loss(fmt: str) -> float:
        if errors[fmt] <= 0 or not points:
            return 0.0
        x = math.log(errors[fmt])
        (x0, y0), (x1, y1) = points[0], points[-1]
        if x <= x0 or len(points) == 1:
            return math.exp(y0 + x - x0)
        slope = min(max((y1 - y0) / max(x1 - x0, 1e-9), _EXPONENTS[0]), _EXPONENTS[1])
        near_x, near_y = (x0, y0) if x - x0 < abs(x - x1) else (x1, y1)
        return math.exp(near_y + slope * (x - near_x))

    return {fmt: loss(fmt) for fmt in names}


def _count_losses(profile: Profile, layer: int, space: Space) -> dict[int, float]:
    """Piecewise linear through the measured counts; zero when all experts stay."""
    points = {space.layout.inventory.n_experts: 0.0, **profile.pruned[layer]}
    xs = sorted(points)
    ys = [points[x] for x in xs]
    return {n: float(np.interp(n, xs, ys)) for n in space.counts}
