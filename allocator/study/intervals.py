"""Bootstrap intervals of losses over documents.

In: losses per document, nats per token. Out: the ends of a 95 % interval. Invariant: the same draws
for the same number of documents and seed, so that a printed interval comes out again.
"""

import math
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
N_DRAWS = 2000
_ENDS = (0.025, 0.975)


@cache
def draws(documents: int, *, seed: int = 0, n: int = N_DRAWS) -> Ints:
    """Returns draws of documents with replacement, `draws x documents`; read only."""
    drawn = np.random.default_rng(seed).integers(0, documents, (n, documents))
    drawn.flags.writeable = False
    return drawn


def ends(values: Floats) -> tuple[float, float]:
    """Returns the ends of the 95 % interval of a figure's values over draws, `(draws,)`."""
    low, high = np.quantile(values, _ENDS)
    return float(low), float(high)


def mean_interval(values: Floats, *, seed: int = 0, n: int = N_DRAWS) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of a mean.

    Args:
        values: losses, `(documents,)`.
        seed: of the draws.
        n: draws of documents.
    """
    return ends(values[draws(len(values), seed=seed, n=n)].mean(1))


def ratio_interval(a: Floats, b: Floats, *, seed: int = 0, n: int = N_DRAWS) -> tuple[float, float]:
    """Returns the 95 % paired bootstrap interval of `mean(a) / mean(b)`; NaN if `b` is 0.

    Args:
        a: losses, `(documents,)`.
        b: of the same documents.
        seed: of the draws.
        n: draws of documents.
    """
    if not (b > 0).all():
        return math.nan, math.nan
    drawn = draws(len(a), seed=seed, n=n)
    return ends(a[drawn].mean(1) / b[drawn].mean(1))
