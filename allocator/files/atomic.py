"""Files that appear whole or not at all, typed TOML, and locks between processes of a machine."""

import fcntl
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from allocator.errors import StudyError, reason

T = TypeVar("T")


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes `data` under a temporary name beside `path`, to the disk, then renames it.

    Safe with several processes and threads writing the same path; the folder is made if missing.
    """
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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, a file that stays; waits for whoever holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_toml(path: Path, kind: type[T], error: type[Exception]) -> T:
    """Reads a TOML file as a typed value.

    Raises:
        error: one line with the file, and the place in the file.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), kind, strict=False)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError, msgspec.ValidationError) as why:
        raise error(f"{path}: {reason(why)}") from None


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
