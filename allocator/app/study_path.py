"""Where a study is: the check that a command makes before it loads anything else.

In: a path. Out: the same path. Invariant: this module loads nothing but Python's own modules.
"""

from pathlib import Path

from allocator.errors import StudyError

STUDY_FILE = "study.toml"
"""The file that says what a study asks."""


def study_path(folder: str | Path) -> Path:
    """Returns the path of a study folder.

    Raises:
        StudyError: if there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise StudyError(f"{folder}: no such study folder; needed one with a study.toml")
    return path
