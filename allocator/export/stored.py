"""A written file's own weights, for a model to compute with.

In: the tensors that a runtime read from the file. Out: `StoredWeights`, which candidates bring
along. Invariant: nothing comes from the checkpoint or from a cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from allocator.checkpoint.tensors import floats_of
from allocator.codecs import Bytes, Floats, codec_of
from allocator.decision.allocation import Allocation
from allocator.export.tensors import encoded_shape
from allocator.formats import format_named
from allocator.scoring.candidates import Candidate
from allocator.targets import FullPrecision, Layout
from allocator.targets.layout import part_names


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        data: its bytes, of any shape.
        format: that the file says; None where the file says none of an encoded tensor.
    """

    data: Bytes
    format: str | None


class StoredWeights:
    """A file's weights, in the place of encodings and of the checkpoint's full-precision tensors.

    Args:
        layout: of the allocation.
        allocation: what the file holds.
        tensors: of the file, by the layout's names; see `Runtime.read`.
        digest: of the file.
    """

    def __init__(
        self,
        layout: Layout,
        allocation: Allocation,
        tensors: Mapping[str, StoredTensor],
        digest: str,
    ) -> None:
        self.layout = layout
        self.allocation = allocation
        self.digest = digest
        self._tensors = tensors

    @property
    def candidate(self) -> Candidate:
        """What a model computes with these weights."""
        return Candidate.of(self.allocation, self)

    def has(self, name: str, fmt: str, expert: int | None = None) -> bool:
        """Says yes: the file has all that its allocation asks for."""
        return True

    def put(self, name: str, fmt: str, expert: int | None, weights: Floats) -> None:
        """Refuses weights `(..., rows, in_features)`: the file has every group already."""
        raise AssertionError(f"{name} in {fmt} is in the file")

    def encoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Bytes:
        """Returns a group in a format, `(..., rows, bytes per row)`; of a projection, `experts`."""
        parts = self.allocation.parts(self.layout, name)
        part = next(i for i, (known, _) in enumerate(parts) if known.name == fmt)
        stored = self._tensors[part_names(name, parts)[part]].data
        data = stored.reshape(encoded_shape(self.layout, self.allocation, name, part))
        stored_experts = parts[part][1]
        return data if experts is None else data[[stored_experts.index(e) for e in experts]]

    def decoded(self, name: str, fmt: str, experts: Sequence[int] | None = None) -> Floats:
        """Returns the same decoded, `(..., rows, in)`, float32."""
        known = format_named(fmt)
        return codec_of(known).decode(self.encoded(name, fmt, experts), known)

    def full_precision(self, tensor: FullPrecision, experts: Sequence[int] | None) -> Floats:
        """Returns a norm, `(width,)`, or a router's rows, `(experts, hidden)`; float32."""
        stored = self._tensors[tensor.source]
        assert stored.format is not None, f"{tensor.source} has no dtype in the file"
        raw = np.ascontiguousarray(stored.data).reshape(-1).view(np.uint8)
        if experts is None:
            return floats_of(raw, stored.format).reshape(tensor.shape)
        assert tensor.layer is not None
        retained = self.allocation.retained_experts[tensor.layer]
        values = floats_of(raw, stored.format).reshape(tensor.shape_with(len(retained)))
        return values[[retained.index(e) for e in experts]]

    def release(self) -> None:
        """Releases nothing, since the file is mapped as a whole."""
