"""The prediction of the proxy loss from the profile, and its optimum under a budget.

In: a profile and a space. Out: a predicted loss for any choice, and `solve`: the choices of least
predicted loss within the bytes. Invariant: never over the budget; under a given noise the solution
is the exact optimum (see `Surrogate.solve`).

A candidate differs from the original in two ways, and so has two losses.

Smoothly: every group's error costs what the curvature says, `q`, and independent errors add up.

By jumps: errors shift the router's logits, and where a shift crosses the gap between the last
expert chosen and the first one left out, a token goes to another expert. The number of crossings
grows with the *standard deviation* of the shift, hence with the square root of the summed errors:
`sqrt(sum of c q)`. One change alone shows `q + sqrt(c q)`, which is why single measurements are
2 to 10 times the curvature in early layers and tell little of what the same change costs beside
others. `c` is measured per bundle (a layer's attention, a layer's experts): on the reference model
it is the same, within noise, for all groups of a bundle, and the loss of a bundle changed together
is mostly within 10 % of what its groups alone predict through the square root.

Pruning a layer costs what was measured, piecewise linear between counts; its experts' errors then
count in proportion to what is left, the tokens of the others being routed to them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from allocator.decision.budget import Budget
from allocator.decision.parameters import (
    EXPERTS_USED,
    KV_FORMAT,
    MICRO_BATCH,
    ExpertsOf,
    FormatOf,
    Params,
    SettingOf,
    parse,
)
from allocator.decision.space import Costs, Loss, Space, split
from allocator.prediction.knapsack import Options, lp_bound, solve
from allocator.prediction.nested_knapsack import Nested, solve_nested
from allocator.prediction.profile import Profile, bundle_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Prices = Mapping[str, Mapping[str, list[float]]]
"""Second-order loss by group and format: one value per routed expert, else one value."""


@dataclass(frozen=True, slots=True)
class LocalPrices:
    """What a gradient says around a candidate.

    Attributes:
        curvature: second-order loss of every format, as in a profile.
        moves: what changing the candidate to a format costs to second order, from where it is; 0
            for experts that it does not retain.
        forward_tokens: what measuring it cost.
    """

    curvature: Prices
    moves: Prices
    forward_tokens: int


_PRICES = 16  # of reading that are tried, each 8 times the last
_PRICE_TOLERANCE = 0.01
_PRICED_STATES = 2000  # of a knapsack whose losses are nearly linear in bytes: kept short
_ROUNDS = 8  # of solving under the noise of the last solution; two or three are needed


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Predicted losses, nats per token.

    Attributes:
        space: whose choices are priced.
        smooth: by group, `counts x options` (one row where it is no routed expert).
        coupling: by group, `c`.
        counts: by MoE layer, one value per count of the space.
        settings: what the original loses by a setting alone: `experts_used`, `kv_format`; 0 for
            what is not listed.
        multipliers: of a group's losses, of a layer's counts (`experts.<layer>`), or of a
            setting's; else 1.
    """

    space: Space
    error_losses: Mapping[str, Floats]
    coupling: Mapping[str, float]
    counts: Mapping[int, Floats]
    settings: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)
    _sizes: dict[str, "_Sizes"] = field(default_factory=dict)

    @cached_property
    def multiplied_names(self) -> tuple[str, ...]:
        """What has a multiplier: every group, every layer's counts, and settings."""
        counts = (ExpertsOf(x).name for x in self.space.layout.layers)
        return (*self.space.formats, *counts, *self.settings)

    def multiplied(self, multipliers: Mapping[str, float]) -> "Surrogate":
        """The same with these multipliers instead."""
        return replace(self, multipliers=dict(multipliers))

    def with_curvature_at(self, prices: Prices) -> "Surrogate":
        """The same with curvature halfway, geometrically, to the one around a candidate.

        The loss of a candidate is the integral of the curvature on the way to it; on the reference
        model the geometric mean of both ends predicts it within 2 % at 1.75 to 3 effective bits,
        and either end alone is off by 10 to 20 %.
        """
        there = _smooth(self.space, prices)
        return replace(
            self, error_losses={g: np.sqrt(v * there[g]) for g, v in self.error_losses.items()}
        )

    def table(self, moves: Prices, held: Mapping[int, int]) -> dict[str, Floats]:
        """Prices of moves from a candidate that held these counts, by group `counts x options`."""
        return _smooth(self.space, moves, held)

    def local(
        self, params: Params, tables: Sequence[Mapping[str, Floats]], *, share: float
    ) -> "Surrogate":
        """The change of loss from complete `params`: a share of the moves', the rest this one's.

        Moves know what errors have in common; but of hundreds of them, each with its own noise,
        the least are the luckiest, and moves made together are not independent. On the reference
        model and 16 documents, shares of 0.2 to 0.5 lower the loss that was measured, and a share
        of 1 raises it.

        Args:
            params: where it is zero.
            tables: of moves from candidates near it; their mean counts.
            share: of the moves.
        """
        noise = max(self.routing_loss(self.losses(params)), 1e-12)
        counts = self.space.layer_counts(params)
        mixed = {}
        for group, rows in self.error_losses.items():
            own = rows * self._weight(group, noise)
            moved = np.mean([t[group] for t in tables], axis=0)
            column = self.space.formats[group].index(params[self.space.format_params[group]])
            here = self._row(params, group), column
            mixed[group] = share * (moved - moved[here]) + (1 - share) * (own - own[here])
        return Surrogate(
            self.space,
            mixed,
            dict.fromkeys(self.coupling, 0.0),
            {
                x: self._counts_of(x) - self._counts_of(x)[self.space.counts.index(n)]
                for x, n in counts.items()
            },
            {
                name: {
                    v: self._setting(name, v) - self._setting(name, params[name]) for v in values
                }
                for name, values in self.settings.items()
            },
            _sizes=self._sizes,
        )

    def losses(self, params: Params) -> Floats:
        """The smooth losses of complete params, then those of counts, as `multiplied_names`."""
        found = []
        for group, names in self.space.formats.items():
            column = names.index(params[self.space.format_params[group]])
            found.append(self.error_losses[group][self._row(params, group), column])
        for layer, losses in self.counts.items():
            found.append(losses[self.space.counts.index(self._count(params, layer))])
        found += [losses[params[name]] for name, losses in self.settings.items()]
        return np.array(found) * self._factors

    def predict(self, params: Params) -> float:
        """Predicted loss of complete params."""
        losses = self.losses(params)
        return float(losses.sum()) + self.routing_loss(losses)

    def routing_loss(self, losses: Floats) -> float:
        """The loss by jumps that goes with `losses`."""
        return sqrt(float(self._couplings @ losses))

    def shares(self, params: Params) -> Floats:
        """Derivative of the predicted loss's logarithm by each multiplier's logarithm."""
        losses = self.losses(params)
        noise = max(self.routing_loss(losses), 1e-12)
        total = float(losses.sum()) + noise
        return np.asarray(losses * (1 + self._couplings / (2 * noise)) / max(total, 1e-12))

    def loss_at(self, params: Params) -> Loss:
        """Losses of single values, the noise being that of complete `params`."""
        noise = max(self.routing_loss(self.losses(params)), 1e-12)

        def loss(param: str, value: Any) -> float:
            key = parse(param)
            if isinstance(key, SettingOf):
                return self._setting(param, value)
            if isinstance(key, FormatOf):
                group = key.group
                column = self.space.formats[group].index(value)
                alone = float(self.error_losses[group][self._row(params, group), column])
                return alone * self._weight(group, noise)
            layers = self.space.count_params[param]
            index = self.space.counts.index(value)
            factors = self.multipliers
            return sum(
                float(self.counts[x][index]) * factors.get(ExpertsOf(x).name, 1.0) for x in layers
            )

        return loss

    def solve(self, budget: Budget) -> Params:
        """The complete params of least predicted loss within the budget.

        `sqrt(n)` is the least value of `n / (2 s) + s / 2` over s, so the optimum is also that of a
        sum of independent losses at the right `s`. Solving for one `s` exactly, then taking the
        noise of the solution as the next, never raises the predicted loss and ends where it stays.

        Raises:
            BudgetError: if no choice fits.
        """
        costs = self.space.costs(budget)
        smallest = self.space.complete(self.space.params(self.space.smallest))
        noise = self.routing_loss(self.losses(smallest)) / 2
        best: tuple[float, Params] | None = None
        for _ in range(_ROUNDS):
            params = self._solve_under(costs, max(noise, 1e-12))
            if params is None:
                self.space.check_budget(budget)
                return smallest
            found = self.predict(params)
            if best is not None and found >= best[0]:
                break
            best = found, params
            noise = self.routing_loss(self.losses(params))
        assert best is not None
        return best[1]

    def _solve_under(self, costs: Costs, noise: float) -> Params | None:
        """The optimum of the losses that are independent under a noise, over all settings.

        Settings are few: each is solved for by itself, those that lose least alone first, until one
        loses more alone than the best in all. Micro-batches lose nothing: the solution takes
        the largest for which it leaves room.
        """
        losses = {g: rows * self._weight(g, noise) for g, rows in self.error_losses.items()}
        space, best = self.space, None
        least = self._least(losses)
        for alone, used, kv in sorted(
            (
                self._setting(EXPERTS_USED.name, used) + self._setting(KV_FORMAT.name, kv),
                -used,
                kv,
            )
            for used in space.experts_used
            for kv in space.kv_formats
        ):
            if best is not None and alone + least >= best[0]:
                break
            told = self._told(-used, kv, space.micro_batches[-1])
            under = inf if best is None else best[0] - alone
            params = self._solve_settings(costs, losses, told, under)
            if params is None:
                continue
            found = alone + self._independent(losses, params)
            if best is None or found < best[0]:
                best = found, params
        if best is None:
            return None
        params = best[1]
        for batch in space.micro_batches if MICRO_BATCH.name in space.choices else ():
            if costs.fits({**params, MICRO_BATCH.name: batch}):
                return {**params, MICRO_BATCH.name: batch}
        return params

    def _told(self, experts_used: int, kv_format: str, micro_batch: int | None) -> Params:
        told = {
            EXPERTS_USED.name: experts_used,
            KV_FORMAT.name: kv_format,
            MICRO_BATCH.name: micro_batch,
        }
        return {name: value for name, value in told.items() if name in self.space.choices}

    def _solve_settings(
        self, costs: Costs, losses: Mapping[str, Floats], told: Params, under: float
    ) -> Params | None:
        """The optimum under some settings: exact, where what a token reads is no limit.

        Where it is, reading has the least price (in loss per byte, to a percent) at which the
        optimum holds the limit (Everett, "Generalized Lagrange Multiplier Method", 1963): a
        solution that loses less within both limits, if there is one, reads more than this and less
        than the limit. None where not even without that limit the loss is below `under`.
        """
        sizes = self._sizes.get(costs.budget.bounds)
        if sizes is None:
            sizes = self._sizes[costs.budget.bounds] = _Sizes(self.space, costs)
        full = {**self.space.first_settings, **told}
        settings = self.space.runtime_settings(full)
        capacity = np.array([costs.capacity(settings, n) for n in self.space.counts], np.int64)

        def solved(
            priced: Mapping[str, Floats], first_row: int = 0, **options: int
        ) -> Params | None:
            found = (
                self._solve_tied(sizes, priced, capacity, first_row, **options)
                if self.space.tied
                else self._solve_untied(sizes, priced, int(capacity[-1]), **options)
            )
            return None if found is None else self.space.complete({**found, **told})

        params, limit = solved(losses), costs.budget.token_bytes
        if params is None or self._independent(losses, params) >= under:
            return None
        if limit is None or costs.token_bytes(params) <= limit:
            return params
        reads = sizes.reads(costs, full[EXPERTS_USED.name])
        first_row = 0  # smaller formats leave room for more experts, never for fewer
        if self.space.tied:
            first_row = self.space.counts.index(params[ExpertsOf(None).name])

        def at(price: float) -> Params | None:
            priced = {g: rows + price * reads[g] for g, rows in losses.items()}
            found = solved(priced, first_row, max_states=_PRICED_STATES)
            return found if found and costs.token_bytes(found) <= limit else None

        scale = max(1e-12, *(float(rows.max()) for rows in losses.values()))
        low, high, best = 0.0, scale / limit, None
        for _ in range(_PRICES):  # up to where losses no longer count
            if best := at(high):
                break
            low, high = high, high * 8
        while best and high - low > _PRICE_TOLERANCE * high:
            middle = (low + high) / 2
            if found := at(middle):
                best, high = found, middle
            else:
                low = middle
        return best

    def _independent(self, losses: Mapping[str, Floats], params: Params) -> float:
        """The sum that is solved for, of complete params."""
        groups = (
            losses[g][self._row(params, g), names.index(params[self.space.format_params[g]])]
            for g, names in self.space.formats.items()
        )
        counts = (
            self._counts_of(x)[self.space.counts.index(self._count(params, x))]
            for x in self.space.layout.layers
        )
        return float(sum(groups) + sum(counts))

    def _least(self, losses: Mapping[str, Floats]) -> float:
        """No params lose less, settings apart."""
        return float(
            sum(rows.min() for rows in losses.values())
            + sum(self._counts_of(x).min() for x in self.space.layout.layers)
        )

    def _setting(self, name: str, value: Any) -> float:
        alone = self.settings.get(name, {}).get(value, 0.0)
        return alone * self.multipliers.get(name, 1.0)

    def _solve_tied(
        self,
        sizes: "_Sizes",
        losses: Mapping[str, Floats],
        capacity: Ints,
        first_row: int = 0,
        **options: int,
    ) -> Params | None:
        """The optimum under a capacity for every count, among the counts from `first_row` on."""
        best: tuple[float, Params] | None = None
        total = np.sum([self._counts_of(x) for x in self.space.layout.layers], axis=0)
        for row in range(first_row, len(self.space.counts))[::-1]:
            classes = [
                Options(sizes.groups[g][min(row, len(v) - 1)], v[min(row, len(v) - 1)])
                for g, v in losses.items()
            ]
            routers = sum(int(sizes.layers[x][row]) for x in self.space.layout.layers)
            room = int(capacity[row]) - routers
            if best is not None and lp_bound(classes, room) + total[row] >= best[0]:
                continue
            found = solve(classes, room, **options)
            if found is None:
                continue
            loss = found.loss + float(total[row])
            if best is None or loss < best[0]:
                best = (
                    loss,
                    {
                        **self._formats(list(losses), found.choice),
                        ExpertsOf(None).name: self.space.counts[row],
                    },
                )
        return None if best is None else best[1]

    def _solve_untied(
        self, sizes: "_Sizes", losses: Mapping[str, Floats], capacity: int, **options: int
    ) -> Params | None:
        inside = {g for groups in self.space.expert_groups.values() for g in groups}
        plain = [g for g in losses if g not in inside]
        layers = self.space.layout.layers
        found = solve_nested(
            [Options(sizes.groups[g][0], losses[g][0]) for g in plain],
            [
                Nested(
                    tuple(sizes.groups[g] for g in self.space.expert_groups[x]),
                    tuple(losses[g] for g in self.space.expert_groups[x]),
                    sizes.layers[x],
                    self._counts_of(x),
                )
                for x in layers
            ],
            capacity,
            **options,
        )
        if found is None:
            return None
        params = self._formats(plain, found.plain)
        for x, (row, picks) in zip(layers, found.nested, strict=True):
            params |= self._formats(list(self.space.expert_groups[x]), picks)
            params[ExpertsOf(x).name] = self.space.counts[row]
        return params

    def _formats(self, groups: list[str], picks: tuple[int, ...]) -> Params:
        chosen = zip(groups, picks, strict=True)
        return {self.space.format_params[g]: self.space.formats[g][i] for g, i in chosen}

    def _counts_of(self, layer: int) -> Floats:
        return self.counts[layer] * self.multipliers.get(ExpertsOf(layer).name, 1.0)

    def _weight(self, group: str, noise: float) -> float:
        return self.multipliers.get(group, 1.0) * (1 + self.coupling[group] / (2 * noise))

    def _row(self, params: Params, group: str) -> int:
        """Where `smooth` has a group at the retained count of params."""
        if len(self.error_losses[group]) == 1:
            return 0
        return self.space.counts.index(self._count(params, self.space.layer_of[group]))

    def _count(self, params: Params, layer: int) -> int:
        count: int = params[self.space.count_param_of[layer]]
        return count

    @cached_property
    def _factors(self) -> Floats:
        return np.array([self.multipliers.get(n, 1.0) for n in self.multiplied_names])

    @cached_property
    def _couplings(self) -> Floats:
        return np.array([self.coupling.get(n, 0.0) for n in self.multiplied_names])


