"""The finishing stage of a study: from an allocation to a record that names finished weights.

In: a finish request: a record, another allocation file, or a format's name. Out: `finished-*` and
the record beside it. Invariant: whatever is wrong with the input is said before anything is
measured; a record that changed meanwhile is not written over.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from allocator.app.allocation_files import is_named
from allocator.app.record_weights import record_of
from allocator.app.resources import Resources
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord, changing, recorded_bytes
from allocator.errors import SpaceError, StudyError
from allocator.files.atomic import write_whole
from allocator.files.outputs import check_output_file
from allocator.finishing.recipe import CODES, Recipe

if TYPE_CHECKING:  # these load torch
    from allocator.app.resolve import Resolved
    from allocator.codecs.encodings import Encodings
    from allocator.finishing.artifact import Artifact
    from allocator.finishing.estimate import FinishEstimate
    from allocator.finishing.finish import FinishDocuments, Finisher


@dataclass(frozen=True)
class FinishRequest:
    """What is to be finished, and how.

    Attributes:
        study: the study's folder.
        allocation: a file, or a format's name, see `read_encoded`.
        base: of a tensor-type file, see `read_encoded`.
        recipe: how.
        seconds: time limit, which ends tuning early; None for no limit.
        out: name of the record; by default that of the file or the format.
        target: name of the target; None for study.toml's.
        resources: what may be used of the machine.
        resolve: finishes another allocation in its place: that of least predicted loss after
            finishing, under the same limits.
    """

    study: Path
    allocation: Path
    base: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    seconds: float | None = None
    out: str | None = None
    target: str | None = None
    resources: Resources = field(default_factory=Resources)
    resolve: bool = False


@dataclass(frozen=True)
class FinishResult:
    """What finishing leaves.

    Attributes:
        record: the allocation file that names the finished weights.
        artifact: the file of the finished weights.
        before: proxy loss per split of the unfinished weights, nats per token.
        after: the same of the finished ones.
        recipe: that made them.
        weights: digest of the finished weights.
        resolved: what was predicted where the study was solved again; None where it was not.
    """

    record: Path
    artifact: Path
    before: dict[str, float]
    after: dict[str, float]
    recipe: Recipe
    weights: str
    resolved: Resolved | None = None


def recipe_of(*, tokens: int | None = None, tuning: bool = True, seed: int | None = None) -> Recipe:
    """Returns the recipe with a user's settings.

    Args:
        tokens: most search tokens behind second moments, and most that are tuned on.
        tuning: tunes norms, routers and scales after the codes.
        seed: of what is drawn.

    Raises:
        SpaceError: if a setting cannot be.
    """
    recipe = Recipe()
    if tokens is not None:
        recipe = msgspec.structs.replace(recipe, moments_tokens=tokens, tuning_tokens=tokens)
    if not tuning:
        recipe = msgspec.structs.replace(recipe, tuning_tokens=0, parts=(CODES,))
    if seed is not None:
        recipe = msgspec.structs.replace(recipe, seed=seed)
    recipe.check()
    return recipe


def finish(
    request: FinishRequest, on_estimate: Callable[[FinishEstimate], None] | None = None
) -> FinishResult:
    """Finishes the weights of an allocation, and notes them in its record.

    Args:
        request: what and how.
        on_estimate: called with what it would take, before anything is measured.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    until = None if request.seconds is None else time.monotonic() + request.seconds
    stage = _Stage(request)
    if request.resolve:
        stage.resolve()
    finisher = stage.finisher(until)
    if on_estimate is not None:
        on_estimate(stage.estimate(finisher))
    artifact = finisher.finish()
    return stage.note(artifact)


