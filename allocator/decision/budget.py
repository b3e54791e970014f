"""The hard limit, in bytes: on a file, on the searched matrices, or on everything on a device.

In: sizes that a target predicts. Out: an itemised file, and the limit that bytes are held against.
Invariant: every item is an integer, and a total is the sum of what is listed.
"""

from dataclasses import dataclass
from typing import Literal

from allocator.errors import BudgetError
from allocator.targets.device_memory import MOST_BYTES, Workload


@dataclass(frozen=True, slots=True)
class FileBytes:
    """A checkpoint file, itemised.

    Attributes:
        encoded: the searched matrices.
        kept: routers and norms.
        padding: between tensors.
        header: before them.
    """

    encoded: int
    full_precision: int
    padding: int
    header: int

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.encoded + self.full_precision

    @property
    def overhead(self) -> int:
        """Bytes of the file that are no tensor's."""
        return self.padding + self.header

    @property
    def file(self) -> int:
        """Bytes of the file."""
        return self.tensors + self.overhead


@dataclass(frozen=True, slots=True)
class Budget:
    """At most so many bytes.

    Attributes:
        nbytes: the limit.
        bounds: `file` (everything in the file), `weights` (the searched matrices alone, the
            measure of effective bits) or `device` (everything in memory).
        workload: what the device runs; with `device`.
        beside: a second limit, on the file or the weights, as hard; with `device`.
    """

    nbytes: int
    bounds: Literal["file", "weights", "device"]
    workload: Workload | None = None
    beside: "Budget | None" = None

    def __str__(self) -> str:
        return " and ".join(f"{limit.nbytes} ({limit.bounds})" for limit in self.limits)

    @property
    def limits(self) -> "tuple[Budget, ...]":
        """Itself, and the one beside it."""
        return (self,) if self.beside is None else (self, self.beside)

    @property
    def lock(self) -> dict[str, object]:
        """What makes another limit another study."""
        found: dict[str, object] = {"budget": str(self)}
        if self.workload is not None:
            names = ("context", "sequences", "reserve", "bandwidth")
            found |= {n: getattr(self.workload, n) for n in names}
            found["bytes read per token"] = self.token_bytes
        return found

    @property
    def token_bytes(self) -> int | None:
        """Bytes that a decoded token may read; None for no limit."""
        return None if self.workload is None else self.workload.token_bytes

    @property
    def context(self) -> int:
        """Tokens that a sequence holds on the device."""
        assert self.workload is not None
        return self.workload.context

    def check_positive(self) -> None:
        """Raises:
        BudgetError: if the limit is no positive number.
        """
        if not 0 < self.nbytes <= MOST_BYTES:
            raise BudgetError(
                f"budget of {self.nbytes} bytes: needed a positive size to {MOST_BYTES}, e.g. 12MiB"
            )
