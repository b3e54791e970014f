"""The multiple-choice knapsack: one option per class, of least total loss, within a capacity.

In: for every class of items (a group's formats, a layer's retained counts x formats) the bytes and
the loss of its options. Out: the chosen option per class. Invariants: never over the capacity; the
optimum up to float64 rounding unless `Solution.proven` is false; the same input gives the same
output.

Dominance and the linear relaxation are Sinha & Zoltners, "The
Multiple-Choice Knapsack Problem", Operations Research 27 (1979). Searching only a core of options
near the relaxation, widened until the optimum is proven, is Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", European Journal of Operational Research 83 (1995).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, inf, ldexp
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MAX_STATES = 200_000
"""Partial choices per class of a core, by default; 8 bytes each."""

_FIRST_CORE = 16  # options beyond the relaxation's own that the first core holds
_GROWTH = 2.0  # the gap limit's factor when a core holds no proof
_TOLERANCE = 1e-12  # of the losses in the core: a partial choice is pruned only beyond rounding
_CHUNK = 1 << 20  # partial choices extended at once


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """The options of one class.

    Attributes:
        nbytes: bytes of every option, shape `options`, not negative.
        loss: loss of every option, shape `options`, finite; any sign, any order.

    Raises:
        ValueError: if the arrays are empty, differ in length, or hold a negative size or a loss
            that is not finite.
    """

    nbytes: Ints
    loss: Floats

    def __post_init__(self) -> None:
        nbytes, loss = np.asarray(self.nbytes), np.asarray(self.loss, dtype=np.float64)
        if (
            nbytes.ndim != 1
            or nbytes.shape != loss.shape
            or not (len(nbytes) and nbytes.dtype.kind in "iu")
        ):
            raise ValueError(
                f"options: got {nbytes.dtype} sizes of shape {nbytes.shape} and losses of shape "
                f"{loss.shape}; needed one integer and one loss per option, at least one option"
            )
        if nbytes.min() < 0 or not np.isfinite(loss).all():
            raise ValueError("options: needed sizes from 0 and finite losses; drop the others")
        object.__setattr__(self, "nbytes", nbytes.astype(np.int64))
        object.__setattr__(self, "loss", loss)


@dataclass(frozen=True, slots=True)
class Solution:
    """One option per class.

    Attributes:
        choice: index of the chosen option, per class.
        nbytes: total bytes, at most the capacity.
        loss: total loss.
        proven: whether no choice within the capacity has a smaller loss.
    """

    choice: tuple[int, ...]
    nbytes: int
    loss: float
    proven: bool


def pareto(nbytes: Ints, loss: Floats) -> Ints:
    """Returns the indices of the options that no other matches in both bytes and loss.

    Args:
        nbytes: `(options,)`.
        loss: `(options,)`.

    Returns:
        `(indices,)` in order of ascending bytes, hence of descending losses.
    """
    return frontier(np.zeros(len(nbytes), dtype=np.int64), nbytes, loss)


def frontier(owner: Ints, nbytes: Ints, loss: Floats) -> Ints:
    """Returns the indices of the options that no other of their class matches in bytes and loss.

    Args:
        owner: class of every option, from 0; `(options,)`.
        nbytes: `(options,)`.
        loss: `(options,)`.

    Returns:
        `(indices,)` by class, then in order of ascending bytes, hence of descending losses.
    """
    order = np.lexsort((loss, nbytes, owner))
    rank = np.unique(loss, return_inverse=True)[1] - owner * (len(loss) + 1)
    return order[_new_minimum(rank[order])]  # every class ranks below all classes before it


def union(classes: Sequence[Options]) -> tuple[Options, Ints]:
    """Returns the Pareto options of "one option of one of these classes".

    Returns:
        The options, and the origin of each: `options x 2` of (class, index in that class).
    """
    nbytes = np.concatenate([c.nbytes for c in classes])
    loss = np.concatenate([c.loss for c in classes])
    source = [(k, i) for k, c in enumerate(classes) for i in range(len(c.nbytes))]
    keep = pareto(nbytes, loss)
    return Options(nbytes[keep], loss[keep]), np.array(source, dtype=np.int64)[keep]


def combine(a: Options, b: Options) -> tuple[Options, Ints]:
    """Returns the Pareto options of "one option of each": sums of bytes and of losses.

    Returns:
        The options, and the terms of each: `options x 2` of (index in `a`, index in `b`).
    """
    nbytes = np.add.outer(a.nbytes, b.nbytes).ravel()
    loss = np.add.outer(a.loss, b.loss).ravel()
    keep = pareto(nbytes, loss)
    pairs = np.stack(np.divmod(keep, len(b.nbytes)), axis=1)
    return Options(nbytes[keep], loss[keep]), pairs.astype(np.int64)


def lp_bound(options: Sequence[Options], capacity: int) -> float:
    """Returns a lower bound of the total loss: the linear relaxation's optimum.

    Args:
        options: the classes.
        capacity: bytes available.

    Returns:
        The bound, exact up to float64 rounding; `inf` if even the smallest options do not fit.
    """
    made = _row_of(options, capacity)
    if made is None:
        return inf
    row, exponent = made
    relaxed = _relax(row)
    return ldexp(fsum([*row.loss[relaxed.pick], -relaxed.gap]), exponent)


def solve(
    options: Sequence[Options], capacity: int, *, max_states: int = MAX_STATES
) -> Solution | None:
    """Returns the choice of one option per class with the least total loss within a capacity.

    Equal losses go to fewer bytes. Losses count as equal when their float64 sums are.

    Args:
        options: the classes.
        capacity: bytes available.
        max_states: most partial choices per class of the core, 8 bytes each. Of more, the most
            promising are searched, and `proven` is false.

    Returns:
        The solution, or None if even the smallest options do not fit.
    """
    made = _row_of(options, capacity)
    if made is None:
        return None
    row, _ = made
    relaxed = _relax(row)
    best, proven = relaxed.pick, True
    if relaxed.gap > 0:
        best, proven = _improve(row, relaxed, max_states)
    choice = row.source[best].tolist()
    return Solution(
        choice=tuple(choice),
        nbytes=sum(int(o.nbytes[i]) for o, i in zip(options, choice, strict=True)),
        loss=fsum(float(o.loss[i]) for o, i in zip(options, choice, strict=True)),
        proven=proven,
    )


class _Row(NamedTuple):
    """All classes' options in one row: by class, bytes ascending, losses strictly descending."""

    owner: Ints  # class
    source: Ints  # index in the class, or in the full row
    nbytes: Ints
    loss: Floats
    capacity: int


