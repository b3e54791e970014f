"""Allocation files: the answer of a study, for a person to open and commit.

In: an allocation, with its losses and bytes. Out: `allocations/<name>.json`, an `AllocationRecord`.
Invariant: a record names the checkpoint, the importance vectors, the codec and the finished
weights that it needs, so rebuilding it elsewhere gives the same bytes or one clear refusal. It
carries a checksum of its content (`files.checksums`). Every change of a record is made under its
folder's lock.
"""

import builtins
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.numpy import load_file

from allocator.checkpoint.tensors import Floats
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_path import no_file
from allocator.decision.pricing import FileBytes
from allocator.errors import CheckpointError, SpaceError, StudyError, first_line, reason
from allocator.files.atomic import accessing, locked, write_whole
from allocator.files.checksums import seal, unseal


class Finishing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What finished the weights of an allocation.

    Attributes:
        recipe: settings of the finishing stage, see `finishing.recipe.Recipe`.
        inputs: digest of everything that finishing depends on.
        before: proxy loss per split of the unfinished weights, nats per token.
        after: the same of the finished weights.
        unfinished_sha256: of the file of the unfinished weights, per container.
    """

    recipe: dict[str, Any]
    inputs: str
    before: dict[str, float]
    after: dict[str, float]
    unfinished_sha256: dict[str, str] = {}  # msgspec copies it


class AllocationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An allocation file.

    Attributes:
        name: of the file.
        kind: of the trial that it comes from: `knapsack`, `pruned` (the knapsack under a lower
            price of pruning), `proposal`, or a baseline's name; `resolved` where a study was
            solved again for finished weights.
        allocation: the decision.
        digest: of the decision.
        checkpoint: digest of the source checkpoint.
        importance: digest of the importance vectors.
        codec: the quantizer that writes its bytes.
        bytes: encoded, full-precision (`kept`) and file bytes in the target's container, and the
            limits; under a device's budget also the items of its memory.
        effective_bits: encoded bits over the searched weights.
        loss: proxy loss per split of the weights as their codecs encode them, nats per token.
        sha256: of the written weights' file, per container; of the finished weights where the
            record names some.
        workload: `context`, `sequences` and `reserve`, where the budget was a whole device's.
        weights: digest of weights that the other digests do not determine, e.g. finished ones;
            absent where they do. The file of finished weights is named for it.
        finishing: what finished the weights; absent where nothing did.
        imatrix: sha256 of the file of llama-imatrix that importance was taken from; absent where
            the calibration pass measured it.
    """

    name: str
    kind: str
    allocation: dict[str, Any]
    digest: str
    checkpoint: str
    importance: str
    codec: str
    bytes: dict[str, int]
    effective_bits: float
    loss: dict[str, float]
    sha256: dict[str, str] = {}  # msgspec copies it
    schema: int = 1
    workload: dict[str, int] = {}  # msgspec copies it
    weights: str | UnsetType = UNSET
    finishing: Finishing | UnsetType = UNSET
    imatrix: str | UnsetType = UNSET

    @property
    def finished(self) -> Finishing | None:
        """What finished the weights that the record names; None if nothing did."""
        return None if isinstance(self.finishing, UnsetType) else self.finishing

    @property
    def losses(self) -> dict[str, float]:
        """Proxy loss per split of the weights that the record names, nats per token."""
        return self.loss if self.finished is None else self.finished.after

    @property
    def unfinished(self) -> "AllocationRecord":
        """The record of the same allocation with the weights as their codecs encode them."""
        digests = self.sha256 if self.finished is None else self.finished.unfinished_sha256
        return replace(self, sha256=digests, weights=UNSET, finishing=UNSET)

    def finished_with(self, weights: str, finishing: Finishing) -> "AllocationRecord":
        """Returns the record of the same allocation with finished weights.

        The sha256 of written files of the same weights stay.

        Args:
            weights: digest of the finished weights.
            finishing: what finished them, its `unfinished_sha256` aside.
        """
        plain = self.unfinished
        return replace(
            plain,
            weights=weights,
            finishing=replace(finishing, unfinished_sha256=plain.sha256),
            sha256=self.sha256 if self.weights_digest == weights else {},
        )

    @property
    def weights_digest(self) -> str:
        """Names weights that the other digests do not determine; empty if they do."""
        return "" if isinstance(self.weights, UnsetType) else self.weights

    @property
    def decision(self) -> Allocation:
        """The allocation, checked against the digest.

        Raises:
            SpaceError: if they do not belong together.
        """
        allocation = Allocation.from_json(self.allocation)
        if allocation.digest != self.digest:
            raise SpaceError(
                f"allocation {self.name!r}: its digest is {self.digest[:12]}…, its content's "
                f"{allocation.digest[:12]}…; it was edited by hand: "
                "score its `allocation` part as a file of its own"
            )
        return allocation

    @classmethod
    def read(cls, path: Path) -> "AllocationRecord":
        """Reads a record from its file.

        Raises:
            SpaceError: if the file is no allocation record, or is damaged.
        """
        try:
            data = unseal(path.read_bytes())
            if "retained" in data:
                raise SpaceError(_plain(path))
            record = msgspec.convert(data, cls)
        except (FileNotFoundError, IsADirectoryError):
            raise no_file(path) from None
        except (OSError, ValueError, RecursionError) as error:
            raise SpaceError(
                f"{path}: no allocation file ({reason(error)}); restore it from a copy, or "
                "search again (a hand-made change is taken where the file has no line `checksum`)"
            ) from None
        if record.schema != 1:
            raise SpaceError(f"{path}: schema {record.schema}, needed 1; use a newer allocator")
        for name in ("importance", "weights_digest"):  # which name files
            digest = getattr(record, name)
            if not re.fullmatch("[0-9a-f]{64}", digest) and (digest or name == "importance"):
                raise SpaceError(f"{path}: {name} {digest[:40]!r} is no sha256")
        if record.finished is not None and not record.weights_digest:
            raise SpaceError(f"{path}: names no weights, but what finished them; restore the file")
        return record

    def to_bytes(self) -> builtins.bytes:
        """Returns the record as JSON for a person to open, with its checksum."""
        return seal(self)


