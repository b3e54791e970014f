"""The bytes of a file: encoded groups from the bank, kept tensors from the checkpoint."""

import numpy as np
import numpy.typing as npt

from allocator.allocation import Allocation
from allocator.codecs.bank import Bank
from allocator.codecs.source import Floats, read_raw, read_tensor
from allocator.targets import Kept, Layout

Bytes = npt.NDArray[np.uint8]


class BankSource:
    """One allocation's tensors, one at a time.

    Args:
        bank: of the allocation's layout.
        allocation: formats and retained experts.
    """

    def __init__(self, bank: Bank, allocation: Allocation) -> None:
        self.layout: Layout = bank.layout
        self._bank = bank
        self._allocation = allocation

    def encoded(self, name: str, part: int = 0) -> Bytes:
        """A group, or one part of it, in its format: `(..., rows, bytes per row)`.

        Retained experts only. What was given before may leave the bank.
        """
        fmt, experts = self._allocation.parts(self.layout, name)[part]
        self._bank.release()
        return self._bank.encoded(name, fmt.name, experts or None)

    def kept(self, kept: Kept) -> Floats:
        """A kept tensor as float32, retained rows only."""
        return np.ascontiguousarray(
            read_tensor(self.layout.inventory, kept.source)[self._rows(kept)]
        )

    def kept_raw(self, kept: Kept) -> Bytes:
        """The same in the checkpoint's own dtype: `(rows, bytes)` or `(bytes,)`."""
        info = self.layout.inventory.tensors[kept.source]
        raw = read_raw(self.layout.inventory, info).reshape(info.shape[0], -1)
        return np.ascontiguousarray(raw[self._rows(kept)])

    def _rows(self, kept: Kept) -> slice | list[int]:
        if kept.role.is_router and kept.layer is not None:
            return list(self._allocation.retained_experts[kept.layer])
        return slice(None)
