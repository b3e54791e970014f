"""Fronts of points by bytes, loss and bytes read per token; and baselines between points.

In: points. Out: the non-dominated points, or a loss at given bytes. Invariant: `front` equals the
brute-force set of points that no other point beats in one objective without losing in another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from allocator.errors import BudgetError


@dataclass(frozen=True, slots=True)
class Point:
    """Something with a size and a loss.

    Attributes:
        name: of the point.
        nbytes: its size.
        loss: nats per token.
        token_bytes: bytes that decoding a token reads, where reading is a third axis; else 0.
    """

    name: str
    nbytes: int
    loss: float
    token_bytes: int = 0


def front(points: Sequence[Point]) -> list[Point]:
    """Returns the non-dominated points, by bytes; of equal points the first."""
    on_front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.loss, p.token_bytes)):
        if not any(f.loss <= point.loss and f.token_bytes <= point.token_bytes for f in on_front):
            on_front.append(point)
    return on_front


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Returns the lower convex hull in (bytes, log loss), by bytes; losses must be positive."""
    hull: list[Point] = []
    for point in front(points):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def baseline_loss(points: Sequence[Point], nbytes: int) -> float:
    """Returns the baseline's loss at exactly `nbytes`: log loss linear along the lower hull.

    Raises:
        BudgetError: if `nbytes` is outside the hull, or there are no points.
    """
    hull = lower_hull(points)
    if not hull:
        raise BudgetError("no baseline: no points; score at least one uniform format")
    if nbytes == hull[-1].nbytes:
        return hull[-1].loss
    for left, right in pairwise(hull):
        if left.nbytes <= nbytes <= right.nbytes:
            share = (nbytes - left.nbytes) / (right.nbytes - left.nbytes)
            return math.exp((1 - share) * math.log(left.loss) + share * math.log(right.loss))
    raise BudgetError(
        f"no baseline at {nbytes:,} bytes: the hull spans "
        f"{hull[0].nbytes:,}..{hull[-1].nbytes:,}; add points"
    )


def _slope(a: Point, b: Point) -> float:
    return (math.log(b.loss) - math.log(a.loss)) / (b.nbytes - a.nbytes)
