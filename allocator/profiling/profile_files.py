"""The files of one profile: read whole, or measured again.

In: a folder that is named by the digest of a profile's inputs. Out: what each stage measured.
Invariants: every file carries a checksum of its content and of the inputs that it belongs to; a
damaged one is logged in one line and measured again; of several processes one builds a stage, and
the others wait. A kill costs at most the line being measured.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from allocator.errors import CalibrationError
from allocator.files.atomic import locked, write_whole
from allocator.files.checksums import log_damage, read_checked, seal_line, unseal, write_checked

_FORM = 2
"""Of the files in the folder; those of another form are in folders of their own."""

T = TypeVar("T")


class Lines:
    """A JSON-lines file that rows are appended to.

    Rows that cannot be used are dropped when the file is opened, and logged in one line.

    Args:
        path: of the file.
        of: digest of the inputs that its rows belong to.
        wanted: whether an undamaged row can be used.

    Attributes:
        rows: the usable rows, in order.
        n_dropped: rows that were damaged or not wanted, a torn last one not counted.
    """

    def __init__(
        self, path: Path, of: str = "", wanted: Callable[[dict[str, Any]], bool] = lambda row: True
    ) -> None:
        self.path, self._of = path, f"{path.name} {of}"
        self.rows: list[dict[str, Any]] = []
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        lines, usable = whole.split(b"\n") if whole else [], []
        unusable: list[tuple[int, Exception]] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = unseal(line, self._of, required=True)
                if not wanted(row):
                    raise ValueError("no finite number for anything that is asked for")
            except (ValueError, RecursionError) as error:
                unusable.append((number, error))
            else:
                usable.append(line)
                self.rows.append(row)
        self.n_dropped = len(unusable)
        if unusable:
            number, why = unusable[0]
            more = f", and {len(unusable) - 1} more" if unusable[1:] else ""
            log_damage(path.with_name(f"{path.name}, line {number}{more}"), why)
        if path.exists():
            write_whole(path, b"".join(line + b"\n" for line in usable))

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row, to the file first."""
        with open(self.path, "ab") as file:
            file.write(seal_line(row, self._of) + b"\n")
        self.rows.append(row)

    def sync(self) -> None:
        """Waits until the disk has all rows."""
        with open(self.path, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def profile_folder(cache: Path, digest: str) -> Path:
    """Returns where the files of a profile are, or would be.

    Args:
        cache: that holds it.
        digest: of the profile's inputs.
    """
    return cache / "profiles" / f"{digest[:32]}-{_FORM}"


class ProfileFolder:
    """The folder of one profile.

    Args:
        cache: the cache that it is in; made if missing.
        digest: of the profile's inputs.

    Attributes:
        path: the folder.
        digest: what its files belong to.
    """

    def __init__(self, cache: Path, digest: str) -> None:
        self.path = profile_folder(cache, digest)
        self.digest = digest
        self.path.mkdir(parents=True, exist_ok=True)
        self._building = False

    def read(self, name: str, kind: type[T], *, quiet: bool = False) -> T | None:
        """Reads a JSON file; returns None if it is missing or damaged.

        Args:
            name: of the file.
            kind: what it holds.
            quiet: logs no line on a damaged one.
        """
        return read_checked(self.path / name, kind, self.digest, quiet=quiet)

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file, whole or not at all."""
        write_checked(self.path / name, value, self.digest)

    def lines(
        self, name: str, wanted: Callable[[dict[str, Any]], bool] = lambda row: True
    ) -> Lines:
        """Opens a JSON-lines file, see `Lines`."""
        return Lines(self.path / name, self.digest, wanted)

    def read_or_build(self, name: str, kind: type[T], build: Callable[[], T]) -> T:
        """Reads a stage's JSON file, or writes what `build` returns, see `stage`."""
        return self.stage(
            name,
            lambda quiet: self.read(name, kind, quiet=quiet),
            lambda: self.write(name, build()),
        )

    def stage(self, name: str, read: Callable[[bool], T | None], build: Callable[[], None]) -> T:
        """Reads what a stage measured; of several processes one builds what is missing or damaged.

        Args:
            name: of the stage's last file.
            read: reads the stage's files, given whether to be quiet; returns None where `build` is
                needed.
            build: writes the files.

        Raises:
            CalibrationError: if the files cannot be read once they are written.
        """
        if not self._building and (measured := read(True)) is not None:
            return measured
        with self._alone():
            if (measured := read(False)) is None:
                build()
                measured = read(False)
        if measured is None:
            raise CalibrationError(
                f"{self.path / name}: does not come back as it was written; needed finite values, "
                "and a disk that keeps what it is given"
            )
        return measured

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock of those who build, once: a stage may need another one."""
        if self._building:
            yield
            return
        with locked(self.path / "building"):
            self._building = True
            try:
                yield
            finally:
                self._building = False

    def scratch(self, stage: str) -> Path:
        """Makes the folder where a stage checkpoints its layers; a kill costs at most one."""
        folder = self.path / stage
        folder.mkdir(exist_ok=True)
        return folder

    def remove_scratch(self, stage: str) -> None:
        """Removes the checkpoints of a finished stage, if there are any."""
        shutil.rmtree(self.path / stage, ignore_errors=True)
