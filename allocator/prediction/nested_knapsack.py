"""The knapsack of plain classes and of nested classes, which choose a count first.

In: plain classes as in `knapsack`; and nested classes (an MoE layer). A nested class chooses one of
several counts (of retained experts) and then, per projection, one option whose bytes and loss
depend on the count. Out: the choice of least total loss within the bytes. Invariants: those of
`knapsack.solve`.

The products of a nested class's projections are never enumerated whole. With a price per byte, the
cheapest choice of every class is a minimum of sums of minima; the best such bound (Everett,
"Generalized Lagrange Multiplier Method", Operations Research 11, 1963) is the linear relaxation's
optimum, and the price is found by intersecting the two lines that enclose it (Handler & Zang, "A
Dual Algorithm for the Constrained Shortest Path Problem", Networks 10, 1980). A choice costs its
class's minimum plus an excess; total loss is the bound plus all excesses plus the price of the
bytes left free. So a choice whose excess is above a limit is in no solution within that limit of
the bound. Only the other choices are made into plain options and solved, under a limit that grows
until the solution lies within it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum, inf, ldexp
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocator.prediction.knapsack import MAX_STATES, Floats, Ints, Options, frontier, solve

_GROWTH = 2.0  # the limit's factor when the solution lies beyond it
_WORK = 1 << 24  # partial choices x choices of a class: wider classes leave fewer states
_GOLDEN = (5**0.5 - 1) / 2  # its multiples' fractions spread evenly
_TOLERANCE = 1e-12  # of the costs: a choice is excluded only beyond rounding


@dataclass(frozen=True, slots=True)
class CoreSize:
    """How many choices are searched; a proven solution does not depend on these numbers.

    Attributes:
        first: excesses of single options that the first limit admits.
        widest: most choices of a class in a core.
    """

    first: int = 32
    widest: int = 1024  # far more than losses that differ need


@dataclass(frozen=True, slots=True, eq=False)
class Nested:
    """The options of one class with counts.

    Attributes:
        nbytes: bytes per projection, each of shape `counts x options`, not negative.
        loss: loss per projection, of the same shapes; `inf` forbids the option for that count.
        count_nbytes: further bytes of every count, shape `counts`, not negative.
        count_loss: further loss of every count, shape `counts`; `inf` forbids the count.

    Raises:
        ValueError: if shapes differ, there is no projection or option, a size is negative, a loss
            is NaN or -inf, or no count has a finite loss in itself and in every projection.
    """

    nbytes: tuple[Ints, ...]
    loss: tuple[Floats, ...]
    count_nbytes: Ints
    count_loss: Floats

    def __post_init__(self) -> None:
        nbytes = tuple(np.asarray(n) for n in (*self.nbytes, self.count_nbytes))
        loss = tuple(np.asarray(v, dtype=np.float64) for v in (*self.loss, self.count_loss))
        shapes = [n.shape for n in nbytes]
        if (
            shapes != [v.shape for v in loss]
            or [len(s) for s in shapes] != [2] * (len(shapes) - 1) + [1]
            or len({s[0] for s in shapes}) > 1
            or not (len(shapes) > 1 and all(n.size and n.dtype.kind in "iu" for n in nbytes))
        ):
            raise ValueError(
                f"nested options: got {', '.join(str(n.dtype) for n in nbytes)} sizes of shapes "
                f"{shapes} and losses of shapes {[v.shape for v in loss]}, the counts' own last; "
                "needed integers, counts x options per projection, and as many counts"
            )
        if min(n.min() for n in nbytes) < 0 or not all((v > -inf).all() for v in loss):
            raise ValueError("nested options: needed sizes from 0 and losses above -inf, not NaN")
        least = sum((v.min(axis=1) for v in loss[:-1]), start=loss[-1])
        if not np.isfinite(least).any():
            raise ValueError("nested options: no count has a finite loss in every projection")
        *sizes, count_nbytes = (n.astype(np.int64) for n in nbytes)
        object.__setattr__(self, "nbytes", tuple(sizes))
        object.__setattr__(self, "loss", loss[:-1])
        object.__setattr__(self, "count_nbytes", count_nbytes)
        object.__setattr__(self, "count_loss", loss[-1])


@dataclass(frozen=True, slots=True)
class NestedSolution:
    """One option per plain class; one count, and one option per projection, per nested class.

    Attributes:
        plain: index of the chosen option, per plain class.
        nested: index of the count and of the option per projection, per nested class.
        nbytes: total bytes, at most the capacity.
        loss: total loss.
        proven: whether no choice within the capacity has a smaller loss.
    """

    plain: tuple[int, ...]
    nested: tuple[tuple[int, tuple[int, ...]], ...]
    nbytes: int
    loss: float
    proven: bool


def nested_bound(plain: Sequence[Options], nested: Sequence[Nested], capacity: int) -> float:
    """Returns a lower bound of the total loss: the linear relaxation's optimum.

    Args:
        plain: classes of one option each.
        nested: classes of one count, and one option per projection, each.
        capacity: bytes available.

    Returns:
        The bound, exact up to float64 rounding; `inf` if even the smallest options do not fit.
    """
    tree = _tree_of(plain, nested, capacity)
    return inf if tree is None else ldexp(_relax(tree).bound, tree.exponent)


def solve_nested(
    plain: Sequence[Options],
    nested: Sequence[Nested],
    capacity: int,
    *,
    max_states: int = MAX_STATES,
    core_size: CoreSize = CoreSize(),
) -> NestedSolution | None:
    """Returns the choice with the least total loss within a capacity.

    Equal losses go to fewer bytes. Losses count as equal when their float64 sums are.

    Args:
        plain: classes of one option each.
        nested: classes of one count, and one option per projection, each.
        capacity: bytes available.
        max_states: as in `knapsack.solve`. Where excesses hardly differ (losses linear in bytes),
            fewer are searched, and `proven` may be false.
        core_size: choices that are searched.

    Returns:
        The solution, or None if even the smallest options do not fit.
    """
    tree = _tree_of(plain, nested, capacity)
    if tree is None:
        return None
    branch, option, proven = _improve(tree, _relax(tree), max_states, core_size)
    counts, picks = tree.count[branch].tolist(), tree.source[option].tolist()
    first = tuple(row[0] for row in picks[: len(plain)])
    layers = tuple(
        (c, tuple(row[: len(n.loss)]))
        for n, c, row in zip(nested, counts[len(plain) :], picks[len(plain) :], strict=True)
    )
    chosen = [(int(o.nbytes[i]), float(o.loss[i])) for o, i in zip(plain, first, strict=True)]
    for n, (c, row) in zip(nested, layers, strict=True):
        chosen.append((int(n.count_nbytes[c]), float(n.count_loss[c])))
        for nbytes, loss, i in zip(n.nbytes, n.loss, row, strict=True):
            chosen.append((int(nbytes[c, i]), float(loss[c, i])))
    return NestedSolution(
        plain=first,
        nested=layers,
        nbytes=sum(b for b, _ in chosen),
        loss=fsum(v for _, v in chosen),
        proven=proven,
    )


@dataclass(frozen=True, eq=False)
class _Tree:
    """All options in one row: by class, count and projection.

    A branch is a count of a class, a cell is a projection of a branch. Every branch has as many
    cells as the widest: a plain class is one count, and missing cells have one option that costs
    nothing. Bytes are relative to the smallest of the cell and of the class; losses are
    divided by a power of two, so that products neither overflow nor vanish.
    """

    nbytes: Ints  # options
    loss: Floats
    source: Ints  # index in the cell
    cell: Ints
    count_nbytes: Ints  # branches
    count_loss: Floats
    count: Ints  # index in the class
    owner: Ints  # class
    n_cells: int  # of every branch
    capacity: int
    exponent: int

    @cached_property
    def first(self) -> Ints:
        """Where every cell's options begin."""
        return _firsts(self.cell)

    @cached_property
    def size(self) -> Ints:
        """Options of every cell."""
        return np.bincount(self.cell, minlength=len(self.owner) * self.n_cells)

    @cached_property
    def branch(self) -> Ints:
        """Branch of every option."""
        return self.cell // self.n_cells

    @cached_property
    def first_branch(self) -> Ints:
        """Where every class's branches begin."""
        return _firsts(self.owner)

    def restricted(self, keep: NDArray[np.bool_]) -> "_Tree":
        """Returns the tree without some options, and without branches that have an empty cell.

        Args:
            keep: `options`.
        """
        if keep.all():
            return self
        sizes = np.bincount(self.cell[keep], minlength=len(self.size))
        branches = sizes.reshape(-1, self.n_cells).min(axis=1) > 0
        keep = keep & branches[self.branch]
        place = (np.cumsum(branches) - 1)[self.branch[keep]]
        return replace(
            self,
            nbytes=self.nbytes[keep],
            loss=self.loss[keep],
            source=self.source[keep],
            cell=place * self.n_cells + self.cell[keep] % self.n_cells,
            count_nbytes=self.count_nbytes[branches],
            count_loss=self.count_loss[branches],
            count=self.count[branches],
            owner=self.owner[branches],
        )


