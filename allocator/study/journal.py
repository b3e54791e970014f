"""Optuna's journal, such that kill -9 leaves it readable.

In: its path. Out: an Optuna storage whose every append mends the tail first. Invariants: no byte of
a journal is dropped without a copy in the same folder; a record is never glued to a torn one; a
record of ours that changed since it was written is never replayed.

Every record that is appended here carries its `checksum` (see `checked`), one more key that Optuna
reads past: stock Optuna opens our journals, and appends to them. A record without one is taken if
it holds nothing but keys that Optuna writes, as journals of earlier versions and of stock tools do:
what has changed within those cannot be seen. Databases are left to their own integrity checks:
sqlite's and PostgreSQL's pages, and whatever transaction log they have.

How Optuna 5 appends (`optuna/storages/journal/_file.py`): one `write` of `record + newline`, then
fsync, under a lock that is a symbolic link `<journal>.lock`. Three things follow.

- A process killed in that write, or a full disk, leaves a last line that is not whole. Optuna
  reads past it, but the next append glues on and the journal is unreadable for ever. So every
  append of `open_storage`'s journal first repairs the tail, under Optuna's own lock.
- Only the last record can be torn: the ones before it have been fsynced. Damage in the middle is
  no kill of ours, and is an error.
- The link of a killed process stays. Optuna breaks it after 30 s if the link's target is an
  absolute path, and spins for ever if it is relative. So paths are made absolute here, and links
  of ours do not outlive their process by more than the next append.
"""

import fcntl
import json
import logging
import os
from collections.abc import Generator
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO
from weakref import finalize

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from allocator.errors import StudyError, first_line
from allocator.files.atomic import accessing
from allocator.files.checksums import CHECKSUM, checksum
from allocator.study.optuna_private import JournalLink

GRACE_SECONDS = 30
"""Age at which Optuna's lock of a journal counts as left by a dead process."""
_RECORD_START = b'{"op_code":'  # every record that Optuna writes starts so
_BLOCK_BYTES = 1 << 16
# of all records of Optuna 4 and 5, see optuna/storages/journal/_storage.py
_STOCK_KEYS = [
    "op_code",
    "worker_id",
    "study_id",
    "study_name",
    "directions",
    "user_attr",
    "system_attr",
    "trial_id",
    "datetime_start",
    "datetime_complete",
    "state",
    "value",
    "values",
    "distributions",
    "params",
    "user_attrs",
    "system_attrs",
    "intermediate_values",
    "param_name",
    "param_value_internal",
    "distribution",
    "step",
    "intermediate_value",
]

_log = logging.getLogger(__name__)


def remove_stale_lock(path: Path) -> str | None:
    """Removes Optuna's lock file of the journal `path`; returns one line to show, None if absent.

    Raises:
        StudyError: if it cannot be removed.
    """
    lock = path.with_name(f"{path.name}.lock")
    with accessing(path):
        for leftover in path.parent.glob(
            f"{escape(path.name)}.lock*.rename"
        ):  # killed while releasing
            leftover.unlink(missing_ok=True)
        if not os.path.lexists(lock):
            return None
        lock.unlink(missing_ok=True)
    return f"{lock}: removed the lock of a search that was killed while it wrote"


def mend_journal(path: Path) -> str | None:
    """Makes the journal end in a whole record; returns one line to show, or None if it did.

    A last line that is not a record is cut off and copied to `<name>.torn-<n>`, which is on the
    disk before the journal is touched. A whole record that lacks only its newline
    is completed: an object without its closing brace never parses, so nothing of it is missing,
    and it may be a finished trial. Costs the same for any length of journal: only the last line
    is parsed, and the line before it when the last is torn.

    Raises:
        StudyError: if the line before a torn one is no record either, the file is no journal, or
            it cannot be read or written.
    """
    with accessing(path), suppress(FileNotFoundError):
        with path.open("r+b") as file:
            if not (end := path.stat().st_size):
                return None
            start = _line_start(file, end)
            tail = _read(file, start, end)
            if not _is_record(tail):
                _check_is_torn(file, path, start, tail)
                return _cut(file, path, start, tail)
            if tail.endswith(b"\n"):
                return None
            _write_at(file, end, b"\n")
        return f"{path}: the last record lacked its newline (a search was killed); completed it"
    return None


