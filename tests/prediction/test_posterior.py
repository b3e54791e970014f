"""Draws against the prior and a dense Gaussian process; predictions of what was not seen."""

from dataclasses import replace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage

from allocator.prediction.posterior import Observation, covariance, fit

MISFIT = 0.01**2  # variance of a logarithmic loss that no multipliers explain
N_DRAWS = 4000


@pytest.fixture(scope="module")
def tiny_one(formula):
    """The surrogate of the checkpoint of zeros: 2 layers, 16 groups."""
    return formula.search(InMemoryStorage(), "random").surrogate


def at_random(space, rng):
    return {n: v[rng.integers(len(v))] for n, v in space.choices.items()}


def logarithms(posterior, rng, n=N_DRAWS, **options):
    return np.log([list(posterior.draw(rng, **options).values()) for _ in range(n)])


def assert_drawn_from(draws, mean, cov):
    """Means and covariances within 5 standard errors."""
    spread = np.sqrt(np.diag(cov))
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * spread / np.sqrt(len(draws))).all()
    error = np.sqrt((cov**2 + np.outer(spread, spread) ** 2) / len(draws))
    assert (np.abs(np.cov(draws.T) - cov) < 5 * error).all()


def test_the_prior_by_hand(surrogates):
    surrogate = surrogates["safetensors"]
    names = surrogate.multiplied_names
    prior = covariance(surrogate.space, names)
    assert prior.shape == (len(names), len(names))
    at = {n: i for i, n in enumerate(names)}
    common, role, layer, own = 0.3**2, 0.2**2, 0.15**2, 0.1**2
    for a, b, expected in [
        ("layers.1.experts.up", "layers.1.experts.up", common + role + layer + own),
        ("layers.1.experts.up", "layers.4.experts.up", common + role),
        ("layers.1.experts.up", "layers.1.attention.o", common + layer),
        ("layers.1.experts.up", "layers.2.attention.o", common),
        ("layers.1.experts.up", "experts.1", common + layer),
        ("experts.1", "experts.2", common + role),
        ("embedding", "layers.1.experts.up", common),
        ("embedding", "embedding", common + role + layer + own),
    ]:
        assert prior[at[a], at[b]] == prior[at[b], at[a]] == pytest.approx(expected)


def test_without_observations_draws_follow_the_prior(tiny_one):
    posterior = fit(tiny_one, [])
    names = posterior.names
    assert names == tiny_one.multiplied_names
    assert (posterior.mean == 0).all()
    prior = covariance(tiny_one.space, names)
    rng = np.random.default_rng(0)
    assert_drawn_from(logarithms(posterior, rng), 0, prior)
    assert_drawn_from(logarithms(posterior, rng, scale=0.5), 0, prior / 4)


@pytest.mark.parametrize("n_observations", [0, 1, 7])
def test_draws_without_spread_are_the_mean_and_seeds_repeat(tiny_one, n_observations):
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(n_observations):
        params = at_random(tiny_one.space, rng)
        seen.append(Observation(params, 2 * tiny_one.predict(params), 0.01))
    posterior = fit(tiny_one, seen)
    mean = dict(zip(posterior.names, np.exp(posterior.mean), strict=True))
    assert posterior.draw(np.random.default_rng(2), scale=0) == pytest.approx(mean)
    assert (posterior.mean > 0).any() == (n_observations > 0)
    first, again, other = (posterior.draw(np.random.default_rng(s)) for s in (2, 2, 3))
    assert first == again == fit(tiny_one, seen).draw(np.random.default_rng(2))
    assert first != other
    assert all(v > 0 for v in first.values())


@pytest.fixture(scope="module")
def linear(tiny_one):
    """No jumps, and every group is lossless in its first format.

    So the loss of one group alone is its multiplier times what it loses.
    """
    smooth = {}
    for group, rows in tiny_one.error_losses.items():
        smooth[group] = rows.copy()
        smooth[group][:, 0] = 0
    return replace(tiny_one, error_losses=smooth, coupling=dict.fromkeys(smooth, 0.0))


def alone(space, name, place):
    """Everything lossless but what has a name."""
    params = {n: v[0] if n.startswith("format.") else v[-1] for n, v in space.choices.items()}
    own = f"format.{name}" if f"format.{name}" in params else name
    params[own] = space.choices[own][place if own.startswith("format.") else -1 - place]
    return params


