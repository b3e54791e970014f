"""GGUF files: written tensor by tensor, read without trust.

In: a layout, an allocation and a source of encoded bytes. Out: a file that stock llama.cpp loads.
Invariant: the file is whole or absent under its name, and its size is the allocation's; a file that
is read has every length and offset checked before it is used.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from allocator.codecs import Bytes, Floats
from allocator.decision.allocation import Allocation
from allocator.errors import VerifyError
from allocator.formats import FORMATS, Format
from allocator.formats.ggml import TYPES
from allocator.targets import FullPrecision, Group, Layout
from allocator.targets.gguf.contract import file_shape
from allocator.targets.gguf.metadata import metadata

Tensors = dict[str, tuple[str, tuple[int, ...], Bytes]]


class GgufSource(Protocol):
    """Where the bytes of a file come from, as of a `TensorSource`; each is asked for once."""

    def encoded(self, name: str) -> Bytes:
        """Returns a group in its format: `(..., rows, bytes per row)`, retained experts only."""

    def full_precision(self, tensor: FullPrecision) -> Floats:
        """Returns a full-precision tensor, of a router the retained rows.

        Returns:
            `tensor.shape_with(retained)`: `(width,)` of a norm, `(retained, hidden)` of a router.
        """


# -- writing


def write_gguf(path: Path, layout: Layout, allocation: Allocation, source: GgufSource) -> None:
    """Writes the file under a temporary name, then renames it; one tensor in memory at a time.

    Raises:
        SpaceError: if this is no allocation of that layout.
        CheckpointError: if the checkpoint's config or tokenizer is not usable.
        TargetError: if llama.cpp cannot express them.
    """
    allocation.check(layout)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, layout, allocation, source)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _write(path: Path, layout: Layout, allocation: Allocation, source: GgufSource) -> None:
    writer = GGUFWriter(path, layout.inventory.family.for_gguf().architecture)
    try:
        _add_metadata(writer, layout, allocation)
        shapes = _add_tensors(writer, layout, allocation)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, data in _data(layout, allocation, source):
            expected, nbytes = shapes[name]
            assert data.nbytes == nbytes, (
                f"{name}: {data.nbytes} bytes of shape {shape}, needed {expected}"
            )
            writer.write_tensor_data(data)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()


def _add_metadata(writer: GGUFWriter, layout: Layout, allocation: Allocation) -> None:
    n_experts = max(allocation.counts.values())
    fields = metadata(layout.inventory, n_experts=n_experts, experts_used=allocation.experts_used)
    for field in fields:
        if field.key != "general.architecture":  # the writer has written it already
            writer.add_key_value(field.key, field.value, field.type, sub_type=field.element)


def _add_tensors(
    writer: GGUFWriter, layout: Layout, allocation: Allocation
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Fills the tensor table in file order; shape and bytes by tensor name."""
    counts = allocation.counts
    rows = [
        (
            g.stored_as,
            g.shape_with(counts.get(_layer(g.layer), 0)),
            FORMATS[allocation.format_of[g.name]],
        )
        for g in layout.groups.values()
    ]
    rows += [
        (k.stored_as, file_shape(k.shape_with(counts.get(_layer(k.layer), 0))), FORMATS[k.dtype])
        for k in layout.full_precision
    ]
    for name, shape, chosen in rows:
        kind = GGMLQuantizationType(TYPES[chosen.name])
        # a float dtype says that the shape counts weights, not bytes
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32), chosen.nbytes(shape), raw_dtype=kind
        )
    return {name: (shape, chosen.nbytes(shape)) for name, shape, chosen in rows}


def _data(
    layout: Layout, allocation: Allocation, source: GgufSource
) -> Iterator[tuple[str, tuple[int, ...], npt.NDArray[np.generic]]]:
    for group in layout.groups.values():
        order = row_order(layout, group)
        encoded = np.ascontiguousarray(source.encoded(group.name)[..., order, :])
        yield group.stored_as, encoded.shape, encoded
    for tensor in layout.full_precision:
        array = to_file(layout, tensor, source.full_precision(tensor))
        yield tensor.stored_as, array.shape, array


def to_file(layout: Layout, tensor: FullPrecision, values: Floats) -> Floats:
    """Returns what a file has in place of a full-precision tensor's values, `(...)`."""
    for transform in tensor.transforms:
        values = transform.to_file(values, layout.inventory.dimensions)
    return np.ascontiguousarray(values, dtype=np.float32)