def _plain(path: Path) -> str:
    """The refusal of an allocation that names no checkpoint and no importance."""
    return (
        f"{path}: an allocation alone, as `allocator plan --out` writes; needed one that names "
        f"its weights: `allocator finish {path} --study STUDY` makes one, of a study of the "
        "model's weights"
    )


def recorded_bytes(size: FileBytes) -> dict[str, int]:
    """Returns a file's bytes by the names that records have for them."""
    return {
        "encoded": size.encoded,
        "kept": size.full_precision,
        "overhead": size.overhead,
        "file": size.file,
    }


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Holds the lock of the folder of a record, under which records there are changed."""
    with accessing(path), locked(path.with_name(".lock")):
        yield


def note_digests(
    path: Path, read: AllocationRecord, digests: dict[str, str], *, unfinished: bool = False
) -> None:
    """Adds the sha256 of written checkpoints to a record, if the record has not changed since.

    Args:
        path: of the record.
        read: the record from which the checkpoints were written.
        digests: sha256 of the weights' file, per container.
        unfinished: the files hold unfinished weights, and the record names finished ones.

    Raises:
        StudyError: if the record has changed; nothing is written then.
        SpaceError: if the record cannot be read any more.
    """
    with changing(path):
        now = AllocationRecord.read(path)
        if _without_digests(now) != _without_digests(read):
            raise StudyError(
                f"{path}: changed while its checkpoint was written (a search ended?), so no sha256 "
                "was recorded; materialize it again"
            )
        if unfinished and now.finished is not None:
            noted = now.finished.unfinished_sha256 | digests
            changes: dict[str, Any] = {"finishing": replace(now.finished, unfinished_sha256=noted)}
        else:
            changes = {"sha256": now.sha256 | digests}
        write_whole(path, replace(now, **changes).to_bytes())


def _without_digests(record: AllocationRecord) -> AllocationRecord:
    """The record of the same weights, of which no file was written yet."""
    if record.finished is None:
        return replace(record, sha256={})
    plain = replace(record.finished, unfinished_sha256={})
    return replace(record, sha256={}, finishing=plain)


def importance_name(digest: str) -> str:
    """Returns the name of the file of importance vectors, in the folder of an allocation."""
    return f"importance-{digest[:12]}.safetensors"


def finished_name(digest: str) -> str:
    """Returns the name of the file of finished weights, in the folder of an allocation."""
    return f"finished-{digest[:12]}.safetensors"


def read_importance(path: Path) -> dict[str, Floats]:
    """Reads committed importance vectors by group: `(in,)`, or `(experts or heads, in)`; float32.

    The caller compares their digest.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another dtype.
    """
    try:
        vectors: dict[str, Floats] = load_file(path)
        if any(v.dtype != np.float32 for v in vectors.values()):
            raise ValueError("not all of it is float32")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({first_line(error)}); restore the file") from None
    return vectors


def read_allocation(path: Path) -> tuple[Allocation, AllocationRecord | None]:
    """Reads the allocation of a record, with the record; or a plain `allocation.json`, with None.

    Raises:
        SpaceError: if the file is neither.
    """
    try:
        data = json.loads(path.read_bytes())
    except IsADirectoryError:
        raise no_file(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SpaceError(
            f"{path}: cannot be read as an allocation ({reason(error)}); needed an allocation "
            "file, e.g. STUDY/allocations/pick.json, or the allocation.json of a written directory"
        ) from None
    if isinstance(data, dict) and "allocation" in data:
        record = AllocationRecord.read(path)
        return record.decision, record
    try:
        return Allocation.from_json(data), None
    except SpaceError as error:
        raise SpaceError(f"{path}: {error}") from None


def recorded_losses(path: Path) -> list[tuple[str, float, float | None]]:
    """Reads what an allocation file says was measured, in nats per token.

    Returns:
        By split, the loss of the unfinished weights and of the finished ones, None where nothing
        finished them; empty where the file is no record.
    """
    record = read_allocation(path)[1]
    if record is None:
        return []
    after = {} if record.finished is None else record.finished.after
    return [(split, loss, after.get(split)) for split, loss in record.loss.items()]
