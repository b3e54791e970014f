"""The surrogate: it predicts the loss of a decision from measurements of the checkpoint.

In: a profile and a space. Out: a predicted loss for any choice. `solver` minimises it under a
budget. Invariant: a surrogate is never changed; whatever teaches it something gives another one.

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

Pruning a layer costs what was measured, piecewise linear between counts. The tokens of removed
experts are routed to the others, so errors of retained experts then count in proportion.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from allocator.decision.costs import ChoiceBytesCache
from allocator.decision.mixes import split
from allocator.decision.parameters import (
    ExpertsOf,
    FormatOf,
    Loss,
    Params,
    SettingOf,
    parse,
)
from allocator.decision.space import Space
from allocator.prediction.profile import Profile, bundle_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Prices = Mapping[str, Mapping[str, list[float]]]
"""Second-order loss by group and format: one value per routed expert, else one value."""


@dataclass(frozen=True, slots=True)
class LocalPrices:
    """Losses around a candidate, from a gradient there.

    Attributes:
        curvature: second-order loss of every format, as in a profile.
        moves: loss of changing the candidate to a format, to second order; 0 for experts that the
            candidate does not retain.
        forward_tokens: tokens that the measurement took.
    """

    curvature: Prices
    moves: Prices
    forward_tokens: int


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Predicted losses, nats per token.

    Attributes:
        space: whose choices are priced.
        error_losses: smooth losses by group, `counts x options`; one row for a group without
            routed experts.
        coupling: `c` by group.
        count_losses: losses of pruning by MoE layer, `counts` of the space.
        setting_losses: what the original loses by a setting alone, by value of `experts_used` and
            `kv_format`; 0 for values that are not listed.
        multipliers: of a group's losses, of a layer's counts (`experts.<layer>`), or of a
            setting's; 1 for names that are not listed.
        choice_bytes: bytes of every choice of the space, shared by the surrogates made from this
            one.
    """

    space: Space
    error_losses: Mapping[str, Floats]
    coupling: Mapping[str, float]
    count_losses: Mapping[int, Floats]
    setting_losses: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)
    choice_bytes: ChoiceBytesCache = field(default_factory=ChoiceBytesCache)

    @cached_property
    def multiplied_names(self) -> tuple[str, ...]:
        """Names that have a multiplier: every group, every layer's counts, and settings."""
        counts = (ExpertsOf(x).name for x in self.space.layout.layers)
        return (*self.space.formats, *counts, *self.setting_losses)

    def multiplied(self, multipliers: Mapping[str, float]) -> "Surrogate":
        """Returns this surrogate with other multipliers."""
        return replace(self, multipliers=dict(multipliers))

    def scaled(self, factors: Mapping[str, Floats]) -> "Surrogate":
        """Returns this surrogate with each group's errors costing a share of what they did.

        Losses of pruning and of settings stay.

        Args:
            factors: of losses by group, `(options,)`; 1 for groups that are not named.
        """
        scaled = {g: rows * factors.get(g, 1.0) for g, rows in self.error_losses.items()}
        return replace(self, error_losses=scaled)

    def with_pruning(self, factor: float) -> "Surrogate":
        """Returns this surrogate with the losses of pruning, in all layers, times a factor."""
        return replace(self, count_losses={x: v * factor for x, v in self.count_losses.items()})

    def with_curvature_at(self, prices: Prices) -> "Surrogate":
        """Returns this surrogate with the geometric mean of its curvature and a candidate's.

        The loss of a candidate is the integral of the curvature on the way to it; on the reference
        model the geometric mean of both ends predicts it within 2 % at 1.75 to 3 effective bits,
        and either end alone is off by 10 to 20 %.

        Args:
            prices: curvature at the candidate.
        """
        other = _error_losses(self.space, prices)
        return replace(
            self, error_losses={g: np.sqrt(v * other[g]) for g, v in self.error_losses.items()}
        )

    def table(self, moves: Prices, counts: Mapping[int, int]) -> dict[str, Floats]:
        """Returns the prices of moves from a candidate, by group `counts x options`.

        Args:
            moves: as of `LocalPrices`.
            counts: experts that the candidate retains, by MoE layer.
        """
        return _error_losses(self.space, moves, counts)

    def local(self, params: Params, moves: Mapping[str, Floats], *, share: float) -> "Surrogate":
        """Returns the change of loss from complete params: a mean of moves' and this surrogate's.

        Moves know how errors interact. But of hundreds of moves, each with its own noise, the least
        are the luckiest, and moves made together are not independent. On the reference
        model and 16 documents, shares of 0.2 to 0.5 lower the loss that was measured, and a share
        of 1 raises it.

        Args:
            params: where the change is zero.
            moves: from candidates near these params, by group `counts x options`: what `table`
                returns, or the mean of several.
            share: weight of the moves.
        """
        routing_loss = max(self.routing_loss(self.losses(params)), 1e-12)
        counts = self.space.layer_counts(params)
        mixed = {}
        for group, rows in self.error_losses.items():
            own, moved = rows * self.error_weight(group, routing_loss), moves[group]
            column = self.space.formats[group].index(params[self.space.format_params[group]])
            at = self.row(params, group), column
            mixed[group] = share * (moved - moved[at]) + (1 - share) * (own - own[at])
        return Surrogate(
            self.space,
            mixed,
            dict.fromkeys(self.coupling, 0.0),
            {
                x: losses - losses[self.space.counts.index(n)]
                for x, n in counts.items()
                for losses in (self.multiplied_count_losses(x),)
            },
            {
                name: {
                    v: self.setting_loss(name, v) - self.setting_loss(name, params[name])
                    for v in values
                }
                for name, values in self.setting_losses.items()
            },
            choice_bytes=self.choice_bytes,
        )

    def losses(self, params: Params) -> Floats:
        """Returns the losses of complete params, `(multiplied_names,)`, without the routing loss.

        The losses are smooth losses by group, losses of counts by layer, and losses of settings.
        """
        return self._losses_alone[self.places(params)] * self._multiplier_values

    def losses_at(self, places: Ints) -> Floats:
        """Returns what `losses` does, of several params: `params x multiplied_names`.

        Args:
            places: of the params, as `places` returns them; `params x multiplied_names`.
        """
        return self._losses_alone[places] * self._multiplier_values

    def places(self, params: Params) -> Ints:
        """Returns where complete params stand among all losses, `(multiplied_names,)`.

        Surrogates that were made from this one have the same places.
        """
        places, start = [], 0
        for group, names in self.space.formats.items():
            rows = self.error_losses[group]
            column = names.index(params[self.space.format_params[group]])
            places.append(start + self.row(params, group) * len(names) + column)
            start += rows.size
        for layer, of_counts in self.count_losses.items():
            places.append(start + self._count_index(params, layer))
            start += len(of_counts)
        for name, of_values in self.setting_losses.items():
            places.append(start + list(of_values).index(params[name]))
            start += len(of_values)
        return np.array(places, dtype=np.int64)

    @cached_property
    def _losses_alone(self) -> Floats:
        """All losses in a row, without multipliers: of groups, of counts, of settings."""
        settings = [np.array(list(v.values()), dtype=float) for v in self.setting_losses.values()]
        errors = [self.error_losses[g] for g in self.space.formats]
        rows = [*errors, *self.count_losses.values(), *settings]
        return np.concatenate([np.ravel(v) for v in rows])

    def predict(self, params: Params) -> float:
        """Returns the predicted loss of complete params."""
        losses = self.losses(params)
        return float(losses.sum()) + self.routing_loss(losses)

    def routing_loss(self, losses: Floats) -> float:
        """Returns the loss by jumps that goes with smooth ones.

        Args:
            losses: `(multiplied_names,)`, as `losses` returns them.
        """
        return sqrt(float(self.coupling_values @ losses))

    def shares(self, params: Params) -> Floats:
        """Returns the derivatives of the predicted loss's logarithm, `(multiplied_names,)`.

        The derivatives are by each multiplier's logarithm, at complete params.
        """
        _, shares = self.predicted_and_shares(self.losses(params)[None])
        return np.asarray(shares[0])

    def predicted_and_shares(self, losses: Floats) -> tuple[Floats, Floats]:
        """Returns predicted losses, `(params,)`, and what `shares` does of each.

        Args:
            losses: `params x multiplied_names`, as `losses_at` returns them.
        """
        # a product of the whole matrix rounds otherwise
        routing_losses = np.sqrt(np.array([self.coupling_values @ row for row in losses]))
        sums, slopes = losses.sum(axis=1), np.maximum(routing_losses, 1e-12)
        weights = 1 + self.coupling_values / (2 * slopes)[:, None]
        totals = np.maximum(sums + slopes, 1e-12)
        return sums + routing_losses, losses * weights / totals[:, None]

    def loss_at(self, params: Params) -> Loss:
        """Returns the losses of single values, under the routing loss of complete params."""
        routing_loss = max(self.routing_loss(self.losses(params)), 1e-12)

        def loss(param: str, value: Any) -> float:
            key = parse(param)
            if isinstance(key, SettingOf):
                return self.setting_loss(param, value)
            if isinstance(key, FormatOf):
                group = key.group
                column = self.space.formats[group].index(value)
                alone = float(self.error_losses[group][self.row(params, group), column])
                return alone * self.error_weight(group, routing_loss)
            layers = self.space.count_params[param]
            index = self.space.counts.index(value)
            factors = {x: self.multipliers.get(ExpertsOf(x).name, 1.0) for x in layers}
            return sum(float(self.count_losses[x][index]) * factors[x] for x in layers)

        return loss

    def setting_loss(self, name: str, value: Any) -> float:
        """Returns the loss of one value of a setting alone."""
        alone = self.setting_losses.get(name, {}).get(value, 0.0)
        return alone * self.multipliers.get(name, 1.0)

    def multiplied_count_losses(self, layer: int) -> Floats:
        """Returns the losses of pruning a layer, `(counts,)` of the space."""
        return self.count_losses[layer] * self.multipliers.get(ExpertsOf(layer).name, 1.0)

    def error_weight(self, group: str, routing_loss: float) -> float:
        """Returns the factor of a group's `error_losses` that makes losses independent.

        This is the multiplier, and the slope of the square root at a routing loss.
        """
        return self.multipliers.get(group, 1.0) * (1 + self.coupling[group] / (2 * routing_loss))

    def weighted_losses(self, routing_loss: float) -> dict[str, Floats]:
        """Returns losses that are independent under a routing loss, by group `counts x options`."""
        return {
            g: rows * self.error_weight(g, routing_loss) for g, rows in self.error_losses.items()
        }

    def row(self, params: Params, group: str) -> int:
        """Returns the row of a group's `error_losses` at the retained count of complete params."""
        if len(self.error_losses[group]) == 1:
            return 0
        return self._count_index(params, self.space.layer_of[group])

    def _count_index(self, params: Params, layer: int) -> int:
        return self.space.counts.index(params[self.space.count_param_of[layer]])

    @cached_property
    def _multiplier_values(self) -> Floats:
        return np.array([self.multipliers.get(n, 1.0) for n in self.multiplied_names])

    @cached_property
    def coupling_values(self) -> Floats:
        """`c`, `multiplied_names`; 0 for counts and settings."""
        return np.array([self.coupling.get(n, 0.0) for n in self.multiplied_names])


