"""Optuna samplers: stock ones, made repeatable, and our own.

In: a name, a study seed. Out: an Optuna sampler. Invariant: its random state comes from (study
seed, proposal number) alone, so a study that was stopped and resumed proposes what an undisturbed
one does.
"""

import time
from collections.abc import Callable
from itertools import count, islice
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.errors import StudyError
from allocator.prediction.surrogate import Surrogate
from allocator.samplers.auto import AutoSampler, GradientStep
from allocator.samplers.evolution import LevelSwitchSampler
from allocator.samplers.knapsack import KnapsackSampler
from allocator.study.trials import ABANDONED, DOUBLED, PROPOSAL, not_abandoned

SAMPLERS = ("auto", "knapsack", "random", "tpe", "nsga2", "evolution")


def proposal_number(study: Study, trial: FrozenTrial) -> int:
    """The least number that no other proposal has; abandoned trials free theirs.

    Trials that are asked for at the same time, whose numbers are not known yet, take theirs in the
    order of the trials.
    """
    others = [t for t in not_abandoned(study) if t.number != trial.number]
    taken = {t.system_attrs[PROPOSAL] for t in others if PROPOSAL in t.system_attrs}
    unknown = sum(PROPOSAL not in t.system_attrs and t.number < trial.number for t in others)
    return next(islice((n for n in count() if n not in taken), unknown, None))


def _number(study: Study, trial: FrozenTrial) -> int:
    """Writes `proposal_number` into the trial, until no other has written the same meanwhile."""
    while True:
        number = proposal_number(study, trial)
        study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, number)
        others = (t for t in not_abandoned(study) if t.number != trial.number)
        if all(t.system_attrs.get(PROPOSAL) != number for t in others):
            return number


def _doubled(study: Study, number: int) -> int:
    """How often this proposal was given up because another worker was scoring the same."""
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    tried = (t for t in failed if t.user_attrs.get(ABANDONED) == DOUBLED)
    return sum(t.system_attrs.get(PROPOSAL) == number for t in tried)


class SeededSampler(BaseSampler):
    """Any sampler, made anew for every trial with a seed of (study seed, proposal number).

    Args:
        make: a seed to a sampler.
        seed: of the study.

    Attributes:
        sampling_seconds: what the last proposal took, looks apart.
        gradient_seconds: of the gradient before it.
        generational: the inner sampler asks the search to run generations.
        on_trial: called with a trial's id before anything is proposed for it.
    """

    on_trial: Callable[[int], None] | None = None

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed
        self._inner = make(seed)
        self.sampling_seconds = self.gradient_seconds = 0.0
        self.generational: bool = getattr(self._inner, "generational", False)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seeds the sampler for this trial; an enqueued one joins NSGA-II's generations too."""
        if self.on_trial is not None:
            self.on_trial(trial._trial_id)
        number = _number(study, trial)
        tries = _doubled(study, number)
        entropy = np.random.SeedSequence([self._seed, number, *([tries] if tries else [])])
        self._inner = self._make(int(entropy.generate_state(1)[0]))
        self._inner.before_trial(study, trial)
        if "fixed_params" in trial.system_attrs and isinstance(self._inner, NSGAIISampler):
            # Optuna does so while sampling, and what is enqueued whole is not sampled
            self._inner.get_trial_generation(study, trial)

    def next_tokens(self, study: Study, n: int = 1) -> int:
        """The most forward tokens that the next `n` proposals themselves cost."""
        inner = self._inner
        return inner.next_tokens(study, n) if isinstance(inner, AutoSampler) else 0

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """As the inner sampler."""
        space: dict[str, BaseDistribution] = self._inner.infer_relative_search_space(study, trial)
        return space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the inner sampler."""
        began = time.perf_counter()
        proposed: dict[str, Any] = self._inner.sample_relative(study, trial, search_space)
        self.gradient_seconds = getattr(self._inner, "gradient_seconds", 0.0)
        self.sampling_seconds = time.perf_counter() - began - self.gradient_seconds
        return proposed

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """As the inner sampler."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """As the inner sampler."""
        self._inner.after_trial(study, trial, state, values)


def make_sampler(
    name: str,
    *,
    seed: int,
    surrogate: Surrogate,
    budget: Budget,
    population: int = 20,
    local_prices: GradientStep | None = None,
    gradient_tokens: int = 0,
) -> BaseSampler:
    """A sampler by its name in study.toml.

    Args:
        name: one of `SAMPLERS`.
        seed: of the study.
        surrogate: predicted losses.
        budget: the hard limit.
        population: of NSGA-II.
        local_prices: what a gradient says around a candidate, for `auto`.
        gradient_tokens: forward tokens of that.

    Raises:
        StudyError: if there is none of that name, or the seed is negative.
    """
    makers: dict[str, Callable[[int], BaseSampler]] = {
        "auto": lambda s: AutoSampler(
            surrogate, budget, seed=s, local_prices=local_prices, gradient_tokens=gradient_tokens
        ),
        "random": lambda s: RandomSampler(seed=s),
        "tpe": lambda s: TPESampler(seed=s),
        "nsga2": lambda s: NSGAIISampler(seed=s, population_size=population),
        "knapsack": lambda s: KnapsackSampler(surrogate, budget, seed=s),
        "evolution": lambda s: LevelSwitchSampler(Costs(surrogate.space, budget), seed=s),
    }
    check_sampler(name)
    if seed < 0:
        raise StudyError(f"seed {seed}: needed 0 or a positive number")
    return SeededSampler(makers[name], seed)


def check_sampler(name: str) -> None:
    """Raises:
    StudyError: if no sampler has that name.
    """
    if name not in SAMPLERS:
        raise StudyError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
