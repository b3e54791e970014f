"""GGUF files, read without trust.

In: a file. Out: its key/value pairs and the table of its tensors. Invariant: every length, count
and offset is checked against the file before it is used; tensors follow one another without gaps,
and the file ends where the last one does
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from allocator.checkpoint.refusals import FETCH_LFS, LFS_POINTER
from allocator.errors import AllocatorError, CheckpointError, reason
from allocator.formats import FORMATS, Format
from allocator.formats.ggml import TYPES

MAGIC = b"GGUF"
VERSION = 3
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BYTES = {kind: struct.calcsize("<" + code) for kind, code in _CODES.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9  # of the specification's `gguf_metadata_value_type`
_FORMATS = {number: FORMATS[name] for name, number in TYPES.items()}
_MOST_ALIGNED = 1 << 20


@dataclass(frozen=True, slots=True)
class Pair:
    """A key/value pair of a file.

    Attributes:
        key: its name.
        value: a number, a truth value, a text, or a tuple of these; None where values are skipped.
        type: the specification's number of the value's type.
        element: of an array, that of its values' type.
    """

    key: str
    value: Any
    type: int
    element: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: llama.cpp's.
        shape: in weights, the slowest axis first.
        format: of its bytes; None where `kind` is none that is known.
        kind: ggml's number of the format.
        offset: of its first byte, from the file's start.
        nbytes: that it occupies, without padding; 0 where the format is not known.
    """

    name: str
    shape: tuple[int, ...]
    format: Format | None
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors' data.

    Attributes:
        path: of the file.
        pairs: by key, in the file's order.
        entries: in the file's order.
        table: byte at which the table of tensors begins.
        alignment: of tensors, in bytes.
        data: the whole file, mapped.
    """

    path: Path
    pairs: Mapping[str, Pair]
    entries: tuple[Entry, ...]
    table: int
    alignment: int
    data: mmap.mmap


def read_header(
    path: Path,
    *,
    error: type[AllocatorError] = CheckpointError,
    way_out: str = "fetch it again",
    values: bool = True,
) -> Header:
    """Reads the pairs and the table of tensors of a file.

    Args:
        path: of the file.
        error: that is raised.
        way_out: what to do with a file that is not whole, for messages.
        values: whether values are wanted, and not only their keys.

    Raises:
        AllocatorError: `error`, if the file is missing, truncated or damaged.
    """
    fail = partial(_failure, path, error, way_out)
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as cause:
        raise error(f"{path}: cannot be read ({reason(cause)}); {way_out}") from None
    if data[: len(LFS_POINTER)] == LFS_POINTER:
        raise error(f"{path}: {FETCH_LFS}")
    cursor = _Cursor(data, fail)
    if data[:4] != MAGIC:
        raise error(f"{path}: no GGUF file; {way_out}")
    cursor.skip(len(MAGIC))
    if (version := cursor.number("I")) != VERSION:
        raise error(f"{path}: GGUF of version {version}, needed {VERSION}; {way_out}")
    n_tensors, n_pairs = cursor.number("Q"), cursor.number("Q")
    pairs: dict[str, Pair] = {}
    for _ in range(n_pairs):
        pair = cursor.pair(values=values)
        if pair.key in pairs:
            raise cursor.fail(f"{pair.key} a second time")
        pairs[pair.key] = pair
    aligned = pairs.get("general.alignment")
    alignment = 32 if aligned is None else aligned.value
    if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNED:
        raise cursor.fail(f"an alignment of {alignment!r}")
    table = cursor.at
    entries = _entries(cursor, n_tensors, alignment)
    return Header(path, pairs, entries, table, alignment, data)


def _failure(
    path: Path, error: type[AllocatorError], way_out: str, what: str, at: int
) -> AllocatorError:
    return error(f"{path}: {what} at byte {at}; the file is damaged: {way_out}")


class _Cursor:
    """Reads forward in a file; refuses to pass its end."""

    def __init__(self, data: mmap.mmap, fail: "partial[AllocatorError]") -> None:
        self.data = data
        self.at = 0
        self._fail = fail

    def fail(self, what: str) -> AllocatorError:
        return self._fail(what, self.at)

    def skip(self, nbytes: int) -> int:
        """Steps over `nbytes`, and returns where they begin."""
        start = self.at
        if nbytes > len(self.data) - start:
            raise self.fail(f"{nbytes} bytes announced, {len(self.data) - start} left")
        self.at += nbytes
        return start

    def number(self, code: str) -> int:
        value: int = struct.unpack_from(
            "<" + code, self.data, self.skip(struct.calcsize("<" + code))
        )[0]
        return value

    def text(self) -> str:
        start = self.skip(self.number("Q"))
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise self.fail("a name that is no text") from None

    def pair(self, *, values: bool) -> Pair:
        key, kind = self.text(), self.number("I")
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            value = self._array(key, element, count, values=values)
            return Pair(key, value, _ARRAY, element)
        if kind == _STRING:
            return Pair(key, self.text(), _STRING)
        if kind not in _CODES:
            raise self.fail(f"{key} of unknown type {kind}")
        return Pair(key, self._scalar(kind), kind)

    def _scalar(self, kind: int) -> Any:
        if kind == _BOOL:  # any byte but 0 is true
            return bool(self.number("B"))
        return self.number(_CODES[kind])

    def _array(self, key: str, element: int, count: int, *, values: bool) -> Any:
        if element in _CODES:
            start = self.skip(count * _BYTES[element])
            return (
                struct.unpack_from(f"<{count}{_CODES[element]}", self.data, start)
                if values
                else None
            )
        if element != _STRING or count * 8 > len(self.data) - self.at:
            raise self.fail(f"{key}, an array of {count} values of type {element}")
        if values:
            return tuple(self.text() for _ in range(count))
        for _ in range(count):
            self.skip(self.number("Q"))
        return None


def _entries(cursor: _Cursor, n_tensors: int, alignment: int) -> tuple[Entry, ...]:
    rows = [_row(cursor) for _ in range(min(n_tensors, len(cursor.data)))]
    if len({name for name, *_ in rows}) != n_tensors:
        raise cursor.fail(f"{n_tensors} tensors with a name twice")
    start, expected = -(-cursor.at // alignment) * alignment, 0
    entries = []
    end = start
    for number, (name, shape, kind, offset) in enumerate(rows):
        fmt = _FORMATS.get(kind)
        if fmt is None:  # its length is not known, but where the next one begins
            following = rows[number + 1][3] if number + 1 < len(rows) else None
            nbytes, step = 0, (offset if following is None else following) - offset
        else:
            if not fmt.stores(shape):
                raise cursor.fail(f"{name} of ggml type {kind} and shape {shape}")
            nbytes = fmt.nbytes(shape)
            step = -(-nbytes // alignment) * alignment
        if offset != expected or step < 0:
            raise cursor.fail(f"{name} at offset {offset}, expected {expected}, found")
        if start + offset + nbytes > len(cursor.data):
            last = start + offset + nbytes
            raise cursor.fail(f"{name} ends at byte {last}, the file at {len(cursor.data)}, found")
        expected += step
        end = start + offset + nbytes
        entries.append(Entry(name, shape, fmt, kind, start + offset, nbytes))
    whole = start + expected
    if not (rows and entries[-1].format is None) and not end <= len(cursor.data) <= whole:
        raise cursor.fail(f"tensors to byte {whole} in a file of {len(cursor.data)}, found")
    return tuple(entries)


def _row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = cursor.text(), cursor.number("I")
    if not 1 <= n_dims <= 4:
        raise cursor.fail(f"{name} with {n_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
    if min(shape) < 1:
        raise cursor.fail(f"{name} of shape {shape}")
    return name, shape, cursor.number("I"), cursor.number("Q")
