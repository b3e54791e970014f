"""Sources of tensors for tests of files: zeros, or a checkpoint's own weights.

In: a layout. Out: what a runtime writes. Invariant: bytes have the predicted shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from allocator.checkpoint.inventory import DTYPE_BYTES
from allocator.checkpoint.tensors import Floats, read_tensor
from allocator.codecs import Bytes, codec_of
from allocator.decision.allocation import Allocation
from allocator.export.tensors import encoded_shape
from allocator.formats import format_named
from allocator.scoring.candidates import Candidate
from allocator.targets import FullPrecision, Layout
from allocator.targets.group_weights import group_weights


@dataclass(frozen=True)
class ZeroTensors:
    """Zeros in the place of every tensor's bytes, which in every format decode to zeros.

    Attributes:
        layout: of the allocation.
        allocation: formats and retained experts.
        digest: see `TensorSource.digest`.
    """

    layout: Layout
    allocation: Allocation
    digest: str = "zeros"

    @property
    def candidate(self) -> Candidate:
        """The allocation's, with the weights of whatever model it is put into."""
        return Candidate.of(self.allocation)

    def encoded(self, name: str, part: int = 0) -> Bytes:
        """Returns a group, or one part of it: `(..., rows, bytes per row)`."""
        return np.zeros(self.shape(name, part), np.uint8)

    def shape(self, name: str, part: int = 0) -> tuple[int, ...]:
        """Returns the shape of what `encoded` returns."""
        return encoded_shape(self.layout, self.allocation, name, part)

    def matches(self, name: str, part: int, stored: Bytes) -> bool:
        """Tells whether stored bytes, `(..., bytes per row)`, are a group's, or its part's."""
        return np.array_equal(stored.reshape(-1), self.encoded(name, part).reshape(-1))

    def full_precision(self, tensor: FullPrecision) -> Floats:
        """Returns zeros, `(width,)` of a norm, `(retained, hidden)` of a router; float32."""
        return np.zeros(self._shape(tensor), np.float32)

    def full_precision_raw(self, tensor: FullPrecision) -> Bytes:
        """Returns the same in the checkpoint's own dtype: `(rows, bytes)`."""
        rows, *columns = self._shape(tensor)
        width = DTYPE_BYTES[self.layout.inventory.tensors[tensor.source].dtype]
        return np.zeros((rows, int(np.prod(columns, dtype=int)) * width), np.uint8)

    def _shape(self, tensor: FullPrecision) -> tuple[int, ...]:
        layer = -1 if tensor.layer is None else tensor.layer
        return tensor.shape_with(self.allocation.counts.get(layer, 0))


@dataclass(frozen=True)
class CheckpointTensors:
    """A checkpoint's own weights, all experts retained: for files beside other writers'.

    Attributes:
        layout: of the checkpoint.
        formats: of groups, by name, where it is not F32.
    """

    layout: Layout
    formats: Mapping[str, str] = field(default_factory=dict)

    def encoded(self, name: str) -> Bytes:
        """Returns a group in its format, `(..., rows, bytes per row)`."""
        fmt = format_named(self.formats.get(name, "F32"))
        return codec_of(fmt).encode(group_weights(self.layout, self.layout.groups[name]), fmt)

    def full_precision(self, tensor: FullPrecision) -> Floats:
        """Returns a norm, a bias or a router, as the checkpoint has it; float32."""
        return read_tensor(self.layout.inventory, tensor.source)
