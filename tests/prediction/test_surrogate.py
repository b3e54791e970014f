"""Predictions against sums made here from the profile; the optimum against brute force."""

import itertools
import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.search_space import Experts, SearchSpace, bind
from allocator.errors import BudgetError
from allocator.prediction.profile import Change
from allocator.prediction.solver import rounds, solve, solve_under
from allocator.prediction.surrogate import from_profile
from allocator.targets import TARGETS

FREE = {  # group: formats left
    "layers.1.experts.down": ("Q6_K", "IQ3_S", "IQ1_S"),
    "layers.1.experts.up": ("Q4_K", "IQ2_XXS"),
    "layers.2.experts.gate": ("Q4_K", "IQ2_XXS"),
    "embedding": ("Q8_0", "Q4_K"),
}
LAYERS = range(1, 6)
KINDS = [("gguf", False), ("safetensors", True), ("safetensors", False)]


def small(layout, profile, same):
    """Few formats in four groups, one in the others; 2 counts per layer, or 4 for all."""
    tied = same or layout.target == "gguf"
    space = bind(
        SearchSpace(
            schema=1, experts=Experts(minimum=21 if tied else 23, same=same), experts_used=[2, 4]
        ),
        layout,
        profile.saliency,
    )
    formats = {n: FREE.get(n, (space.formats[n][3],)) for n in space.formats}
    return from_profile(profile, replace(space, formats=formats))


def everything(space):
    choices = {n: v for n, v in space.choices.items() if n != "experts_used"}
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True)) | {"experts_used": 4}


def at_random(space, rng):
    return {n: v[rng.integers(len(v))] for n, v in space.choices.items()}


def count_of(params, layer):
    return params.get(f"experts.{layer}", params.get("experts.all"))


def bundle(name):
    if not name.startswith("layers."):
        return name
    _, layer, role, *_ = name.split(".")
    return f"layers.{layer}.{'attention' if role == 'attention' else 'mlp'}"


class Priced:
    """What params lose, from a profile: `smooth` by multiplied name, `coupling` by bundle."""

    def __init__(self, profile, space):
        self.profile, self.space = profile, space
        excess = {}
        for change in profile.measured:
            q = sum(sum(profile.curvature[g][f]) for g, f in change.formats.items())
            excess.setdefault(change.bundle, []).append(max(change.kl - q, 0) ** 2 / q)
        self.coupling = {b: sum(v) / len(v) for b, v in excess.items()}

    def group(self, name, value, count):
        prices = self.profile.curvature[name]
        if ".experts." not in name:
            return sum(prices[value])
        layer = int(name.split(".")[1])
        weight = np.sum(list(prices.values()), axis=0)
        kept = list(self.space.retained(layer, count))
        lost = sum(prices[f][e] for f, experts in self.space.parts(name, value, count)
                   for e in experts)  # fmt: skip
        return lost * weight.sum() / weight[kept].sum()

    def pruned(self, layer, count):
        points = {24: 0.0, **self.profile.pruned[layer]}
        return float(np.interp(count, sorted(points), [points[n] for n in sorted(points)]))

    def losses(self, params, factors):
        found = {}
        for name in self.space.formats:
            count = count_of(params, self.space.layout.groups[name].layer)
            found[name] = self.group(name, params[f"format.{name}"], count)
        found |= {f"experts.{x}": self.pruned(x, count_of(params, x)) for x in LAYERS}
        return {n: v * factors.get(n, 1.0) for n, v in found.items()}

    def routing_loss(self, losses):
        return math.sqrt(sum(self.coupling[bundle(n)] * v for n, v in losses.items()
                             if not n.startswith("experts.")))  # fmt: skip

    def total(self, params, factors):
        losses = self.losses(params, factors)
        return sum(losses.values()) + self.routing_loss(losses)

    def linear(self, params, factors, noise):
        """The noise's square root replaced by its tangent, less its constant."""
        losses = self.losses(params, factors)
        return sum(losses.values()) + self.routing_loss(losses) ** 2 / (2 * noise)


def factors_of(surrogate, rng, sigma=1.0):
    names = surrogate.multiplied_names
    return dict(zip(names, np.exp(sigma * rng.standard_normal(len(names))).tolist(), strict=True))


# -- predictions


