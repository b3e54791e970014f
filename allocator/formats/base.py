"""A storage format: how many weights form a block, how many bytes a block takes, who encodes it.

In: a format and a shape. Out: bytes, as an integer. Invariant: a size given here is the size
written. A shape that the format cannot store as named raises instead of being padded or cut.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from allocator.errors import FormatError


class Importance(StrEnum):
    """What a format's encoder does with an importance vector: a weight for each input channel."""

    REQUIRED = "required"
    USED = "used"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight.

    Attributes:
        name: the runtime's own name, e.g. `Q4_K`; one name over all codecs.
        block: weights along the last axis that are encoded together.
        block_bytes: bytes one block occupies, scales included.
        codec: name of the codec that encodes and decodes it.
        gaussian_error: squared error over squared weights, on normal weights of equal importance.
        importance: what the encoder does with importance vectors.
    """

    name: str
    block: int
    block_bytes: int
    codec: str
    gaussian_error: float
    importance: Importance = Importance.USED

    @property
    def needs_importance(self) -> bool:
        """Whether the encoder refuses to work without an importance vector."""
        return self.importance is Importance.REQUIRED

    @property
    def bits(self) -> float:
        """Effective bits per weight; for display and ordering only."""
        return self.block_bytes * 8 / self.block

    def stores(self, shape: tuple[int, ...]) -> bool:
        """Tells whether rows of `shape` = `(..., in_features)` are whole blocks."""
        return shape[-1] % self.block == 0

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes of a weight of `shape` = `(..., out_features, in_features)`.

        Raises:
            FormatError: if `in_features` is not a multiple of `block`.
        """
        if not self.stores(shape):
            raise FormatError(
                f"{self.name}: in_features {shape[-1]} is not a multiple of its block {self.block} "
                f"(shape {shape}); choose a format with a smaller block for this tensor"
            )
        return prod(shape) // self.block * self.block_bytes
