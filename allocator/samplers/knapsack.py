"""Proposals that solve the surrogate exactly, under perturbed losses and a drawn byte target.

In: the surrogate, the budget, and the finished trials. Out: params within the byte target.
Invariant: every proposal is feasible as it is. Each group's (and each layer's counts') predicted
loss is multiplied by a log-normal factor around the factors of the best finished trial within the
drawn target; so accepted factors correct the surrogate where measurements disagree with it.
"""

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from allocator.memory import Budget
from allocator.space import Params
from allocator.surrogate import Surrogate

ABANDONED = "abandoned"
"""User attribute of a trial whose process died; it does not count as a proposal."""
MULTIPLIERS = "knapsack:multipliers"
_AT_THE_CAP = 0.75  # share of proposals whose byte target is the budget itself
_SIGMAS = (0.05, 0.1, 0.2, 0.4)
_ATTEMPTS = 6  # redraws, wider each time, while the proposal is one that was made before


class KnapsackSampler(BaseSampler):
    """See the module.

    Args:
        surrogate: predicted losses.
        budget: the hard limit; byte targets are drawn between the floor and it.
        seed: of this trial.
    """

    def __init__(self, surrogate: Surrogate, budget: Budget, *, seed: int) -> None:
        self._surrogate = surrogate
        self._budget = budget
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All params, at once."""
        return self._surrogate.space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The optimum of a perturbed surrogate; remembers its multipliers with the trial."""
        if "fixed_params" in trial.system_attrs:
            return {}
        space = self._surrogate.space
        target = self._draw_target()
        parent = self._parent(study, target)
        trials = study.get_trials(deepcopy=False)
        # an abandoned trial's proposal is made again
        seen = {tuple(sorted(t.params.items())) for t in trials if ABANDONED not in t.user_attrs}
        sigma = float(self._rng.choice(_SIGMAS))
        proposal: Params = {}
        multipliers: dict[str, float] = {}
        for attempt in range(_ATTEMPTS):
            multipliers = self._perturb(parent, sigma * 1.5**attempt)
            solved = self._surrogate.multiplied(multipliers).solve(target)
            proposal = {name: solved[name] for name in space.distributions}
            if tuple(sorted(proposal.items())) not in seen:
                break
        study._storage.set_trial_system_attr(trial._trial_id, MULTIPLIERS, multipliers)
        return proposal

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """For params outside the space only."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _draw_target(self) -> Budget:
        floor = self._surrogate.space.costs(self._budget).total(self._smallest())
        share = 1.0 if self._rng.random() < _AT_THE_CAP else float(self._rng.random())
        low = min(floor, self._budget.nbytes)
        return Budget(low + int(share * (self._budget.nbytes - low)), self._budget.bounds)

    def _smallest(self) -> Params:
        space = self._surrogate.space
        return space.complete(space.params(space.smallest))

    def _parent(self, study: Study, target: Budget) -> dict[str, float]:
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        fitting = [t for t in finished if t.values[1] <= target.nbytes]
        if not fitting:
            return {}
        best = min(fitting, key=lambda t: (t.values[0], t.number))
        # first trials carry none: the unperturbed surrogate, all ones
        found: dict[str, float] = best.system_attrs.get(MULTIPLIERS, {})
        return found

    def _perturb(self, parent: dict[str, float], sigma: float) -> dict[str, float]:
        names = self._surrogate.multiplied_names
        factors = np.exp(sigma * self._rng.standard_normal(len(names)))
        return {n: parent.get(n, 1.0) * float(f) for n, f in zip(names, factors, strict=True)}
