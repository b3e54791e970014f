"""A Gaussian posterior of the logarithms of a surrogate's multipliers, given finished trials.

In: a surrogate and measured losses of some params. Out: the posterior mean, and draws of it.
Invariant: without observations the mean is 0 (multipliers 1) and draws follow the prior.

Under the prior (`covariance`) multipliers of one role, of one layer, and all of them together move
alike, so a handful of trials teaches more than a handful of multipliers. A trial's logarithmic loss
is linear in the logarithms to first order (`Surrogate.shares`), and the mean is found by
Gauss-Newton steps. Draws are by Matheron's rule (Wilson et al., "Efficiently Sampling Functions
from Gaussian Process Posteriors", 2020, eq. 10).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt

from allocator.decision.parameters import ExpertsOf, Params, SettingOf, parse
from allocator.decision.space import Space
from allocator.prediction.surrogate import Ints, Surrogate

Floats = npt.NDArray[np.float64]

COMMON, ROLE, LAYER, OWN = 0.3, 0.2, 0.15, 0.1
"""Prior standard deviations of a logarithmic multiplier's parts."""
_MISFIT = 0.01  # of a logarithmic loss, which no multipliers explain
_STEPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """A measured loss.

    Attributes:
        params: complete.
        loss: nats per token.
        variance: of the loss's logarithm, without the misfit.
        places: of the params, as of `Surrogate.places`; None where nobody worked them out.
    """

    params: Params
    loss: float
    variance: float
    places: Ints | None = None


@dataclass(frozen=True, eq=False)
class Posterior:
    """Logarithmic multipliers given observations.

    Attributes:
        names: of the multipliers.
        mean: of the logarithms, `names`.
    """

    names: tuple[str, ...]
    mean: Floats
    _prior: Floats  # names x names
    _jacobian: Floats  # observations x names
    _variance: Floats  # observations

    def draw(self, rng: np.random.Generator, *, scale: float = 1.0) -> dict[str, float]:
        """Returns multipliers drawn from the posterior.

        Args:
            rng: the source of randomness.
            scale: factor of the posterior's spread; 0 gives the mean.
        """
        root = np.linalg.cholesky(self._prior + 1e-12 * np.eye(len(self.names)))
        prior = root @ rng.standard_normal(len(self.names))
        noise = rng.standard_normal(len(self._variance)) * np.sqrt(self._variance)
        moved = prior - _gain(self._prior, self._jacobian, self._variance) @ (
            self._jacobian @ prior + noise
        )
        values = np.exp(self.mean + scale * moved)
        return dict(zip(self.names, values.tolist(), strict=True))


def covariance(space: Space, names: Sequence[str]) -> Floats:
    """Returns the prior covariance of the logarithmic multipliers, `names x names`."""
    groups = space.layout.groups

    def role(name: str) -> str:
        if name in groups:
            return str(groups[name].role)
        return name if isinstance(parse(name), SettingOf) else "count"

    def layer(name: str) -> int | str | None:
        if name in groups:
            return groups[name].layer
        key = parse(name)
        return key.layer if isinstance(key, ExpertsOf) else name

    roles = np.array([role(n) for n in names])
    layers = np.array([layer(n) for n in names], dtype=object)
    same_role, same_layer = (v[:, None] == v[None, :] for v in (roles, layers))
    return np.asarray(
        COMMON**2 + ROLE**2 * same_role + LAYER**2 * same_layer + OWN**2 * np.eye(len(names))
    )


def fit(surrogate: Surrogate, observations: Sequence[Observation]) -> Posterior:
    """Returns the posterior of a surrogate's logarithmic multipliers.

    Args:
        surrogate: with multipliers of 1.
        observations: of complete params of its space.
    """
    names = surrogate.multiplied_names
    prior = covariance(surrogate.space, names)
    mean = np.zeros(len(names))
    jacobian = np.zeros((len(observations), len(names)))
    variance = np.array([o.variance + _MISFIT**2 for o in observations])
    measured = [o.loss for o in observations]
    places = np.array(
        [surrogate.places(o.params) if o.places is None else o.places for o in observations]
    )
    for _ in range(_STEPS if observations else 0):
        current = surrogate.multiplied(dict(zip(names, np.exp(mean).tolist(), strict=True)))
        predicted, jacobian = current.predicted_and_shares(current.losses_at(places))
        missing = np.array(
            [log(m / max(p, 1e-12)) for m, p in zip(measured, predicted, strict=True)]
        )
        mean = _gain(prior, jacobian, variance) @ (missing + jacobian @ mean)
    return Posterior(names, mean, prior, jacobian, variance)


def _gain(prior: Floats, jacobian: Floats, variance: Floats) -> Floats:
    """The Kalman gain, `names x observations`."""
    if not len(variance):
        return np.zeros((len(prior), 0))
    between = prior @ jacobian.T
    return np.asarray(np.linalg.solve(jacobian @ between + np.diag(variance), between.T).T)