def _line_start(file: BinaryIO, end: int) -> int:
    """Offset of the line whose last byte, newline or not, is at `end - 1`."""
    high = end - 1
    while high > 0:
        low = max(0, high - _BLOCK_BYTES)
        newline = _read(file, low, high).rfind(b"\n")
        if newline >= 0:
            return low + newline + 1
        high = low
    return 0


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _write_at(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return False
    return isinstance(record, dict) and "op_code" in record


def _check_is_torn(file: BinaryIO, path: Path, start: int, tail: bytes) -> None:
    """Refuses to cut what one torn append cannot explain: a foreign file, or older damage."""
    if start:
        if not _is_record(_read(file, _line_start(file, start), start)):
            raise _damaged(path, "more than its last line is no record")
    elif not (tail.startswith(_RECORD_START) or _RECORD_START.startswith(tail)):
        raise StudyError(
            f"{path}: not an Optuna journal (it starts with {tail[:16]!r}); "
            "name another file with journal:PATH"
        )


def _cut(file: BinaryIO, path: Path, start: int, tail: bytes) -> str:
    kept = _keep(path, tail)
    file.truncate(start)
    os.fsync(file.fileno())
    return f"{path}: cut a torn last record of {len(tail)} bytes (kept in {kept.name})"


def _keep(path: Path, tail: bytes) -> Path:
    """Writes `tail` to the next free `<name>.torn-<n>`, whole and on the disk upon return."""
    n = 1
    while (kept := path.with_name(f"{path.name}.torn-{n}")).exists():
        n += 1
    partial = path.with_name(f"{path.name}.torn-partial")
    with partial.open("wb") as file:
        _write_at(file, 0, tail)
    partial.rename(kept)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return kept


class _MendingLock(JournalLink):
    """Optuna's journal lock; whoever takes it finds a journal that ends in a whole record.

    So a search that is killed, or a disk that fills, while another search lives does no harm. A
    process of ours takes a flock of the journal, too, which ends with the process: a link of ours
    that exists once the flock was taken is that of a dead process, and is removed at once.
    (Optuna's way, every waiter breaking the link after 30 s, lets two of them write.) Links of ours
    are recognized by the spelling of their target.
    """

    def __init__(self, path: Path, *, grace_seconds: int) -> None:
        super().__init__(path, grace_seconds=grace_seconds)
        self._path = path
        self._flock: int | None = None
        # both stay open, so that no other file can have their inodes
        self._link: int | None = None  # while the lock is held
        self._file: int | None = None

    def check_file(self) -> None:
        """Raises:
        StudyError: if the journal is not the file that it was, as when it is deleted or restored.
        """
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY)
                finalize(self, os.close, self._file)
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            same = self._file is None  # not made yet
        if not same:
            raise _removed(self._path)

    def acquire(self) -> bool:
        with accessing(self._path):
            self.check_file()
            flock = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(flock, fcntl.LOCK_EX)
                self.check_file()
                with suppress(FileNotFoundError):
                    if self.is_ours:
                        os.unlink(self.link)
                super().acquire()  # calls `release` where it breaks a link
                with suppress(FileNotFoundError):
                    self._link = os.open(self.link, os.O_PATH | os.O_NOFOLLOW)
            except BaseException:
                os.close(flock)
                raise
        self._flock = flock
        try:
            shown = mend_journal(self._path)
        except BaseException:
            self.release()
            raise
        if shown is not None:
            _log.warning(shown)
        return True

    def release(self) -> None:
        """Removes the link and ends the flock.

        A link that somebody removed or broke meanwhile is no error: the flock held all the time,
        and stock Optuna's append is one write at the end of the file too. Another's link stays.
        """
        flock, self._flock = self._flock, None
        link, self._link = self._link, None
        try:
            if flock is None or self._is_there(link):
                super().release()
        except (FileNotFoundError, RuntimeError):
            if flock is None:  # Optuna's `acquire` tells a broken link by it
                raise
        finally:
            for handle in (flock, link):
                if handle is not None:
                    os.close(handle)

    def _is_there(self, link: int | None) -> bool:
        return link is not None and os.path.samestat(os.lstat(self.link), os.fstat(link))


class _CheckedFile(JournalFileBackend):
    """Optuna's journal file, with a checksum in every record."""

    def __init__(self, path: Path, *, grace_seconds: int) -> None:
        self._journal_lock = _MendingLock(path, grace_seconds=grace_seconds)
        super().__init__(str(path), lock_obj=self._journal_lock)
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        plain = [json.loads(json.dumps(log)) for log in logs]
        super().append_logs([{**log, CHECKSUM: checksum(log)} for log in plain])

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Raises:
        StudyError: at a record that is none, or is not as it was written; if the journal is gone.
        """
        self._journal_lock.check_file()
        try:
            for log in super().read_logs(log_number_from):
                _check_record(log)
                yield log
        except FileNotFoundError:  # since it was checked
            raise _removed(self._path) from None
        except (ValueError, RecursionError) as error:
            raise _damaged(self._path, first_line(error)) from None


def _check_record(record: Any) -> None:
    """Raises:
    ValueError: if it is not as it was written, or holds what nobody writes.
    """
    if not isinstance(record, dict) or "op_code" not in record:
        raise ValueError("no record")
    known = record.pop(CHECKSUM, None)
    if known is None:
        if unknown := set(record).difference(_STOCK_KEYS):
            raise ValueError(f"no {CHECKSUM}, and an unknown key {min(unknown)[:40]!r}")
    elif known != checksum(record):
        raise ValueError(f"its {CHECKSUM} is not that of its content")


def open_journal(path: Path, *, grace_seconds: int = GRACE_SECONDS) -> BaseStorage:
    """Opens the storage in a journal; creates it if it is not there yet.

    Args:
        path: of the journal.
        grace_seconds: a lock of stock Optuna that is older counts as left by a dead process.

    Raises:
        StudyError: if its folder is missing, or it is damaged before its last line.
    """
    if not path.parent.is_dir():
        raise StudyError(f"{path}: needed an existing folder, {path.parent} is none; create it")
    with accessing(path):
        backend = _CheckedFile(path, grace_seconds=grace_seconds)
        try:
            return JournalStorage(backend)
        except (OSError, StudyError):
            raise
        except Exception as error:  # a replay fails in whatever way a damaged record makes it
            raise _damaged(path, f"{type(error).__name__}: {first_line(error)}") from error


def _removed(path: Path) -> StudyError:
    return StudyError(
        f"{path}: removed or replaced while a search was using it; stop all searches of this "
        "study, put the file in its place, and run the same command again"
    )


def _damaged(path: Path, why: str) -> StudyError:
    line = _first_bad_line(path)
    where = "a record that Optuna cannot replay" if line is None else f"line {line} is no record"
    return StudyError(
        f"{path}: {where} ({why}); restore the file from a copy, or take that line out by hand "
        "(later trials may then be numbered differently)"
    )


def _first_bad_line(path: Path) -> int | None:
    """Number, from 1, of the first whole line that is no record, or not as it was written."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.endswith(b"\n"):
                    _check_record(json.loads(line))
            except (ValueError, RecursionError):
                return number
    return None
