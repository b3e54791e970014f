"""Files that appear whole or not at all, and locks between processes of a machine."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allocator.errors import StudyError
from allocator.files.progress import waiting


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` under a temporary name beside `path`, to the disk, then renames it.

    Safe with several processes and threads writing the same path; the folder is made if missing.

    Raises:
        OSError: if it cannot be written; names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, a file that stays; waits for whoever holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with waiting(f"waiting for another process that has {path}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def accessing(path: Path) -> Iterator[None]:
    """Says in one line that a study's file cannot be used within the block.

    Raises:
        StudyError: if so.
    """
    try:
        yield
    except OSError as error:
        raise StudyError(
            f"{path}: {error.strerror or error}; needed a folder and files that can be read and "
            "written, with room on the disk"
        ) from error