def from_file(layout: Layout, tensor: FullPrecision, values: Floats) -> Floats:
    """Returns a full-precision tensor's values, `(...)`, from what a file has in their place."""
    for transform in reversed(tensor.transforms):
        values = transform.from_file(values, layout.inventory.dimensions)
    return np.ascontiguousarray(values, dtype=np.float32)


def row_order(layout: Layout, group: Group) -> slice | Sequence[int]:
    """Returns which rows of a group come one after the other in a file; all of them by default."""
    orders = layout.inventory.family.for_gguf().row_orders
    return orders[group.role](layout.inventory.dimensions) if group.role in orders else slice(None)


def _layer(layer: int | None) -> int:
    return -1 if layer is None else layer


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)
_BY_TYPE = {number: FORMATS[name] for name, number in TYPES.items()}
_VERSION = 3


class _Cursor:
    """Reads forward in a file; refuses to pass its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def fail(self, what: str) -> VerifyError:
        return VerifyError(
            f"{self.path}: {what} at byte {self.at}; the file is damaged: write it again"
        )

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

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALAR_BYTES:
                self.skip(count * _SCALAR_BYTES[element])
                return
            if element != _STRING or count * 8 > len(self.data) - self.at:
                raise self.fail(f"an array of {count} values of type {element}")
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        else:
            raise self.fail(f"a value of unknown type {kind}")


def read_gguf(path: Path) -> Tensors:
    """Reads every tensor of a file: name to (format, shape, bytes mapped from the file).

    The shape is ours, slowest axis first, in weights; the bytes are `uint8` of shape
    `(*shape[:-1], bytes per row)`, so that `.view(np.float32)` gives an F32 tensor back.

    Raises:
        VerifyError: if the file is missing, truncated, damaged, or holds an unknown type.
    """
    cursor, n_tensors, alignment = _past_metadata(path)
    rows = [_table_row(cursor) for _ in range(min(n_tensors, len(cursor.data)))]
    if not 1 <= alignment <= 1 << 20 or len({name for name, *_ in rows}) != n_tensors:
        raise cursor.fail(f"alignment {alignment}, {n_tensors} tensors with a name twice")
    return _tensors(cursor, rows, alignment)


def metadata_end(path: Path) -> tuple[int, int]:
    """Returns the byte at which the tensor table of a file begins, and the data's alignment.

    Raises:
        VerifyError: if the file is missing, truncated or damaged.
    """
    cursor, _, alignment = _past_metadata(path)
    return cursor.at, alignment


def _past_metadata(path: Path) -> tuple[_Cursor, int, int]:
    """A cursor at the tensor table; number of tensors, and alignment."""
    try:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path}: cannot be read ({error}); write it again") from None
    cursor = _Cursor(path, view)
    if cursor.number("I") != int.from_bytes(b"GGUF", "little") or cursor.number("I") != _VERSION:
        raise VerifyError(f"{path}: no GGUF file of version {_VERSION}")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    alignment = 32
    for _ in range(n_fields):
        key, kind = cursor.text(), cursor.number("I")
        if key == "general.alignment":
            alignment = cursor.number("I")
        else:
            cursor.skip_value(kind)
    return cursor, n_tensors, alignment


def _table_row(cursor: _Cursor) -> tuple[str, Format, tuple[int, ...], int]:
    name, n_dims = cursor.text(), cursor.number("I")
    if not 1 <= n_dims <= 4:
        raise cursor.fail(f"{name} with {n_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in _BY_TYPE or min(shape) < 1 or not _BY_TYPE[kind].stores(shape):
        raise cursor.fail(f"{name} of ggml type {kind} and shape {shape}")
    return name, _BY_TYPE[kind], shape, offset


def _tensors(
    cursor: _Cursor, rows: list[tuple[str, Format, tuple[int, ...], int]], alignment: int
) -> Tensors:
    start = -(-cursor.at // alignment) * alignment
    whole = np.frombuffer(cursor.data, dtype=np.uint8)
    tensors: Tensors = {}
    expected = 0
    for name, chosen, shape, offset in rows:
        nbytes = chosen.nbytes(shape)
        if offset != expected or start + offset + nbytes > len(whole):
            raise cursor.fail(
                f"{name} at offset {offset} with {nbytes} bytes (expected offset {expected}) in a "
                f"file of {len(whole)}, found"
            )
        expected += -(-nbytes // alignment) * alignment
        data = whole[start + offset : start + offset + nbytes]
        tensors[name] = chosen.name, shape, data.reshape(*shape[:-1], nbytes // prod(shape[:-1]))
    if start + expected != len(whole):
        raise cursor.fail(f"tensors to byte {start + expected} in a file of {len(whole)}, found")
    return tensors
