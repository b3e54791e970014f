"""The hard limit, in bytes, and what counts against it: a file, or everything on a device.

In: sizes that a target predicts. Out: itemised totals, and the limit they are held against.
Invariant: every item is an integer, and a total is the sum of what is listed.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from allocator.errors import BudgetError

MICRO_BATCH = 512
"""Tokens that llama.cpp computes at once unless told otherwise."""


MOST_CELLS = 2**31 - 1
"""Tokens of all sequences: llama.cpp counts them in 32 bits."""
MOST_BYTES = 2**60


class Settings(NamedTuple):
    """What a runtime is told beside the weights.

    Attributes:
        experts_used: routed experts per token.
        kv_format: how keys and values are stored, e.g. `f16` or `q8_0/q4_0`.
        micro_batch: tokens computed at once.
    """

    experts_used: int
    kv_format: str
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What a device runs, and what is left to others.

    Attributes:
        context: tokens of a sequence.
        sequences: held at once.
        reserve: bytes for everything else on the device.
        bandwidth: bytes that the device reads from memory in a second, if known.
        min_tokens_per_second: that one sequence is decoded with at full context, by what the
            bandwidth allows; None for no limit.
    """

    context: int = 4096
    sequences: int = 1
    reserve: int = 0
    bandwidth: int | None = None
    min_tokens_per_second: float | None = None

    def check(self) -> None:
        """Raises:
        BudgetError: if a number makes no sense.
        """
        if self.context < 1 or self.sequences < 1 or self.context * self.sequences > MOST_CELLS:
            raise BudgetError(
                f"context {self.context}, sequences {self.sequences}: needed positive numbers, and "
                f"at most {MOST_CELLS} tokens in all"
            )
        if not 0 <= self.reserve <= MOST_BYTES:
            raise BudgetError(f"reserve {self.reserve}: needed 0 to {MOST_BYTES} bytes")
        if self.bandwidth is not None and not 1 <= self.bandwidth <= MOST_BYTES:
            raise BudgetError(f"bandwidth {self.bandwidth}: needed bytes per second, e.g. 100GB")
        if self.min_tokens_per_second is None:
            return
        if not 1e-9 <= self.min_tokens_per_second <= 1e9:
            raise BudgetError(
                f"{self.min_tokens_per_second} tokens per second: needed a positive number to 1e9"
            )
        if self.bandwidth is None:
            raise BudgetError(
                "a limit on tokens per second needs the device's bandwidth, e.g. 100GB per second"
            )

    @property
    def token_bytes(self) -> int | None:
        """Bytes that a decoded token may read; None for no limit."""
        if self.bandwidth is None or self.min_tokens_per_second is None:
            return None
        return max(1, int(self.bandwidth / self.min_tokens_per_second))

    def tokens_per_second(self, token_bytes: int) -> float | None:
        """At most so many, where a token reads so many bytes; None if the bandwidth is unknown."""
        return None if self.bandwidth is None else self.bandwidth / token_bytes


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What runs on a device, itemised, in bytes.

    Attributes:
        weights: tensor data.
        kv_cache: keys and values of all sequences at full context.
        compute: buffers for activations, and logits.
        overhead: of the runtime's process.
        reserve: left to others.
    """

    weights: int
    kv_cache: int
    compute: int
    overhead: int
    reserve: int

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.kv_cache + self.compute + self.overhead + self.reserve


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
    kept: int
    padding: int
    header: int

    @property
    def tensors(self) -> int:
        """Bytes of all tensors."""
        return self.encoded + self.kept

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
