"""What a device runs, and the bytes that it takes there, itemised.

In: sizes that a target predicts. Out: itemised totals. Invariant: every item is an integer, and the
total is the sum of what is listed.
"""

from dataclasses import dataclass
from typing import NamedTuple

from allocator.errors import BudgetError

MICRO_BATCH = 512
"""Tokens that llama.cpp computes at once unless told otherwise."""


MOST_CELLS = 2**31 - 1
"""Tokens of all sequences: llama.cpp counts them in 32 bits."""
MOST_BYTES = 2**60


class RuntimeSettings(NamedTuple):
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
        """Checks every number.

        Raises:
            BudgetError: if one makes no sense.
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
        """Bounds the speed where a token reads `token_bytes`; None if the bandwidth is unknown."""
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
