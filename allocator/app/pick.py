"""The pick: the allocation that a finished search recommends, and its record.

In: a study folder and a search that has ended. Out: `allocations/pick.json`,
`allocations/knapsack.json`, and the importance vectors that they are encoded with. Invariant: the
pick is made on the selection split among finalists that include the unperturbed knapsack, so there
it is never worse than that.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from optuna.trial import FrozenTrial
from safetensors.numpy import save

from allocator.app.outcome import Outcome, outcome_of
from allocator.app.study_folder import StudyFolder
from allocator.codecs import identity_of
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord, changing, recorded_bytes
from allocator.decision.budget import Budget
from allocator.errors import SpaceError, StudyError
from allocator.files.atomic import write_whole
from allocator.study.search import Search
from allocator.study.trials import KIND, allocation_of, complete_trials

N_FINALISTS = 3
"""Trials of least search loss that the selection split decides between."""

_log = logging.getLogger(__name__)


def pick_tokens(study_folder: StudyFolder) -> int:
    """Returns the most forward tokens that a pick takes: finalists, the knapsack, the original."""
    return (N_FINALISTS + 2) * study_folder.scorers.selection.n_tokens


def check_tokens(study_folder: StudyFolder, tokens: int, way_out: str) -> None:
    """Raises:
    StudyError: if `tokens` are too few for the profile, the original, one trial and the pick.
    """
    least = (
        study_folder.base_tokens + study_folder.scorers.trials.n_tokens + pick_tokens(study_folder)
    )
    if tokens < least:
        raise StudyError(
            f"{tokens:,} forward tokens; the profile, the original, one trial and the pick take "
            f"{least:,}: {way_out}"
        )


def finalists_of(search: Search) -> tuple[list[FrozenTrial], FrozenTrial | None]:
    """Returns trials of different allocations that the pick is made among.

    Also the trial of the knapsack alone, if it was finished.
    """
    first: dict[Allocation, FrozenTrial] = {}
    for trial in complete_trials(search.study):
        first.setdefault(allocation_of(trial), trial)
    finalists = list(first.values())[:N_FINALISTS]
    alone = first.get(search.queue[0].allocation)
    if alone is not None and alone.number not in {t.number for t in finalists}:
        finalists.append(alone)
    return finalists, alone


def pick_among(study_folder: StudyFolder, search: Search) -> tuple[Path, Path | None, Outcome]:
    """Picks on the selection split, and writes the files of the pick and of the knapsack alone.

    Returns:
        The file of the pick, that of the knapsack alone if it was finished, and the pick's figures.

    Raises:
        StudyError: if no trial was finished.
    """
    finalists, alone = finalists_of(search)
    if not finalists:
        raise StudyError(
            f"{study_folder.path}: no trial was finished; give it more --trials, --time or --tokens"
        )
    losses = {t.number: _selection_loss(study_folder, allocation_of(t)) for t in finalists}
    best = min(finalists, key=lambda t: (losses[t.number], t.number))
    write_importance(study_folder)
    pick = _record(study_folder, search.budget, "pick", best, losses[best.number])
    outcome = outcome_of(search.study, best, losses[best.number])
    if alone is None:
        return pick, None, outcome
    knapsack = _record(study_folder, search.budget, "knapsack", alone, losses[alone.number])
    return pick, knapsack, outcome


def _selection_loss(study_folder: StudyFolder, allocation: Allocation) -> float:
    return study_folder.profiler.selection_loss(allocation, study_folder.scorers.selection)


def write_importance(study_folder: StudyFolder) -> None:
    """Commits the importance vectors of the study's own calibration beside its allocations."""
    from allocator.profiling.statistics import importance_digest

    vectors = study_folder.profiler.statistics.importance
    write_whole(study_folder.encodings.path(importance_digest(vectors)), save(vectors))


def recorded_imatrix(study_folder: StudyFolder) -> str | UnsetType:
    """Returns the sha256 of the imatrix that the study's importance was taken from, if any."""
    given = study_folder.given_importance
    return UNSET if given is None else given.sha256


def _record(
    study_folder: StudyFolder, budget: Budget, name: str, trial: FrozenTrial, selection_loss: float
) -> Path:
    allocation = allocation_of(trial)
    size = allocation.nbytes(study_folder.layout)
    memory = budget.memory(allocation.stored(study_folder.layout))
    path = study_folder.path / "allocations" / f"{name}.json"
    record = AllocationRecord(
        name=name,
        kind=str(trial.user_attrs[KIND]),
        allocation=allocation.to_json(),
        digest=allocation.digest,
        checkpoint=study_folder.inventory.digest,
        importance=study_folder.profile.importance,
        codec=identity_of(allocation.stored_formats),
        bytes={"budget": budget.nbytes}
        | recorded_bytes(size)
        | budget.by_name
        | ({} if memory is None else _prefixed("device", asdict(memory) | {"total": memory.total})),
        effective_bits=size.encoded * 8 / study_folder.inventory.n_searched_weights,
        loss={"search": float(trial.values[0]), "selection": selection_loss},
        workload=budget.recorded_workload,
        imatrix=recorded_imatrix(study_folder),
    )
    with changing(path):
        known = _known(path, record)
        write_whole(path, msgspec.structs.replace(record, **known).to_bytes())
    return path


def _prefixed(prefix: str, sizes: dict[str, int]) -> dict[str, int]:
    return {f"{prefix}_{name}": nbytes for name, nbytes in sizes.items()}


def _known(path: Path, record: AllocationRecord) -> dict[str, Any]:
    """Fields of the file so far that are true of a new record, too: its digests, and finishing."""
    if not path.exists():
        return {}
    try:
        old = AllocationRecord.read(path)
    except SpaceError as error:
        _log.warning("%s; written anew", error)
        return {}
    if old.digest != record.digest:
        return {}
    if old.finished is None or old.importance != record.importance:
        return {"sha256": old.unfinished.sha256}
    return {"sha256": old.sha256, "weights": old.weights, "finishing": old.finishing}