@pytest.mark.parametrize("target", TARGETS)
def test_predicted_is_the_sum_its_noise_and_the_counts(surrogates, profiles, target):
    plain = surrogates[target]
    space, rng = plain.space, np.random.default_rng(1)
    priced = Priced(profiles[target], space)
    names = [*space.formats, *(f"experts.{x}" for x in LAYERS)]
    assert list(plain.multiplied_names) == names
    for factors in ({}, {"embedding": 3.0, "experts.2": 5.0}, factors_of(plain, rng)):
        surrogate = plain.multiplied(factors)
        for _ in range(4):
            params = at_random(space, rng)
            losses = priced.losses(params, factors)
            assert dict(zip(names, surrogate.losses(params), strict=True)) == pytest.approx(losses)
            assert surrogate.routing_loss(surrogate.losses(params)) == pytest.approx(
                priced.routing_loss(losses)
            )
            assert surrogate.predict(params) == pytest.approx(priced.total(params, factors))
    assert plain.multipliers == {}
    assert plain.multiplied(factors).multiplied({}).predict(params) == plain.predict(params)


def test_mixes_are_sums_of_parts_rescaled_by_what_is_retained(surrogates, profiles):
    surrogate = surrogates["safetensors"]
    priced = Priced(profiles["safetensors"], surrogate.space)
    seen = set()
    for name in ("layers.1.experts.down", "layers.4.experts.gate"):
        values = surrogate.space.formats[name]
        assert surrogate.error_losses[name].shape == (19, len(values))
        for row, count in enumerate(range(6, 25)):
            expected = [priced.group(name, v, count) for v in values]
            np.testing.assert_allclose(surrogate.error_losses[name][row], expected, rtol=1e-12)
        seen |= {"*" in v for v in values}
    assert seen == {True, False}
    assert surrogate.error_losses["layers.1.attention.o"].shape[0] == 1


def test_fewer_experts_of_a_mix_lose_less_only_by_their_formats(surrogates):
    """Pruning itself is priced by `counts`: in one format, the experts' loss hardly changes."""
    table = surrogates["safetensors"].error_losses["layers.1.experts.down"]
    values = surrogates["safetensors"].space.formats["layers.1.experts.down"]
    plain = table[:, values.index("Q4_K")]
    assert plain.max() / plain.min() < 1.2
    mix = table[:, values.index("IQ2_XXS*12+IQ1_S")]
    np.testing.assert_allclose(mix[:7], table[:7, values.index("IQ2_XXS")])  # 6 to 12 experts
    assert mix[-1] > 1.2 * mix[0]


@pytest.mark.parametrize("target", TARGETS)
def test_shares_are_logarithmic_derivatives(surrogates, target):
    plain = surrogates[target]
    rng, h = np.random.default_rng(2), 1e-5
    surrogate = plain.multiplied(factors_of(plain, rng, 0.3))
    params = at_random(plain.space, rng)
    shares = surrogate.shares(params)
    for at, name in enumerate(plain.multiplied_names):
        up, down = (
            surrogate.multiplied({**surrogate.multipliers, name: factor * math.exp(sign * h)})
            for factor in (surrogate.multipliers[name],) for sign in (1, -1)
        )  # fmt: skip
        slope = (math.log(up.predict(params)) - math.log(down.predict(params))) / (2 * h)
        assert shares[at] == pytest.approx(slope, abs=1e-8)
    assert 0.5 < shares.sum() <= 1  # the noise grows with the root


@pytest.mark.parametrize("target", TARGETS)
def test_around_is_the_derivative_of_predict(surrogates, target):
    """Differences between values against a step on the way from one to the other."""
    plain = surrogates[target]
    space, rng, h = plain.space, np.random.default_rng(3), 1e-5
    surrogate = plain.multiplied(factors_of(plain, rng, 0.3))
    params = at_random(space, rng)
    loss = surrogate.loss_at(params)
    for group in ("embedding", "layers.1.experts.down", "layers.2.attention.o"):
        name, rows = f"format.{group}", surrogate.error_losses[group]
        row = count_of(params, int(group.split(".")[1])) - 6 if len(rows) > 1 else 0
        here = space.formats[group].index(params[name])
        for there, value in enumerate(space.formats[group]):
            on_the_way = []
            for sign in (1, -1):
                moved = rows.copy()
                moved[row, here] += sign * h * (rows[row, there] - rows[row, here])
                changed = replace(surrogate, error_losses={**surrogate.error_losses, group: moved})
                on_the_way.append(changed.predict(params))
            slope = (on_the_way[0] - on_the_way[1]) / (2 * h)
            assert loss(name, value) - loss(name, params[name]) == pytest.approx(slope, rel=1e-4)
    # counts have no noise; they are the change itself, experts' formats left as they are
    name = "experts.all" if space.tied else "experts.2"
    table = {x: surrogate.count_losses[x] for x in (LAYERS if space.tied else (2,))}
    expected = sum(v[1] * surrogate.multipliers[f"experts.{x}"] for x, v in table.items())
    assert loss(name, 7) == pytest.approx(expected)
    assert loss(name, 24) == 0
    assert loss("experts_used", 4) == 0


