"""Data files that ship with the package: search spaces and device presets, found by name.

In: what a user wrote, a path or a name. Out: a path. Invariant: a file that exists where the user
says is the one that is read; a name has no folder and no ending.
"""

import os
from pathlib import Path

from allocator.errors import SpaceError

_PACKAGE = Path(__file__).resolve().parents[1]
SEARCH_SPACES = "search_spaces"
DEVICES = "search_spaces/devices"


def shipped_folder(name: str) -> Path:
    """Returns a folder of data: inside an installed package, beside it in a clone.

    Args:
        name: `search_spaces`, `search_spaces/devices` or `notebooks`.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def schema_file(name: str) -> Path:
    """Returns the path of a JSON schema, `study`, `search-space` or `device`."""
    return _PACKAGE / "data" / f"{name}.schema.json"


def shipped_names(kind: str) -> list[str]:
    """Returns the names of the shipped files of a kind, `SEARCH_SPACES` or `DEVICES`."""
    return sorted(file.stem for file in shipped_folder(kind).glob("*.toml"))


def named_file(text: str, *, kind: str, relative_to: Path) -> Path:
    """Returns the TOML file that a text means: a path, or the name of a shipped file.

    Args:
        text: e.g. `space.toml`, `/a/space.toml` or `careful`.
        kind: folder of the shipped ones, `SEARCH_SPACES` or `DEVICES`.
        relative_to: folder that paths are relative to; it need not exist yet.

    Raises:
        SpaceError: if it is neither.
    """
    path = Path(os.path.realpath(relative_to / text))
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(shipped_folder(kind).glob("*.toml"))}
    if text in shipped:
        return shipped[text]
    raise SpaceError(f"{path}: no such file; needed one, or a name of {', '.join(shipped)}")