def test_a_linear_case_is_the_dense_gaussian_process(linear):
    names, space = linear.multiplied_names, linear.space
    rng = np.random.default_rng(4)
    seen, rows, wanted, variances = [], [], [], []
    for name in ("embedding", "layers.0.experts.up", "layers.0.experts.up", "layers.1.attention.o",
                 "experts.1", "head"):  # fmt: skip
        params = alone(space, name, len(seen) % 2 + 1)
        logarithm, variance = rng.normal(), float(rng.uniform(0.001, 0.1))
        loss = float(np.exp(logarithm)) * linear.predict(params)
        seen.append(Observation(params, loss, variance))
        rows.append([float(n == name) for n in names])
        wanted.append(logarithm)
        variances.append(variance + MISFIT)
    prior, rows = covariance(space, names), np.array(rows)
    among = np.linalg.inv(rows @ prior @ rows.T + np.diag(variances))
    mean = prior @ rows.T @ among @ np.array(wanted)
    left = prior - prior @ rows.T @ among @ rows @ prior

    posterior = fit(linear, seen)
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-9)
    assert np.abs(posterior.mean).min() > 1e-3  # what was seen of six moves all
    assert_drawn_from(logarithms(posterior, rng), mean, left)
    assert_drawn_from(logarithms(posterior, rng, scale=0.5), mean, left / 4)
    at = names.index("embedding")
    assert left[at, at] < prior[at, at] / 2


@pytest.mark.parametrize("target", ["gguf", "safetensors"])
@pytest.mark.parametrize("seed", [0, 1])
def test_many_exact_losses_predict_others(surrogates, target, seed):
    plain = surrogates[target]
    space, names = plain.space, plain.multiplied_names
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky(covariance(space, names))
    drawn = np.exp(root @ rng.standard_normal(len(names)))
    truth = plain.multiplied(dict(zip(names, drawn.tolist(), strict=True)))

    def seen(n):
        chosen = [at_random(space, rng) for _ in range(n)]
        return [Observation(p, truth.predict(p), 0.0) for p in chosen]

    def error(posterior, observations):
        fitted = plain.multiplied(posterior.draw(rng, scale=0))
        return np.std([np.log(fitted.predict(o.params) / o.loss) for o in observations])

    held_out = seen(40)
    before, few, many = (error(fit(plain, seen(n)), held_out) for n in (0, 10, 150))
    assert many < 0.02
    assert many < 0.3 * before
    assert many < few


def test_a_loss_of_no_certainty_teaches_nothing(tiny_one):
    params = at_random(tiny_one.space, np.random.default_rng(5))
    loud = [Observation(params, 5 * tiny_one.predict(params), v) for v in (0.0, 1.0, 1e9)]
    sure, unsure, deaf = (fit(tiny_one, [o]) for o in loud)
    learned = [
        np.log(tiny_one.multiplied(p.draw(np.random.default_rng(0), scale=0)).predict(params)
               / tiny_one.predict(params)) for p in (sure, unsure, deaf)
    ]  # fmt: skip
    assert learned[0] == pytest.approx(np.log(5), rel=0.01)
    assert 0.01 < learned[1] < 0.5 * np.log(5)
    assert learned[2] == pytest.approx(0, abs=1e-6)


def test_losses_of_what_is_predicted_lossless_teach_nothing(linear):
    """A candidate in the checkpoint's own formats: its loss is rounding."""
    params = alone(linear.space, "head", 0)
    assert linear.predict(params) == 0
    posterior = fit(linear, [Observation(params, 1e-9, 0.0)])
    assert (posterior.mean == 0).all()
    assert all(np.isfinite(v) for v in posterior.draw(np.random.default_rng(0)).values())


@pytest.mark.parametrize("target", ["gguf", "safetensors"])
def test_all_observations_at_once_are_as_one_after_the_other(surrogates, target):
    """Gauss-Newton steps that predict every observation by itself end in the same mean."""
    plain = surrogates[target]
    space, names = plain.space, plain.multiplied_names
    rng = np.random.default_rng(6)
    chosen = [at_random(space, rng) for _ in range(12)]
    seen = [Observation(p, float(np.exp(rng.normal())) * plain.predict(p), 0.01) for p in chosen]
    placed = [replace(o, places=plain.places(o.params)) for o in seen]
    prior, mean = covariance(space, names), np.zeros(len(names))
    for _ in range(4):
        current = plain.multiplied(dict(zip(names, np.exp(mean), strict=True)))
        slopes = np.array([slopes_of(current, o.params) for o in seen])
        missing = np.log([o.loss / current.predict(o.params) for o in seen])
        among = slopes @ prior @ slopes.T + (0.01 + MISFIT) * np.eye(len(seen))
        mean = prior @ slopes.T @ np.linalg.solve(among, missing + slopes @ mean)
    np.testing.assert_allclose(fit(plain, seen).mean, mean, atol=1e-6)
    assert np.array_equal(fit(plain, seen).mean, fit(plain, placed).mean)


def slopes_of(surrogate, params):
    """Derivatives of the logarithmic prediction by logarithmic multipliers, by differences."""
    slopes = []
    for name in surrogate.multiplied_names:
        ends = [
            surrogate.multiplied(
                {**surrogate.multipliers, name: surrogate.multipliers.get(name, 1.0) * factor}
            ).predict(params) for factor in (np.exp(-1e-4), np.exp(1e-4))
        ]  # fmt: skip
        slopes.append(np.log(ends[1] / ends[0]) / 2e-4)
    return slopes
