"""Where a study's trials live: journals, databases, and Optuna's proxy.

In: a storage spec and a study folder. Out: an Optuna storage that kill -9 leaves readable, and one
line where its database is lost.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage

from allocator.errors import StudyError, first_line
from allocator.study.journal import mend_journal, open_journal, remove_stale_lock

_PROXY = "grpc://"
_MOST_PORT = 65535
ANSWER_SECONDS = 20.0
"""How long a proxy may take to answer."""
_BUSY_SECONDS = 60.0  # how long a writer waits for others of a sqlite file


def journal_path(spec: str | None, study_dir: Path) -> Path | None:
    """Returns the absolute path of the journal that `spec` names; None if it names a database.

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


def check_storage(spec: str | None, study_dir: Path) -> None:
    """Checks the form of a storage and the folder of a journal; opens and writes nothing.

    Raises:
        StudyError: if `open_storage` would refuse the spec as it stands.
    """
    path = journal_path(spec, study_dir)
    if path is not None and not path.parent.is_dir():
        raise StudyError(f"{path}: needed an existing folder, {path.parent} is none; create it")
    if spec is not None and spec.startswith(_PROXY):
        _proxy_address(spec)


def open_storage(
    spec: str | None, study_dir: Path, *, answer_seconds: float = ANSWER_SECONDS
) -> BaseStorage:
    """Opens the Optuna storage of `spec`; creates it if it is not there yet.

    Args:
        spec: None for `study_dir/journal`, `journal:PATH`, a database URL (`sqlite:///...`), or
            `grpc://HOST:PORT` of a running `optuna.storages.run_grpc_proxy_server`.
        study_dir: the study's folder.
        answer_seconds: how long a proxy may take to answer.

    Raises:
        StudyError: if the spec is unknown, its folder is missing, the journal is damaged before
            its last line, or the database cannot be reached.
    """
    path = journal_path(spec, study_dir)
    if path is not None:
        return open_journal(path)
    assert spec is not None
    if spec.startswith(_PROXY):
        return _open_proxy(spec, answer_seconds)
    return _open_database(spec)


def mend_storage(spec: str | None, study_dir: Path) -> list[str]:
    """Mends what a killed search left behind in the folder's own journal; returns lines to show.

    Call it only where nobody else writes, i.e. under `SearchLock.exclusive_start`: it removes
    Optuna's lock file, whoever made it. Storages that others may share are left alone: a database
    mends itself, `journal:PATH` is mended by the next append.

    Raises:
        StudyError: as `mend_journal` and `journal_path`.
    """
    path = journal_path(spec, study_dir)
    if path is None or spec is not None:
        return []
    lines = (remove_stale_lock(path), mend_journal(path))
    return [line for line in lines if line is not None]


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
        why = first_line(error).replace(url, shown)
        raise StudyError(
            f"storage {shown}: {why}; needed a database that can be reached, its driver "
            "installed, and for sqlite a file in an existing folder; or leave the storage out"
        ) from error


def _open_proxy(spec: str, answer_seconds: float) -> BaseStorage:
    """Optuna's proxy, once it answers."""
    host, port = _proxy_address(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = GrpcStorageProxy(host=host, port=port)
        storage.wait_server_ready(timeout=answer_seconds)
    except ImportError as error:
        raise StudyError(f"storage {spec}: {error}; pip install '.[grpc]'") from None
    except ConnectionError as error:
        raise StudyError(
            f"storage {spec}: {error}; needed a machine where Optuna's run_grpc_proxy_server runs"
        ) from None
    return storage


def _proxy_address(spec: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = spec.removeprefix(_PROXY).rstrip("/").rpartition(":")
    if not host or not re.fullmatch("[0-9]+", port) or int(port) > _MOST_PORT:
        raise StudyError(f"storage {spec}: needed grpc://HOST:PORT, e.g. grpc://server:13000")
    return host, int(port)


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
    """Turns the loss of a database within the block into one line.

    Raises:
        StudyError: if the database of `spec` was lost.
    """
    try:
        yield
    except _lost() as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if details := getattr(cause, "details", None):  # gRPC's
            cause = StudyError(str(details()))
        raise StudyError(
            f"storage {_without_password(spec or '')}: {first_line(cause)}; finished trials are "
            "kept: run the same command when the database can be reached"
        ) from error


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)
