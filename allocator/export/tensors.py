"""The tensors of a file to write: encoded groups, and full-precision tensors.

In: an allocation, and where its weights come from. Out: bytes, one tensor at a time
(`TensorSource`). Invariant: encoded bytes are checked when they are given. A file that was written
of them is held against the same digests once more (`matches`), because what is mapped from a disk
may change in between.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np

from allocator.checkpoint.tensors import Floats, read_raw, read_tensor
from allocator.codecs import Bytes
from allocator.codecs.encodings import Encodings
from allocator.codecs.entries import SlotDigests
from allocator.decision.allocation import Allocation
from allocator.scoring.candidates import Candidate, retained_rows, rows_of
from allocator.targets import FullPrecision, Layout


class TensorSource(Protocol):
    """Where the tensors of a file come from; a writer asks for each once, in the file's order."""

    @property
    def layout(self) -> Layout:
        """Of the allocation."""

    @property
    def allocation(self) -> Allocation:
        """Formats and retained experts."""

    @property
    def digest(self) -> str:
        """Names weights that allocation, importance and codec do not determine; else empty."""

    @property
    def candidate(self) -> Candidate:
        """What a model computes with these weights."""

    def encoded(self, name: str, part: int = 0) -> Bytes:
        """Returns a group, or one part of it, in its format: `(..., rows, bytes per row)`.

        Retained experts only.
        """

    def shape(self, name: str, part: int = 0) -> tuple[int, ...]:
        """Returns the shape of what `encoded` returns."""

    def matches(self, name: str, part: int, stored: Bytes) -> bool:
        """Tells whether stored bytes are those of a group, or of one part of the group.

        Args:
            name: the group's.
            part: which of its parts.
            stored: `(..., bytes per row)`; only the order of the bytes counts.
        """

    def full_precision(self, tensor: FullPrecision) -> Floats:
        """Returns a norm, `(width,)`, or a router's rows, `(retained, hidden)`, float32."""

    def full_precision_raw(self, tensor: FullPrecision) -> Bytes:
        """Returns the same in the checkpoint's own dtype: `(rows, bytes)` or `(bytes,)`."""


class EncodedTensors:
    """One allocation's tensors, encoded by its formats' codecs; the others as in the checkpoint.

    Args:
        encodings: of the allocation's layout.
        allocation: formats and retained experts.
        encode: encodes what `matches` needs anew, without the encodings' entries.
    """

    digest = ""

    def __init__(
        self, encodings: Encodings, allocation: Allocation, *, encode: bool = False
    ) -> None:
        self.layout: Layout = encodings.layout
        self.allocation = allocation
        self.candidate = Candidate.of(allocation)
        self._encodings = encodings
        self._encode = encode
        self._digests: dict[tuple[str, int], SlotDigests] = {}

    def encoded(self, name: str, part: int = 0) -> Bytes:
        """Returns a group, or one part of it, in its format: `(..., rows, bytes per row)`.

        Retained experts only. What was returned before may leave the encodings.
        """
        fmt, experts = self.allocation.parts(self.layout, name)[part]
        self._encodings.release()
        data, self._digests[name, part] = self._encodings.given(name, fmt.name, experts or None)
        return data

    def matches(self, name: str, part: int, stored: Bytes) -> bool:
        """Tells whether stored bytes are those of a group, or of one part of the group, by digest.

        Groups that were not returned before are read now, so the encodings' own bytes are checked
        too.

        Args:
            name: the group's.
            part: which of its parts.
            stored: `(..., bytes per row)`; only the order of the bytes counts.
        """
        if self._encode:
            fmt, experts = self.allocation.parts(self.layout, name)[part]
            with TemporaryDirectory(prefix="anew-", dir=self._encodings.folder) as folder:
                anew = self._encodings.anew(Path(folder))
                return anew.given(name, fmt.name, experts or None)[1].match(stored)
        if (name, part) not in self._digests:
            self.encoded(name, part)
        return self._digests[name, part].match(stored)

    def shape(self, name: str, part: int = 0) -> tuple[int, ...]:
        """Returns the shape of what `encoded` returns."""
        return encoded_shape(self.layout, self.allocation, name, part)

    def full_precision(self, tensor: FullPrecision) -> Floats:
        """Returns a norm, `(width,)`, or a router's rows, `(retained, hidden)`, float32."""
        return rows_of(read_tensor(self.layout.inventory, tensor.source), self._rows(tensor))

    def full_precision_raw(self, tensor: FullPrecision) -> Bytes:
        """Returns the same in the checkpoint's own dtype: `(rows, bytes)` or `(bytes,)`."""
        info = self.layout.inventory.tensors[tensor.source]
        raw = read_raw(self.layout.inventory, info).reshape(info.shape[0], -1)
        rows = self._rows(tensor)
        return np.ascontiguousarray(raw if rows is None else raw[list(rows)])

    def _rows(self, tensor: FullPrecision) -> tuple[int, ...] | None:
        return retained_rows(tensor, self.allocation.retained_experts)


def encoded_shape(
    layout: Layout, allocation: Allocation, name: str, part: int = 0
) -> tuple[int, ...]:
    """Returns the shape of a group's bytes, or of one part's: `(..., rows, bytes per row)`.

    Args:
        layout: of the allocation.
        allocation: formats and retained experts.
        name: the group's.
        part: which of its parts.
    """
    fmt, experts = allocation.parts(layout, name)[part]
    *rows, width = layout.groups[name].shape
    return (*((len(experts), *rows[1:]) if experts else rows), fmt.nbytes((1, width)))
