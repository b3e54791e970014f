"""Held-out figures with intervals, and the distance to the best baseline.

In: figures by document (`app.held_out_file`). Out: means with 95 % bootstrap intervals over
documents. Invariant: two allocations are compared on the same draws of documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from allocator.app.held_out_file import HeldOutRow, HeldOutSplit
from allocator.decision.front import Point, lower_hull
from allocator.study.intervals import draws, ends

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 95 % interval.

    Attributes:
        value: as measured.
        low: end of the interval; equal to `value` where one document was scored.
        high: its other end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Distance:
    """What an allocation loses over the best baseline of its size.

    Attributes:
        ratio: of mean KL.
        against: name of the baseline, or of the two that it lies between.
        same_size: whether it is a baseline of exactly the allocation's bytes, measured or between
            two; else the best one that is no larger.
    """

    ratio: Figure
    against: tuple[str, ...]
    same_size: bool


def _means(values: Sequence[float], weights: Sequence[float]) -> Floats:
    """Weighted means, `(1 + draws,)`: of all documents, then of every draw."""
    v, w = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    drawn = draws(len(v))
    whole = np.average(v, weights=w)
    return np.append(whole, (v[drawn] * w[drawn]).sum(1) / w[drawn].sum(1))


def _figure(means: Floats) -> Figure:
    return Figure(float(means[0]), *ends(means[1:]))


def kl(split: HeldOutSplit, row: HeldOutRow, domain: str | None = None) -> Figure:
    """Returns the mean KL of a row, nats per token; of one domain's documents if it is named."""
    chosen = [i for i, d in enumerate(split.domains) if domain in (None, d)]
    return _figure(_means([row.kl_of[i] for i in chosen], [split.tokens[i] for i in chosen]))


def top1(split: HeldOutSplit, row: HeldOutRow) -> Figure:
    """Returns the share of positions with the same most likely token."""
    return _figure(_means(row.top1_of, split.tokens))


def perplexity(split: HeldOutSplit, row: HeldOutRow) -> Figure:
    """Returns the perplexity of all predicted tokens over the original's, on the same draws."""
    original = split.original
    assert original is not None
    nll = np.subtract(row.nll_of, original.nll_of)
    return _figure(np.exp(_means(nll.tolist(), [n - 1 for n in split.tokens])))


def distance(split: HeldOutSplit, row: HeldOutRow) -> Distance | None:
    """Returns what a row loses over the best baseline of its bytes.

    Baselines of other bytes are joined by straight lines in (bytes, log loss), along their lower
    hull.

    Returns:
        None where no baseline is as small.
    """
    baselines = {r.name: r for r in split.baselines if r.kl > 0}
    hull = lower_hull([Point(name, r.bytes, r.kl) for name, r in baselines.items()])
    mine = _means(row.kl_of, split.tokens)

    def means(name: str) -> Floats:
        return np.maximum(_means(baselines[name].kl_of, split.tokens), 1e-12)

    for left, right in pairwise(hull):
        if left.nbytes <= row.bytes < right.nbytes:
            if left.nbytes == row.bytes:
                return Distance(_figure(mine / means(left.name)), (left.name,), True)
            share = (row.bytes - left.nbytes) / (right.nbytes - left.nbytes)
            between = (1 - share) * np.log(means(left.name)) + share * np.log(means(right.name))
            return Distance(_figure(mine / np.exp(between)), (left.name, right.name), True)
    if not hull or row.bytes < hull[0].nbytes:
        return None
    last = hull[-1]
    same = last.nbytes == row.bytes
    return Distance(_figure(mine / means(last.name)), (last.name,), same)