# -- around a candidate


def prices_at_random(profile, rng, sigma=0.5):
    return {
        g: {f: (np.array(v) * np.exp(sigma * rng.standard_normal(len(v)))).tolist()
            for f, v in row.items()}
        for g, row in profile.curvature.items()
    }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_towards_is_the_geometric_mean(surrogates, profiles, target):
    surrogate, profile = surrogates[target], profiles[target]
    there = prices_at_random(profile, np.random.default_rng(4))
    other = from_profile(msgspec.structs.replace(profile, curvature=there), surrogate.space)
    halfway = surrogate.multiplied({"embedding": 2.0}).with_curvature_at(there)
    for group, rows in halfway.error_losses.items():
        expected = np.sqrt(surrogate.error_losses[group] * other.error_losses[group])
        np.testing.assert_allclose(rows, expected, rtol=1e-12)
        assert (rows != surrogate.error_losses[group]).any()
    assert halfway.coupling == surrogate.coupling
    assert halfway.count_losses == surrogate.count_losses
    assert halfway.multipliers == {"embedding": 2.0}
    same = surrogate.with_curvature_at(profile.curvature)
    for group, rows in same.error_losses.items():
        np.testing.assert_allclose(rows, surrogate.error_losses[group], rtol=1e-12)


def moves_from(profile, space, params, rng):
    """Losses of single switches, of either sign; none where nothing is switched."""
    moves = {}
    for name, row in profile.curvature.items():
        moves[name] = {f: (np.array(v) * rng.standard_normal(len(v))) for f, v in row.items()}
        value = params[f"format.{name}"]
        if ".experts." not in name:
            moves[name][value][:] = 0
            continue
        layer = int(name.split(".")[1])
        parts = space.parts(name, value, count_of(params, layer))
        for fmt, experts in parts:
            moves[name][fmt][list(experts)] = 0
        lost = set(range(24)) - {e for _, experts in parts for e in experts}
        for values in moves[name].values():
            values[sorted(lost)] = 0
    return {g: {f: v.tolist() for f, v in row.items()} for g, row in moves.items()}


def near_of(surrogate, params, moves, share):
    held = surrogate.space.allocation(params).counts
    return surrogate.local(params, surrogate.table(moves, held), share=share)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_nearby_is_zero_here_and_a_mixture_there(surrogates, profiles, target, share):
    plain, profile = surrogates[target], profiles[target]
    space, rng = plain.space, np.random.default_rng(5)
    priced = Priced(profile, space)
    for _ in range(3):
        factors = factors_of(plain, rng, 0.5)
        surrogate, params = plain.multiplied(factors), at_random(space, rng)
        moves = moves_from(profile, space, params, rng)
        near = near_of(surrogate, params, moves, share)
        assert near.predict(params) == pytest.approx(0, abs=1e-12)
        noise = priced.routing_loss(priced.losses(params, factors))
        here = priced.linear(params, factors, noise)
        for _ in range(5):  # other formats at the same counts
            other = {n: v if not n.startswith("format.") or rng.random() < 0.5
                     else space.choices[n][rng.integers(len(space.choices[n]))]
                     for n, v in params.items()}  # fmt: skip
            moved = sum(
                moves[g][f][e]
                for g in space.formats
                for f, experts in space.parts(
                    g, other[f"format.{g}"], count_of(params, space.layout.groups[g].layer)
                )
                for e in experts or (0,)
            )
            expected = share * moved + (1 - share) * (priced.linear(other, factors, noise) - here)
            assert near.predict(other) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_nearby_prices_counts_as_measured(surrogates, profiles):
    """Moves of experts that were pruned are not known: of more experts, those known count alone."""
    plain, profile = surrogates["safetensors"], profiles["safetensors"]
    space, rng = plain.space, np.random.default_rng(6)
    surrogate = plain.multiplied({"experts.3": 2.0})
    params = {**at_random(space, rng), "experts.3": 12, "format.layers.3.experts.up": "IQ4_XS"}
    moves = moves_from(profile, space, params, rng)
    near = near_of(surrogate, params, moves, 1.0)
    for count in (24, 18, 12, 9):
        other = {**params, "experts.3": count}
        pruned = Priced(profile, space).pruned
        change = near.predict({**other, "format.layers.3.experts.up": "Q4_K"}) - near.predict(other)
        step, weight = (np.zeros(24) for _ in range(2))
        for fmt, values in moves["layers.3.experts.up"].items():
            weight += np.abs(values)
            step += np.array(values) * ((fmt == "Q4_K") - (fmt == "IQ4_XS"))
        kept = list(space.retained(3, count))
        known = min(weight[kept].sum(), weight.sum()) / weight.sum()
        assert change == pytest.approx(step[kept].sum() / known)
        if count == 24:  # moves of the formats here are 0 at any more experts
            assert near.predict(other) == pytest.approx(2 * (pruned(3, 24) - pruned(3, 12)))