class _PricedTree(NamedTuple):
    """Loss plus price times bytes, of everything in a tree."""

    option: Floats
    cell: Floats  # least of its options
    branch: Floats  # sum over its cells
    least: Floats  # of the branches of every class


class _Choice(NamedTuple):
    """One choice of everything; its cost is a line over the price."""

    branch: Ints  # per class
    options: Ints  # classes x cells
    loss: float
    nbytes: int


class _Relaxed(NamedTuple):
    """The linear relaxation: the price at which the cheapest choices cease to fit."""

    price: float  # loss that one more byte would save; 0 if the best options all fit
    bound: float
    fits: _Choice  # one of the cheapest that fits
    gap: float  # its loss less the bound
    rounding: float  # what float64 may do to a sum of excesses
    branch: Floats  # excess of every branch: its cost less the least of its class
    option: Floats  # excess of every option: its cost less the least of its cell
    either: Floats  # excess of every option and its branch


class _Core(NamedTuple):
    """Choices of whole classes, undominated: by class, bytes ascending."""

    owner: Ints
    nbytes: Ints
    loss: Floats
    excess: Floats
    branch: Ints
    options: Ints  # choices x cells
    limit: float  # every choice that is excluded has an excess beyond it, or is dominated


def _tree_of(plain: Sequence[Options], nested: Sequence[Nested], capacity: int) -> _Tree | None:
    """The options that fit, or None if the smallest do not."""
    n_cells = max((len(n.loss) for n in nested), default=1)
    no_bytes, no_loss = np.zeros((1, 1), dtype=np.int64), np.zeros((1, 1))
    nbytes, loss, sizes = [no_bytes[0, :0]], [no_loss[0, :0]], [no_bytes[0, :0]]
    for wide_nbytes, wide_loss in [
        *(((o.nbytes[None],), (o.loss[None],)) for o in plain),
        *((n.nbytes, n.loss) for n in nested),
    ]:
        counts, n_missing = len(wide_loss[0]), n_cells - len(wide_loss)
        wide_nbytes += (no_bytes.repeat(counts, axis=0),) * n_missing
        wide_loss += (no_loss.repeat(counts, axis=0),) * n_missing
        nbytes.append(np.concatenate(wide_nbytes, axis=1).ravel())
        loss.append(np.concatenate(wide_loss, axis=1).ravel())
        sizes.append(np.tile([v.shape[1] for v in wide_loss], counts))
    size = np.concatenate(sizes)
    n_counts = np.array([1] * len(plain) + [len(n.count_loss) for n in nested], dtype=np.int64)
    free = np.zeros(len(plain), dtype=np.int64)
    tree = _Tree(
        nbytes=np.concatenate(nbytes),
        loss=np.concatenate(loss),
        source=_ranges(np.zeros_like(size), size),
        cell=np.repeat(np.arange(len(size)), size),
        count_nbytes=np.concatenate([free, *(n.count_nbytes for n in nested)]),
        count_loss=np.concatenate([free.astype(np.float64), *(n.count_loss for n in nested)]),
        count=_ranges(np.zeros_like(n_counts), n_counts),
        owner=np.repeat(np.arange(len(n_counts)), n_counts),
        n_cells=n_cells,
        capacity=capacity,
        exponent=0,
    )
    tree = tree.restricted(np.isfinite(tree.loss) & np.isfinite(tree.count_loss)[tree.branch])
    return _fitting(tree)


