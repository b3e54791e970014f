"""Bootstrap intervals of losses over documents.

In: losses per document, nats per token. Out: the ends of a 95 % interval. Invariant: the same draws
for the same number of documents and seed, so that a printed interval comes out again.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_ENDS = (0.025, 0.975)


def mean_interval(values: Floats, *, seed: int = 0, n: int = 2000) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of a mean.

    Args:
        values: losses, `(documents,)`.
        seed: of the draws.
        n: draws of documents.
    """
    low, high = np.quantile(values[_drawn(len(values), seed, n)].mean(1), _ENDS)
    return float(low), float(high)


def ratio_interval(a: Floats, b: Floats, *, seed: int = 0, n: int = 2000) -> tuple[float, float]:
    """Returns the 95 % paired bootstrap interval of `mean(a) / mean(b)`; NaN if `b` is 0.

    Args:
        a: losses, `(documents,)`.
        b: of the same documents.
        seed: of the draws.
        n: draws of documents.
    """
    if not (b > 0).all():
        return math.nan, math.nan
    drawn = _drawn(len(a), seed, n)
    low, high = np.quantile(a[drawn].mean(1) / b[drawn].mean(1), _ENDS)
    return float(low), float(high)


def _drawn(documents: int, seed: int, n: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, documents, (n, documents))
