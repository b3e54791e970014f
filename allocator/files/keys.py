"""Keys of the TOML files that people write: the facts that messages and references are made of.

In: a frozen msgspec struct whose fields are `Annotated[type, About(...)]`. Out: its tables and
their keys, each with its description, valid values and default. Invariant: error texts, templates,
references and JSON schemas read these facts and have none of their own.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from allocator.files.shipped import shipped_names


@dataclass(frozen=True, slots=True)
class About:
    """What people should know of a key, and what its type does not say of its values.

    Attributes:
        text: the description, in sentences.
        example: a value to show where there is none.
        default: what takes the place of a missing value, where the field's own default is None.
        least: the smallest number.
        above: below all numbers, itself none of them.
        most: the largest number.
        names: the valid names; of lists, for each element; of tables, for each key.
        size: whether it is a number of bytes, or a text such as `12GiB`.
        path: whether it names a file or folder, relative to the TOML file.
        shipped: the folder of shipped files that may be named instead of a path.
        filled: whether an empty list or table is refused.
        rising: whether the numbers of a list must rise.
    """

    text: str
    example: Any = None
    default: str = ""
    least: int | None = None
    above: int | None = None
    most: int | None = None
    names: Callable[[], Iterable[str]] | None = None
    size: bool = False
    path: bool = False
    shipped: str = ""
    filled: bool = False
    rising: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a table.

    Attributes:
        name: in the file.
        kind: the type of its values, without None and `Annotated`.
        about: its facts.
        field_default: the field's default; `msgspec.NODEFAULT` where the key is required.
    """

    name: str
    kind: Any
    about: About
    field_default: Any

    @property
    def is_required(self) -> bool:
        """Whether a file without the key is refused."""
        return self.field_default is msgspec.NODEFAULT

    @property
    def table(self) -> type[msgspec.Struct] | None:
        """The struct of a table, or of a list of tables; None for other values."""
        kind = self.elements if self.is_list else self.kind
        is_table = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        return kind if is_table else None

    @property
    def is_list(self) -> bool:
        """Whether its value is a list, of values or of tables."""
        return get_origin(self.kind) in (list, tuple)

    @property
    def elements(self) -> Any:
        """The type of the elements of a list, or of the values of a table with free keys."""
        return get_args(self.kind)[-1 if get_origin(self.kind) is dict else 0]

    @property
    def needed(self) -> str:
        """The valid values in words, e.g. `a whole number from 1 to 256`."""
        return needed(self.kind, self.about)

    @property
    def default(self) -> str:
        """What takes the place of a missing value, as text; empty for required keys."""
        if self.is_required or self.about.default:
            return self.about.default
        if self.field_default is None or self.table is not None:
            return "none"
        return toml_value(self.field_default) if self.field_default != "" else "none"

    @property
    def example(self) -> Any:
        """A value to show: the field's default, else the example."""
        if self.about.example is not None or self.is_required:
            return self.about.example
        return self.field_default


def keys_of(table: type[msgspec.Struct]) -> dict[str, Key]:
    """Returns the keys of a table by name: plain values first, as a file must have them."""
    hints = get_type_hints(table, include_extras=True)
    defaults = {
        f.name: f.default if f.default_factory is msgspec.NODEFAULT else f.default_factory()
        for f in msgspec.structs.fields(table)
    }
    keys = [Key(name, *_parted(hints[name]), default) for name, default in defaults.items()]
    return {key.name: key for key in sorted(keys, key=lambda key: key.table is not None)}


def _parted(hint: Any) -> tuple[Any, About]:
    """The type of a field without None, and its facts."""
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{hint}: needed Annotated[type, About(...)]")
    kind, about = get_args(hint)
    return without_none(kind), about


def without_none(kind: Any) -> Any:
    """Returns a type without the None of `type | None`."""
    if get_origin(kind) in (Union, UnionType):
        rest = tuple(k for k in get_args(kind) if k is not NoneType)
        return rest[0] if len(rest) == 1 else Union[rest]  # noqa: UP007
    return kind


def tables_of(
    root: type[msgspec.Struct], name: str = ""
) -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """Lists the tables of a file with their headers, `[a.b]` or `[[a.b]]`, depth first.

    Args:
        root: the struct of the file.
        name: of the table that `root` is, e.g. `budget`.
    """
    yield (f"[{name}]" if name else ""), root
    for key in keys_of(root).values():
        if (table := key.table) is None:
            continue
        full = f"{name}.{key.name}" if name else key.name
        (header, _), *deeper = tables_of(table, full)
        yield (f"[{header}]" if key.is_list else header), table
        yield from deeper


def list_of(kind: Any) -> Any:
    """Returns the list or tuple type among the choices of a type; None if there is none."""
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return next((k for k in choices if get_origin(k) in (list, tuple)), None)


def needed(kind: Any, about: About) -> str:
    """Returns the valid values of a type in words."""
    origin = get_origin(kind)
    if origin in (list, tuple):
        some = "one or more of" if about.filled else "any number of"
        rising = ", rising, each once" if about.rising else ""
        return f"a list of {some}: {needed(get_args(kind)[0], about)}{rising}"
    if origin is dict:
        key, value = get_args(kind)
        named = _one_of(about.names()) if about.names else "a whole number" if key is int else "any"
        free = About(about.text, least=about.least)
        return f"a table, each key {named}, each value {needed(value, free)}"
    if (several := list_of(kind)) is not None and not about.path:
        one = next(k for k in get_args(kind) if k is not several)
        return f"{needed(one, about)}, or a list of those"
    if about.size:
        above = "" if about.least == 0 else " above 0"
        return f'a size{above} such as "12GiB" or "1.5GB", or a number of bytes'
    if about.names is not None:
        return _one_of(about.names())
    if origin is Literal:
        return _one_of(get_args(kind))
    if kind in (int, float):
        return _number("a whole number" if kind is int else "a number", about)
    if about.path:
        several = ", or a list of paths" if list_of(kind) else ""
        names = ", ".join(map(toml_value, shipped_names(about.shipped))) if about.shipped else ""
        return f"a path relative to this file{several}" + (names and f", or a name: {names}")
    return {bool: "true or false", str: "a text in quotes"}.get(kind, "a table")


def _number(what: str, about: About) -> str:
    if about.least is not None and about.least == about.most:
        return str(about.least)
    if about.least is not None and about.most is not None:
        return f"{what} from {about.least:,} to {about.most:,}"
    limits = [
        *([f"{about.least:,} or more"] if about.least is not None else ()),
        *([f"above {about.above:,}"] if about.above is not None else ()),
        *([f"up to {about.most:,}"] if about.most is not None else ()),
    ]
    return f"{what}, {' and '.join(limits)}" if limits else what


def _one_of(names: Iterable[str]) -> str:
    listed = [f'"{name}"' for name in names]
    return listed[0] if len(listed) == 1 else f"one of {', '.join(listed)}"


def toml_value(value: Any) -> str:
    """Returns a value as TOML has it in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{_toml_key(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return str(value)


def _toml_key(key: str | int) -> str:
    text = str(key)
    plain = text.isascii() and text.replace("-", "_").replace("_", "a").isalnum()
    return text if plain else toml_value(text)


def toml_line(key: Key) -> str:
    """Returns a line that gives a key a valid value, with the other names in a comment."""
    value = key.example
    line = f"{key.name} = {toml_value(value)}"
    others = [] if key.about.names is None else [n for n in key.about.names() if n != value]
    if others and isinstance(value, str):
        line += f" # or {', '.join(map(toml_value, others))}"
    return line