def _fitting(tree: _Tree) -> _Tree | None:
    """The tree less the floor of bytes, without choices that never fit, and scaled."""
    least = np.minimum.reduceat(tree.nbytes, tree.first)
    count_nbytes = tree.count_nbytes + least.reshape(-1, tree.n_cells).sum(axis=1)
    floor = np.minimum.reduceat(count_nbytes, tree.first_branch)
    capacity = tree.capacity - sum(floor.tolist())
    if capacity < 0:
        return None
    nbytes, count_nbytes = tree.nbytes - least[tree.cell], count_nbytes - floor[tree.owner]
    tree = replace(tree, nbytes=nbytes, count_nbytes=count_nbytes, capacity=capacity)
    tree = tree.restricted(nbytes + count_nbytes[tree.branch] <= capacity)
    largest = max(np.abs(v).max(initial=0) for v in (tree.loss, tree.count_loss))
    exponent = int(np.frexp(largest)[1])
    return replace(
        tree,
        loss=np.ldexp(tree.loss, -exponent),
        count_loss=np.ldexp(tree.count_loss, -exponent),
        exponent=exponent,
    )


def _firsts(ids: Ints) -> Ints:
    """The index of the first of every run of equal ids."""
    return np.flatnonzero(np.diff(ids, prepend=-1))


