"""Where a study is: the check that a command makes before it loads anything else.

In: a path. Out: the same path. Invariant: this module loads nothing but Python's own modules.
"""

from pathlib import Path

from allocator.errors import StudyError
from allocator.files.outputs import check_output_folder

STUDY_FILE = "study.toml"
"""The file that says what a study asks."""


def study_path(folder: str | Path) -> Path:
    """Returns the path of a study folder.

    Raises:
        StudyError: if there is no such folder, or it is a model.
    """
    path = Path(folder)
    is_study = (path / STUDY_FILE).exists()
    if path.match("*.gguf") or ((path / "config.json").exists() and not is_study):
        raise StudyError(
            f"{folder}: a model, needed a study folder; `allocator init {folder}` makes one"
        )
    if path.name == STUDY_FILE and path.is_file():
        raise StudyError(f"{folder}: a file; name its folder, {path.parent}")
    if not path.is_dir():
        raise StudyError(
            f"{folder}: no such study folder; needed one with a {STUDY_FILE}, which `allocator "
            f"init MODEL --out {folder}` writes"
        )
    return path


def check_new(folder: Path) -> None:
    """Raises:
    StudyError: if there is a study already, which is never overwritten, or a model.
    OutputError: if none can be made.
    """
    path = folder / STUDY_FILE
    if path.exists():
        raise StudyError(
            f"{path}: exists already, and is not overwritten; edit it, launch it with `allocator "
            f"search {folder}`, or name another folder with --out"
        )
    if (folder / "config.json").exists():
        raise StudyError(f"{folder}: a model; name another folder for its study with --out")
    check_output_folder("--out", folder)