# -- from measurements


def changed(profile, space, **changes):
    return from_profile(msgspec.structs.replace(profile, **changes), space)


def test_couplings_are_means_of_what_changes_lost_beyond_the_curvature(surrogates, profiles):
    profile, space = profiles["safetensors"], surrogates["safetensors"].space
    formats = {"layers.1.attention.o": "Q4_K", "layers.1.attention.q_a": "IQ3_S"}
    low = {"layers.1.attention.o": "IQ2_S"}
    smooth = [sum(sum(profile.curvature[g][f]) for g, f in c.items()) for c in (formats, low)]

    def coupling(*kls):
        rest = [c for c in profile.measured if c.bundle != "layers.1.attention"]
        changes = [Change("layers.1.attention", c, kl)
                   for c, kl in zip((formats, low), kls, strict=True)]  # fmt: skip
        return changed(profile, space, measured=[*rest, *changes]).coupling

    found = coupling(*(q + math.sqrt(c * q) for q, c in zip(smooth, (0.02, 0.06), strict=True)))
    assert found["layers.1.attention.o"] == pytest.approx(0.04)
    assert found["layers.1.attention.kv_a"] == pytest.approx(0.04)  # of the same bundle
    before = surrogates["safetensors"].coupling
    others = {g for g in before if not g.startswith("layers.1.attention")}
    assert {g: found[g] for g in others} == {g: before[g] for g in others}
    assert found["layers.1.experts.up"] != pytest.approx(0.04)
    low_noise = coupling(smooth[0] / 2, smooth[1] + math.sqrt(0.06 * smooth[1]))
    assert low_noise["layers.1.attention.o"] == pytest.approx(0.03)  # below the curvature: none


def test_a_bundle_changed_alone_loses_what_was_measured(surrogates, profiles):
    """Every group lossless in its first format: only the bundle's own loss is left."""
    profile, space = profiles["safetensors"], surrogates["safetensors"].space
    curvature = {
        g: row | {next(iter(row)): [0.0] * len(next(iter(row.values())))}
        for g, row in profile.curvature.items()
    }
    measured = list({c.bundle: c for c in profile.measured}.values())
    surrogate = changed(profile, space, curvature=curvature, measured=measured)
    none = {n: v[0] if n.startswith("format.") else v[-1] for n, v in space.choices.items()}
    assert surrogate.predict(none) == 0
    for change in measured:
        params = none | {f"format.{g}": f for g, f in change.formats.items()}
        assert surrogate.predict(params) == pytest.approx(change.kl)
    several = {f"format.{g}": f for c in measured[:4] for g, f in c.formats.items()}
    together = surrogate.predict(none | several)
    assert together < 0.9 * sum(c.kl for c in measured[:4])  # jumps do not add up


def test_pruning_is_linear_between_measured_counts(surrogates, profiles):
    pruned = profiles["safetensors"].pruned | {1: {20: 0.1, 12: 0.5, 6: 2.0}}
    space = surrogates["safetensors"].space
    found = changed(profiles["safetensors"], space, pruned=pruned).count_losses[1]
    assert space.counts == tuple(range(6, 25))
    expected = {24: 0, 22: 0.05, 20: 0.1, 16: 0.3, 12: 0.5, 9: 1.25, 6: 2.0}
    assert {n: found[n - 6] for n in expected} == pytest.approx(expected)


def test_all_experts_cost_nothing(surrogates):
    for surrogate in surrogates.values():
        assert {row[-1] for row in surrogate.count_losses.values()} == {0.0}


# -- the optimum


