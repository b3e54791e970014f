"""Allocation files: the answer of a study, for a person to open and commit.

In: an allocation, with its losses and bytes. Out: `allocations/<name>.json`, an `AllocationRecord`.
Invariant: a record names the checkpoint, the importance vectors and the codec that it needs, so
rebuilding it elsewhere gives the same bytes or one clear refusal. It carries a checksum of its
content (`files.checksums`). Every change of a record is made under its folder's lock.
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
from safetensors import SafetensorError
from safetensors.numpy import load_file

from allocator.checkpoint.tensors import Floats
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, SpaceError, StudyError, first_line
from allocator.files.atomic import accessing, locked, write_whole
from allocator.files.checksums import seal, unseal


class AllocationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An allocation file.

    Attributes:
        name: of the file.
        kind: of the trial that it comes from: `knapsack`, `proposal`, or a baseline's name.
        allocation: the decision.
        digest: of the decision.
        checkpoint: digest of the source checkpoint.
        importance: digest of the importance vectors.
        codec: the quantizer that writes its bytes.
        bytes: encoded, full-precision (`kept`) and file bytes in the target's container, and the
            limits; under a device's budget also the items of its memory.
        effective_bits: encoded bits over the searched weights.
        loss: proxy loss per split, nats per token.
        sha256: of the written weights' file, per container.
        workload: `context`, `sequences` and `reserve`, where the budget was a whole device's.
        weights: digest of weights that the other digests do not determine, e.g. finished ones;
            absent where they do.
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
            record = msgspec.convert(unseal(path.read_bytes()), cls)
        except (OSError, ValueError, RecursionError) as error:
            raise SpaceError(
                f"{path}: no allocation file ({error}); restore it from a copy, or search again (a "
                "hand-made change is taken where the file has no line `checksum`)"
            ) from None
        if record.schema != 1:
            raise SpaceError(f"{path}: schema {record.schema}, needed 1; use a newer allocator")
        if not re.fullmatch("[0-9a-f]{64}", record.importance):
            raise SpaceError(f"{path}: importance {record.importance[:40]!r} is no sha256")
        return record

    def to_bytes(self) -> builtins.bytes:
        """Returns the record as JSON for a person to open, with its checksum."""
        return seal(self)


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Holds the lock of the folder of a record, under which records there are changed."""
    with accessing(path), locked(path.with_name(".lock")):
        yield


def note_digests(path: Path, read: AllocationRecord, digests: dict[str, str]) -> None:
    """Adds the sha256 of written checkpoints to a record, if the record has not changed since.

    Args:
        path: of the record.
        read: the record from which the checkpoints were written.
        digests: sha256 of the weights' file, per container.

    Raises:
        StudyError: if the record has changed; nothing is written then.
        SpaceError: if the record cannot be read any more.
    """
    with changing(path):
        now = AllocationRecord.read(path)
        if msgspec.structs.replace(now, sha256=read.sha256) != read:
            raise StudyError(
                f"{path}: changed while its checkpoint was written (a search ended?), so no sha256 "
                "was recorded; materialize it again"
            )
        known = msgspec.structs.replace(now, sha256=now.sha256 | digests)
        write_whole(path, known.to_bytes())


def importance_name(digest: str) -> str:
    """Returns the name of the file of importance vectors, in the folder of an allocation."""
    return f"importance-{digest[:12]}.safetensors"


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
    except (OSError, ValueError, RecursionError) as error:
        raise SpaceError(f"{path}: cannot be read as an allocation ({error})") from None
    if isinstance(data, dict) and "allocation" in data:
        record = AllocationRecord.read(path)
        return record.decision, record
    try:
        return Allocation.from_json(data), None
    except SpaceError as error:
        raise SpaceError(f"{path}: {error}") from None
