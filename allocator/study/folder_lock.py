"""A lock that tells which searches of a study folder run on this machine.

In: the folder. Out: a lock that says whether another search lives, and so whether what a dead one
left may be mended. Invariant: the lock ends with its process, kill -9 included.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from allocator.errors import StudyError
from allocator.files.atomic import accessing
from allocator.files.progress import waiting

_POLL_SECONDS = 0.02
START_SECONDS = 30.0
"""How long a search that starts waits for another one to finish its repairs."""
_MOST_SIGNED = 1 << 16  # bytes of the list of searches


@dataclass
class SearchLock:
    """The lock of a living search on its study folder.

    Attributes:
        exclusive_start: True when no other search lives. Until `ready()` none can start: this is
            the time to mend. False for a search that joined one, which must not mend.
    """

    exclusive_start: bool
    _startup: int | None

    def ready(self) -> None:
        """Ends the start: from here on others may join. May be called again."""
        if self._startup is not None:
            _release(self._startup)
            self._startup = None


@contextmanager
def search_lock(
    study_dir: Path,
    *,
    join: bool = False,
    way_out: str = "add --join to work beside it, or stop it first",
    start_seconds: float = START_SECONDS,
) -> Iterator[SearchLock]:
    """Locks `study_dir` for a search, until the block ends or the process dies, kill -9 included.

        with search_lock(study_dir, join=join) as lock:
            if lock.exclusive_start:
                mend_storage(spec, study_dir)
            storage = open_storage(spec, study_dir)
            ...                # close the trials that a killed search left RUNNING
            lock.ready()       # others may join from here on
            ...                # search

    Two files, because a flock cannot be turned from exclusive to shared in one step:
    `search.start` is held exclusively while a search starts; `search.lock` is held shared by
    every search that lives, and is only ever touched by the holder of `search.start`, who finds
    out with a try for exclusive whether anybody lives. The files are never removed (a waiter
    would hold a lock on a file that is gone).

    The lock speaks for this machine and this folder only: searches on other machines that share
    a database, and study folders that name the same `journal:PATH`, do not see each other here;
    they have `allocator.study.leases`.
    A child made by a bare fork holds it too; a child that execs does not.

    Args:
        study_dir: the study's folder.
        join: works beside a living search; makes no difference when none lives.
        way_out: what to tell who is refused.
        start_seconds: how long to wait for another search that is starting.

    Raises:
        StudyError: if a search lives and `join` is False, if another one takes longer than
            `start_seconds` to start, or if the folder cannot be locked.
    """
    startup = _open_lock(study_dir / "search.start")
    alive: int | None = None
    lock = SearchLock(exclusive_start=False, _startup=startup)
    try:
        _wait_for_startup(startup, study_dir, start_seconds)
        alive = _open_lock(study_dir / "search.lock")
        lock.exclusive_start = _take(alive, fcntl.LOCK_EX, study_dir)
        if not lock.exclusive_start and not join:
            raise StudyError(f"{study_dir} is being searched by {_searchers(alive)}; {way_out}")
        _take(alive, fcntl.LOCK_SH, study_dir)
        _sign(alive, first=lock.exclusive_start)
        if not lock.exclusive_start:
            lock.ready()
        yield lock
    finally:
        if alive is not None:
            _release(alive)
        lock.ready()


def _open_lock(path: Path) -> int:
    with accessing(path):
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _take(fd: int, kind: int, study_dir: Path) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StudyError(
            f"{study_dir}: cannot be locked ({error.strerror}); needed a file system with flock; "
            "move the study to a local disk"
        ) from error
    return True


def _wait_for_startup(startup: int, study_dir: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with waiting("waiting for another search that starts"):
        while not _take(startup, fcntl.LOCK_EX, study_dir):
            if time.monotonic() > deadline:
                raise StudyError(
                    f"{study_dir}: another search has been starting for {seconds:g} s; "
                    "wait for it, or stop it"
                )
            time.sleep(_POLL_SECONDS)


def _release(fd: int) -> None:
    """Unlocks before it closes, so that a forked child's copy of `fd` holds nothing."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _sign(alive: int, *, first: bool) -> None:
    """Adds this process to the list in `search.lock`, which is for error messages only."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    with suppress(OSError):  # a full disk
        if first:
            os.ftruncate(alive, 0)
        os.lseek(alive, 0, os.SEEK_END)
        os.write(alive, f"{os.getpid()} {socket.gethostname()} {since}\n".encode())


def _searchers(alive: int) -> str:
    lines = os.pread(alive, _MOST_SIGNED, 0).decode(errors="replace").splitlines()
    signed = [tuple(line.split()) for line in lines if len(line.split()) == 3]
    living = [f"pid {pid} since {since}" for pid, host, since in signed if _lives(pid, host)]
    return " and ".join(living) or "another process"


def _lives(pid: str, host: str) -> bool:
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    with suppress(PermissionError):  # it lives, and is another user's
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True
