"""TOML files that people write, read as typed values; everything wrong with a file is told at once.

In: a path, and a struct as of `allocator.files.keys`. Out: the struct. Invariant: a file is taken
whole or refused with one line per fault, each with the file's path and the key.
"""

import math
import tomllib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from allocator.errors import AllocatorError, reason
from allocator.files.keys import (
    About,
    Key,
    keys_of,
    list_of,
    needed,
    tables_of,
    toml_line,
    toml_value,
)
from allocator.files.shipped import shipped_names
from allocator.units import parse_bytes

T = TypeVar("T", bound=msgspec.Struct)
_SHOWN = 60  # characters of a value


def read_toml(path: Path, kind: type[T], error: type[AllocatorError]) -> T:
    """Reads a TOML file as a typed value.

    Files that it names need not exist; those that do not are told where something else is wrong.

    Raises:
        error: one line per fault, with the file and the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError) as why:
        raise error(f"{path}: {reason(why)}") from None
    if faults := faults_of(data, kind):
        raise error(_listed(path, [*faults, *missing_files(data, kind, path.parent)]))
    return typed(data, kind)


def typed(data: dict[str, Any], kind: type[T]) -> T:
    """Returns the data of a file as a struct; it has no faults."""
    return msgspec.convert(data, kind, str_keys=True)


def without_nones(data: Any) -> Any:
    """Returns the data of a file without keys that have no value; TOML has no None."""
    if isinstance(data, dict):
        return {k: without_nones(v) for k, v in data.items() if v is not None}
    return [without_nones(v) for v in data] if isinstance(data, list | tuple) else data


def check_files(path: Path, value: msgspec.Struct, error: type[AllocatorError]) -> None:
    """Raises:
    error: one line per file that `value`, read from `path`, names and that does not exist.
    """
    data = without_nones(msgspec.to_builtins(value, str_keys=True))
    if faults := list(missing_files(data, type(value), path.parent)):
        raise error(_listed(path, faults))


def _listed(path: Path, faults: Iterable[str]) -> str:
    return "\n".join(f"{path}: {fault}" for fault in faults)


def faults_of(data: dict[str, Any], kind: type[msgspec.Struct]) -> list[str]:
    """Lists everything wrong with the data of a file, one line each: key, value, what is needed."""
    schema = data.get("schema")
    if type(schema) is int and schema != 1:
        return [f"schema {schema}, needed 1; use a newer allocator"]  # its keys are not these
    return list(_table_faults(data, kind, "", kind))


def _table_faults(
    data: dict[str, Any], kind: type[msgspec.Struct], where: str, root: type[msgspec.Struct]
) -> Iterator[str]:
    """Faults of a table.

    Args:
        data: the table's.
        kind: of the table.
        where: the header in front of a key's name, e.g. `[budget.device] `.
        root: the struct of the whole file.
    """
    keys = keys_of(kind)
    found, meant = [], set()
    for name in data:
        if name not in keys:
            close = get_close_matches(name, keys.keys() - data.keys(), n=1)
            meant.update(close)
            way_out = f"did you mean {close[0]}?" if close else _place(name, keys, root)
            found.append(f"{where}{_named(name)}: unknown key; {way_out}")
    for name, key in keys.items():
        if name in data:
            found += _value_faults(data[name], key, where, root)
        elif key.is_required and name not in meant:
            found.append(f"{where}{name}: missing; {_to_add(key, where)}")
    if not found:
        found += [
            f"{where}{one} and {other}: needed one of the two; remove the other"
            for one, other in getattr(kind, "exclusive", ())
            if one in data and other in data
        ]
    if not found and hasattr(kind, "faults"):
        found += [f"{where}{fault}" for fault in typed(data, kind).faults()]
    yield from found


def _named(name: str) -> str:
    return name if name.isprintable() and len(name) <= _SHOWN else toml_value(name[:_SHOWN])


def _place(name: str, keys: dict[str, Key], root: type[msgspec.Struct]) -> str:
    for header, table in tables_of(root):
        if name in keys_of(table):
            return f"it belongs {f'under {header}' if header else 'above the first [table]'}"
    return f"known: {', '.join(keys)}"


def _to_add(key: Key, where: str) -> str:
    under = f" under {where.strip()}" if where else " above the first [table]"
    if key.table is None:
        return f"add{under} the line: {toml_line(key)}"
    lines = [toml_line(k) for k in keys_of(key.table).values() if k.is_required]
    return f"add the table [{key.name}]" + (f" with the line: {', '.join(lines)}" if lines else "")


def _value_faults(value: Any, key: Key, where: str, root: type[msgspec.Struct]) -> Iterator[str]:
    inside = _inside(where, key.name)
    if (table := key.table) is None:
        yield from _plain_faults(value, key.kind, key.about, f"{where}{key.name} =")
    elif key.is_list:
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            yield f"{where}{key.name}: needed tables, each under a header [[{inside}]]"
            return
        for i, element in enumerate(value, 1):
            for fault in _table_faults(element, table, f"[[{inside}]] ", root):
                yield f"{fault} (table {i} of that name)" if len(value) > 1 else fault
    elif not isinstance(value, dict):
        yield f"{where}{key.name} = {_shown(value)}: needed a table, under a header [{inside}]"
    else:
        yield from _table_faults(value, table, f"[{inside}] ", root)


def _plain_faults(value: Any, kind: Any, about: About, what: str) -> Iterator[str]:
    """Faults of a value; `what` is the text in front of it, e.g. `[calibration] window =`."""
    if get_origin(kind) is Union and isinstance(value, list) and list_of(kind):
        kind = list_of(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    name = what.removesuffix(" =")
    is_other = not isinstance(value, dict if origin is dict else list)
    if origin not in (list, tuple, dict):
        if said := _refusal(value, kind, about):
            yield f"{what} {_shown(value)}: {said}"
    elif is_other:
        yield f"{what} {_shown(value)}: needed {needed(kind, about)}"
    elif not value and about.filled:
        yield f"{name} is empty: needed {needed(kind, about)}"
    elif origin is dict:
        free = About("", least=about.least)
        for key, element in value.items():
            if said := _key_refusal(key, arguments[0], about):
                yield f"{name} has the key {_shown(key)}: {said}"
            yield from _plain_faults(element, arguments[1], free, f"{name}.{_named(key)} =")
    else:
        wrong = [f for v in value for f in _plain_faults(v, arguments[0], about, f"{name} has")]
        yield from wrong
        if about.rising and not wrong and any(a >= b for a, b in pairwise(value)):
            rising = sorted(set(value))
            yield f"{what} {_shown(value)}: needed rising numbers, each once: {rising}"


def _key_refusal(key: str, kind: Any, about: About) -> str:
    if kind is int:
        return "" if key.isascii() and key.isdigit() else "needed a whole number"
    return _refusal(key, kind, About("", names=about.names))


def _refusal(value: Any, kind: Any, about: About) -> str:
    """What is wrong with a value; empty if nothing is."""
    what = f"needed {needed(kind, about)}"
    if about.size:
        return _size_refusal(value, about, what)
    if about.names is not None:
        names = list(about.names())
        if isinstance(value, str) and value in names:
            return ""
        lower = {name.lower(): name for name in names}
        close = get_close_matches(value.lower(), lower, n=1) if isinstance(value, str) else ()
        return what + (f"; did you mean {toml_value(lower[close[0]])}?" if close else "")
    if get_origin(kind) is Literal:
        return "" if value in get_args(kind) else what
    choices = get_args(kind) if get_origin(kind) is Union else (kind,)
    kinds = [k for k in choices if k is not list_of(kind)]
    return "" if any(_is(value, k) for k in kinds) and _is_within(value, about) else what


def _size_refusal(value: Any, about: About, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return what
    try:
        return "" if parse_bytes(value) >= (1 if about.least is None else about.least) else what
    except AllocatorError:
        return what


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _is_within(value: Any, about: About) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    limits = (
        about.least is None or value >= about.least,
        about.above is None or value > about.above,
        about.most is None or value <= about.most,
    )
    return math.isfinite(value) and all(limits)


def _shown(value: Any) -> str:
    text = toml_value(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def missing_files(
    data: dict[str, Any], kind: type[msgspec.Struct], folder: Path, where: str = ""
) -> Iterator[str]:
    """Lists the files that a TOML file names and that do not exist, one line each.

    Args:
        data: of the file; values of wrong types name no file.
        kind: the struct of the file.
        folder: that its paths are relative to.
        where: the header in front of a key's name, e.g. `[calibration] `.
    """
    for name, key in keys_of(kind).items():
        value = data.get(name)
        if key.table is not None and not key.is_list and isinstance(value, dict):
            yield from missing_files(value, key.table, folder, f"[{_inside(where, name)}] ")
        if not key.about.path:
            continue
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str) or not path or (folder / path).exists():
                continue
            names = shipped_names(key.about.shipped) if key.about.shipped else []
            if path not in names:
                known = f", or the name of a shipped one: {', '.join(names)}" if names else ""
                yield (
                    f"{where}{name} = {_shown(path)}: no such file; needed a path relative to "
                    f"{folder}{known}"
                )


def _inside(where: str, name: str) -> str:
    return f"{where.strip()[1:-1]}.{name}" if where else name
