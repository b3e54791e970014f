"""The default sampler: it solves a surrogate fitted to finished trials and gradients at the best.

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
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.decision.budget import Budget
from allocator.decision.parameters import Params
from allocator.errors import SpaceError
from allocator.prediction.posterior import Observation, Posterior, fit
from allocator.prediction.surrogate import Floats, Surrogate
from allocator.samplers.knapsack import SolvingSampler
from allocator.samplers.problem import GradientStep, Problem
from allocator.study.optuna_private import set_system_attr
from allocator.study.trials import (
    GRADIENT_TOKENS,
    LOSSES,
    PROPOSAL,
    allocation_of,
    best_complete,
    not_abandoned,
)

ROUND = 5
"""Own proposals from one gradient step to the next."""
NOISY_STEPS = 2.0
"""Gradient steps whose average is as much noise as signal: `n` steps count with the share
`n / (n + NOISY_STEPS)`."""
PLACES = ((1.0, 0.0), (0.7, 0.5), (1.3, 0.5), (0.7, 1.0), (1.0, 1.0))
"""By place in the round: a factor of that share, and of the posterior's spread."""

INCUMBENT = "auto:incumbent"
"""System attribute of a trial that begins a round: `PROPOSAL` of the incumbent then, where the
round's gradient step is taken."""

_Slopes = tuple[Params, list[Mapping[str, Floats]]]
"""The incumbent, and what each gradient step says of every switch from there."""


class AutoSampler(SolvingSampler):
    """See the module.

    Args:
        surrogate: predicted losses.
        budget: the hard limit.
        seed: of this trial.
        gradient: None where no gradient is to be had.
    """

    at_the_cap = 0.95

    def __init__(
        self,
        surrogate: Surrogate,
        budget: Budget,
        *,
        seed: int,
        gradient: GradientStep | None = None,
    ) -> None:
        super().__init__(surrogate, budget, seed=seed)
        self._gradient = gradient
        self._place = 0  # in the round
        self._curved = surrogate  # with the curvature at the incumbent
        self._posterior: Posterior | None = None
        self._slopes: _Slopes | None = None
        self._is_near = False  # whether the byte target is near enough to the incumbent

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Self:
        """Makes the sampler of one trial."""
        return cls(problem.surrogate, problem.budget, seed=seed, gradient=problem.gradient)

    def next_tokens(self, study: Study, n: int) -> int:
        """Returns the forward tokens of the gradient steps that the next `n` proposals take."""
        done = not_abandoned(study)
        if self._gradient is None or best_complete(done) is None:
            return 0
        own = _own(done)
        rounds = sum(i % ROUND == 0 for i in range(own, own + n))
        return rounds * self._gradient.forward_tokens

    def _learn(self, study: Study, trial: FrozenTrial) -> None:
        done = not_abandoned(study, before=trial.number)
        self._place = _own(done) % ROUND
        self._curved, self._slopes = self._surrogate, None
        if not self._place:
            incumbent = best_complete(done)
            number = None if incumbent is None else incumbent.system_attrs.get(PROPOSAL)
            set_system_attr(study, trial, INCUMBENT, number)
        if incumbents := self._incumbents(done):
            assert self._gradient is not None
            began = time.perf_counter()
            steps = [
                self._gradient.take(allocation_of(t), part) for part, t in enumerate(incumbents)
            ]
            self.gradient_seconds = time.perf_counter() - began
            if not self._place:
                set_system_attr(study, trial, GRADIENT_TOKENS, steps[-1].forward_tokens)
            self._curved = self._surrogate.with_curvature_at(steps[-1].curvature)
            tables: list[Mapping[str, Floats]] = [
                self._surrogate.table(step.moves, allocation_of(t).counts)
                for t, step in zip(incumbents, steps, strict=True)
            ]
            self._slopes = self._params(incumbents[-1]), tables
        self._posterior = fit(self._curved, list(self._observations(done)))

    def _aim(self, target: Budget) -> None:
        self._is_near = target.nbytes == self._budget.nbytes

    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        assert self._posterior is not None
        factor, scale = PLACES[self._place]
        scale = max(scale, 0.5) * 1.2**attempt if attempt else scale
        multipliers = self._posterior.draw(self._rng, scale=scale)
        surrogate = self._curved.multiplied(multipliers)
        if self._slopes is not None and self._is_near:
            params, tables = self._slopes
            share = min(factor * len(tables) / (len(tables) + NOISY_STEPS), 1.0)
            surrogate = surrogate.local(params, tables, share=share)
        return surrogate, multipliers

    def _incumbents(self, done: list[FrozenTrial]) -> list[FrozenTrial]:
        """The incumbent at the beginning of every round so far, this one's last.

        The trial that began a round notes the incumbent then: trials that ran at the same time may
        have ended since.
        """
        if self._gradient is None:
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
    if begin < len(done) and INCUMBENT in done[begin].system_attrs:
        number = done[begin].system_attrs[INCUMBENT]
        if number is None:
            return None
        return next((t for t in done if t.system_attrs.get(PROPOSAL) == number), None)
    return best_complete(done[:begin])


def _own(done: list[FrozenTrial]) -> int:
    """How many were proposed, not queued."""
    return sum("fixed_params" not in t.system_attrs for t in done)
