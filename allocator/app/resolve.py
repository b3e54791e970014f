"""A search solved again for finished weights: prices that finishing lowers by group.

In: a study, an allocation, how it would be finished. Out: the allocation of least predicted loss
after finishing, within the same limits. Invariant: the result fits the budget that the given
allocation was found under, or else its file's bytes.

Finishing lowers the loss of a group by a factor of its own (`finishing.factors`), so the best
formats before finishing are not the best after. Prices are those of the search at its end: the
profile's, with the curvature and the slopes of `N_STEPS` gradient steps at the given allocation,
and with the multipliers that finished trials taught, where this folder has the study. Every group's
prices are multiplied by its factor; pruning costs what it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import optuna

from allocator.app.study_folder import StudyFolder
from allocator.codecs import codec_of
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.decision.budget import Budget
from allocator.decision.mixes import split
from allocator.decision.parameters import Params
from allocator.decision.space import Space
from allocator.errors import AllocatorError, SpaceError
from allocator.formats import format_named
from allocator.prediction.posterior import fit
from allocator.prediction.solver import STARTS, solve
from allocator.prediction.surrogate import Floats, Surrogate
from allocator.samplers.auto import NOISY_STEPS
from allocator.samplers.lessons import Lessons, Step
from allocator.scoring.documents import digest
from allocator.study.optuna_study import LOCK
from allocator.study.storages import journal_path, open_storage
from allocator.study.trials import not_abandoned

if TYPE_CHECKING:  # these load torch
    from allocator.codecs.encodings import Encodings
    from allocator.finishing.finish import Finisher

N_STEPS = 4
"""Gradient steps at the given allocation, each on other documents."""


@dataclass(frozen=True)
class Resolved:
    """What solving again gives.

    Attributes:
        allocation: of least predicted loss after finishing.
        budget: the limit.
        factors: by group, what choosing codes anew leaves of its loss.
        given: predicted loss of the given allocation, finished, nats per token; None where the
            study's space does not hold the allocation.
        predicted: predicted loss of the new one, finished.
    """

    allocation: Allocation
    budget: Budget
    factors: dict[str, float]
    given: float | None
    predicted: float


def budget_of(
    study_folder: StudyFolder, allocation: Allocation, record: AllocationRecord | None
) -> Budget:
    """Returns the limits that an allocation was found under.

    These are study.toml's where the record names them, else the bytes of the allocation's file.
    """
    layout = study_folder.layout
    try:
        budget = study_folder.budget()
    except AllocatorError:
        budget = None
    if budget is not None and record is not None and budget.by_name.items() <= record.bytes.items():
        return budget
    return Budget(allocation.nbytes(layout).file, "file")


def resolve(
    study_folder: StudyFolder,
    allocation: Allocation,
    budget: Budget,
    finisher: Finisher,
    encodings: Encodings,
) -> Resolved:
    """Solves again around an allocation, for finished weights.

    Args:
        study_folder: of the study; its profile is built where there is none.
        allocation: given.
        budget: the limit.
        finisher: of the allocation; it says how weights are finished, and finishes none.
        encodings: that the allocation is encoded with.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    from allocator.finishing.factors import measured_factors

    surrogate, space = study_folder.surrogate, study_folder.space
    factors = measured_factors(finisher, encodings)
    of_options = option_factors(space, factors)
    lessons = Lessons(surrogate, study_folder.gradient_step())
    steps: list[Step] = []
    if lessons.gradient is not None:
        steps = [lessons.step(allocation, part) for part in range(N_STEPS)]
        surrogate = lessons.curved(allocation, N_STEPS - 1)
    posterior = fit(surrogate, list(lessons.observations(_trials(study_folder))))
    means = np.exp(posterior.mean).tolist()
    taught = surrogate.multiplied(dict(zip(posterior.names, means, strict=True)))
    finished = taught.scaled(of_options)
    params = _params(space, allocation)
    if params is None:
        solved = solve(finished, budget, starts=STARTS)
        given, predicted = None, finished.predict(solved)
    else:
        given = finished.predict(params)
        local = _local(finished, params, lessons, steps, of_options)
        solved = solve(local, budget)
        predicted = given + local.predict(solved) - local.predict(params)
    return Resolved(space.allocation(solved), budget, factors, given, predicted)


def _local(
    finished: Surrogate,
    params: Params,
    lessons: Lessons,
    steps: Sequence[Step],
    factors: Mapping[str, Floats],
) -> Surrogate:
    """The surrogate with the slopes of gradient steps; as it is without any."""
    if not steps:
        return finished
    moves = {g: rows * factors[g] for g, rows in lessons.mean_moves(steps).items()}
    return finished.local(params, moves, share=len(steps) / (len(steps) + NOISY_STEPS))


def option_factors(space: Space, factors: Mapping[str, float]) -> dict[str, Floats]:
    """Returns the factor of every option of every group, `(options,)`.

    The options of a format whose codes cannot be chosen keep their losses; those of a mix lose the
    share that its other formats have.

    Args:
        space: whose options.
        factors: by group; 1 for groups that are not named.
    """
    n = space.counts[-1]

    def of(group: str, value: str) -> float:
        if not space.layout.groups[group].role.is_expert:
            return factors.get(group, 1.0) if _is_chosen(value) else 1.0
        parts = split(value, n)
        chosen = sum(k for fmt, k in parts if _is_chosen(fmt)) / n
        return 1.0 - chosen * (1.0 - factors.get(group, 1.0))

    return {g: np.array([of(g, value) for value in names]) for g, names in space.formats.items()}


def _is_chosen(fmt: str) -> bool:
    """Tells whether codes of a format can be chosen anew."""
    named = format_named(fmt)
    return codec_of(named).block_format(named) is not None


def _params(space: Space, allocation: Allocation) -> Params | None:
    try:
        return space.complete(space.params(allocation))
    except SpaceError:
        return None


def _trials(study_folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    """The trials of the folder's own study, if it was launched on the same inputs."""
    path = journal_path(None, study_folder.path)
    if path is None or not path.exists():
        return []
    try:
        study = optuna.load_study(
            study_name=study_folder.study_name(None), storage=open_storage(None, study_folder.path)
        )
    except KeyError:
        return []
    inputs = {
        "checkpoint": study_folder.inventory.digest,
        "target": study_folder.target,
        "search split": digest(study_folder.calibration.trial_documents),
        "profile": study_folder.profiler.inputs.digest,
    }
    lock = study.user_attrs.get(LOCK, {})
    return not_abandoned(study) if inputs.items() <= lock.items() else []
