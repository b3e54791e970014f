"""The table of families in the docs is that of the registry."""

from pathlib import Path

from allocator.families import families

PAGE = Path(__file__).parents[2] / "docs/families.md"


def rows():
    yield "| `model_type` | models | | GGUF | device | from GGUF |"
    yield "|---|---|---|---|---|---|"
    known = (family.gguf for family in families())
    sources = {f"`{gguf.architecture}`" for gguf in known if gguf and gguf.source}
    for family in families():
        gguf = f"`{family.gguf.architecture}`" if family.gguf else f"no: {family.no_gguf}"
        device = "yes" if family.gguf and family.gguf.graph else "no"
        source = "yes" if gguf in sources else "no"
        named = f"| `{family.model_type}` | {family.models} | {family.support} "
        yield f"{named}| {gguf} | {device} | {source} |"


def test_the_table_is_that_of_the_registry():
    assert "\n\n" + "\n".join(rows()) + "\n\n" in PAGE.read_text()
