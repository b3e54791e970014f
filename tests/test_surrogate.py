"""The exact optimum against brute force; predictions against the measurements they came from."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from allocator.errors import BudgetError
from allocator.memory import Budget
from allocator.space import Experts, Pin, SearchSpace, bind
from allocator.surrogate import from_profile
from allocator.targets import TARGETS

FREE = {  # group: formats left
    "layers.1.experts.down": ("Q6_K", "IQ3_S", "IQ1_S"),
    "layers.1.experts.up": ("Q4_K", "IQ2_XXS"),
    "layers.2.experts.gate": ("Q4_K", "IQ2_XXS"),
    "embedding": ("Q8_0", "Q4_K"),
}


def small(layout, profile, same, free=tuple(FREE)):
    """Few formats in four groups, one in the others; 2 counts per layer, or 4 for all."""
    tied = same or layout.target == "gguf"
    space = bind(
        SearchSpace(
            schema=1, experts=Experts(minimum=21 if tied else 23, same=same), experts_used=[2, 4]
        ),
        layout,
        profile.saliency,
    )
    formats = {n: FREE[n] if n in free else (space.formats[n][3],) for n in space.formats}
    return from_profile(profile, replace(space, formats=formats))


def everything(space):
    choices = {n: v for n, v in space.choices.items() if n != "experts_used"}
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True)) | {"experts_used": 4}


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize(
    ("target", "same"), [("gguf", False), ("safetensors", True), ("safetensors", False)]
)
def test_solve_is_brute_force(layouts, profiles, target, same, bounds):
    surrogate = small(layouts[target], profiles[target], same)
    rng = np.random.default_rng(1)
    for _ in range(2):
        space = surrogate.space
        costs = space.costs(Budget(1, bounds))
        table = []
        for params in everything(space):  # the loss, summed here
            loss = sum(
                surrogate.formats[n.removeprefix("format.")][v]
                for n, v in params.items()
                if n.startswith("format.")
            )
            count = {x: params.get(f"experts.{x}", params.get("experts.all")) for x in range(1, 6)}
            loss += sum(surrogate.counts[x][n] for x, n in count.items())
            assert surrogate.predict(params) == pytest.approx(loss)
            table.append((costs.total(params), loss))
        sizes, losses = np.array([n for n, _ in table]), np.array([x for _, x in table])
        for share in (0, 0.05, 0.3, 0.5, 0.8, 1):
            budget = Budget(int(np.quantile(sizes, share)), bounds)
            found = surrogate.solve(budget)
            assert costs.total(found) <= budget.nbytes
            best = losses[sizes <= budget.nbytes].min()
            assert surrogate.predict(found) == pytest.approx(best, rel=1e-12)
            used = budget.used(space.allocation(found).nbytes(space.layout))
            assert used <= budget.nbytes
            assert found["experts_used"] == 4
        with pytest.raises(BudgetError, match="is under the floor of"):
            surrogate.solve(Budget(int(sizes.min()) - 3000, bounds))
        factors = np.exp(rng.standard_normal(len(surrogate.multiplied_names)))
        surrogate = surrogate.multiplied(
            dict(zip(surrogate.multiplied_names, factors.tolist(), strict=True))
        )


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize("target", TARGETS)
def test_never_over_the_budget(surrogates, target, bounds):
    surrogate = surrogates[target]
    space = surrogate.space
    low, high = (
        Budget(1, bounds).used(a.nbytes(space.layout)) for a in (space.smallest, space.largest)
    )
    before = math.inf
    for share in (0, 0.001, 0.1, 0.5, 1, 1.5):
        budget = Budget(low + int(share * (high - low)), bounds)
        found = surrogate.solve(budget)
        allocation = space.allocation(found)
        allocation.check(space.layout)
        assert budget.used(allocation.nbytes(space.layout)) <= budget.nbytes
        assert surrogate.predict(found) <= before
        before = surrogate.predict(found)
    with pytest.raises(BudgetError, match=f"{low - 1:,} bytes"):
        surrogate.solve(Budget(low - 1, bounds))


def test_solve_is_repeatable(surrogates):
    for surrogate in surrogates.values():
        budget = Budget(12_000_000, "weights")
        assert surrogate.solve(budget) == surrogate.solve(budget)


def test_multiplied(surrogates):
    for target, plain in surrogates.items():
        many = plain.multiplied({"embedding": 3.0, "experts.2": 5.0})
        assert plain.multiplied({}).formats == plain.formats
        for group, row in plain.formats.items():
            factor = 3.0 if group == "embedding" else 1.0
            assert many.formats[group] == {f: factor * v for f, v in row.items()}
        for layer, counts in plain.counts.items():
            factor = 5.0 if layer == 2 else 1.0
            assert many.counts[layer] == {n: factor * v for n, v in counts.items()}
        names = [*plain.space.formats, *(f"experts.{x}" for x in range(1, 6))]
        assert list(plain.multiplied_names) == names
        name = "experts.all" if target == "gguf" else "experts.2"
        extra = 4.0 * plain.counts[2][7]
        assert many.loss(name, 7) == pytest.approx(plain.loss(name, 7) + extra)


def test_unused_multipliers_and_fixed_choices_cost_nothing(surrogates):
    surrogate = surrogates["gguf"]
    assert surrogate.loss("experts_used", 4) == 0
    assert surrogate.loss("experts.all", 24) == 0


# -- from measurements

G = "layers.1.experts.down"


def one_group(profile, layout, *, measured, errors=None, pruned=None):
    changed = {
        "measured": profile.measured | {G: measured},
        "errors": profile.errors | {G: profile.errors[G] | (errors or {})},
        "pruned": profile.pruned | (pruned or {}),
    }
    import msgspec

    profile = msgspec.structs.replace(profile, **changed)
    pins = [Pin(pattern="embedding", format="Q8_0")]
    return from_profile(profile, bind(SearchSpace(schema=1, pin=pins), layout, profile.saliency))


@pytest.fixture
def layout(layouts):
    return layouts["safetensors"]


@pytest.fixture
def profile(profiles):
    return profiles["safetensors"]


def test_power_law_through_two_points(layout, profile):
    """kl = 3 error^1.4 through two formats; linear in the error below the smaller one."""
    errors = profile.errors[G]
    law = {f: 3 * e**1.4 for f, e in errors.items()}
    found = one_group(profile, layout, measured={f: law[f] for f in ("IQ3_XXS", "IQ1_M")})
    low = errors["IQ3_XXS"]
    for fmt, loss in found.formats[G].items():
        linear = law["IQ3_XXS"] * errors[fmt] / low
        assert loss == pytest.approx(law[fmt] if errors[fmt] >= low else linear)
    assert errors["IQ1_S"] > errors["IQ2_S"] > low > errors["Q8_0"]


def test_one_point_scales_with_the_error(layout, profile):
    found = one_group(profile, layout, measured={"IQ3_XXS": 0.02})
    errors = profile.errors[G]
    for fmt, loss in found.formats[G].items():
        assert loss == pytest.approx(0.02 * errors[fmt] / errors["IQ3_XXS"])


@pytest.mark.parametrize(("exponent", "held"), [(0.1, 0.5), (5.0, 2.0), (-1.0, 0.5)])
def test_noise_is_held_to_plausible_exponents(layout, profile, exponent, held):
    errors = profile.errors[G]
    low, high = errors["IQ3_XXS"], errors["IQ1_M"]
    measured = {"IQ3_XXS": 0.01, "IQ1_M": 0.01 * (high / low) ** exponent}
    found = one_group(profile, layout, measured=measured).formats[G]
    assert found["IQ3_XXS"] == pytest.approx(0.01)
    assert found["IQ1_M"] == pytest.approx(measured["IQ1_M"])
    assert found["IQ1_S"] == pytest.approx(measured["IQ1_M"] * (errors["IQ1_S"] / high) ** held)
    assert found["Q8_0"] == pytest.approx(0.01 * errors["Q8_0"] / low)
    assert found["IQ1_S"] == pytest.approx(measured["IQ1_M"] * (errors["IQ1_S"] / high) ** held)


def test_no_error_no_loss(layout, profile):
    found = one_group(profile, layout, errors={"BF16": 0.0}, measured={"BF16": 0.0, "IQ1_M": 0.1})
    assert found.formats[G]["BF16"] == 0.0
    assert found.formats[G]["IQ1_M"] == pytest.approx(0.1)
    noise = one_group(profile, layout, measured={"IQ3_XXS": -1e-7, "IQ1_M": 0.1}).formats[G]
    assert all(math.isfinite(v) and v >= 0 for v in noise.values())


def test_pruning_is_linear_between_measured_counts(layout, profile):
    pruned = {1: {20: 0.1, 12: 0.5, 6: 2.0}}
    found = one_group(profile, layout, measured={"IQ1_M": 0.1}, pruned=pruned).counts[1]
    assert list(found) == list(range(6, 25))
    expected = {24: 0, 22: 0.05, 20: 0.1, 16: 0.3, 12: 0.5, 9: 1.25, 6: 2.0}
    assert {n: found[n] for n in expected} == pytest.approx(expected)


def test_all_experts_cost_nothing(surrogates):
    for surrogate in surrogates.values():
        assert {row[24] for row in surrogate.counts.values()} == {0.0}
