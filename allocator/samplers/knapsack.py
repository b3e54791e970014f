"""Proposals that solve the surrogate exactly, under perturbed losses and a drawn byte target.

In: the surrogate, the budget, and the finished trials. Out: params within the byte target.
Invariant: every proposal is feasible as it is. Each group's (and each layer's counts') predicted
loss is multiplied by a log-normal factor around the factors of the best finished trial within the
drawn target; so accepted factors correct the surrogate where measurements disagree with it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.parameters import Params
from allocator.prediction.solver import solve
from allocator.prediction.surrogate import Surrogate
from allocator.samplers.base import WholeSampler
from allocator.samplers.problem import Problem
from allocator.study.optuna_private import set_system_attr
from allocator.study.trials import best_complete, key_of, proposed

MULTIPLIERS = "knapsack:multipliers"
_SIGMAS = (0.05, 0.1, 0.2, 0.4)
_ATTEMPTS = 6  # draws, wider each time, while the proposal is one that was made before
_LOWER = 6  # more of them, each with a byte target of its own anywhere below the budget


class SolvingSampler(WholeSampler):
    """A sampler that solves a multiplied surrogate; subclasses say which multipliers.

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
    def _learn(self, study: Study, trial: FrozenTrial) -> None:
        """Reads what the study teaches."""

    @abstractmethod
    def _aim(self, target: Budget) -> None:
        """Turns to a byte target, maybe after others."""

    @abstractmethod
    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        """What to solve, farther from the last with every attempt, and its multipliers."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes the optimum of a multiplied surrogate; notes its multipliers with the trial."""
        if "fixed_params" in trial.system_attrs:
            return {}
        seen = proposed(study)
        self._learn(study, trial)
        for solution in self._solutions():
            if key_of(solution[0]) not in seen:
                break
        proposal, multipliers = solution
        set_system_attr(study, trial, MULTIPLIERS, multipliers)
        return proposal

    def _solutions(self) -> Iterator[tuple[Params, dict[str, float]]]:
        for target, attempts in self.targets():
            self._aim(target)
            for attempt in attempts:
                surrogate, multipliers = self._draw(attempt)
                solved = solve(surrogate, target)
                yield {name: solved[name] for name in self._space.distributions}, multipliers

    def targets(self) -> Iterator[tuple[Budget, Sequence[int]]]:
        """Yields byte targets, each with the numbers of the attempts at it."""
        share = 1.0 if self._rng.random() < self.at_the_cap else float(self._rng.random())
        yield Costs(self._space, self._budget).budget_at(share), range(_ATTEMPTS)
        for attempt in range(_LOWER):
            yield Costs(self._space, self._budget).budget_at(float(self._rng.random())), (attempt,)


class KnapsackSampler(SolvingSampler):
    """See the module."""

    at_the_cap = 0.75

    def __init__(self, surrogate: Surrogate, budget: Budget, *, seed: int) -> None:
        super().__init__(surrogate, budget, seed=seed)
        self._trials: list[FrozenTrial] = []
        self._sigma = 0.0  # of the logarithms of the factors
        self._parent: dict[str, float] = {}  # multipliers that the factors are around

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Self:
        """Makes the sampler of one trial."""
        return cls(problem.surrogate, problem.budget, seed=seed)

    def _learn(self, study: Study, trial: FrozenTrial) -> None:
        self._trials = study.get_trials(deepcopy=False)

    def _aim(self, target: Budget) -> None:
        self._sigma = float(self._rng.choice(_SIGMAS))
        self._parent = {}
        best = best_complete(self._trials, nbytes=target.nbytes)
        if best is not None:
            # first trials carry none: the unperturbed surrogate, all ones
            self._parent = best.system_attrs.get(MULTIPLIERS, {})

    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        names = self._surrogate.multiplied_names
        factors = np.exp(self._sigma * 1.5**attempt * self._rng.standard_normal(len(names)))
        pairs = zip(names, factors, strict=True)
        multipliers = {n: self._parent.get(n, 1.0) * float(f) for n, f in pairs}
        return self._surrogate.multiplied(multipliers), multipliers
