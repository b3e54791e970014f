"""A TOML file with every key of its grammar: the given values, all others commented out.

In: a struct as of `allocator.files.keys`. Out: text. Invariant: read again, the text is the struct;
a line without its leading `#` (and that of its table) is a valid one.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from allocator.errors import AllocatorError
from allocator.files.atomic import write_whole
from allocator.files.keys import Key, keys_of, toml_value
from allocator.files.shipped import schema_file
from allocator.files.toml_files import faults_of, without_nones

_WIDTH = 96
_LEGEND = (
    "Lines that begin with `#` and a key are not set: remove the `#` to set them, and that of the "
    "[table] above them."
)


def write_toml(
    path: Path, value: msgspec.Struct, error: type[AllocatorError], *, title: str, schema: str
) -> None:
    """Writes a value as a TOML file with every key of its grammar.

    Args:
        path: of the file.
        value: of the whole file.
        error: raised on wrong values.
        title: as of `template`.
        schema: name of the JSON schema that ships with the package.

    Raises:
        error: one line per fault.
    """
    data = without_nones(msgspec.to_builtins(value, str_keys=True))
    if faults := faults_of(data, type(value)):
        raise error("\n".join(f"{path}: {fault}" for fault in faults))
    text = template(value, title=title, schema=schema_file(schema).as_uri())
    write_whole(path, text.encode())


def template(value: msgspec.Struct, *, title: str, schema: str = "") -> str:
    """Returns the file of a value.

    Args:
        value: of the whole file.
        title: what the file is, in sentences.
        schema: the address of its JSON schema, for editors.
    """
    head = [f"#:schema {schema}"] if schema else []
    lines = [*head, *_comment(f"{title} {_LEGEND}"), *_keys(type(value), value, "")]
    return "\n".join(lines) + "\n"


def _keys(kind: type[msgspec.Struct], value: Any, inside: str, *, explained: bool = True
) -> Iterator[str]:  # fmt: skip
    """Lines of a table's keys.

    Args:
        kind: of the table.
        value: of the table; None where it is commented out.
        inside: its name, e.g. `budget.device`.
        explained: whether keys have comments, and those without a value are there at all.
    """
    for key in keys_of(kind).values():
        given = None if value is None else getattr(value, key.name)
        if key.table is not None:
            yield from _tables(key, given, f"{inside}.{key.name}".lstrip("."))
        elif explained:
            yield from ("", *_explained(key), _line(key, given))
        elif not _is_unset(key, given):
            yield _line(key, given)


def _tables(key: Key, given: Any, name: str) -> Iterator[str]:
    assert key.table is not None
    values = (given or [None]) if key.is_list else [given]
    for i, value in enumerate(values):
        header = f"[[{name}]]" if key.is_list else f"[{name}]"
        about = _explained(key) if not i else ()
        yield from ("", *about, header if value is not None else f"#{header}")
        yield from _keys(key.table, value, name, explained=not i)


def _explained(key: Key) -> list[str]:
    about = key.about
    if key.table is not None:
        return _comment(about.text)
    default = f" Default: {key.default}." if key.default else " Required."
    return [*_comment(about.text), *_comment(f"{_capital(key.needed)}.{default}")]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH, break_on_hyphens=False)]


def _line(key: Key, given: Any) -> str:
    if _is_unset(key, given):
        return f"#{key.name} = {toml_value(key.example)}"
    return f"{key.name} = {toml_value(given)}"


def _is_unset(key: Key, given: Any) -> bool:
    """Whether a value need not be written: there is none, or it is the empty default."""
    return given is None or (given in ("", [], {}) and given == key.field_default)