def _ranges(first: Ints, size: Ints) -> Ints:
    """`first[i]`, `first[i] + 1`, ..., `size[i]` of them, for every i in turn."""
    before = np.cumsum(size) - size
    places: Ints = np.arange(int(size.sum())) + np.repeat(first - before, size)
    return places


def _priced(tree: _Tree, price: float) -> _PricedTree:
    """Costs at a price; at an infinite one the smallest cost their loss, the others `inf`."""
    if price == inf:
        option = np.where(tree.nbytes == 0, tree.loss, inf)
        branch = np.where(tree.count_nbytes == 0, tree.count_loss, inf)
    else:
        option = tree.loss + price * tree.nbytes
        branch = tree.count_loss + price * tree.count_nbytes
    cell = np.minimum.reduceat(option, tree.first)
    branch += cell.reshape(-1, tree.n_cells).sum(axis=1)
    return _PricedTree(option, cell, branch, np.minimum.reduceat(branch, tree.first_branch))


def _cheapest(tree: _Tree, price: float) -> _Choice:
    """A choice of least cost at the price."""
    costs = _priced(tree, price)
    branch = np.flatnonzero(costs.branch == costs.least[tree.owner])
    branch = branch[_firsts(tree.owner[branch])]
    cell = (branch[:, None] * tree.n_cells + np.arange(tree.n_cells)).ravel()
    option = _ranges(tree.first[cell], tree.size[cell])
    option = option[costs.option[option] == costs.cell[tree.cell[option]]]
    option = option[_firsts(tree.cell[option])]
    return _Choice(
        branch,
        option.reshape(-1, tree.n_cells),
        float(tree.loss[option].sum() + tree.count_loss[branch].sum()),
        int(tree.nbytes[option].sum() + tree.count_nbytes[branch].sum()),
    )


def _relax(tree: _Tree) -> _Relaxed:
    """Intersect a line that fits with one that does not, until no choice lies below them."""
    price, fits, over = 0.0, _cheapest(tree, inf), _cheapest(tree, 0.0)
    if over.nbytes <= tree.capacity:
        fits = over
    while over.nbytes > tree.capacity:
        price = max(0.0, (fits.loss - over.loss) / (over.nbytes - fits.nbytes))
        new = _cheapest(tree, price)
        if new.nbytes > tree.capacity:
            if (new.nbytes, new.loss) >= (over.nbytes, over.loss):
                break
            over = new
        else:
            if (-new.nbytes, new.loss) >= (-fits.nbytes, fits.loss):
                break
            fits = new
    costs, paid = _priced(tree, price), price * tree.capacity
    bound = fsum([*costs.least, -paid])
    branch = costs.branch - costs.least[tree.owner]
    option = costs.option - costs.cell[tree.cell]
    return _Relaxed(
        price=price,
        bound=bound,
        fits=fits,
        gap=max(0.0, fits.loss - bound),
        rounding=_TOLERANCE * (float(np.abs(costs.least).sum()) + paid),
        branch=branch,
        option=option,
        either=option + branch[tree.branch],
    )


