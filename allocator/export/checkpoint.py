"""A quantized checkpoint directory: what is written, and the manifest that says so.

In: an allocation, encodings, a container (`gguf` or `safetensors`). Out: a directory with the file,
`allocation.json` and `manifest.json` (sizes, sha256). Invariant: it appears under its name whole;
free disk is checked first; the same allocation gives the same bytes. Before it appears, the encoded
tensors are read back and held against the digests that they were encoded with, after their sha256
was taken: what the manifest signs is what was encoded.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from allocator.checkpoint.inventory import Inventory
from allocator.checkpoint.tokenizer import carried_files, read_tokenizer
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError, TargetError, VerifyError
from allocator.export.gguf.files import llama_cpp_options, tensor_type_file, write_gguf
from allocator.export.tensors import EncodedTensors
from allocator.files.checksums import seal, unseal
from allocator.targets import Layout, Target, target_named
from allocator.targets.safetensors import entries, header

FILE = {"gguf": "model.gguf", "safetensors": "encoded.safetensors"}
"""Not `model.safetensors`: stock transformers skips an unknown quantization method with a warning,
and would then run on random weights; without that file it refuses the directory."""
QUANT_METHOD = "moe-allocator"
MANIFEST = "manifest.json"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was written.

    Attributes:
        container: `gguf` or `safetensors`.
        allocation: digest of the allocation.
        checkpoint: digest of the source checkpoint.
        importance: digest of the importance vectors.
        file: name of the weights' file.
        file_bytes: its size.
        tensor_bytes: bytes of its tensor data.
        overhead_bytes: the rest of it.
        sha256: of every file, by name.
        schema: of this file.
    """

    container: str
    allocation: str
    checkpoint: str
    importance: str
    file: str
    file_bytes: int
    tensor_bytes: int
    overhead_bytes: int
    sha256: dict[str, str]
    schema: int = 1

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """From a checkpoint directory.

        Raises:
            VerifyError: if it has none, it is damaged, or it names files that it cannot hold.
        """
        try:
            found = msgspec.convert(unseal((folder / MANIFEST).read_bytes()), cls)
            found._check()
        except (OSError, ValueError, RecursionError) as error:
            raise VerifyError(
                f"{folder}: no readable manifest.json ({error}); needed a directory written by "
                "`allocator materialize`: materialize it again"
            ) from None
        return found

    def _check(self) -> None:
        """Raises:
        ValueError: if a field says what no written directory has.
        """
        if self.schema != 1:
            raise ValueError(f"schema {self.schema}, needed 1")
        if self.container not in FILE:
            raise ValueError(f"container {self.container!r}, needed {' or '.join(FILE)}")
        if self.file != FILE[self.container]:
            raise ValueError(f"file {self.file!r}, needed {FILE[self.container]!r} beside it")
        for name in self.sha256:
            parts = name.split("/")
            if name == MANIFEST or {"", ".", ".."} & {*parts} or {"\\", "\0"} & {*name}:
                raise ValueError(f"sha256 of {name!r}, needed names of files beside it")
        for name in (self.file, "allocation.json"):
            if name not in self.sha256:
                raise ValueError(f"no sha256 of {name}")


@dataclass(frozen=True)
class Written:
    """A directory, its manifest, and what the runtime must be told when it runs the file."""

    folder: Path
    manifest: Manifest
    options: str = ""