class _Sizes:
    """Bytes of every choice: groups `counts x options`, routers `counts`."""

    def __init__(self, space: Space, costs: Costs) -> None:
        self.groups: dict[str, Ints] = {}
        for group, names in space.formats.items():
            expert = space.layout.groups[group].role.is_expert
            counts = space.counts if expert else (0,)
            self.groups[group] = np.array(
                [[costs.group(group, v, n) for v in names] for n in counts], np.int64
            )
        self.layers = {
            x: np.array([costs.layer(x, n) for n in space.counts], np.int64)
            for x in space.layout.layers
        }
        self._reads: dict[int, dict[str, Floats]] = {}

    def reads(self, costs: Costs, experts_used: int) -> dict[str, Floats]:
        """Bytes that a token reads of every choice, groups `counts x options`."""
        if experts_used not in self._reads:
            space = costs.space
            self._reads[experts_used] = {
                g: np.array(
                    [
                        [costs.reads(g, v, n, experts_used) for v in names]
                        for n in (space.counts if len(self.groups[g]) > 1 else space.counts[:1])
                    ],
                    np.float64,
                )
                for g, names in space.formats.items()
            }
        return self._reads[experts_used]


def from_profile(
    profile: Profile, space: Space, settings: Mapping[str, Mapping[Any, float]] = {}
) -> Surrogate:
    """The surrogate that measurements give.

    Args:
        profile: of the space's layout.
        space: what is priced.
        settings: as of `Surrogate`.
    """
    bundles = _couplings(profile)
    return Surrogate(
        space,
        _smooth(space, profile.curvature),
        {g: bundles[bundle_of(space.layout.groups[g])] for g in space.formats},
        {x: _count_losses(profile, x, space) for x in space.layout.layers},
        settings,
    )


