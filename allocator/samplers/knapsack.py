"""Proposals that solve the surrogate exactly, under perturbed losses and a drawn byte target.

In: the surrogate, the budget, and the finished trials. Out: params within the byte target.
Invariant: every proposal is feasible as it is. Each group's (and each layer's counts') predicted
loss is multiplied by a log-normal factor around the factors of the best finished trial within the
drawn target; so accepted factors correct the surrogate where measurements disagree with it.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.memory import Budget
from allocator.samplers.base import WholeSampler
from allocator.space import Params
from allocator.surrogate import Surrogate
from allocator.trials import best_complete, key_of, proposed

MULTIPLIERS = "knapsack:multipliers"
_SIGMAS = (0.05, 0.1, 0.2, 0.4)
_ATTEMPTS = 6  # draws, wider each time, while the proposal is one that was made before
_LOWER = 6  # more of them, each with a byte target of its own anywhere below the budget


class SolvingSampler(WholeSampler):
    """Solves a multiplied surrogate; subclasses say which multipliers.

    Args:
        surrogate: predicted losses.
        budget: the hard limit; byte targets are drawn between the floor and it.
        seed: of this trial.
    """

    at_the_cap: ClassVar[float]
    """Share of proposals whose byte target is the budget itself."""

    def __init__(self, surrogate: Surrogate, budget: Budget, *, seed: int) -> None:
        super().__init__(surrogate.space, seed=seed)
        self._surrogate = surrogate
        self._budget = budget

    @abstractmethod
    def _prepare(self, study: Study, trial: FrozenTrial, target: Budget) -> None:
        """Reads what the study teaches."""

    @abstractmethod
    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        """What to solve, farther from the last with every attempt, and its multipliers."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The optimum of a multiplied surrogate; remembers its multipliers with the trial."""
        if "fixed_params" in trial.system_attrs:
            return {}
        seen = proposed(study)
        proposal: Params = {}
        multipliers: dict[str, float] = {}
        prepared: Budget | None = None
        for target, attempt in self._tries():
            if target is not prepared:
                self._prepare(study, trial, target)
                prepared = target
            surrogate, multipliers = self._draw(attempt)
            solved = surrogate.solve(target)
            proposal = {name: solved[name] for name in self._space.distributions}
            if key_of(proposal) not in seen:
                break
        study._storage.set_trial_system_attr(trial._trial_id, MULTIPLIERS, multipliers)
        return proposal

    def _tries(self) -> Iterator[tuple[Budget, int]]:
        """Byte targets, and how often each was tried before."""
        share = 1.0 if self._rng.random() < self.at_the_cap else float(self._rng.random())
        target = self._space.between(self._budget, share)
        yield from ((target, attempt) for attempt in range(_ATTEMPTS))
        for attempt in range(_LOWER):
            yield self._space.between(self._budget, float(self._rng.random())), attempt


class KnapsackSampler(SolvingSampler):
    """See the module."""

    at_the_cap = 0.75

    def _prepare(self, study: Study, trial: FrozenTrial, target: Budget) -> None:
        self._sigma = float(self._rng.choice(_SIGMAS))
        self._parent: dict[str, float] = {}
        best = best_complete(study.get_trials(deepcopy=False), nbytes=target.nbytes)
        if best is not None:
            # first trials carry none: the unperturbed surrogate, all ones
            self._parent = best.system_attrs.get(MULTIPLIERS, {})

    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        names = self._surrogate.multiplied_names
        factors = np.exp(self._sigma * 1.5**attempt * self._rng.standard_normal(len(names)))
        pairs = zip(names, factors, strict=True)
        multipliers = {n: self._parent.get(n, 1.0) * float(f) for n, f in pairs}
        return self._surrogate.multiplied(multipliers), multipliers