def estimate(request: FinishRequest) -> FinishEstimate:
    """Prices what `finish` would do: `finish --dry-run`.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    stage = _Stage(request)
    return stage.estimate(stage.finisher(None))


def finish_anew(study_folder: StudyFolder, record: AllocationRecord, path: Path) -> Artifact:
    """Finishes a record's allocation by the record's recipe; the record stays as it is.

    Args:
        study_folder: of the study.
        record: names finished weights.
        path: of the record.

    Raises:
        AllocatorError: one line on whatever is wrong.
    """
    assert record.finished is not None
    recipe = Recipe.of(record.finished.recipe, str(path))
    if recipe.streamed != (study_folder.spec.streamed is not None):
        raise StudyError(
            f"{path}: its weights were finished {'' if recipe.streamed else 'not '}layer by layer: "
            f"{'give' if recipe.streamed else 'remove'} study.toml's [streamed], or restore the "
            "file of the finished weights"
        )
    finisher = _finisher(study_folder, record.decision, record.importance, recipe, path, None)
    if finisher.inputs(recipe) != record.finished.inputs:
        raise StudyError(
            f"{path}: its weights were finished on other documents, or encoded by another version "
            f"({record.codec}, here {finisher.codec}); needed the file of the finished weights"
        )
    return finisher.finish()


def finish_documents(study_folder: StudyFolder) -> FinishDocuments:
    """Returns the documents that weights of a study are finished on."""
    calibration = study_folder.calibration
    documents = calibration.search, calibration.trial_documents, calibration.selection_documents

    from allocator.finishing.finish import FinishDocuments

    return FinishDocuments(*documents)


def _finisher(
    study_folder: StudyFolder,
    allocation: Allocation,
    importance: str | None,
    recipe: Recipe,
    beside: Path | None,
    until: float | None,
) -> Finisher:
    documents = finish_documents(study_folder)

    from allocator.export.tensors import EncodedTensors
    from allocator.finishing.finish import Finisher

    scorers = study_folder.scorers
    encodings = _encodings(study_folder, importance, beside)
    if importance is None:
        importance = study_folder.profile.importance
        model = cache(lambda: scorers.model)
    else:  # without the study's own calibration pass
        model = cache(lambda: scorers.model_with(encodings))
    return Finisher(
        EncodedTensors(encodings, allocation),
        importance,
        recipe,
        documents,
        lambda chosen: scorers.on(chosen, model=model()),
        study_folder.finished_folder,
        progress=study_folder.progress,
        until=until,
    )


def _encodings(study_folder: StudyFolder, importance: str | None, beside: Path | None) -> Encodings:
    """Encoded weights by the digest of their importance vectors; None for the study's own."""
    if importance is None:
        return study_folder.profiler.encodings
    return study_folder.encodings.of(importance, beside=beside)