def _couplings(profile: Profile) -> dict[str, float]:
    """`c` by bundle: what a measured change lost beyond the curvature, squared, over that."""
    found: dict[str, list[float]] = {}
    for change in profile.measured:
        smooth = sum(sum(profile.curvature[g][f]) for g, f in change.formats.items())
        excess = max(change.kl - smooth, 0.0)
        found.setdefault(change.bundle, []).append(excess**2 / max(smooth, 1e-12))
    return {bundle: float(np.mean(values)) for bundle, values in found.items()}


def _smooth(
    space: Space, prices: Prices, held: Mapping[int, int] | None = None
) -> dict[str, Floats]:
    """Losses by group, `counts x options`; `held` are the counts that prices were measured at."""
    found = {}
    for group, names in space.formats.items():
        row = {f: np.array(values) for f, values in prices[group].items()}
        layer = space.layer_of[group]
        if not space.layout.groups[group].role.is_expert:
            found[group] = np.array([[float(row[f].sum()) for f in names]])
            continue
        reference = np.sum(np.abs(list(row.values())), axis=0)
        ranking, counts = list(space.rankings[layer]), np.array(space.counts)
        whole = _share(space, layer, reference, None if held is None else held[layer])
        left = np.array([_share(space, layer, reference, n) for n in space.counts])
        # losses of the ranking's first n experts, n from 0 on
        sums = {f: np.append(0.0, np.cumsum(v[ranking])) for f, v in row.items()}
        table = np.zeros((len(counts), len(names)))
        for j, value in enumerate(names):
            start = np.zeros_like(counts)
            for fmt, n_experts in split(value, space.counts[-1]):
                end = np.minimum(start + n_experts, counts)
                table[:, j] += sums[fmt][end] - sums[fmt][start]
                start = end
        found[group] = table / (np.minimum(left, whole) / whole)[:, None]
    return found


def _share(space: Space, layer: int, values: Floats, count: int | None) -> float:
    """What the experts that a count retains have of `values`."""
    kept = space.rankings[layer][:count]
    return float(values[list(kept)].sum() / max(values.sum(), 1e-300)) or 1e-12


def _count_losses(profile: Profile, layer: int, space: Space) -> Floats:
    """Piecewise linear through the measured counts; zero when all experts stay.

    A router that needs all experts has no measured counts.
    """
    points = {space.layout.inventory.n_experts: 0.0, **profile.pruned.get(layer, {})}
    xs = sorted(points)
    return np.interp(space.counts, xs, [points[x] for x in xs])
