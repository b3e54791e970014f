"""Key/value pairs of a GGUF file, and their exact bytes.

In: keys and values. Out: `Field`s. Invariant: `metadata_bytes` are the bytes that gguf-py writes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gguf import GGUFValueType

from allocator.checkpoint.inventory import GgufModel

Value = int | float | bool | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]

_SCALAR_BYTES = {
    GGUFValueType.BOOL: 1, GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1,
    GGUFValueType.UINT16: 2, GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4, GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One key/value pair; `element` is the type of an array's values."""

    key: str
    value: Value
    type: GGUFValueType
    element: GGUFValueType | None = None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the pair in the file."""
        key = 8 + len(self.key.encode())  # length + text
        if self.element is None:
            return key + 4 + _value_bytes(self.type, self.value)  # type + value
        assert isinstance(self.value, tuple)
        values = sum(_value_bytes(self.element, v) for v in self.value)
        return key + 4 + 4 + 8 + values  # type + element type + count + values


def _value_bytes(kind: GGUFValueType, value: Any) -> int:
    if kind == GGUFValueType.STRING:
        return 8 + len(value.encode())
    return _SCALAR_BYTES[kind]


def metadata_bytes(fields: Iterable[Field]) -> int:
    """Returns the bytes of the key/value section as gguf-py's `GGUFWriter` writes it."""
    return sum(field.nbytes for field in fields)


def carried_fields(model: GgufModel, begin: str) -> tuple[Field, ...]:
    """Returns the pairs of a GGUF model whose keys begin so, as they are.

    Empty lists, which say nothing, are left out: gguf-py writes none.
    """
    return tuple(
        Field(
            pair.key,
            pair.value,
            GGUFValueType(pair.type),
            None if pair.element is None else GGUFValueType(pair.element),
        )
        for key, pair in model.pairs.items()
        if key.startswith(begin) and pair.value != ()
    )


def uint_field(key: str, value: int) -> Field:
    """Returns a pair with an unsigned integer of 32 bits."""
    return Field(key, value, GGUFValueType.UINT32)


def float_field(key: str, value: float) -> Field:
    """Returns a pair with a float of 32 bits."""
    return Field(key, value, GGUFValueType.FLOAT32)


def bool_field(key: str, value: bool) -> Field:
    """Returns a pair with a truth value."""
    return Field(key, value, GGUFValueType.BOOL)


def string_field(key: str, value: str) -> Field:
    """Returns a pair with a text."""
    return Field(key, value, GGUFValueType.STRING)


def array_field(
    key: str,
    value: tuple[int, ...] | tuple[float, ...] | tuple[str, ...],
    element: GGUFValueType,
) -> Field:
    """Returns a pair with several values of one type."""
    return Field(key, value, GGUFValueType.ARRAY, element)
