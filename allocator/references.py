"""The files that are made from descriptions of keys and options: JSON schemas and references.

In: the repository's folder. Out: its `allocator/data/*.schema.json`, and the parts between
`<!-- made: NAME -->` and `<!-- end -->` of `docs/*.md`. Invariant: a test holds them equal to what
is made here; `python -m allocator.references` in the repository writes them.
"""

import json
import re
from pathlib import Path

import msgspec

from allocator.app.device_presets import DevicePreset
from allocator.app.study_file import StudySpec
from allocator.cli.parsers import help_texts
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
_DOCUMENTS = ("docs/study-toml.md", "docs/search-spaces.md", "docs/cli.md")
_PARTS = re.compile(r"(?<=<!-- made: )([a-z-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


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
        path: _PARTS.sub(lambda m: f"{m[1]}{m[2]}\n{_part(m[1])}\n", path.read_text())
        for path in (root / name for name in _DOCUMENTS)
    }
    return schemas | documents


def _part(name: str) -> str:
    if name != "cli":
        return reference(KINDS[name])
    helps = help_texts().items()
    return "\n".join(f"## {command}\n\n```text\n{text}```\n" for command, text in helps)


def write_files(root: Path) -> None:
    """Writes the files into the repository."""
    for path, text in made_files(root).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    write_files(Path.cwd())
