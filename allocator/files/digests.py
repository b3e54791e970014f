"""sha256 of parts of large files, computed once per file instead of once per process.

In: files as they were opened, what of them is digested, and how. Out: the digest. Invariant: what
is remembered belongs to a path and an `Identity`; a file that changed has none, and of a file that
changed within the last seconds, which could change again without its time telling, none is kept.

One JSON per file, written whole at most once a second, so that a kill costs a second's work. Best
effort: where nothing can be written, or what was written is damaged, digests are computed again.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from allocator.files.checksums import read_checked, write_checked

_SAVE_SECONDS = 1.0
_FORM = 2  # of these files; those without a checksum had none in their names
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system (FAT) ticks every two seconds


class Identity(NamedTuple):
    """What tells a file from its replacement, and from itself after a change.

    Attributes:
        size: bytes.
        inode: another one where a file was renamed into its place.
        modified_ns: when its bytes changed; may be set by hand.
        changed_ns: when its inode changed: bytes, name, owner or times.
    """

    size: int
    inode: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Identity":
        """Identifies a file by what the file system says of the file."""
        return cls(stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


class _Record(msgspec.Struct):
    file: str
    digests: dict[str, str]


class Digests:
    """Digests that are remembered in a folder.

    Args:
        folder: where; made when something is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, str]] = {}
        self._unsaved: set[str] = set()
        self._saved = time.monotonic()

    def of(self, files: Mapping[Path, Identity], part: str, compute: Callable[[], str]) -> str:
        """Returns the digest of a part of some files; computes an unknown one.

        Args:
            files: all files that the digest depends on, as they were opened.
            part: names the part among those of the first file: what is digested, and from where.
            compute: reads the files; raises if one is another file by then.
        """
        latest = max(identity.modified_ns for identity in files.values())
        if time.time_ns() - latest < _SETTLED_NS:
            return compute()
        first, *others = (_name(file, identity) for file, identity in files.items())
        if others:
            part = " ".join((part, "and", *others))
        if first not in self._known:
            self._known[first] = self._load(first)
        digest = self._known[first].get(part)
        if digest is None:
            digest = compute()
            self._known[first][part] = digest
            self._unsaved.add(first)
            if time.monotonic() - self._saved > _SAVE_SECONDS:
                self.save()
        return digest

    def save(self) -> None:
        """Writes what is not yet on disk, beside what other processes found meanwhile."""
        for identity in self._unsaved:
            record = _Record(identity, self._load(identity) | self._known[identity])
            with suppress(OSError):
                write_checked(self._path(identity), record)
        self._unsaved.clear()
        self._saved = time.monotonic()

    def _path(self, identity: str) -> Path:
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-{_FORM}.json"

    def _load(self, identity: str) -> dict[str, str]:
        record = read_checked(self._path(identity), _Record)
        return record.digests if record is not None and record.file == identity else {}


def _name(file: Path, identity: Identity) -> str:
    return (
        f"{_resolved(file)}: {identity.size} bytes, inode {identity.inode}, "
        f"modified {identity.modified_ns}, changed {identity.changed_ns}"
    )


@cache
def _resolved(file: Path) -> str:
    return os.path.realpath(file)
