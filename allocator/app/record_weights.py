"""The weights that an allocation record names: as its codecs encode them, or finished.

In: a study folder, and a record of one of its allocations. Out: a source of tensors, or a candidate
to score. Invariant: finished weights come from the file that is named for their digest, beside the
record, in the study's `allocations`, or in the cache; such a file is refused where it belongs to
another allocation, checkpoint or importance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.app.allocation_files import is_named
from allocator.app.study_folder import StudyFolder
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord, finished_name, read_allocation
from allocator.errors import CheckpointError

if TYPE_CHECKING:  # these load torch
    from allocator.codecs.encodings import Encodings
    from allocator.export.tensors import TensorSource
    from allocator.finishing.artifact import Artifact
    from allocator.scoring.candidates import Candidate


def artifact_path(study_folder: StudyFolder, weights: str, beside: Path | None) -> Path | None:
    """Returns where the file of finished weights with this digest is; None if it is nowhere.

    Args:
        study_folder: of the study.
        weights: digest of the finished weights.
        beside: an allocation file, whose folder may hold the file too.
    """
    name = finished_name(weights)
    folders = [study_folder.path / "allocations", study_folder.finished_folder]
    if beside is not None:
        folders.insert(0, beside.parent)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def open_artifact(
    study_folder: StudyFolder, weights: str, importance: str, beside: Path | None
) -> Artifact:
    """Opens the file of finished weights with this digest.

    Args:
        study_folder: of the study.
        weights: digest of the finished weights.
        importance: digest of the importance vectors that the unfinished weights are encoded with.
        beside: an allocation file, whose folder may hold the file too.

    Raises:
        CheckpointError: if the file is nowhere, damaged, or of other weights.
    """
    path = artifact_path(study_folder, weights, beside)
    if path is None:
        where = study_folder.path / "allocations" if beside is None else beside.parent
        raise CheckpointError(
            f"finished weights {weights[:12]} are not here; needed {where / finished_name(weights)}"
            ": restore the file, finish the allocation again (`allocator finish`), or write the "
            "plain weights (--unfinished)"
        )

    from allocator.finishing.artifact import damaged, read_artifact

    artifact = read_artifact(path, weights)
    of = artifact.description
    if (of.checkpoint, of.importance) != (study_folder.inventory.digest, importance):
        raise damaged(path, "it is of another checkpoint or other importance vectors")
    return artifact


def source_of(
    study_folder: StudyFolder,
    record: AllocationRecord,
    *,
    beside: Path | None = None,
    encodings: Encodings | None = None,
) -> TensorSource:
    """Returns the tensors that a record names; see `AllocationRecord.unfinished` for plain ones.

    Args:
        study_folder: of the study.
        record: of the allocation.
        beside: the record's file.
        encodings: under the record's importance, if they are open.

    Raises:
        CheckpointError: if importance or finished weights are not here, or damaged.
    """
    encodings = encodings or study_folder.encodings.of(record.importance, beside=beside)
    opener = opener_of(study_folder, record.weights_digest, record.importance, encodings, beside)
    return opener(record.decision)


def finished_candidate(study_folder: StudyFolder, path: Path) -> Candidate | None:
    """Returns what a model computes with the finished weights that an allocation file names.

    Args:
        study_folder: of the study.
        path: of the file.

    Returns:
        None where the file is no record, or names no finished weights.

    Raises:
        CheckpointError: if importance or finished weights are not here, or damaged.
    """
    record = record_of(path)
    if record is None or record.finished is None:
        return None
    return source_of(study_folder, record, beside=path).candidate


def record_of(path: Path) -> AllocationRecord | None:
    """Reads the record in an allocation file; None for any other file, or a format's name."""
    if is_named(path):
        return None
    if path.suffix != ".json" and not path.read_text("utf-8", "replace").lstrip().startswith("{"):
        return None
    return read_allocation(path)[1]


def opener_of(
    study_folder: StudyFolder,
    weights: str,
    importance: str,
    encodings: Encodings,
    beside: Path | None = None,
    *,
    encode: bool = False,
) -> Callable[[Allocation], TensorSource]:
    """Returns what opens the tensors of an allocation with these weights.

    Args:
        study_folder: of the study.
        weights: digest of finished weights; empty for plain ones.
        importance: digest of the importance vectors.
        encodings: under these vectors.
        beside: an allocation file, whose folder may hold the finished weights.
        encode: see `EncodedTensors`.

    Raises:
        CheckpointError: if the finished weights are not here, or damaged.
    """
    artifact = open_artifact(study_folder, weights, importance, beside) if weights else None

    from allocator.export.tensors import EncodedTensors
    from allocator.finishing.artifact import damaged
    from allocator.finishing.tensors import FinishedTensors

    def opened(allocation: Allocation) -> TensorSource:
        plain = EncodedTensors(encodings, allocation, encode=encode)
        if artifact is None:
            return plain
        if artifact.description.allocation != allocation.digest:
            raise damaged(artifact.path, "it is of another allocation")
        return FinishedTensors(plain, artifact)

    return opened
