"""Where a study's trials live, and who may write there.

In: a storage spec and a study folder. Out: an Optuna storage that kill -9 leaves readable, and a
lock that says whether a search lives. Invariants: no byte of a journal is dropped without a copy
beside it; a record is never glued to a torn one.

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
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from allocator.errors import StudyError

_PROXY = "grpc://"
_MOST_PORT = 65535
_ANSWER_SECONDS = 20.0  # until a proxy must have answered
_RECORD_START = b'{"op_code":'  # every record that Optuna writes starts so
_BLOCK_BYTES = 1 << 16
_POLL_SECONDS = 0.02
_BUSY_SECONDS = 60.0  # how long a writer waits for others of a sqlite file
_START_SECONDS = 30.0  # how long a starter waits for another one to finish its repairs

_log = logging.getLogger(__name__)


def journal_path(spec: str | None, study_dir: Path) -> Path | None:
    """The absolute path of the journal that `spec` names; None when it names a database.

    Raises:
        StudyError: if `spec` is neither None, `journal:PATH`, a database URL nor a proxy's.
    """
    if spec is None:
        return (study_dir / "journal").absolute()
    if spec.startswith("journal:") and spec != "journal:":
        return Path(spec.removeprefix("journal:")).absolute()
    if "://" in spec:
        return None
    raise StudyError(
        f"storage: got {spec!r}, needed journal:PATH or a database URL such as sqlite:///trials.db "
        "(grpc://HOST:PORT of a proxy); leave it out to keep the trials in the study's own folder"
    )


def open_storage(spec: str | None, study_dir: Path) -> BaseStorage:
    """The Optuna storage of `spec`, created if it is not there yet.

    Args:
        spec: None for `study_dir/journal`, `journal:PATH`, a database URL (`sqlite:///...`), or
            `grpc://HOST:PORT` of a running `optuna.storages.run_grpc_proxy_server`.
        study_dir: the study's folder.

    Raises:
        StudyError: if the spec is unknown, its folder is missing, the journal is damaged before
            its last line, or the database cannot be reached.
    """
    path = journal_path(spec, study_dir)
    if path is not None:
        return _open_journal(path)
    assert spec is not None
    return _open_proxy(spec) if spec.startswith(_PROXY) else _open_database(spec)


def repair_storage(spec: str | None, study_dir: Path) -> list[str]:
    """Mends what a killed search left behind in the folder's own journal; returns lines to show.

    Call it only where nobody else writes, i.e. under `SearchLock.exclusive_start`: it removes
    Optuna's lock file, whoever holds it. Nothing is done for what others may share: a database
    mends itself, `journal:PATH` is mended by the next append.

    Raises:
        StudyError: as `repair_journal` and `journal_path`.
    """
    path = journal_path(spec, study_dir)
    if path is None or spec is not None:
        return []
    lines = (remove_stale_lock(path), repair_journal(path))
    return [line for line in lines if line is not None]


def remove_stale_lock(path: Path) -> str | None:
    """Removes Optuna's lock file of the journal `path`; returns one line to show, None if absent.

    Raises:
        StudyError: if it cannot be removed.
    """
    lock = path.with_name(f"{path.name}.lock")
    with _accessing(path):
        for leftover in path.parent.glob(
            f"{escape(path.name)}.lock*.rename"
        ):  # killed while releasing
            leftover.unlink(missing_ok=True)
        if not os.path.lexists(lock):
            return None
        lock.unlink(missing_ok=True)
    return f"{lock}: removed the lock of a search that was killed while it wrote"


# --- the journal ------------------------------------------------------------------------------


def repair_journal(path: Path) -> str | None:
    """Makes the journal end in a whole record; returns one line to show, or None if it did.

    A last line that is not a record is cut off, and kept beside the journal in `<name>.torn-<n>`,
    which is on the disk before the journal is touched. A whole record that lacks only its newline
    is completed: an object without its closing brace never parses, so nothing of it is missing,
    and it may be a finished trial. Costs the same for any length of journal: only the last line
    is parsed, and the line before it when the last is torn.

    Raises:
        StudyError: if the line before a torn one is no record either, the file is no journal, or
            it cannot be read or written.
    """
    with _accessing(path):
        if not path.exists() or not (end := path.stat().st_size):
            return None
        with path.open("r+b") as file:
            start = _line_start(file, end)
            tail = _read(file, start, end)
            if not _is_record(tail):
                _check_is_torn(file, path, start, tail)
                return _cut(file, path, start, tail)
            if tail.endswith(b"\n"):
                return None
            _write_at(file, end, b"\n")
    return f"{path}: the last record lacked its newline (a search was killed); completed it"


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


class _RepairingLock(JournalFileSymlinkLock):
    """Optuna's journal lock; whoever takes it finds a journal that ends in a whole record.

    Covers what no start can repair: a search killed, or a disk filled, beside a living one. Ours
    hold a flock of the journal too, which ends with its process: so a link of ours that is there
    when the flock was had is a dead one's, and goes at once. (Optuna's way, every waiter breaking
    the link after 30 s, lets two of them write.) Ours are told by how they spell their target.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._lock_target_file = f"{path.parent}/./{path.name}"
        self._flock: int | None = None

    def acquire(self) -> bool:
        with _accessing(self._path):
            flock = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(flock, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.readlink(self._lock_file) == self._lock_target_file:
                        os.unlink(self._lock_file)
                super().acquire()  # calls `release` where it breaks a link
            except BaseException:
                os.close(flock)
                raise
        self._flock = flock
        try:
            shown = repair_journal(self._path)
        except BaseException:
            self.release()
            raise
        if shown is not None:
            _log.warning(shown)
        return True

    def release(self) -> None:
        flock, self._flock = self._flock, None
        try:
            super().release()
        finally:
            if flock is not None:
                os.close(flock)


def _open_journal(path: Path) -> BaseStorage:
    if not path.parent.is_dir():
        raise StudyError(f"{path}: needed an existing folder, {path.parent} is none; create it")
    with _accessing(path):
        backend = JournalFileBackend(str(path), lock_obj=_RepairingLock(path))
        try:
            return JournalStorage(backend)
        except OSError:
            raise
        except Exception as error:  # a replay fails in whatever way a damaged record makes it
            raise _damaged(path, f"{type(error).__name__}: {_first_line(error)}") from error


def _damaged(path: Path, why: str) -> StudyError:
    line = _first_bad_line(path)
    where = "a record that Optuna cannot replay" if line is None else f"line {line} is no record"
    return StudyError(
        f"{path}: {where} ({why}); restore the file from a copy, or take that line out by hand "
        "(later trials may then be numbered differently)"
    )


def _first_bad_line(path: Path) -> int | None:
    """Number, from 1, of the first whole line that is no record."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and not _is_record(line):
                return number
    return None


@contextmanager
def _accessing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyError(
            f"{path}: {error.strerror or error}; needed a folder and files that can be read and "
            "written, with room on the disk"
        ) from error


# --- databases --------------------------------------------------------------------------------


def _open_database(url: str) -> BaseStorage:
    """Heartbeats stay off: Optuna sends them only inside `study.optimize`, which we do not use.

    Connections are tried before they are used: hours may pass between two trials.
    """
    engine: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        engine["connect_args"] = {"timeout": _BUSY_SECONDS}
    try:
        storage = RDBStorage(url, engine)
        if url.startswith("sqlite"):
            _begin_immediately(storage)
        return storage
    except Exception as error:  # SQLAlchemy's, the driver's, Optuna's and ImportError
        shown = _without_password(url)
        why = _first_line(error).replace(url, shown)
        raise StudyError(
            f"storage {shown}: {why}; needed a database that can be reached, its driver "
            "installed, and for sqlite a file in an existing folder; or leave the storage out"
        ) from error


def _open_proxy(spec: str) -> BaseStorage:
    """Optuna's proxy, once it answers."""
    host, _, port = spec.removeprefix(_PROXY).rstrip("/").rpartition(":")
    if not host or not re.fullmatch("[0-9]+", port) or int(port) > _MOST_PORT:
        raise StudyError(f"storage {spec}: needed grpc://HOST:PORT, e.g. grpc://server:13000")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = GrpcStorageProxy(host=host, port=int(port))
        storage.wait_server_ready(timeout=_ANSWER_SECONDS)
    except ImportError as error:
        raise StudyError(f"storage {spec}: {error}; pip install '.[grpc]'") from None
    except ConnectionError as error:
        raise StudyError(
            f"storage {spec}: {error}; needed a machine where Optuna's run_grpc_proxy_server runs"
        ) from None
    return storage


def _lost() -> tuple[type[Exception], ...]:
    """What storages raise where their database, or proxy, is gone."""
    grpc = sys.modules.get("grpc")
    return (StorageInternalError,) if grpc is None else (StorageInternalError, grpc.RpcError)


def _begin_immediately(storage: RDBStorage) -> None:
    """Takes sqlite's write lock as a transaction begins.

    Optuna reads a trial's state before it sets it, and sqlite has no row locks: else two workers
    could both close a trial.
    """
    from sqlalchemy import event

    storage.engine.dispose()

    @event.listens_for(storage.engine, "connect")
    def _leave_it_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(storage.engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def reaching(spec: str | None) -> Iterator[None]:
    """Says in one line that the database of `spec` was lost within the block.

    Raises:
        StudyError: if it was.
    """
    try:
        yield
    except _lost() as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if details := getattr(cause, "details", None):  # gRPC's
            cause = StudyError(str(details()))
        raise StudyError(
            f"storage {_without_password(spec or '')}: {_first_line(cause)}; finished trials are "
            "kept: run the same command when the database can be reached"
        ) from error


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- who searches -----------------------------------------------------------------------------


@dataclass
class SearchLock:
    """A living search's hold on its study folder.

    Attributes:
        exclusive_start: True when no other search lives. Until `ready()` none can start: this is
            the time to repair. False for a search that joined one: it must not repair.
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
) -> Iterator[SearchLock]:
    """Holds `study_dir` for a search, until the block ends or the process dies, kill -9 included.

        with search_lock(study_dir, join=join) as lock:
            if lock.exclusive_start:
                repair_storage(spec, study_dir)
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
    they have `allocator.leases`.
    A child made by a bare fork holds it too; a child that execs does not.

    Args:
        study_dir: the study's folder.
        join: work beside a living search; makes no difference when none lives.
        way_out: what to tell who is refused.

    Raises:
        StudyError: if a search lives and `join` is False, if another one takes more than 30 s to
            start, or if the folder cannot be locked.
    """
    startup = _open_lock(study_dir / "search.start")
    alive: int | None = None
    lock = SearchLock(exclusive_start=False, _startup=startup)
    try:
        _wait_for_startup(startup, study_dir)
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
    with _accessing(path):
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


def _wait_for_startup(startup: int, study_dir: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _take(startup, fcntl.LOCK_EX, study_dir):
        if time.monotonic() > deadline:
            raise StudyError(
                f"{study_dir}: another search has been starting for {_START_SECONDS:g} s; "
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
    lines = os.pread(alive, _BLOCK_BYTES, 0).decode(errors="replace").splitlines()
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
