"""The table of families in the docs is that of the registry."""

from pathlib import Path

from allocator.families import families

PAGE = Path(__file__).parents[2] / "docs/families.md"


def rows():
    yield "| `model_type` | models | | GGUF | device |"
    yield "|---|---|---|---|---|"
    for family in families():
        gguf = f"`{family.gguf.architecture}`" if family.gguf else f"no: {family.no_gguf}"
        device = "yes" if family.gguf and family.gguf.graph else "no"
        yield (
            f"| `{family.model_type}` | {family.models} | {family.support} | {gguf} | {device} |"
        )


def test_the_table_is_that_of_the_registry():
    assert "\n\n" + "\n".join(rows()) + "\n\n" in PAGE.read_text()
