"""References of TOML files in Markdown, as `docs/` has them.

In: a struct as of `allocator.files.keys`. Out: Markdown, a table of keys per table of the file.
Invariant: every key is there, with its description, valid values and default.
"""

import msgspec

from allocator.files.keys import Key, keys_of, tables_of


def reference(kind: type[msgspec.Struct]) -> str:
    """Returns the reference of a file.

    Args:
        kind: struct of the file.
    """
    parts = []
    for header, table in tables_of(kind):
        title = f"## `{header}`" if header else "## Keys above the first table"
        about = " ".join((table.__doc__ or "").split())
        rows = [_row(key) for key in keys_of(table).values()]
        head = ["| key | meaning | needed | default |", "|---|---|---|---|"]
        parts.append("\n".join([title, "", about, "", *head, *rows]))
    return "\n\n".join(parts) + "\n"


def _row(key: Key) -> str:
    needed = "a table, see below" if key.table is not None else key.needed
    cells = (f"`{key.name}`", key.about.text, needed, key.default or "**required**")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
