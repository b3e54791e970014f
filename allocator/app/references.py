"""The files that are made from the descriptions of keys: JSON schemas and references.

In: the repository's folder. Out: its `allocator/data/*.schema.json`, and the parts between
`<!-- keys: NAME -->` and `<!-- end -->` of `docs/*.md`. Invariant: a test holds them equal to what
is made here; `python -m allocator.app.references` in the repository writes them.
"""

import json
import re
from pathlib import Path

import msgspec

from allocator.app.device_presets import DevicePreset
from allocator.app.study_file import StudySpec
from allocator.decision.search_space import SearchSpace
from allocator.files.toml_reference import reference
from allocator.files.toml_schema import json_schema

KINDS: dict[str, type[msgspec.Struct]] = {
    "study": StudySpec,
    "search-space": SearchSpace,
    "device": DevicePreset,
}
"""Structs of the TOML files that people write, by the name of their JSON schema."""
TITLES = {"study": "study.toml", "search-space": "A search space", "device": "A device preset"}
_PARTS = re.compile(r"(?<=<!-- keys: )([a-z-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def made_files(root: Path) -> dict[Path, str]:
    """Returns the texts of the files, by path.

    Args:
        root: of the repository, whose documents have the parts that are written by hand.
    """
    schemas = {
        root / f"allocator/data/{name}.schema.json": json.dumps(
            json_schema(kind, title=TITLES[name]), indent=1, ensure_ascii=False
        )
        + "\n"
        for name, kind in KINDS.items()
    }
    documents = {
        path: _PARTS.sub(lambda m: f"{m[1]}{m[2]}\n{reference(KINDS[m[1]])}\n", path.read_text())
        for path in (root / "docs/study-toml.md", root / "docs/search-spaces.md")
    }
    return schemas | documents


def write_files(root: Path) -> None:
    """Writes the files into the repository."""
    for path, text in made_files(root).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    write_files(Path.cwd())
