"""The report of a study: reads what is on disk, writes one HTML file.

In: a study folder. Out: an HTML file, whole or not at all. Invariant: the study is not changed.
"""

from pathlib import Path
from typing import Unpack

from allocator.app.resources import StudyOptions
from allocator.files.atomic import write_whole
from allocator.files.outputs import check_output_file
from allocator.reporting.facts import read_facts
from allocator.reporting.page import page

NAME = "report.html"


def report(
    study: str | Path,
    *,
    out: str | Path | None = None,
    allocation: str | Path | None = None,
    storage: str | None = None,
    **options: Unpack[StudyOptions],
) -> Path:
    """Writes a page of what a study found, that can be read without this package.

    Nothing is measured. What is missing is left out, with the command that measures it.

    Args:
        study: its folder.
        out: HTML file to write; `report.html` in the folder by default.
        allocation: record to report; `allocations/pick.json` by default.
        storage: as of `search`.
        options: as of `StudyOptions`.

    Returns:
        The path of the file.

    Raises:
        AllocatorError: if there is nothing to report yet, or a file is damaged.
    """
    path = Path(study) / NAME if out is None else Path(out)
    check_output_file("--out", path)
    facts = read_facts(study, allocation=allocation, storage=storage, **options)
    write_whole(path, page(facts).encode())
    return path
