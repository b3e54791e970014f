"""Everything that a search needs, made from a study folder.

In: a study folder, a launch, and the opened Optuna study. Out: a `Search`, its profile built.
"""

from collections.abc import Sequence

import optuna

from allocator.app.request import Launch
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation import Allocation
from allocator.study.initial_trials import first_trials
from allocator.study.leases import Leases
from allocator.study.race import Race
from allocator.study.search import Search

N_KNAPSACK = 3
"""Unperturbed knapsack solutions among the first trials: at the cap, and below it."""

PRUNING_FACTORS = (0.5, 0.25)
"""Prices of pruning, over the measured ones, of further solutions among the first trials."""


def prepare(
    study_folder: StudyFolder,
    launch: Launch,
    study: optuna.Study,
    *,
    baselines: Sequence[tuple[str, Allocation]] | None = None,
    n_knapsack: int = N_KNAPSACK,
    pruning_factors: Sequence[float] = PRUNING_FACTORS,
    leases: Leases | None = None,
) -> Search:
    """Sets up a search, ready to `step` or `run`; builds the profile where there is none.

    Args:
        study_folder: of the study.
        launch: of this folder.
        study: opened.
        baselines: among the first trials; uniform formats and role mixes by default.
        n_knapsack: knapsack solutions among the first trials.
        pruning_factors: as of `first_trials`.
        leases: of this worker; None where no other search can be on the study.
    """
    if baselines is None:
        baselines = study_folder.baselines()
    surrogate, budget = study_folder.surrogate, launch.budget
    return Search(
        study=study,
        sampler=study_folder.sampler(launch, on_trial=None if leases is None else leases.take),
        surrogate=surrogate,
        budget=budget,
        scorer=study_folder.scorers.trials,
        race=Race(study_folder.spec.calibration.rungs),
        queue=first_trials(
            surrogate,
            budget,
            baselines,
            n_knapsack=n_knapsack,
            pruning_factors=pruning_factors,
        ),
        base_tokens=study_folder.base_tokens,
        leases=leases,
    )