class _Steps(NamedTuple):
    """The lower convex hulls of all classes, cut into steps, the steepest saving first."""

    first: Ints  # classes -> position of the smallest option
    end: Ints  # steps -> position where it ends
    nbytes: Ints
    loss: Floats
    slope: Floats


class _Relaxed(NamedTuple):
    """The linear relaxation, rounded down to whole options."""

    pick: Ints  # classes -> position
    slope: float  # loss that one more byte would save; 0 if the best options all fit
    slack: int  # bytes that `pick` leaves
    gap: float  # loss of `pick` less the bound


class _States(NamedTuple):
    """Partial choices of the classes so far."""

    nbytes: Ints
    loss: Floats
    bound: Floats  # the least loss that the relaxation of the open classes leaves possible
    code: Ints  # option of the last class x states before + state before


def _row_of(options: Sequence[Options], capacity: int) -> tuple[_Row, int] | None:
    """The undominated options that fit, or None if the smallest do not.

    Returns:
        The row, with bytes less the smallest of the class and losses over a power of two, so that
        products neither overflow nor vanish; and that power's exponent.
    """
    least = np.array([o.nbytes.min() for o in options], dtype=np.int64)
    capacity -= int(least.sum())
    if capacity < 0:
        return None
    sizes = [len(o.nbytes) for o in options]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    index = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(n) for n in sizes)])
    nbytes = np.concatenate([np.zeros(0, dtype=np.int64), *(o.nbytes for o in options)])
    loss = np.concatenate([np.zeros(0), *(o.loss for o in options)])
    nbytes -= least[owner]
    keep = np.flatnonzero(nbytes <= capacity)
    keep = keep[frontier(owner[keep], nbytes[keep], loss[keep])]
    owner, index, nbytes, loss = owner[keep], index[keep], nbytes[keep], loss[keep]
    exponent = int(np.frexp(np.abs(loss).max(initial=0))[1])
    capacity = min(capacity, int(nbytes.max(initial=0)) * len(options))  # fits int64
    return _Row(owner, index, nbytes, np.ldexp(loss, -exponent), capacity), exponent