def from_profile(
    profile: Profile, space: Space, setting_losses: Mapping[str, Mapping[Any, float]] = {}
) -> Surrogate:
    """Returns the surrogate that measurements give.

    Args:
        profile: of the space's layout.
        space: the choices that are priced.
        setting_losses: as of `Surrogate`.
    """
    bundles = _couplings(profile)
    return Surrogate(
        space,
        _error_losses(space, profile.curvature),
        {g: bundles[bundle_of(space.layout.groups[g])] for g in space.formats},
        {x: _count_losses(profile, x, space) for x in space.layout.layers},
        setting_losses,
    )


def _couplings(profile: Profile) -> dict[str, float]:
    """`c` by bundle: squared loss of a measured change beyond the curvature, over the curvature."""
    ratios: dict[str, list[float]] = {}
    for change in profile.measured:
        smooth = sum(sum(profile.curvature[g][f]) for g, f in change.formats.items())
        excess = max(change.kl - smooth, 0.0)
        ratios.setdefault(change.bundle, []).append(excess**2 / max(smooth, 1e-12))
    return {bundle: float(np.mean(values)) for bundle, values in ratios.items()}


def _error_losses(
    space: Space, prices: Prices, measured_at: Mapping[int, int] | None = None
) -> dict[str, Floats]:
    """Losses by group, `counts x options`.

    Args:
        space: the choices.
        prices: second-order losses.
        measured_at: retained counts that prices were measured at, by MoE layer; all if None.
    """
    tables = {}
    for group, names in space.formats.items():
        row = {f: np.array(values) for f, values in prices[group].items()}
        layer = space.layer_of[group]
        if not space.layout.groups[group].role.is_expert:
            tables[group] = np.array([[float(row[f].sum()) for f in names]])
            continue
        reference = np.sum(np.abs(list(row.values())), axis=0)
        ranking, counts = list(space.rankings[layer]), np.array(space.counts)
        whole = _share(space, layer, reference, None if measured_at is None else measured_at[layer])
        shares = np.array([_share(space, layer, reference, n) for n in space.counts])
        # losses of the ranking's first n experts, n from 0 on
        sums = {f: np.append(0.0, np.cumsum(v[ranking])) for f, v in row.items()}
        table = np.zeros((len(counts), len(names)))
        for j, value in enumerate(names):
            start = np.zeros_like(counts)
            for fmt, n_experts in split(value, space.counts[-1]):
                end = np.minimum(start + n_experts, counts)
                table[:, j] += sums[fmt][end] - sums[fmt][start]
                start = end
        tables[group] = table / (np.minimum(shares, whole) / whole)[:, None]
    return tables


def _share(space: Space, layer: int, values: Floats, count: int | None) -> float:
    """The share of `values`, one per expert, that the experts of a retained count have."""
    retained = space.rankings[layer][:count]
    return float(values[list(retained)].sum() / max(values.sum(), 1e-300)) or 1e-12


def _count_losses(profile: Profile, layer: int, space: Space) -> Floats:
    """Losses of pruning a layer, `counts`: piecewise linear between measured counts.

    They are zero where all experts stay. A router that needs all experts has no measured counts.
    """
    points = {space.layout.inventory.n_experts: 0.0, **profile.pruned.get(layer, {})}
    xs = sorted(points)
    return np.interp(space.counts, xs, [points[x] for x in xs])
