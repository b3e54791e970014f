"""Any Optuna sampler, made repeatable.

In: how to make a sampler from a seed, and the seed of a study. Out: a sampler whose random state
comes from (study seed, proposal number) alone. Invariant: a study that was stopped and resumed
proposes what an undisturbed one does.
"""

import time
from collections.abc import Callable
from itertools import count, islice
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from allocator.study.generations import Selection
from allocator.study.optuna_private import WithoutReports, set_system_attr, trial_id
from allocator.study.protocols import StudySampler
from allocator.study.trials import ABANDONED, DOUBLED, PROPOSAL, not_abandoned


def proposal_number(study: Study, trial: FrozenTrial) -> int:
    """Returns the least number that no other proposal has; abandoned trials free theirs.

    Trials that are asked for at the same time, whose numbers are not known yet, take theirs in the
    order of the trials.
    """
    others = [t for t in not_abandoned(study) if t.number != trial.number]
    taken = {t.system_attrs[PROPOSAL] for t in others if PROPOSAL in t.system_attrs}
    unknown = sum(PROPOSAL not in t.system_attrs and t.number < trial.number for t in others)
    return next(islice((n for n in count() if n not in taken), unknown, None))


def number_proposal(
    study: Study,
    trial: FrozenTrial,
    *,
    choose: Callable[[Study, FrozenTrial], int] = proposal_number,
) -> int:
    """Writes a trial's proposal number into it, until no other trial has written the same one.

    Args:
        study: of the trial.
        trial: new.
        choose: which number is free, as far as the storage says.
    """
    while True:
        number = choose(study, trial)
        set_system_attr(study, trial, PROPOSAL, number)
        others = (t for t in not_abandoned(study) if t.number != trial.number)
        if all(t.system_attrs.get(PROPOSAL) != number for t in others):
            return number


def _tries(study: Study, number: int) -> int:
    """How often this proposal was given up because another worker was scoring the same."""
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    doubled = (t for t in failed if t.user_attrs.get(ABANDONED) == DOUBLED)
    return sum(t.system_attrs.get(PROPOSAL) == number for t in doubled)


class SeededSampler(StudySampler):
    """Any sampler, made anew for every trial with a seed of (study seed, proposal number).

    Args:
        make: a seed to a sampler, one of Optuna's or a `StudySampler`.
        seed: of the study.
        on_trial: called with a trial's id before anything is proposed for it.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        seed: int,
        *,
        on_trial: Callable[[int], None] | None = None,
    ) -> None:
        self._make = make
        self._seed = seed
        self._on_trial = on_trial
        self._inner = make(seed)

    @property
    def _planned(self) -> StudySampler | None:
        """The inner sampler, where it is more than Optuna's."""
        return self._inner if isinstance(self._inner, StudySampler) else None

    def _seen(self, study: Study) -> Study:
        """The study as the inner sampler takes it: one of Optuna's must see no reports."""
        return WithoutReports(study) if self._planned is None else study

    def selection(self, n_documents: int) -> Selection | None:
        """Returns what the inner sampler does; None for one of Optuna's."""
        return None if self._planned is None else self._planned.selection(n_documents)

    def next_tokens(self, study: Study, n: int) -> int:
        """Returns what the inner sampler does; 0 for one of Optuna's."""
        return 0 if self._planned is None else self._planned.next_tokens(study, n)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Numbers the proposal and makes the sampler that proposes it."""
        if self._on_trial is not None:
            self._on_trial(trial_id(trial))
        number = number_proposal(study, trial)
        tries = _tries(study, number)
        entropy = np.random.SeedSequence([self._seed, number, *([tries] if tries else [])])
        self._inner = self._make(int(entropy.generate_state(1)[0]))
        self._inner.before_trial(self._seen(study), trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Returns what the inner sampler does."""
        space: dict[str, BaseDistribution] = self._inner.infer_relative_search_space(
            self._seen(study), trial
        )
        return space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes what the inner sampler does, and notes the seconds."""
        began = time.perf_counter()
        params: dict[str, Any] = self._inner.sample_relative(self._seen(study), trial, search_space)
        self.gradient_seconds = 0.0 if self._planned is None else self._planned.gradient_seconds
        self.sampling_seconds = time.perf_counter() - began - self.gradient_seconds
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Proposes what the inner sampler does."""
        return self._inner.sample_independent(
            self._seen(study), trial, param_name, param_distribution
        )

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Calls the inner sampler's."""
        self._inner.after_trial(self._seen(study), trial, state, values)
