"""Results as values that JSON has: `--json` of the command line.

In: tables, dataclasses, structs, paths, numbers. Out: dicts, lists, texts, numbers. Invariants:
what is unknown or not finite is null; sizes are integers; what is none of these is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

_OMITTED = object()


def plain(value: Any) -> Any:
    """Returns a value as JSON has it.

    A pandas table becomes `rows`, a list of dicts, beside the table's `attrs`. A decision becomes
    what its allocation file has.
    """
    made = _plain(value)
    return None if made is _OMITTED else made


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        whole = float(value)
        return whole if math.isfinite(whole) else None
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "to_json") and not hasattr(value, "columns"):
        return _plain(value.to_json())
    if hasattr(value, "columns") and hasattr(value, "attrs"):
        rows = [
            {str(name): _size(name, _plain(cell)) for name, cell in row.items()}
            for row in value.astype(object).to_dict("records")
        ]
        return {"rows": rows, **_mapping(value.attrs)}
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [made for each in value if (made := _plain(each)) is not _OMITTED]
    if is_dataclass(value) and not isinstance(value, type):
        return _mapping({f.name: getattr(value, f.name) for f in fields(value)})
    if hasattr(value, "__struct_fields__"):
        return _mapping({name: getattr(value, name) for name in value.__struct_fields__})
    if hasattr(value, "tolist"):  # of numpy
        return _plain(value.tolist())
    return _OMITTED


def _size(name: Any, value: Any) -> Any:
    """A size as an integer, also in a column whose empty cells made pandas store floats."""
    return int(value) if isinstance(value, float) and str(name).endswith("bytes") else value


def _mapping(values: Mapping[Any, Any]) -> dict[str, Any]:
    made = {str(key): _plain(value) for key, value in values.items() if str(key)[:1] != "_"}
    return {key: value for key, value in made.items() if value is not _OMITTED}