def _new_minimum(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value is below all values before it."""
    new = np.ones(len(values), dtype=np.bool_)
    new[1:] = values[1:] < np.minimum.accumulate(values)[:-1]
    return new


def _steps(row: _Row) -> _Steps:
    hull = np.arange(len(row.owner))
    while True:  # what lies on or above the chord of its neighbours is on no lower hull
        inside = row.owner[hull[1:]] == row.owner[hull[:-1]]
        nbytes, loss = np.diff(row.nbytes[hull]), np.diff(row.loss[hull])
        slope = loss / np.where(inside, nbytes, 1)
        above = inside[1:] & inside[:-1] & (slope[:-1] >= slope[1:])
        if not above.any():
            break
        hull = np.delete(hull, np.flatnonzero(above) + 1)
    first = np.flatnonzero(np.diff(row.owner, prepend=-1))
    step = np.flatnonzero(inside)
    step = step[np.argsort(slope[step], kind="stable")]
    return _Steps(first, hull[1:][step], nbytes[step], loss[step], slope[step])


def _relax(row: _Row) -> _Relaxed:
    """Take the steepest steps while they fit; the first that does not is where the slope breaks."""
    steps = _steps(row)
    n_taken = int(np.searchsorted(np.cumsum(steps.nbytes), row.capacity, side="right"))
    taken = steps.end[:n_taken]
    pick = steps.first.copy()
    np.maximum.at(pick, row.owner[taken], taken)
    slope = float(-steps.slope[n_taken]) if n_taken < len(steps.end) else 0.0
    slack = row.capacity - int(row.nbytes[pick].sum())
    return _Relaxed(pick, slope, slack, slope * slack)


def _improve(row: _Row, relaxed: _Relaxed, max_states: int) -> tuple[Ints, bool]:
    """The best positions, `classes`, and whether they are proven: cores of growing gap limits."""
    pick, slope, slack, gap = relaxed
    nbytes = row.nbytes - row.nbytes[pick][row.owner]  # from here relative to `pick`
    loss = row.loss - row.loss[pick][row.owner]
    delta = loss + slope * nbytes  # what the option adds to the bound, at least
    wanted = np.sort(delta[delta > _TOLERANCE * gap])[:_FIRST_CORE]
    limit = float(wanted[-1]) if len(wanted) else gap
    while True:
        limit = min(limit, gap)
        core = np.union1d(pick, np.flatnonzero(delta <= limit))
        part = _Row(row.owner[core], core, nbytes[core], loss[core], slack)
        best, complete = _search(part, limit - gap, max_states)
        if best is not None and loss[best].sum() <= 0:
            return best, complete
        if limit == gap or not complete:
            return pick, complete
        limit *= _GROWTH


def _search(row: _Row, limit: float, max_states: int) -> tuple[Ints | None, bool]:
    """The best choice of a core with a loss up to `limit`, by dynamic programming over the classes.

    A state is a partial choice: bytes and loss so far. It survives if no other has as few bytes at
    as little loss, and if the relaxation of the classes still open can bring it to `limit`.

    Returns:
        Per class the `source` of its option, or None if no choice reaches `limit`; and whether all
        such states were searched.
    """
    steps = _steps(row)
    limit += _TOLERANCE * float(np.abs(row.loss).sum())
    size = np.bincount(row.owner)
    width = np.maximum.reduceat(row.nbytes, steps.first) - row.nbytes[steps.first]
    order = np.argsort(-width, kind="stable")[: np.count_nonzero(width)]  # wide first: few states
    turn = np.zeros_like(size)
    turn[order] = np.arange(len(order))
    step_turn = turn[row.owner[steps.end]]
    nbytes, loss, complete = np.zeros(1, dtype=np.int64), np.zeros(1), True
    trail: list[tuple[Ints, int]] = []
    for k, own in enumerate(order.tolist()):
        open_steps, least = (
            step_turn > k,
            steps.first[order[k + 1 :]],
        )  # the open classes' relaxation
        more_nbytes = np.cumsum(np.append(row.nbytes[least].sum(), steps.nbytes[open_steps]))
        more_loss = np.cumsum(np.append(row.loss[least].sum(), steps.loss[open_steps]))
        states = _States(nbytes[:0], loss[:0], loss[:0], nbytes[:0])
        n_rows = max(1, _CHUNK // len(nbytes))
        for i in range(0, int(size[own]), n_rows):
            some = steps.first[own] + np.arange(i, min(i + n_rows, size[own]))
            total = np.add.outer(row.nbytes[some], nbytes).ravel()
            value = np.add.outer(row.loss[some], loss).ravel()
            bound = value + np.interp(row.capacity - total, more_nbytes, more_loss, left=inf)
            ok = np.flatnonzero(bound <= limit)
            made = _States(total[ok], value[ok], bound[ok], ok + i * len(nbytes))
            states, whole = _undominated(states, made, max_states)
            complete &= whole
        if not len(states.code):
            return None, complete
        trail.append((states.code, len(nbytes)))
        nbytes, loss = states.nbytes, states.loss
    chosen, state = steps.first.copy(), len(nbytes) - 1  # the last state has the least loss
    for own, (code, n_before) in zip(order[::-1], trail[::-1], strict=True):
        option, state = divmod(int(code[state]), n_before)
        chosen[own] += option
    return row.source[chosen], complete


def _undominated(a: _States, b: _States, max_states: int) -> tuple[_States, bool]:
    """The undominated states of both sets, by ascending bytes; and whether they are all."""
    both = _States._make(np.concatenate(pair) for pair in zip(a, b, strict=True))
    alive = np.argsort(both.nbytes, kind="stable")
    alive = alive[_new_minimum(both.loss[alive])]
    alive = alive[_new_minimum(both.nbytes[alive][::-1])[::-1]]  # of equal bytes the least loss
    complete = len(alive) <= max_states
    if not complete:
        alive = alive[np.sort(np.argsort(both.bound[alive], kind="stable")[:max_states])]
    return _States._make(values[alive] for values in both), complete
