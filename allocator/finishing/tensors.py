"""Finished weights as the source of a file's tensors, and as what a model computes with.

In: the plain weights of an allocation, and an artifact or finished bytes in memory. Out:
`FinishedTensors`, a `TensorSource`. Invariant: what finishing changed comes from the artifact,
everything else from the plain weights; a candidate made of it computes with exactly the bytes and
values that a file gets, whichever container.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import numpy as np

from allocator.checkpoint.tensors import Floats, floats_of
from allocator.codecs import Bytes
from allocator.decision.allocation import Allocation
from allocator.errors import CheckpointError
from allocator.export.stored import StoredTensor, StoredWeights
from allocator.export.tensors import TensorSource
from allocator.scoring.candidates import Candidate
from allocator.targets import FullPrecision, Layout
from allocator.targets.layout import part_names


class Changes(Protocol):
    """What finishing changed; an `Artifact` is one."""

    @property
    def weights(self) -> str:
        """The digest of the finished weights."""

    def codes(self, name: str, plain: Callable[[], Bytes]) -> Bytes | None:
        """Returns bytes of a part, `(..., rows, bytes per row)`; None if they are the codec's.

        Args:
            name: of the part.
            plain: returns the codec's.
        """

    def values(self, source: str) -> Floats | None:
        """Returns a norm, `(width,)`, or a router's retained rows, `(retained, hidden)`, float32.

        None if they are the checkpoint's.
        """

    def holds(self, name: str, stored: Bytes) -> bool | None:
        """Tells whether stored bytes are a part's; None if these are the codec's."""


class FinishedTensors:
    """The tensors of an allocation, finished.

    Args:
        plain: the allocation's weights as its codecs encode them.
        changes: what finishing changed of them.
    """

    def __init__(self, plain: TensorSource, changes: Changes) -> None:
        self.layout: Layout = plain.layout
        self.allocation: Allocation = plain.allocation
        self._plain = plain
        self._changes = changes
        self._names = {
            name: part_names(name, plain.allocation.parts(plain.layout, name))
            for name in plain.layout.groups
        }

    @property
    def digest(self) -> str:
        """Names the finished weights."""
        return self._changes.weights

    @property
    def candidate(self) -> Candidate:
        """What a model computes with these weights."""
        weights = StoredWeights(self.layout, self.allocation, _Stored(self), self.digest)
        return weights.candidate

    def encoded(self, name: str, part: int = 0) -> Bytes:
        """Returns a group, or one part of it, in its format: `(..., rows, bytes per row)`.

        Raises:
            CheckpointError: if the artifact is damaged.
        """
        stored_as = self._names[name][part]
        data = self._changes.codes(stored_as, partial(self._plain.encoded, name, part))
        if data is None:
            return self._plain.encoded(name, part)
        _check_shape(stored_as, data.shape, self.shape(name, part))
        return data

    def shape(self, name: str, part: int = 0) -> tuple[int, ...]:
        """Returns the shape of what `encoded` returns."""
        return self._plain.shape(name, part)

    def matches(self, name: str, part: int, stored: Bytes) -> bool:
        """Tells whether stored bytes are those of a group, or of one part of it, by digest.

        Args:
            name: the group's.
            part: which of its parts.
            stored: `(..., bytes per row)`; only the order of the bytes counts.
        """
        same = self._changes.holds(self._names[name][part], stored)
        return self._plain.matches(name, part, stored) if same is None else same

    def full_precision(self, tensor: FullPrecision) -> Floats:
        """Returns a norm, `(width,)`, or a router's rows, `(retained, hidden)`, float32."""
        values = self._changes.values(tensor.source)
        if values is None:
            return self._plain.full_precision(tensor)
        layer = -1 if tensor.layer is None else tensor.layer
        shape = tensor.shape_with(self.allocation.counts.get(layer, 0))
        _check_shape(tensor.source, values.shape, shape)
        return values

    def full_precision_raw(self, tensor: FullPrecision) -> Bytes:
        """Returns the same in the checkpoint's own dtype: `(rows, bytes)` or `(bytes,)`."""
        if self._changes.values(tensor.source) is None:
            return self._plain.full_precision_raw(tensor)
        values = self.full_precision(tensor)
        return raw_of(values, self.layout.inventory.tensors[tensor.source].dtype)


def _check_shape(name: str, stored: tuple[int, ...], needed: tuple[int, ...]) -> None:
    """Raises:
    CheckpointError: if finished weights are not of their allocation.
    """
    if stored != needed:
        raise CheckpointError(
            f"finished weights: {name} of shape {stored}, its allocation needs {needed}; finish "
            "the allocation again (`allocator finish`)"
        )


class _Stored(Mapping[str, StoredTensor]):
    """A source's tensors by the names that a file of ours has, read when they are asked for."""

    def __init__(self, source: FinishedTensors) -> None:
        self._source = source
        self._parts = {
            stored_as: (name, part)
            for name, names in source._names.items()
            for part, stored_as in enumerate(names)
        }
        self._full_precision = {t.source: t for t in source.layout.full_precision}

    def __getitem__(self, name: str) -> StoredTensor:
        if name in self._parts:
            return StoredTensor(self._source.encoded(*self._parts[name]), None)
        tensor = self._full_precision[name]
        return StoredTensor(self._source.full_precision(tensor).view(np.uint8), "F32")

    def __iter__(self) -> Iterator[str]:
        yield from (*self._parts, *self._full_precision)

    def __len__(self) -> int:
        return len(self._parts) + len(self._full_precision)


def raw_of(values: Floats, dtype: str) -> Bytes:
    """Returns floats in a checkpoint's dtype, exactly: `(rows, bytes)`, or `(bytes,)`.

    Args:
        values: `(rows, columns)` or `(rows,)`, exact in the dtype.
        dtype: `F32`, `F16` or `BF16`.
    """
    if dtype == "BF16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = values.astype({"F32": np.float32, "F16": np.float16}[dtype])
    raw = np.ascontiguousarray(stored).view(np.uint8)
    assert np.array_equal(floats_of(raw.reshape(-1), dtype), values.reshape(-1))
    return raw.reshape(len(values), -1)
