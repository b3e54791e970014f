"""sha256 of parts of large files, computed once per file instead of once per process.

In: files, what of them is digested, and how. Out: the digest. Invariant: what is remembered belongs
to a path, inode, size and times of change; a file that changed has none, and of a file that changed
within the last seconds, which could change again without its time telling, none is kept.

One JSON per file, written whole at most once a second, so that a kill costs a second's work. Best
effort: where nothing can be written, or what was written is damaged, digests are computed again.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

from allocator.checked import read_checked, write_checked

_SAVE_SECONDS = 1.0
_FORM = 2  # of these files; those without a checksum had none in their names
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system (FAT) ticks every two seconds


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

    def of(self, files: Sequence[Path], part: str, compute: Callable[[], str]) -> str:
        """The digest of a part of some files.

        Args:
            files: all that it depends on.
            part: names it among the parts of the first file: what is digested, and from where.
            compute: reads them.
        """
        now = _identities(files)
        if now is None:
            return compute()
        first, *others = now
        if others:
            part = " ".join((part, "and", *others))
        if first not in self._known:
            self._known[first] = self._load(first)
        found = self._known[first].get(part)
        if found is None:
            found = compute()
            if _identities(files) != now:  # changed while it was read
                return found
            self._known[first][part] = found
            self._unsaved.add(first)
            if time.monotonic() - self._saved > _SAVE_SECONDS:
                self.save()
        return found

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


def _identities(files: Sequence[Path]) -> list[str] | None:
    """Names files as they are now; None if one is not there or has just changed."""
    found = []
    for file in dict.fromkeys(files):
        try:
            stat = file.stat()
        except OSError:
            return None
        if time.time_ns() - stat.st_mtime_ns < _SETTLED_NS:
            return None
        found.append(
            f"{_resolved(file)}: {stat.st_size} bytes, inode {stat.st_ino}, "
            f"modified {stat.st_mtime_ns}, changed {stat.st_ctime_ns}"
        )
    return found


@cache
def _resolved(file: Path) -> str:
    return os.path.realpath(file)