def _improve(
    tree: _Tree, relaxed: _Relaxed, max_states: int, core_size: CoreSize
) -> tuple[Ints, Ints, bool]:
    """The best choice: branch per class, options `classes x cells`; and whether that is proven."""
    wanted = relaxed.either[relaxed.either > relaxed.rounding]
    limit = relaxed.gap
    n_first = core_size.first
    if len(wanted) > n_first:
        limit = min(limit, float(np.partition(wanted, n_first)[n_first]))
    while True:
        asked = limit + relaxed.rounding
        core = _core(tree, relaxed, asked, core_size.widest)
        gap, solution = inf, _search(core, tree.capacity, max_states)
        whole = core.limit == asked
        if solution is not None:
            chosen, complete = solution
            slack = tree.capacity - int(core.nbytes[chosen].sum())
            gap = float(core.excess[chosen].sum()) + relaxed.price * slack
            proven = gap <= (core.limit if complete else relaxed.rounding)
            whole &= complete
            if proven or (not whole and gap < relaxed.gap):
                return core.branch[chosen], core.options[chosen], proven
        if not whole:
            return relaxed.fits.branch, relaxed.fits.options, False
        limit = min(max(limit, relaxed.rounding) * _GROWTH, gap)


def _core(tree: _Tree, relaxed: _Relaxed, limit: float, widest: int) -> _Core:
    """The choices whose excess is within a limit, the `widest` best of every class."""
    keep = np.flatnonzero(relaxed.either <= limit)
    size = np.bincount(tree.cell[keep], minlength=len(tree.size))
    first = np.cumsum(size) - size
    branch = np.flatnonzero(relaxed.branch <= limit)
    nbytes, loss = tree.count_nbytes[branch], tree.count_loss[branch]
    excess, options = relaxed.branch[branch], np.zeros((len(branch), 0), dtype=np.int64)
    for k in range(tree.n_cells):
        cell = branch * tree.n_cells + k
        added = keep[_ranges(first[cell], size[cell])]
        before = np.repeat(np.arange(len(cell)), size[cell])
        within = excess[before] + relaxed.option[added] <= limit
        added, before = added[within], before[within]
        nbytes, loss = nbytes[before] + tree.nbytes[added], loss[before] + tree.loss[added]
        owner = branch[before] if k < tree.n_cells - 1 else tree.owner[branch[before]]
        best = frontier(owner, nbytes, loss)
        nbytes, loss, before, added = nbytes[best], loss[best], before[best], added[best]
        branch, excess = branch[before], excess[before] + relaxed.option[added]
        options = np.column_stack([options[before], added])
        beyond = np.maximum(excess, relaxed.rounding)
        rank = _rank(tree.owner[branch], beyond)
        if rank.max(initial=0) >= widest:
            limit = min(limit, float(beyond[rank >= widest].min()))
            some = rank < widest
            nbytes, loss, excess = nbytes[some], loss[some], excess[some]
            branch, options = branch[some], options[some]
    return _Core(tree.owner[branch], nbytes, loss, excess, branch, options, limit)


def _rank(owner: Ints, excess: Floats) -> Ints:
    """The place of each choice among those of its class: least excess first, equal ones mixed."""
    mixed = np.arange(len(owner)) * _GOLDEN % 1
    order = np.lexsort((mixed, excess, owner))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(owner, owner)
    return rank


def _search(core: _Core, capacity: int, max_states: int) -> tuple[Ints, bool] | None:
    """The best choice in the core: its position per class, and whether it is proven."""
    chosen = _firsts(core.owner)
    size = np.bincount(core.owner)
    free = np.flatnonzero(size > 1)  # the others have one choice
    least = core.nbytes[chosen]
    options = [
        Options(core.nbytes[i : i + n], core.loss[i : i + n])
        for i, n in zip(chosen[free].tolist(), size[free].tolist(), strict=True)
    ]
    for_free = capacity - int(least.sum() - least[free].sum())
    n_states = min(max_states, _WORK // int(size.max(initial=1)))
    solution = solve(options, for_free, max_states=n_states)
    if solution is None:
        return None
    chosen[free] += np.array(solution.choice, dtype=np.int64)
    return chosen, solution.proven
