"""Fronts and baselines against brute force, numpy and scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from allocator.decision.front import Point, baseline_loss, front, lower_hull
from allocator.errors import BudgetError

POINTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=14).map(
    lambda rows: [Point(str(i), n, loss / 8) for i, (n, loss) in enumerate(rows)]
)


def beats(a, b):
    return a.nbytes <= b.nbytes and a.loss <= b.loss and (a.nbytes, a.loss) != (b.nbytes, b.loss)


def brute_force(points):
    best = [p for p in points if not any(beats(q, p) for q in points)]
    first = {(p.nbytes, p.loss): p for p in reversed(best)}
    return [first[key] for key in sorted(first)]


@given(POINTS)
def test_front_is_brute_force(points):
    assert front(points) == brute_force(points)


def interpolated(points, nbytes):
    """Least log loss at `nbytes` on any chord of two points, which is the lower hull."""
    found = [
        np.interp(nbytes, [a.nbytes, b.nbytes], np.log([a.loss, b.loss]))
        for a in points
        for b in points
        if a.nbytes <= nbytes <= b.nbytes and a.nbytes < b.nbytes
    ]
    return math.exp(min(found + [math.log(p.loss) for p in points if p.nbytes == nbytes]))


@given(POINTS.filter(bool), st.floats(0, 1))
def test_baseline_is_the_least_chord_of_the_front(points, share):
    best = brute_force(points)
    nbytes = round(best[0].nbytes + share * (best[-1].nbytes - best[0].nbytes))
    assert baseline_loss(points, nbytes) == pytest.approx(interpolated(best, nbytes))


@pytest.mark.parametrize("seed", range(5))
def test_lower_hull_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    nbytes = rng.choice(10**6, 40, replace=False)
    points = [Point(str(i), int(n), float(rng.uniform(0.1, 3))) for i, n in enumerate(nbytes)]
    best = brute_force(points)
    # two points far above close the polygon, so that its other corners are the lower hull
    ends = [(best[0].nbytes, 1e3), (best[-1].nbytes, 1e3)]
    plane = np.array([(p.nbytes, math.log(p.loss)) for p in best] + ends)
    corners = {best[i].name for i in ConvexHull(plane).vertices if i < len(best)}
    assert {p.name for p in lower_hull(points)} == corners


def test_outside_of_the_hull():
    points = [Point("a", 10, 2.0), Point("b", 20, 1.0)]
    for nbytes in (9, 21):
        with pytest.raises(BudgetError, match=f"no baseline at {nbytes} bytes: .* 10..20"):
            baseline_loss(points, nbytes)
    with pytest.raises(BudgetError, match="no points"):
        baseline_loss([], 10)


def test_one_point_is_a_hull():
    assert baseline_loss([Point("a", 10, 2.0)], 10) == 2.0
