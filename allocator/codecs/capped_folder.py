"""A folder of cache files that may be removed at any time, within a cap of disk.

In: which files are used, and how many bytes were written. Out: a folder that occupies at most the
cap where that is possible. Invariant: a file that was used since the last `release` is not removed.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path

from allocator.errors import AllocatorError

WAY_OUT = "free some disk, cap what encoded weights take ($ALLOCATOR_BANK_CAP), or move the cache"
_SPARE_BYTES = 16 << 20  # of disk that are left free
_LOOKS = 16  # the folder is listed again when this share of the cap has been written


class CappedFolder:
    """Removes the files used longest ago while the folder occupies more than its cap.

    Args:
        path: of the folder; made if missing.
        cap_bytes: of disk; None for no cap.
        removable: suffixes of the files that may be removed.
    """

    def __init__(self, path: Path, cap_bytes: int | None, *, removable: tuple[str, ...]) -> None:
        self.path = path
        self._cap = inf if cap_bytes is None else cap_bytes
        self._removable = removable
        self._occupied = inf  # when the folder was last listed; never yet
        self._written = 0  # since then
        self._warned = False
        self._in_use: set[str] = set()
        path.mkdir(parents=True, exist_ok=True)

    def use(self, handle: int, path: str) -> None:
        """Notes that an open file is used: by its time, for all processes."""
        if path not in self._in_use:
            self._in_use.add(path)
            with suppress(OSError):  # somebody else's file, or a disk that is only read
                os.utime(handle)

    def check_free(self, handle: int, nbytes: int) -> None:
        """Checks that the disk has room for what is about to be written.

        Raises:
            AllocatorError: if it has not.
        """
        stat = os.fstatvfs(handle)
        free, needed = stat.f_bavail * stat.f_frsize, nbytes + _SPARE_BYTES
        if free < needed:
            raise AllocatorError(f"{self.path}: {free:,} bytes free, needed {needed:,}; {WAY_OUT}")

    def release(self) -> None:
        """Lets the files used so far be removed."""
        self._in_use.clear()
        self.wrote(0)

    def wrote(self, nbytes: int) -> None:
        """Counts what was written; removes files where that is too much."""
        self._written += nbytes
        within = self._occupied + self._written <= self._cap
        if self._cap == inf or (within and self._written < self._cap / _LOOKS):
            return
        files = sorted(_occupied(self.path))
        occupied = sum(size for _, _, size in files)
        for _, path, size in files:
            if occupied > self._cap and path.endswith(self._removable) and path not in self._in_use:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                occupied -= size
        if occupied > self._cap and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                "%s: what is in use needs %s bytes, more than the cap of %s; raise it",
                self.path, f"{occupied:,}", f"{self._cap:,}",
            )  # fmt: skip
        self._occupied, self._written = occupied, 0


def _occupied(folder: Path) -> Iterator[tuple[int, str, int]]:
    """Yields when a file was used last, its path, and the bytes of disk it occupies."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                yield stat.st_mtime_ns, entry.path, stat.st_blocks * 512