def materialize(
    allocation: Allocation,
    encodings: Encodings,
    folder: Path,
    *,
    container: str,
    importance: str,
    workload: Mapping[str, int] | None = None,
) -> Written:
    """Writes a checkpoint directory; an earlier one of the same allocation is replaced.

    Args:
        allocation: in the encodings' layout.
        encodings: encoded weights.
        folder: where; its parent must exist.
        container: `gguf` or `safetensors`.
        importance: digest of the encodings' importance vectors, for the manifest.
        workload: what a device's memory was budgeted for, as in `AllocationRecord`.

    Raises:
        TargetError: if the container's runtime cannot express the allocation.
        VerifyError: if `folder` holds something else, the disk is too small, or gives back other
            bytes than it was given.
        CheckpointError: if the checkpoint changed since it was opened.
    """
    layout = encodings.layout
    allocation.check(layout)
    if container == "gguf" and allocation.target != "gguf":
        raise TargetError(
            f"an allocation for target {allocation.target!r} cannot be written as gguf: llama.cpp "
            'stores other tensors (and one expert count); search with target = "gguf"'
        )
    target = target_named(container)
    size = allocation.nbytes(layout, target)
    _check_place(folder, allocation, container, size.file)
    source, options = EncodedTensors(encodings, allocation), ""
    with _whole_directory(folder) as place:
        if container == "gguf":
            write_gguf(place / FILE["gguf"], layout, allocation, source)
            (place / "tensor-types.txt").write_text(tensor_type_file(layout, allocation))
            if options := llama_cpp_options(layout, allocation, workload or {}):
                (place / "llama-cpp-options.txt").write_text(options + "\n")
        else:
            _write_safetensors(place / FILE["safetensors"], layout, allocation, source)
            _write_config(place, layout, allocation)
        (place / "allocation.json").write_text(json.dumps(allocation.to_json(), indent=1) + "\n")
        manifest = Manifest(
            container=container,
            allocation=allocation.digest,
            checkpoint=layout.inventory.digest,
            importance=importance,
            file=FILE[container],
            file_bytes=(place / FILE[container]).stat().st_size,
            tensor_bytes=size.tensors,
            overhead_bytes=size.overhead,
            sha256={name: file_digest(place / name) for name in files_in(place)},
        )
        if manifest.file_bytes != size.file:
            raise VerifyError(f"wrote {manifest.file_bytes} bytes, predicted {size.file}")
        _check_written(place / manifest.file, folder, allocation, target, source)
        layout.inventory.check_unchanged()
        (place / MANIFEST).write_bytes(seal(manifest))
    return Written(folder, manifest, options)


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_place(folder: Path, allocation: Allocation, container: str, nbytes: int) -> None:
    if not folder.parent.is_dir():
        raise VerifyError(f"{folder.parent}: no such directory; make it first")
    if folder.exists() and not _holds(folder, allocation, container):
        raise VerifyError(f"{folder}: holds something else; choose another directory or remove it")
    free = shutil.disk_usage(folder.parent).free
    if free < nbytes * 1.01 + (16 << 20):
        raise VerifyError(
            f"{folder.parent}: {free:,} bytes free, needed {nbytes:,}; free some disk"
        )


def _holds(folder: Path, allocation: Allocation, container: str) -> bool:
    """Whether `folder` is empty, or this allocation in this container and nothing besides."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    if not (folder / MANIFEST).is_file():
        return False
    manifest = Manifest.read(folder)
    same = (manifest.allocation, manifest.container) == (allocation.digest, container)
    return same and set(files_in(folder)) <= {*manifest.sha256, MANIFEST}


def files_in(folder: Path) -> list[str]:
    """Names every file of a directory and of those in it, from there."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@contextmanager
def _whole_directory(folder: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `folder` when the body succeeds."""
    place = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = place.with_suffix(".old")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
        if folder.exists():  # moved aside first: a kill leaves no half of it under the name
            folder.rename(old)
        place.rename(folder)
    finally:
        for leftover in (place, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_safetensors(
    path: Path, layout: Layout, allocation: Allocation, source: EncodedTensors
) -> None:
    rows = entries(layout, retained=allocation.retained_experts, formats=allocation.format_of)
    with open(path, "wb") as file:
        file.write(header(rows))
        for name in layout.groups:
            for part in range(len(allocation.parts(layout, name))):
                file.write(np.ascontiguousarray(source.encoded(name, part)).data)
        for kept in layout.full_precision:
            file.write(source.full_precision_raw(kept).data)
        file.flush()
        os.fsync(file.fileno())


def _check_written(
    path: Path, folder: Path, allocation: Allocation, target: Target, source: EncodedTensors
) -> None:
    """Raises:
    VerifyError: if an encoded tensor comes back other than the encodings gave it.
    """
    whole, layout = np.memmap(path, np.uint8, "r"), source.layout
    start = allocation.nbytes(layout, target).header
    for name in layout.groups:  # in the order that both writers have
        for part in range(len(allocation.parts(layout, name))):
            nbytes = prod(source.shape(name, part))
            if not source.matches(name, part, whole[start : start + nbytes]):
                raise VerifyError(
                    f"{folder}: {name} comes back from the disk other than it was written; memory "
                    "or disk is faulty: materialize it elsewhere"
                )
            start += target.padded(nbytes)


def _write_config(place: Path, layout: Layout, allocation: Allocation) -> None:
    """config.json with the allocation, and what a runtime needs beside it."""
    inventory = layout.inventory
    config: dict[str, Any] = dict(inventory.config)
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "allocation": allocation.to_json(),
    }
    (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in carried_files(inventory.path):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(inventory.path / name, place / name)
    if (made := _converted_tokenizer(inventory)) is not None:
        (place / "tokenizer.json").write_text(made, encoding="utf-8")


def _converted_tokenizer(inventory: Inventory) -> str | None:
    """The tokenizer.json that the checkpoint lacks, if its other files can be converted."""
    try:
        found = read_tokenizer(inventory)
    except CheckpointError:  # then the checkpoint's own files are all there is
        return None
    return None if found is None or not found.converted else found.text
