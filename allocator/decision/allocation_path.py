"""Where an allocation file is: the refusal of a path that is no file.

In: a path. Out: the error. Invariant: this module loads nothing but Python's own modules.
"""

from pathlib import Path

from allocator.errors import SpaceError


def no_file(path: Path, way_out: str = "") -> SpaceError:
    """Returns the error on a path that is no file: in a folder, it names the file that was meant.

    Args:
        path: of an allocation, as it was given.
        way_out: ends the line where nothing is there.
    """
    if not path.is_dir():
        return SpaceError(f"{path}: no such allocation file{way_out}")
    inside = (path / name for name in ("allocation.json", "allocations/pick.json"))
    meant = next((file for file in inside if file.is_file()), "STUDY/allocations/pick.json")
    return SpaceError(f"{path}: a folder, needed an allocation file, such as {meant}")
