"""A quantized checkpoint directory: what is written, and the manifest that says so.

In: a source of tensors, a container (the name of a runtime's target). Out: a directory with the
weights' file, `allocation.json` and `manifest.json` (sizes, sha256). Invariant: it appears under
its name whole; free disk is checked first; the same tensors give the same bytes. Before it appears,
the encoded tensors are read back and held against the digests that they were encoded with, after
their sha256 was taken: what the manifest signs is what was encoded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import UNSET

from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.errors import VerifyError
from allocator.export.base import Runtime
from allocator.export.card import CARD, CardFacts, licence_files, model_card
from allocator.export.manifest import ALLOCATION, MANIFEST, Manifest, file_digest, files_in
from allocator.export.runtimes import runtime_named
from allocator.files.checksums import seal
from allocator.files.machine import existing, free_disk
from allocator.files.outputs import check_output_folder
from allocator.files.progress import stepping

if TYPE_CHECKING:  # which loads torch
    from allocator.export.tensors import TensorSource


@dataclass(frozen=True)
class Written:
    """A written checkpoint directory.

    Attributes:
        folder: the directory.
        manifest: what it says of itself.
        options: what the runtime must be told when it runs the file.
    """

    folder: Path
    manifest: Manifest
    options: str = ""


def materialize(
    source: TensorSource,
    folder: Path,
    *,
    container: str,
    importance: str,
    workload: Mapping[str, int] | None = None,
    record: AllocationRecord | None = None,
    shard_bytes: int | None = None,
) -> Written:
    """Writes a checkpoint directory; an earlier one of the same weights is replaced.

    With a record, the directory has a model card and the checkpoint's licence, ready to upload.

    Args:
        source: the tensors of an allocation.
        folder: where; its parent must exist.
        container: name of the target whose runtime reads the directory.
        importance: digest of the importance vectors that weights were encoded with, for the
            manifest.
        workload: what a device's memory was budgeted for, as in `AllocationRecord`.
        record: of the allocation, as its file has it.
        shard_bytes: the most bytes of tensors in a file of the weights; None for one file.

    Raises:
        SpaceError: if the allocation does not fit the source's layout.
        TargetError: if the container's runtime cannot express the allocation.
        OutputError: if `folder` cannot be made.
        VerifyError: if `folder` holds something else, the disk is too small, or gives back other
            bytes than it was given.
        CheckpointError: if the checkpoint changed since it was opened.
    """
    layout, allocation = source.layout, source.allocation
    allocation.check(layout)
    runtime = runtime_named(container)
    runtime.check_can_write(allocation)
    if shard_bytes is not None:
        runtime = runtime.in_shards(layout, allocation, shard_bytes)
    size = allocation.nbytes(layout, runtime.target)
    check_place(folder, allocation, source.digest, container, size.file)
    with _whole_directory(folder) as place:
        options = runtime.write(place, source, workload or {})
        (place / ALLOCATION).write_text(json.dumps(allocation.to_json(), indent=1) + "\n")
        if record is not None:
            for licence in licence_files(layout.inventory):
                shutil.copyfile(licence, place / licence.name)
        one_file = runtime.one_file_digest(place)
        manifest = Manifest(
            container=container,
            allocation=allocation.digest,
            checkpoint=layout.inventory.digest,
            importance=importance,
            file=runtime.file_name,
            file_bytes=sum((place / n).stat().st_size for n in runtime.weights_names(source)),
            tensor_bytes=size.tensors,
            overhead_bytes=size.overhead,
            sha256={name: file_digest(place / name) for name in files_in(place)},
            weights=source.digest or UNSET,
            shard_bytes=UNSET if one_file is None or shard_bytes is None else shard_bytes,
            one_file=one_file or UNSET,
        )
        if manifest.file_bytes != size.file:
            raise VerifyError(f"wrote {manifest.file_bytes} bytes, predicted {size.file}")
        _check_written(place, folder, runtime, source)
        layout.inventory.check_unchanged()
        (place / MANIFEST).write_bytes(seal(manifest))
        if record is not None:
            facts = CardFacts(
                runtime,
                options,
                manifest,
                unfinished=record.weights_digest != source.digest,
            )
            written = record.unfinished if facts.unfinished else record
            (place / CARD).write_text(model_card(layout, written, facts), encoding="utf-8")
    return Written(folder, manifest, options)


def check_place(
    folder: Path, allocation: Allocation, weights: str, container: str, nbytes: int
) -> None:
    """Checks that a directory can be written, before any weight is encoded.

    Args:
        folder: to be written.
        allocation: of the directory.
        weights: digest of the tensors' source.
        container: name of the target whose runtime reads the directory.
        nbytes: of the weights' file.

    Raises:
        OutputError: if `folder` cannot be made.
        VerifyError: if `folder` holds something else, or the disk is too small.
    """
    check_output_folder("OUT", folder, whole=True)
    if folder.exists() and not _holds(folder, allocation, weights, container):
        raise VerifyError(f"{folder}: holds something else; choose another directory or remove it")
    free, needed = free_disk(folder), int(nbytes * 1.01) + (16 << 20)
    if free < needed:
        raise VerifyError(
            f"{existing(folder)}: {free:,} bytes free, needed {needed:,}; free some disk"
        )


def _holds(folder: Path, allocation: Allocation, weights: str, container: str) -> bool:
    """Says whether `folder` is empty, or these weights in this container and nothing besides."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    if not (folder / MANIFEST).is_file():
        return False
    manifest = Manifest.read(folder)
    wanted = (allocation.digest, weights, container)
    same = (manifest.allocation, manifest.weights_digest, manifest.container) == wanted
    return same and set(files_in(folder)) <= {*manifest.sha256, MANIFEST, CARD}


@contextmanager
def _whole_directory(folder: Path) -> Iterator[Path]:
    """Yields a temporary directory that takes the place of `folder` when the body succeeds."""
    place = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = place.with_suffix(".old")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
        if folder.exists():  # moved aside first: a kill leaves no half of it under the name
            folder.rename(old)
        place.rename(folder)
    finally:
        for leftover in (place, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_written(place: Path, folder: Path, runtime: Runtime, source: TensorSource) -> None:
    """Raises:
    VerifyError: if an encoded tensor comes back other than the source gave it.
    """
    places = runtime.places(source)
    for name in stepping(source.layout.groups, "reading back", unit="matrices", brief=True):
        for part in range(len(source.allocation.parts(source.layout, name))):
            file, start = next(places)
            stored = np.memmap(place / file, np.uint8, "r", start, source.shape(name, part))
            if not source.matches(name, part, runtime.in_order(stored, source.layout, name)):
                raise VerifyError(
                    f"{folder}: {name} comes back from the disk other than it was written; memory "
                    "or disk is faulty: materialize it elsewhere"
                )
