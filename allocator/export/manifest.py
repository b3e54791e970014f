"""`manifest.json`, the list of a written directory's files with sizes and digests.

In: a directory. Out: a `Manifest`. Invariant: one that names files outside of its directory, or a
file that its container does not have, is refused.
"""

import hashlib
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from allocator.errors import VerifyError, reason
from allocator.export.runtimes import RUNTIMES
from allocator.files.checksums import unseal
from allocator.files.progress import BYTES, step

MANIFEST = "manifest.json"
ALLOCATION = "allocation.json"
_CHUNK_BYTES = 16 << 20


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was written.

    Attributes:
        container: name of the target whose runtime reads it.
        allocation: digest of the allocation.
        checkpoint: digest of the source checkpoint.
        importance: digest of the importance vectors.
        file: name of the weights' file; of the index where they are in shards.
        file_bytes: its size, that of all shards included.
        tensor_bytes: bytes of tensor data.
        overhead_bytes: the rest of it.
        sha256: of every file, by name.
        schema: of this file.
        weights: `TensorSource.digest`; absent where allocation, importance and codec say it all.
        shard_bytes: the most bytes of tensors in a shard; absent where there is one file.
        one_file: sha256 of one file with the tensors of the shards.
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
    weights: str | UnsetType = UNSET
    shard_bytes: int | UnsetType = UNSET
    one_file: str | UnsetType = UNSET

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads the manifest of a checkpoint directory.

        Raises:
            VerifyError: if there is none, it is damaged, or it names files that no directory holds.
        """
        try:
            manifest = msgspec.convert(unseal((folder / MANIFEST).read_bytes()), cls)
            manifest._check()
        except (OSError, ValueError, RecursionError) as error:
            raise VerifyError(
                f"{folder}: no readable manifest.json ({reason(error)}); needed a directory "
                "written by `allocator materialize`: materialize it again"
            ) from None
        return manifest

    def _check(self) -> None:
        """Raises:
        ValueError: if a field says what no written directory has.
        """
        if self.schema != 1:
            raise ValueError(f"schema {self.schema}, needed 1")
        if self.container not in RUNTIMES:
            raise ValueError(f"container {self.container!r}, needed {' or '.join(RUNTIMES)}")
        runtime = RUNTIMES[self.container]
        names = (runtime.file_name, *runtime.earlier_names)
        if self.in_shards:
            names = (runtime.index_name,)
        if self.file not in names:
            raise ValueError(f"file {self.file!r}, needed {names[0]!r} beside it")
        for name in self.sha256:
            parts = name.split("/")
            if name == MANIFEST or {"", ".", ".."} & {*parts} or {"\\", "\0"} & {*name}:
                raise ValueError(f"sha256 of {name!r}, needed names of files beside it")
        for name in (self.file, ALLOCATION):
            if name not in self.sha256:
                raise ValueError(f"no sha256 of {name}")

    @property
    def sha256_of_weights(self) -> str:
        """The sha256 of the weights' file; of shards, that of one file with the same tensors."""
        return self.sha256[self.file] if isinstance(self.one_file, UnsetType) else self.one_file

    @property
    def in_shards(self) -> bool:
        """Whether the weights are in shards, and `file` is their index."""
        return self.shard_bytes is not UNSET

    @property
    def shown_sha256(self) -> str:
        """The sha256 of `file`, in words; of an index, that of one file instead, too."""
        if not self.in_shards:
            return f"sha256 {self.sha256_of_weights}"
        return (
            f"sha256 {self.sha256[self.file]} of the index (of each shard: {MANIFEST}), "
            f"{self.sha256_of_weights} of one file with the same tensors, which a record notes"
        )

    def size_of_weights(self, folder: Path) -> int:
        """Returns the bytes that the weights' file, or shards and index, have on the disk now.

        Raises:
            OSError: if one is missing.
        """
        names = {self.file}
        if self.in_shards:
            names |= {name for name in self.sha256 if Path(name).suffix == ".safetensors"}
        return sum((folder / name).stat().st_size for name in names)

    @property
    def weights_digest(self) -> str:
        """Names weights that the other digests do not determine; empty if they do."""
        return "" if isinstance(self.weights, UnsetType) else self.weights


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    total = hashlib.sha256()
    size = path.stat().st_size
    with (
        open(path, "rb") as file,
        step(f"hashing {path.name}", size, unit=BYTES, brief=True) as shown,
    ):
        while chunk := file.read(_CHUNK_BYTES):
            total.update(chunk)
            shown.update(len(chunk))
    return total.hexdigest()


def files_in(folder: Path) -> list[str]:
    """Lists every file of a directory and of those in it, relative to it, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
