"""The default: solve what finished trials, and gradients at the best of them, say.

In: the surrogate, the budget, the finished trials, and (where it fits) a way to take a gradient.
Out: params within the byte target. Invariant: as of `SolvingSampler`; what is proposed depends on
the study's trials and the seed alone, so a resumed study proposes what an undisturbed one does.

- Rounds of `ROUND` proposals begin with a gradient step at the incumbent (`GradientStep`), each on
  other documents. Its curvature makes the surrogate that of the place where the search is
  (`Surrogate.with_curvature_at`). Its slope prices every single switch from there; slopes of all
  rounds are averaged, incumbents being near each other, and count the more the more there are
  (`Surrogate.local`).
- Every proposal solves the result exactly, under multipliers drawn from their posterior given all
  finished trials (Thompson sampling; `allocator.prediction.posterior`), lost races included: those
  are compared with the incumbent on the documents that both have seen.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.parameters import Params
from allocator.errors import SpaceError
from allocator.prediction.posterior import Observation, Posterior, fit
from allocator.prediction.surrogate import Floats, LocalPrices, Surrogate
from allocator.samplers.knapsack import SolvingSampler
from allocator.study.trials import (
    LOOKED,
    LOSSES,
    PROPOSAL,
    allocation_of,
    best_complete,
    not_abandoned,
)

ROUND = 5
"""Own proposals from one look to the next."""
NOISE = 2.0
"""Looks whose average is as much noise as signal: `n` looks get the share `n / (n + NOISE)`."""
PLACES = ((1.0, 0.0), (0.7, 0.5), (1.3, 0.5), (0.7, 1.0), (1.0, 1.0))
"""By place in the round: a factor of that share, and of the posterior's spread."""

LOOKED_AT = "auto:incumbent"
"""System attribute of the trial before which a look was taken: the incumbent's `PROPOSAL`."""

_Here = tuple[Params, list[Mapping[str, Floats]]]
"""The incumbent, and what the looks price every switch from there."""
GradientStep = Callable[[Allocation, int], LocalPrices]
"""An allocation, and which part of the documents to use, to what a gradient says around it."""


class AutoSampler(SolvingSampler):
    """See the module.

    Args:
        surrogate: predicted losses.
        budget: the hard limit.
        seed: of this trial.
        local_prices: None where no gradient is to be had.
        gradient_tokens: forward tokens of a look.

    Attributes:
        gradient_seconds: what the look before the last proposal took.
    """

    at_the_cap = 0.95

    def __init__(
        self,
        surrogate: Surrogate,
        budget: Budget,
        *,
        seed: int,
        local_prices: GradientStep | None = None,
        gradient_tokens: int = 0,
    ) -> None:
        super().__init__(surrogate, budget, seed=seed)
        self._local_prices = local_prices
        self._look_tokens = gradient_tokens
        self.gradient_seconds = 0.0
        self._posterior: Posterior
        self._here: _Here | None = None
        self._near = False  # whether what is aimed at is near enough to it

    def next_tokens(self, study: Study, n: int = 1) -> int:
        """Forward tokens of the looks that the next `n` proposals begin with."""
        done = not_abandoned(study)
        own = _own(done)
        rounds = sum(i % ROUND == 0 for i in range(own, own + n))
        looks = self._local_prices is not None and best_complete(done) is not None
        return rounds * self._look_tokens if looks else 0

    def _learn(self, study: Study, trial: FrozenTrial) -> None:
        done = not_abandoned(study, before=trial.number)
        self._place = _own(done) % ROUND
        self._global, self._here = self._surrogate, None
        if not self._place:
            incumbent = best_complete(done)
            number = None if incumbent is None else incumbent.system_attrs.get(PROPOSAL)
            study._storage.set_trial_system_attr(trial._trial_id, LOOKED_AT, number)
        if looks := self._looks(done):
            assert self._local_prices is not None
            began = time.perf_counter()
            seen = [self._local_prices(allocation_of(t), part) for part, t in enumerate(looks)]
            self.gradient_seconds = time.perf_counter() - began
            if not self._place:
                tokens = seen[-1].forward_tokens
                study._storage.set_trial_system_attr(trial._trial_id, LOOKED, tokens)
            self._global = self._surrogate.with_curvature_at(seen[-1].curvature)
            tables: list[Mapping[str, Floats]] = [
                self._surrogate.table(look.moves, allocation_of(t).counts)
                for t, look in zip(looks, seen, strict=True)
            ]
            self._here = self._params(looks[-1]), tables
        self._posterior = fit(self._global, list(self._observations(done)))

    def _aim(self, target: Budget) -> None:
        self._near = target.nbytes == self._budget.nbytes

    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        factor, scale = PLACES[self._place]
        scale = max(scale, 0.5) * 1.2**attempt if attempt else scale
        multipliers = self._posterior.draw(self._rng, scale=scale)
        surrogate = self._global.multiplied(multipliers)
        if self._here is not None and self._near:
            params, tables = self._here
            share = min(factor * len(tables) / (len(tables) + NOISE), 1.0)
            surrogate = surrogate.local(params, tables, share=share)
        return surrogate, multipliers

    def _looks(self, done: list[FrozenTrial]) -> list[FrozenTrial]:
        """The incumbent at the beginning of every round so far, this one's last.

        What was the best then is noted with the trial that began the round: trials that ran beside
        it may have ended since.
        """
        if self._local_prices is None:
            return []
        begins = range(len(done) - _own(done), len(done) + 1, ROUND)
        incumbents = [_best_then(done, begin) for begin in begins]
        return [t for t in incumbents if t is not None and self._params(t)]

    def _params(self, trial: FrozenTrial) -> Params:
        """Complete params of what a trial scored; none if the space does not hold it."""
        try:
            return self._space.complete(self._space.params(allocation_of(trial)))
        except SpaceError:
            return {}  # a first trial that keeps other experts

    def _observations(self, done: list[FrozenTrial]) -> Iterator[Observation]:
        incumbent = best_complete(done)
        if incumbent is None:
            return
        for trial in done:
            losses: Any = np.array(trial.user_attrs.get(LOSSES, ()))
            if not len(losses) or not np.isfinite(losses).all():
                continue
            if not (params := self._params(trial)):
                continue
            rival = np.array(incumbent.user_attrs[LOSSES])[: len(losses)]
            if min(losses.mean(), rival.mean()) <= 0:
                continue  # lossless within rounding: no ratio
            ratio = float(losses.mean() / rival.mean())
            spread = losses / losses.mean() - rival / rival.mean()
            yield Observation(
                params,
                max(ratio * float(incumbent.values[0]), 1e-9),
                float(spread.var() / len(losses)),
            )


def _best_then(done: list[FrozenTrial], begin: int) -> FrozenTrial | None:
    """The incumbent when the trial at this place was asked for."""
    if begin < len(done) and LOOKED_AT in done[begin].system_attrs:
        number = done[begin].system_attrs[LOOKED_AT]
        if number is None:
            return None
        return next((t for t in done if t.system_attrs.get(PROPOSAL) == number), None)
    return best_complete(done[:begin])


def _own(done: list[FrozenTrial]) -> int:
    """How many were proposed, not queued."""
    return sum("fixed_params" not in t.system_attrs for t in done)
