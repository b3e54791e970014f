"""JSON schemas of TOML files, for editors: taplo and VS Code check and complete with them.

In: a struct as of `allocator.files.keys`. Out: a JSON schema (draft 7). Invariant: it takes every
file that the reader takes, and refuses what the reader refuses by types, ranges and names.
"""

from typing import Any, Literal, get_args, get_origin

import msgspec

from allocator.files.keys import About, Key, keys_of, list_of

_SIZE = r"^\s*[0-9][0-9_]*(\.[0-9]+)?\s*([KkMmGgTt]?[Ii]?[Bb])?\s*$"


def json_schema(kind: type[msgspec.Struct], *, title: str) -> dict[str, Any]:
    """Returns the JSON schema of a file.

    Args:
        kind: struct of the file.
        title: of the schema.
    """
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": title}
    return head | {"description": (kind.__doc__ or "").partition("\n")[0]} | _table(kind)


def _table(kind: type[msgspec.Struct]) -> dict[str, Any]:
    keys = keys_of(kind)
    schema = {
        "type": "object",
        "properties": {name: _key(key) for name, key in keys.items()},
        "additionalProperties": False,
    }
    if required := [name for name, key in keys.items() if key.is_required]:
        schema["required"] = required
    if pairs := getattr(kind, "exclusive", ()):
        schema["allOf"] = [{"not": {"required": list(pair)}} for pair in pairs]
    return schema


def _key(key: Key) -> dict[str, Any]:
    default = key.field_default
    facts: dict[str, Any] = {"description": f"{key.about.text}\n\n{_sentence(key)}"}
    if key.table is not None:
        inside = _table(key.table)
        return facts | ({"type": "array", "items": inside} if key.is_list else inside)
    if not key.is_required and default not in (None, "", {}):
        facts["default"] = list(default) if isinstance(default, tuple) else default
    return facts | _value(key.kind, key.about)


def _sentence(key: Key) -> str:
    return f"Needed: {key.needed}. " + (f"Default: {key.default}." if key.default else "Required.")


def _value(kind: Any, about: About) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (list, tuple):
        least = {"minItems": 1} if about.filled else {}
        rising = {"uniqueItems": True} if about.rising else {}
        return {"type": "array", "items": _value(arguments[0], about)} | least | rising
    if origin is dict:
        inside = _value(arguments[1], About("", least=about.least))
        least = {"minProperties": 1} if about.filled else {}
        keys: dict[str, Any] = {}
        if about.names is not None:
            keys = {"propertyNames": {"enum": list(about.names())}}
        elif arguments[0] is int:
            keys = {"propertyNames": {"pattern": "^[0-9]+$"}}
        return {"type": "object", "additionalProperties": inside} | keys | least
    if (several := list_of(kind)) is not None:
        one = next(k for k in arguments if get_origin(k) not in (list, tuple))
        return {"anyOf": [_value(one, about), _value(several, about)]}
    if about.size:
        least_bytes = 1 if about.least is None else about.least
        return {
            "anyOf": [
                *([] if kind is str else [{"type": "integer", "minimum": least_bytes}]),
                {"type": "string", "pattern": _SIZE},
            ]
        }
    if about.names is not None:
        return {"enum": list(about.names())}
    if origin is Literal:
        return {"enum": list(arguments)}
    if kind in (int, float):
        limits = {
            "minimum": about.least,
            "exclusiveMinimum": about.above,
            "maximum": about.most,
        }
        number = {"type": "integer" if kind is int else "number"}
        return number | {name: n for name, n in limits.items() if n is not None}
    return {"type": "boolean" if kind is bool else "string"}
