"""Whether an output can be written, found out before it is computed.

In: the option that names the output, and its path. Out: nothing, or a refusal in the option's
words. Invariant: what is made to find out is removed again.
"""

import os
import tempfile
from pathlib import Path

from allocator.errors import OutputError


def check_output_file(option: str, path: Path) -> None:
    """Refuses a file that cannot be written whole, in the place of one that is there.

    Args:
        option: that names the file, for the message.
        path: of the file; folders above it are made with it.

    Raises:
        OutputError: if so.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{option} {path}: no regular file; name another file")
    _check_makes(option, path, path.parent)


def check_output_folder(option: str, path: Path, *, whole: bool = False) -> None:
    """Refuses a folder in which nothing can be made, and one that cannot be made itself.

    Args:
        option: that names the folder, for the message.
        path: of the folder; those above it are made with it.
        whole: the folder appears whole, in the place of one that is there.

    Raises:
        OutputError: if so.
    """
    _check_makes(option, path, path.parent if whole else path)


def _check_makes(option: str, path: Path, folder: Path) -> None:
    place, missing = folder.absolute(), path.name
    while not os.path.lexists(place):
        place, missing = place.parent, place.name
    if not place.is_dir():
        raise OutputError(f"{option} {path}: {place} is no folder; name another place")
    try:  # permissions say nothing to root, nor of /proc, nor of a disk that can only be read
        os.rmdir(tempfile.mkdtemp(".part", f".{missing}.", place))
    except OSError as error:
        raise OutputError(
            f"{option} {path}: nothing can be made in {place} ({error.strerror}); name another "
            "place"
        ) from None