class _Stage:
    """One request, read and accepted."""

    def __init__(self, request: FinishRequest) -> None:
        self._request = request
        self._folder = StudyFolder(
            request.study, target=request.target, **request.resources.options
        )
        streamed = self._folder.spec.streamed is not None
        self._recipe = request.recipe.layer_by_layer if streamed else request.recipe
        given = request.allocation
        self._record = record_of(given) if given.is_file() else None
        self._beside = None if self._record is None else given
        self._resolved: Resolved | None = None
        self._path = self._record_path()
        check_output_file("record", self._path)
        _ = self._folder.calibration.splits
        self._allocation, self._importance = self._folder.read_encoded(given, base=request.base)
        if not request.resolve:
            self._check_known_record()
        elif streamed:
            raise StudyError(
                f"{self._folder.path}: --resolve needs the model in memory; finish without it, or "
                "remove study.toml's [streamed]"
            )

    def resolve(self) -> None:
        """Puts the allocation of least predicted loss after finishing in the given one's place."""
        from allocator.app.resolve import budget_of, resolve

        given = self._allocation
        budget = budget_of(self._folder, given, self._record)
        encodings = _encodings(self._folder, self._importance, self._beside)
        self._resolved = resolve(self._folder, given, budget, self.finisher(None), encodings)
        self._allocation, self._record = self._resolved.allocation, None
        self._check_known_record()

    def _record_path(self) -> Path:
        """Where the record is written.

        Raises:
            SpaceError: if the name is none of a file.
        """
        given, out = self._request.allocation, self._request.out
        name = out or (given.stem if given.is_file() else re.sub(r"\s*/\s*", "-", str(given)))
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise SpaceError(
                f"--out {name!r}: needed a file name of letters, digits, dots, '-' and '_'"
            )
        if self._request.resolve and out is None:
            name += "-resolved"
        folder = self._folder.path / "allocations" if self._record is None else given.parent
        if self._request.resolve:
            return folder / f"{name}.json"
        return given if self._record is not None and out is None else folder / f"{name}.json"

    def _check_known_record(self) -> None:
        """Raises:
        SpaceError: if the record that is there already is of another allocation.
        """
        if not self._path.is_file():
            return
        if AllocationRecord.read(self._path).digest != self._allocation.digest:
            raise SpaceError(
                f"{self._path}: holds another allocation; name another record with --out"
            )

    def finisher(self, until: float | None) -> Finisher:
        """Makes what finishes it."""
        return _finisher(
            self._folder, self._allocation, self._importance, self._recipe, self._beside, until
        )

    def estimate(self, finisher: Finisher) -> FinishEstimate:
        """Prices it."""
        from allocator.finishing.estimate import estimate as _estimate
        from allocator.finishing.estimate import seconds_per_token

        if finisher.known() is not None:
            return _estimate(finisher, 0.0)
        if not self._recipe.streamed:
            return _estimate(finisher, seconds_per_token(finisher))

        from allocator.app.estimate import encoded_seconds_per_token

        return _estimate(finisher, encoded_seconds_per_token(self._folder))

    def note(self, artifact: Artifact) -> FinishResult:
        """Puts the file of finished weights beside the record, and names it there.

        Raises:
            StudyError: if the record changed meanwhile.
        """
        of = artifact.description
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(artifact.path.name)
        _link(artifact.path, beside)
        if self._beside is None:
            self._write_importance(of.importance)
        with changing(self._path):
            now = AllocationRecord.read(self._path) if self._path.is_file() else None
            if now is not None and now.digest != of.allocation:
                raise StudyError(
                    f"{self._path}: changed while it was finished (a search ended?), so its record "
                    f"was left; {beside.name} is there: finish it again"
                )
            if now is None or now.importance != of.importance:
                now = self._new_record(artifact)
            record = now.finished_with(artifact.weights, of.finishing)
            write_whole(self._path, record.to_bytes())
        return FinishResult(
            record=self._path,
            artifact=beside,
            before=of.finishing.before,
            after=of.finishing.after,
            recipe=Recipe.of(of.finishing.recipe, str(beside)),
            weights=artifact.weights,
            resolved=self._resolved,
        )

    def _write_importance(self, importance: str) -> None:
        from allocator.app.pick import write_importance

        if not self._folder.encodings.path(importance).is_file():
            write_importance(self._folder)

    def _new_record(self, artifact: Artifact) -> AllocationRecord:
        """A record of the unfinished weights."""
        if self._record is not None:
            return msgspec.structs.replace(self._record.unfinished, name=self._path.stem)

        from allocator.app.pick import recorded_imatrix

        of, size = artifact.description, self._allocation.nbytes(self._folder.layout)
        return AllocationRecord(
            name=self._path.stem,
            kind=self._kind,
            allocation=self._allocation.to_json(),
            digest=self._allocation.digest,
            checkpoint=of.checkpoint,
            importance=of.importance,
            codec=of.codec,
            bytes=(self._resolved.budget.by_name if self._resolved else {}) | recorded_bytes(size),
            effective_bits=size.encoded * 8 / self._folder.inventory.n_searched_weights,
            loss=of.finishing.before,
            imatrix=recorded_imatrix(self._folder),
        )

    @property
    def _kind(self) -> str:
        if self._resolved is not None:
            return "resolved"
        given = self._request.allocation
        return str(given) if is_named(given) else "file"


def _link(path: Path, to: Path) -> None:
    """Puts a file under a second name, without a copy where the disk is the same."""
    if to.exists() and os.path.samefile(path, to):
        return
    part = to.with_name(f"{to.name}.{os.getpid()}.part")
    try:
        with suppress(OSError):
            os.link(path, part)
        if not part.exists():
            shutil.copyfile(path, part)
        os.replace(part, to)
    finally:
        part.unlink(missing_ok=True)
