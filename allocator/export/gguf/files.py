"""GGUF files: written tensor by tensor, read without trust.

In: a layout, an allocation and a source of encoded bytes. Out: a file that stock llama.cpp loads.
Invariant: the file is whole or absent under its name, and its size is the allocation's; a file that
is read has every length and offset checked before it is used.
"""

import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from allocator.checkpoint.gguf.reader import read_header
from allocator.codecs import Bytes, Floats
from allocator.decision.allocation import Allocation
from allocator.errors import VerifyError
from allocator.files.progress import BYTES, step
from allocator.formats import FORMATS, Format
from allocator.formats.ggml import TYPES
from allocator.targets import FullPrecision, Group, Layout
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
        total = sum(nbytes for _, nbytes in shapes.values())
        with step("writing", total, unit=BYTES) as shown:
            for name, shape, data in _data(layout, allocation, source):
                expected, nbytes = shapes[name]
                assert data.nbytes == nbytes, (
                    f"{name}: {data.nbytes} bytes of shape {shape}, needed {expected}"
                )
                writer.write_tensor_data(data)
                shown.update(nbytes)
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
    rows: list[tuple[str, tuple[int, ...], Format]] = [
        (made.name, (len(made.values),), FORMATS["F32"]) for made in layout.made
    ]
    rows += [
        (
            g.stored_as,
            g.shape_with(counts.get(_layer(g.layer), 0)),
            FORMATS[allocation.format_of[g.name]],
        )
        for g in layout.groups.values()
    ]
    rows += [
        (k.stored_as, k.stored_shape_with(counts.get(_layer(k.layer), 0)), FORMATS[k.dtype])
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
    for made in layout.made:
        values = np.array(made.values, np.float32)
        yield made.name, values.shape, values
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

_WAY_OUT = "write it again"


def read_gguf(path: Path) -> Tensors:
    """Reads every tensor of a file: name to (format, shape, bytes mapped from the file).

    The shape is ours, slowest axis first, in weights; the bytes are `uint8` of shape
    `(*shape[:-1], bytes per row)`, so that `.view(np.float32)` gives an F32 tensor back.

    Raises:
        VerifyError: if the file is missing, truncated, damaged, or holds an unknown type.
    """
    header = read_header(path, error=VerifyError, way_out=_WAY_OUT, values=False)
    whole = np.frombuffer(header.data, dtype=np.uint8)
    tensors: Tensors = {}
    end = -(-header.table // header.alignment) * header.alignment
    for entry in header.entries:
        shape, fmt = entry.shape, entry.format
        if fmt is None:
            raise VerifyError(
                f"{path}: {entry.name} of unknown ggml type {entry.kind}; the file is damaged: "
                f"{_WAY_OUT}"
            )
        end = entry.offset + -(-entry.nbytes // header.alignment) * header.alignment
        data = whole[entry.offset : entry.offset + entry.nbytes]
        row_bytes = entry.nbytes // prod(shape[:-1])
        tensors[entry.name] = fmt.name, shape, data.reshape(*shape[:-1], row_bytes)
    if end != len(whole):
        raise VerifyError(
            f"{path}: {len(whole)} bytes, needed {end}; the file is damaged: {_WAY_OUT}"
        )
    return tensors


def metadata_end(path: Path) -> tuple[int, int]:
    """Returns the byte at which the tensor table of a file begins, and the data's alignment.

    Raises:
        VerifyError: if the file is missing, truncated or damaged.
    """
    header = read_header(path, error=VerifyError, way_out=_WAY_OUT, values=False)
    return header.table, header.alignment