@pytest.fixture(scope="module")
def tables(layouts, profiles):
    """Of every choice of a small space: what it loses in itself, and what it has of jumps."""
    made = {}

    def get(target, same, seed):
        key = target, same, seed
        if key not in made:
            plain = small(layouts[target], profiles[target], same)
            priced, names = Priced(profiles[target], plain.space), plain.multiplied_names
            rng = np.random.default_rng(seed)
            factors = factors_of(plain, rng) if seed else {}
            rows = [priced.losses(p, factors) for p in everything(plain.space)]
            losses = np.array([[row[n] for n in names] for row in rows])
            coupling = np.array([priced.coupling.get(bundle(n), 0.0) for n in names])
            made[key] = plain.multiplied(factors), losses.sum(axis=1), losses @ coupling
        return made[key]

    return get


def sizes_of(surrogate, bounds):
    costs = Costs(surrogate.space, Budget(1, bounds))
    return np.array([costs.total(p) for p in everything(surrogate.space)])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize(("target", "same"), KINDS)
def test_under_a_noise_the_solution_is_brute_force(tables, target, same, bounds, seed):
    surrogate, smooth, squared = tables(target, same, seed)
    sizes, all_params = sizes_of(surrogate, bounds), list(everything(surrogate.space))
    for noise, share in itertools.product((0.003, 0.1, 5.0), (0, 0.05, 0.3, 0.5, 0.8, 1)):
        budget = Budget(int(np.quantile(sizes, share)), bounds)
        costs = Costs(surrogate.space, budget)
        found = solve_under(surrogate, costs, noise)
        assert costs.total(found) <= budget.nbytes
        linear = smooth + squared / (2 * noise)
        best = linear[sizes <= budget.nbytes].min()
        assert linear[all_params.index(found)] == pytest.approx(best, rel=1e-12)
    under = Costs(surrogate.space, Budget(int(sizes.min()) - 1, bounds))
    assert solve_under(surrogate, under, 1) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize(("target", "same"), KINDS)
def test_solved_is_near_the_optimum_of_the_whole(tables, target, same, bounds, seed):
    surrogate, smooth, squared = tables(target, same, seed)
    sizes, total = sizes_of(surrogate, bounds), smooth + np.sqrt(squared)
    space = surrogate.space
    for share in (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1):
        budget = Budget(int(np.quantile(sizes, share)), bounds)
        found = solve(surrogate, budget)
        assert space.allocation(found).used(space.layout, budget) <= budget.nbytes
        assert found["experts_used"] == 4
        least = total[sizes <= budget.nbytes].min()
        assert least * (1 - 1e-12) <= surrogate.predict(found) <= 1.005 * least
        met = list(rounds(surrogate, Costs(space, budget)))
        course = [surrogate.predict(p) for _, p in met]
        assert course == [loss for loss, _ in met]
        assert 2 <= len(course) <= 8
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(course))
        assert surrogate.predict(found) == min(course)
    with pytest.raises(BudgetError, match="is under the floor of"):
        solve(surrogate, Budget(int(sizes.min()) - 3000, bounds))


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize("target", TARGETS)
def test_never_over_the_budget(surrogates, target, bounds):
    surrogate = surrogates[target]
    space = surrogate.space
    low, high = (a.used(space.layout, Budget(1, bounds)) for a in (space.smallest, space.largest))
    before = math.inf
    for share in (0, 0.001, 0.1, 0.5, 1, 1.5):
        budget = Budget(low + int(share * (high - low)), bounds)
        found = solve(surrogate, budget)
        allocation = space.allocation(found)
        allocation.check(space.layout)
        assert allocation.used(space.layout, budget) <= budget.nbytes
        assert surrogate.predict(found) <= before
        before = surrogate.predict(found)
    with pytest.raises(BudgetError, match=f"{low - 1:,} bytes"):
        solve(surrogate, Budget(low - 1, bounds))


def test_losses_that_fall_below_zero_are_solved_within_the_budget(surrogates, profiles):
    """Around a candidate, switches may win: half of the moves do."""
    for target, surrogate in surrogates.items():
        budget = Budget(9_000_000, "weights")
        here = solve(surrogate, budget)
        rng = np.random.default_rng(7)
        moves = moves_from(profiles[target], surrogate.space, here, rng)
        near = near_of(surrogate, here, moves, 0.5)
        found = solve(near, budget)
        assert near.predict(found) < 0
        used = surrogate.space.allocation(found).nbytes(surrogate.space.layout).encoded
        assert used <= budget.nbytes


def test_solve_is_repeatable(surrogates):
    for surrogate in surrogates.values():
        budget = Budget(12_000_000, "weights")
        first = solve(surrogate, budget)
        solve(surrogate.multiplied({"embedding": 9.0}), Budget(11_000_000, "file"))
        assert solve(surrogate, budget) == first
