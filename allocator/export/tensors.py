"""The bytes of a file: encoded groups, and kept tensors from the checkpoint.

Encoded bytes are checked when they are given. A file that was written of them is held against the
same digests once more (`matches`), because what is mapped from a disk may change in between.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from allocator.checkpoint.tensors import Floats, read_raw, read_tensor
from allocator.codecs.encodings import Encodings, SlotDigests
from allocator.decision.allocation import Allocation
from allocator.targets import FullPrecision, Layout

Bytes = npt.NDArray[np.uint8]


class EncodedTensors:
    """One allocation's tensors, one at a time.

    Args:
        encodings: of the allocation's layout.
        allocation: formats and retained experts.
        encode: encodes what `matches` needs anew, without the encodings' entries.
    """

    def __init__(
        self, encodings: Encodings, allocation: Allocation, *, encode: bool = False
    ) -> None:
        self.layout: Layout = encodings.layout
        self._encodings = encodings
        self.allocation = allocation
        self._encode = encode
        self._digests: dict[tuple[str, int], SlotDigests] = {}

    def encoded(self, name: str, part: int = 0) -> Bytes:
        """A group, or one part of it, in its format: `(..., rows, bytes per row)`.

        Retained experts only. What was given before may leave the encodings.
        """
        fmt, experts = self.allocation.parts(self.layout, name)[part]
        self._encodings.release()
        data, self._digests[name, part] = self._encodings.given(name, fmt.name, experts or None)
        return data

    def matches(self, name: str, part: int, stored: Bytes) -> bool:
        """Whether stored bytes are those of a group, or of one part of it, by their digests.

        What was not given before is asked for, so the encodings' own bytes are checked too.
        """
        if self._encode:
            fmt, experts = self.allocation.parts(self.layout, name)[part]
            with TemporaryDirectory(prefix="anew-", dir=self._encodings.folder) as folder:
                anew = self._encodings.anew(Path(folder))
                return anew.given(name, fmt.name, experts or None)[1].match(stored)
        if (name, part) not in self._digests:
            self.encoded(name, part)
        return self._digests[name, part].match(stored)

    def shape(self, name: str, part: int) -> tuple[int, ...]:
        """Of what `encoded` gives."""
        fmt, experts = self.allocation.parts(self.layout, name)[part]
        *rows, width = self.layout.groups[name].shape
        return (*((len(experts), *rows[1:]) if experts else rows), fmt.nbytes((1, width)))

    def full_precision(self, kept: FullPrecision) -> Floats:
        """A kept tensor as float32, retained rows only."""
        return np.ascontiguousarray(
            read_tensor(self.layout.inventory, kept.source)[self._rows(kept)]
        )

    def full_precision_raw(self, kept: FullPrecision) -> Bytes:
        """The same in the checkpoint's own dtype: `(rows, bytes)` or `(bytes,)`."""
        info = self.layout.inventory.tensors[kept.source]
        raw = read_raw(self.layout.inventory, info).reshape(info.shape[0], -1)
        return np.ascontiguousarray(raw[self._rows(kept)])

    def _rows(self, kept: FullPrecision) -> slice | list[int]:
        if kept.role.is_router and kept.layer is not None:
            return list(self.allocation.retained_experts[kept.layer])
        return slice(None)
