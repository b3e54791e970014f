"""The hard limit, in bytes, and what counts against it: a file, or everything on a device.

In: sizes that a target predicts. Out: itemised totals, and the limit they are held against.
Invariant: every item is an integer, and a total is the sum of what is listed.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from allocator.errors import BudgetError

MICRO_BATCH = 512
"""Tokens that llama.cpp computes at once unless told otherwise."""


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
        if self.context < 1 or self.sequences < 1 or self.reserve < 0:
            raise BudgetError(
                f"context {self.context}, sequences {self.sequences}, reserve {self.reserve}: "
                "needed positive numbers, and a reserve of 0 bytes or more"
            )
        if self.bandwidth is not None and self.bandwidth < 1:
            raise BudgetError(f"bandwidth {self.bandwidth}: needed bytes per second, e.g. 100GB")
        if self.min_tokens_per_second is None:
            return
        if self.min_tokens_per_second <= 0:
            raise BudgetError(
                f"{self.min_tokens_per_second} tokens per second: needed a positive number"
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
        return int(self.bandwidth / self.min_tokens_per_second)

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
    """

    nbytes: int
    bounds: Literal["file", "weights", "device"]
    workload: Workload | None = None

    def __str__(self) -> str:
        text = f"{self.nbytes} ({self.bounds})"
        if self.workload is None:
            return text
        w = self.workload
        text += f", context {w.context}, sequences {w.sequences}, reserve {w.reserve}"
        return text if self.token_bytes is None else f"{text}, {self.token_bytes} read per token"

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
        if self.nbytes <= 0:
            raise BudgetError(f"budget of {self.nbytes} bytes: needed a positive size, e.g. 12MiB")
