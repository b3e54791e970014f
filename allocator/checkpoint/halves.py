"""The two halves of latent attention's `kv_b`, which llama.cpp stores in place of it.

In: weights of any type. Out: the same weights in another order. Invariant:
`join_kv_b(*split_kv_b(w)) == w`.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Weight = TypeVar("Weight", bound=np.generic)


def split_kv_b(
    weight: npt.NDArray[Weight], *, heads: int, nope: int
) -> tuple[npt.NDArray[Weight], npt.NDArray[Weight]]:
    """Splits `kv_b` as llama.cpp stores it.

    Args:
        weight: `(heads * (nope + value), rank)`.
        heads: attention heads.
        nope: rows of a head's keys without rotation.

    Returns:
        `k_b` `(heads, rank, nope)` and `v_b` `(heads, value, rank)`.
    """
    halves = weight.reshape(heads, -1, weight.shape[-1])
    k_b = np.ascontiguousarray(halves[:, :nope].transpose(0, 2, 1))
    return k_b, np.ascontiguousarray(halves[:, nope:])


def join_kv_b(k_b: npt.NDArray[Weight], v_b: npt.NDArray[Weight]) -> npt.NDArray[Weight]:
    """Joins `k_b` and `v_b`; the inverse of `split_kv_b`.

    Args:
        k_b: `(heads, rank, nope)`.
        v_b: `(heads, value, rank)`.

    Returns:
        `(heads * (nope + value), rank)`.
    """
    joined = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
    return joined.reshape(-1, joined.shape[-1])
