"""The hard limit, in bytes, and what counts against it."""

from dataclasses import dataclass
from typing import Literal

from allocator.errors import BudgetError


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A checkpoint file, itemised.

    Attributes:
        encoded: the searched matrices.
        kept: routers and norms.
        overhead: header, metadata and alignment of the file.
    """

    encoded: int
    kept: int
    overhead: int

    @property
    def tensors(self) -> int:
        """Bytes of all tensor data."""
        return self.encoded + self.kept

    @property
    def file(self) -> int:
        """Bytes of the file."""
        return self.tensors + self.overhead


@dataclass(frozen=True, slots=True)
class Budget:
    """At most so many bytes.

    Attributes:
        nbytes: the limit.
        bounds: `file` (everything in the file) or `weights` (the searched matrices alone, the
            measure of effective bits).
    """

    nbytes: int
    bounds: Literal["file", "weights"]

    def used(self, size: FileBytes) -> int:
        """The bytes of `size` that count against this budget."""
        return size.file if self.bounds == "file" else size.encoded

    def check_positive(self) -> None:
        """Raises:
        BudgetError: if the limit is no positive number.
        """
        if self.nbytes <= 0:
            raise BudgetError(f"budget of {self.nbytes} bytes: needed a positive size, e.g. 12MiB")
