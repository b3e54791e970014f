"""What our own samplers share: they propose all params at once, from a generator of their trial.

In: a space and the seed of one trial. Out: a base class; subclasses write `sample_relative`.
"""

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.decision.space import Space
from allocator.study.protocols import StudySampler


class WholeSampler(StudySampler):
    """Proposes complete params in `sample_relative`, which subclasses write.

    Args:
        space: whose params.
        seed: of this trial.
    """

    def __init__(self, space: Space, *, seed: int) -> None:
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Returns the distributions of all params."""
        return self._space.distributions

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draws a param at random; asked for params outside the space only."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)
