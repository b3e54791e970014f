"""The folder that caches profiles and encoded weights between studies, with a limit on its size.

In: environment variables, or a path that the caller names. Out: a folder, and a limit in bytes.
Invariant: the cache only saves time; a study computes the same without it.
"""

import os
import stat
from pathlib import Path

from allocator.errors import AllocatorError, StudyError
from allocator.units import parse_bytes

_FOLDER = "ALLOCATOR_CACHE"
_ENCODINGS_CAP = "ALLOCATOR_BANK_CAP"  # named when encodings were called a bank


def default_cache() -> Path:
    """Returns `$ALLOCATOR_CACHE`, else `~/.cache/moe-allocator`."""
    return Path(os.environ.get(_FOLDER) or Path.home() / ".cache" / "moe-allocator")


def check_cache(path: Path) -> None:
    """Refuses a path that can be no folder: every file in it would be reported as damaged.

    Raises:
        StudyError: if the path is a file, or cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: {error}; needed a folder for the cache") from None
    if not stat.S_ISDIR(mode):
        raise StudyError(f"{path}: no folder; needed one for the cache")


def encodings_cap() -> int | None:
    """Reads the bytes that encoded weights may occupy from `$ALLOCATOR_BANK_CAP`.

    Returns:
        None where the variable is not set.

    Raises:
        AllocatorError: if its value is no size.
    """
    text = os.environ.get(_ENCODINGS_CAP)
    try:
        return parse_bytes(text) if text else None
    except AllocatorError as error:
        raise AllocatorError(f"${_ENCODINGS_CAP}: {error}") from None
