"""What llama.cpp stores in place of a checkpoint's values, and the way back.

In: the values of a tensor that is not encoded, and the model's sizes. Out: the values of a file, or
of the checkpoint again. Invariant: the way back gives values from which a model computes what it
computes from the ones that came in, up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from allocator.families.sizes import Dimensions

Floats = npt.NDArray[np.float32]
Change = Callable[[Floats, Dimensions], Floats]


@dataclass(frozen=True)
class Transform:
    """A named change of values `(rows, ...)`, float32; the shape stays.

    Attributes:
        name: for readers.
        to_file: returns the values that a file has.
        from_file: returns the checkpoint's.
        moves: whether all values stay as they are, of any type, in other places.
    """

    name: str
    to_file: Change
    from_file: Change
    moves: bool = False


def _float32(values: Any) -> Floats:
    return np.asarray(values, np.float32)


PLUS_ONE = Transform(
    "one more, of norms that transformers multiplies by one more than their weight",
    lambda values, _: _float32(values + np.float32(1)),
    lambda values, _: _float32(values - np.float32(1)),
)
MINUS_EXP = Transform(
    "minus the exponential, of logarithms of decay",
    lambda values, _: _float32(-np.exp(values)),
    lambda values, _: _float32(np.log(-values)),
)


def reordered(name: str, order: Callable[[Dimensions], tuple[int, ...]]) -> Transform:
    """Returns the transform that puts rows in another order.

    Args:
        name: for readers.
        order: numbers of the checkpoint's rows.
    """

    def to_file(values: Floats, dimensions: Dimensions) -> Floats:
        return np.ascontiguousarray(values[list(order(dimensions))])

    def from_file(values: Floats, dimensions: Dimensions) -> Floats:
        ordered = np.empty_like(values)
        ordered[list(order(dimensions))] = values
        return ordered

    return Transform(name, to_file, from_file, moves=True)
