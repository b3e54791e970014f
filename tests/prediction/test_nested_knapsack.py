import itertools
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from allocator.formats import offered
from allocator.prediction.knapsack import Options, combine, lp_bound, solve, union
from allocator.prediction.nested_knapsack import CoreSize, Nested, nested_bound, solve_nested

EIGHTHS = st.integers(-40, 40).map(lambda n: n / 8)  # their sums are exact: ties are ties


def nested_of(nbytes, loss, count_nbytes, count_loss):
    return Nested(
        tuple(np.array(n, dtype=np.int64) for n in nbytes),
        tuple(np.array(v, dtype=float) for v in loss),
        np.array(count_nbytes, dtype=np.int64),
        np.array(count_loss, dtype=float),
    )


def choices(one):
    """Every (bytes, loss, choice) of a class, infinite losses left out."""
    if isinstance(one, Options):
        return [
            (int(n), float(v), i) for i, (n, v) in enumerate(zip(one.nbytes, one.loss, strict=True))
        ]
    made = []
    for c in range(len(one.count_loss)):
        for picks in itertools.product(*(range(v.shape[1]) for v in one.loss)):
            loss = float(one.count_loss[c])
            nbytes = int(one.count_nbytes[c])
            for n, v, i in zip(one.nbytes, one.loss, picks, strict=True):
                nbytes, loss = nbytes + int(n[c, i]), loss + float(v[c, i])
            if loss < inf:
                made.append((nbytes, loss, (c, picks)))
    return made


def floor_and_ceiling(plain, nested):
    low, high = (sum(int(f(o.nbytes)) for o in plain) for f in (np.min, np.max))
    for one in nested:
        sizes = []
        for c in np.flatnonzero(np.isfinite(one.count_loss)):
            parts = zip(one.nbytes, one.loss, strict=True)
            finite = [n[c][np.isfinite(v[c])] for n, v in parts]
            if all(len(n) for n in finite):
                own = int(one.count_nbytes[c])
                sizes.append([own + sum(int(f(n)) for n in finite) for f in (np.min, np.max)])
        low, high = low + min(s[0] for s in sizes), high + max(s[1] for s in sizes)
    return low, high


def brute_force(plain, nested, capacity):
    """Least (loss, bytes) over all choices that fit."""
    totals = {(0.0, 0)}
    for one in (*plain, *nested):
        totals = {(v + w, n + m) for v, n in totals for m, w, _ in choices(one)}
    return min((t for t in totals if t[1] <= capacity), default=None)


def enumerated(nested):
    """A nested class as a plain one, by the products of its projections."""
    per_count = []
    for c in range(len(nested.count_loss)):
        parts = []
        for n, v in zip(nested.nbytes, nested.loss, strict=True):
            finite = np.isfinite(v[c])
            parts.append((n[c][finite], v[c][finite]))
        if not np.isfinite(nested.count_loss[c]) or not all(len(v) for _, v in parts):
            continue
        joint = Options(nested.count_nbytes[[c]], nested.count_loss[[c]])
        for n, v in parts:
            joint, _ = combine(joint, Options(n, v))
        per_count.append(joint)
    return union(per_count)[0]


def realistic(rng, n_groups, *, n_layers, n_counts=6, n_options=6):
    """Bytes of ggml formats; losses fall as 4^-bits, with noise; pruning's grow as counts fall."""
    plain, nested = [], []
    for _ in range(n_groups - 3 * n_layers):
        plain.append(Options(*formats(rng, (64 * int(rng.integers(1, 60)), 768), n_options)))
    counts = np.linspace(8, 32, n_counts).astype(int)
    for _ in range(n_layers):
        sensitivity = np.exp(rng.standard_normal())
        parts = [formats(rng, (768, 2048), n_options) for _ in range(3)]
        nested.append(
            Nested(
                tuple(np.outer(counts, n) for n, _ in parts),
                tuple(np.outer((counts / 32) ** 0.5, v) for _, v in parts),
                counts * 4096,
                sensitivity * (1 - counts / 32) ** rng.uniform(1.5, 4) * rng.uniform(0.01, 0.2),
            )
        )
    return plain, nested


def formats(rng, shape, n_options):
    some = [f for f in offered(shape, importance=True) if f.bits < 9]
    some = [some[i] for i in rng.permutation(len(some))[:n_options]]
    bits = np.array([f.bits for f in some])
    noise = np.exp(1.5 * rng.standard_normal() + 0.2 * rng.standard_normal(len(bits)))
    return np.array([f.nbytes(shape) for f in some]), noise * 4**-bits


def capacity_between(rng, plain, nested):
    low, high = floor_and_ceiling(plain, nested)
    return int(low + rng.random() ** 2 * 0.6 * (high - low))


def highs(plain, nested, capacity):
    """One variable per option and per count: the options of a projection sum to their count's.

    HiGHS stops at an absolute gap of 1e-6 (SciPy offers no option): scale the optimum to 1e4.
    """
    loss, nbytes, entries, ones = [], [], [], []

    def variables(sizes, losses):
        first = len(loss)
        nbytes.extend(int(n) for n in sizes)
        loss.extend(float(v) for v in losses)
        return range(first, len(loss))

    def row(total, *terms):
        entries.extend((len(ones), x, sign) for some, sign in terms for x in some)
        ones.append(total)

    for one in plain:
        row(1, (variables(one.nbytes, one.loss), 1))
    for one in nested:
        counts = variables(one.count_nbytes, one.count_loss)
        row(1, (counts, 1))
        for n, v in zip(one.nbytes, one.loss, strict=True):
            for c, z in enumerate(counts):
                row(0, (variables(n[c], v[c]), 1), ([z], -1))
    loss, unit = np.array(loss), int(np.gcd.reduce(nbytes))
    i, j, value = zip(*entries, strict=True)
    matrix = coo_array((value, (i, j)), shape=(len(ones), len(loss))).tocsr()
    limit = LinearConstraint(np.array([nbytes]) / unit, -np.inf, capacity // unit)
    found = milp(
        loss * (1e4 / nested_bound(plain, nested, capacity)),
        integrality=np.ones(len(loss)),
        bounds=(0, 1),
        constraints=[LinearConstraint(matrix, ones, ones), limit],
        options={"mip_rel_gap": 0},
    )
    assert found.status == 0, found.message
    chosen = np.round(found.x) == 1
    assert np.array(nbytes)[chosen].sum() <= capacity
    return float(loss[chosen].sum())


def check(plain, nested, capacity, found):
    """A solution says the truth about itself."""
    taken = [(int(o.nbytes[i]), o.loss[i]) for o, i in zip(plain, found.plain, strict=True)]
    for one, (c, picks) in zip(nested, found.nested, strict=True):
        taken.append((int(one.count_nbytes[c]), one.count_loss[c]))
        parts = zip(one.nbytes, one.loss, picks, strict=True)
        taken += [(int(n[c, i]), v[c, i]) for n, v, i in parts]
    assert found.nbytes == sum(n for n, _ in taken) <= capacity
    assert found.loss == pytest.approx(sum(v for _, v in taken), rel=1e-12, abs=1e-12)


@st.composite
def instances(draw, losses, sizes, *, forbidden=False):
    """Up to three plain and two nested classes, of up to three counts and projections."""

    def table(values, rows, columns):
        return draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))

    plain, nested = [], []
    for _ in range(draw(st.integers(0, 3))):
        n = draw(st.integers(1, 4))
        plain.append(Options(np.array(table(sizes, n, 1)), np.array(table(losses, n, 1))))
    for _ in range(draw(st.integers(0, 2))):
        n_counts = draw(st.integers(1, 3))
        shapes = [(n_counts, draw(st.integers(1, 3))) for _ in range(draw(st.integers(1, 3)))]
        loss = [np.reshape(table(losses, *s), s) for s in shapes]
        count_loss = np.array(table(losses, n_counts, 1))
        if forbidden and n_counts > 1:  # the last count stays whole
            loss[0][draw(st.integers(0, n_counts - 2))] = inf
            count_loss[draw(st.integers(0, n_counts - 2))] = inf
            loss[-1][:, 1:] = inf
        nbytes = [np.reshape(table(sizes, *s), s) for s in shapes]
        nested.append(nested_of(nbytes, loss, table(sizes, n_counts, 1), count_loss))
    return plain, nested


def solved(plain, nested, share):
    low, high = floor_and_ceiling(plain, nested)
    capacity = int(low + share * (high - low))
    return capacity, solve_nested(plain, nested, capacity), brute_force(plain, nested, capacity)


@settings(max_examples=250, deadline=None)
@given(
    instances(EIGHTHS, st.integers(0, 12)) | instances(EIGHTHS, st.integers(0, 3), forbidden=True),
    st.floats(-0.1, 1.1),
)
def test_equals_brute_force_ties_included(instance, share):
    capacity, found, best = solved(*instance, share)
    if found is None:
        assert best is None
        assert nested_bound(*instance, capacity) == inf
    else:
        check(*instance, capacity, found)
        assert found.proven
        assert (found.loss, found.nbytes) == best


@settings(max_examples=150, deadline=None)
@given(
    instances(
        st.floats(-1e9, 1e9, allow_subnormal=False) | st.floats(-1, 1), st.integers(0, 10**13)
    ),
    st.floats(0, 1),
)
def test_equals_brute_force_for_any_losses(instance, share):
    capacity, found, best = solved(*instance, share)
    if best is None:  # the share was rounded below the floor
        assert found is None
        return
    check(*instance, capacity, found)
    terms = [np.abs(o.loss).max() for o in instance[0]]
    for one in instance[1]:
        terms += [np.abs(v).max() for v in (*one.loss, one.count_loss)]
    rounding = 1e-14 * float(sum(terms))
    assert abs(found.loss - best[0]) <= rounding
    assert nested_bound(*instance, capacity) <= best[0] + rounding


@pytest.mark.parametrize("seed", range(50))
def test_equals_highs(seed):
    rng = np.random.default_rng(seed)
    n_layers = int(rng.integers(1, 6))
    plain, nested = realistic(rng, int(rng.integers(3 * n_layers, 81)), n_layers=n_layers)
    capacity = capacity_between(rng, plain, nested)
    found = solve_nested(plain, nested, capacity)
    check(plain, nested, capacity, found)
    assert found.proven
    assert found.loss == pytest.approx(highs(plain, nested, capacity), rel=1e-9)


@pytest.mark.parametrize("seed", range(15))
def test_equals_the_products_of_the_projections(seed):
    rng = np.random.default_rng(seed)
    plain, nested = realistic(rng, 40, n_layers=int(rng.integers(1, 9)), n_counts=9, n_options=10)
    capacity = capacity_between(rng, plain, nested)
    found = solve_nested(plain, nested, capacity)
    check(plain, nested, capacity, found)
    classes = [*plain, *map(enumerated, nested)]
    whole = solve(classes, capacity)
    assert (found.proven, found.nbytes) == (True, whole.nbytes)
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    assert nested_bound(plain, nested, capacity) <= lp_bound(classes, capacity) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_bound_is_the_relaxation_of_the_products(seed):
    rng = np.random.default_rng(seed)
    plain, nested = realistic(rng, 40, n_layers=4)
    low, high = floor_and_ceiling(plain, nested)
    classes = [*plain, *map(enumerated, nested)]
    # every product fits beside the smallest of the others: the relaxations leave nothing out
    least = max(int(np.ptp(c.nbytes)) for c in classes)
    for capacity in (low + least, low + least + (high - low) // 5, high):
        bound = nested_bound(plain, nested, capacity)
        assert bound == pytest.approx(lp_bound(classes, capacity), rel=1e-12)


def test_bound_leaves_out_what_never_fits():
    rng = np.random.default_rng(4)
    for _ in range(50):
        sizes, losses = rng.integers(0, 100, (2, 3, 5)), rng.random((2, 3, 5))
        nested = [
            nested_of([n], [v], [1, 5, 9], [0, 0, 0]) for n, v in zip(sizes, losses, strict=True)
        ]
        low, high = floor_and_ceiling([], nested)
        capacity = int(rng.integers(low, (low + high) // 2))
        whole = lp_bound(list(map(enumerated, nested)), capacity)
        assert nested_bound([], nested, capacity) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("core_size", [CoreSize(first=0), CoreSize(first=500), CoreSize(widest=2)])
def test_no_size_of_the_core_changes_what_is_proven(core_size):
    n_proven = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        plain, nested = realistic(rng, 12, n_layers=int(rng.integers(1, 4)), n_options=1 + seed % 4)
        capacity = capacity_between(rng, plain, nested)
        found = solve_nested(plain, nested, capacity, core_size=core_size)
        check(plain, nested, capacity, found)
        whole = solve([*plain, *map(enumerated, nested)], capacity)
        if found.proven:
            n_proven += 1
            assert found.loss == pytest.approx(whole.loss, rel=1e-12)
        assert found.loss >= whole.loss * (1 - 1e-12)
    assert n_proven == 40 or (core_size.widest == 2 and 0 < n_proven < 40)


def test_excesses_of_counts_count():
    """Counts alone differ: a first core too small for a proof must not claim one."""
    rng = np.random.default_rng(9)
    for _ in range(300):
        classes = [Options(rng.integers(0, 100, 6), rng.random(6)) for _ in range(5)]
        zero = np.zeros((6, 1))
        nested = [nested_of([zero] * 2, [zero] * 2, o.nbytes, o.loss) for o in classes]
        low, high = floor_and_ceiling(classes, [])
        capacity = int(rng.integers(low, high + 1))
        found = solve_nested([], nested, capacity, core_size=CoreSize(first=0))
        whole = solve(classes, capacity)
        assert found.loss == pytest.approx(whole.loss, rel=1e-12)


def test_counts_of_every_size_are_chosen():
    """Else the instances above would not test the choice of a count."""
    chosen = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        plain, nested = realistic(rng, 30, n_layers=4)
        found = solve_nested(plain, nested, capacity_between(rng, plain, nested))
        chosen |= {c for c, _ in found.nested}
    assert chosen == set(range(6))


def test_capacity_at_the_edges():
    plain, nested = realistic(np.random.default_rng(5), 40, n_layers=3)
    low, high = floor_and_ceiling(plain, nested)
    assert solve_nested(plain, nested, low).nbytes == low
    assert solve_nested(plain, nested, low - 1) is None
    assert nested_bound(plain, nested, low - 1) == inf
    best = sum(min(c[1] for c in choices(one)) for one in (*plain, *nested))
    for capacity in (high, 10**30):
        assert solve_nested(plain, nested, capacity).loss == pytest.approx(best)
        assert nested_bound(plain, nested, capacity) == pytest.approx(best)


def test_without_classes_of_a_kind():
    found = solve_nested([], [], 0)
    assert (found.plain, found.nested, found.nbytes, found.loss) == ((), (), 0, 0.0)
    assert solve_nested([], [], -1) is None
    assert nested_bound([], [], 0) == 0.0
    plain, nested = realistic(np.random.default_rng(6), 40, n_layers=4)
    low, high = floor_and_ceiling(plain, [])
    capacity = low + (high - low) // 4
    whole = solve(plain, capacity)
    alone = solve_nested(plain, [], capacity)
    assert (alone.plain, alone.nbytes) == (whole.choice, whole.nbytes)
    assert alone.proven
    low, high = floor_and_ceiling([], nested)
    capacity = low + (high - low) // 4
    whole = solve(list(map(enumerated, nested)), capacity)
    assert solve_nested([], nested, capacity).loss == pytest.approx(whole.loss, rel=1e-12)


def test_a_single_count_and_projection_is_a_plain_class():
    plain, _ = realistic(np.random.default_rng(7), 20, n_layers=0)
    as_nested = [nested_of([o.nbytes[None]], [o.loss[None]], [0], [0.0]) for o in plain]
    low, high = floor_and_ceiling(plain, [])
    for capacity in (low, low + (high - low) // 3, high):
        found = solve_nested(plain[:5], as_nested[5:], capacity)
        whole = solve(plain, capacity)
        assert (*found.plain, *(i for _, (i,) in found.nested)) == whole.choice


def test_a_forbidden_option_is_not_taken():
    one = nested_of([[[1, 2], [1, 2]]], [[[5.0, 1.0], [inf, 3.0]]], [0, 0], [0.0, 0.0])
    assert solve_nested([], [one], 2).nested == ((0, (1,)),)
    assert solve_nested([], [one], 1).nested == ((0, (0,)),)
    pruned = nested_of(one.nbytes, one.loss, one.count_nbytes, [inf, 0.0])
    assert solve_nested([], [pruned], 2).nested == ((1, (1,)),)
    assert solve_nested([], [pruned], 1) is None


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_losses_of_any_magnitude(scale):
    plain, nested = realistic(np.random.default_rng(8), 20, n_layers=2)
    low, high = floor_and_ceiling(plain, nested)
    capacity = low + (high - low) // 3
    found = solve_nested(
        [Options(o.nbytes, o.loss * scale) for o in plain],
        [
            Nested(n.nbytes, tuple(v * scale for v in n.loss), n.count_nbytes, n.count_loss * scale)
            for n in nested
        ],
        capacity,
    )
    assert found.loss == pytest.approx(solve_nested(plain, nested, capacity).loss * scale)


def test_same_input_same_choice():
    plain, nested = realistic(np.random.default_rng(1), 80, n_layers=6)
    capacity = sum(floor_and_ceiling(plain, nested)) // 4
    assert solve_nested(plain, nested, capacity) == solve_nested(plain, nested, capacity)


def test_a_huge_loss_that_cancels_leaves_a_solution():
    one = nested_of([[[1, 9]]], [[[-1e9, -1e9 - 3]]], [0], [1e9])
    plain = [
        Options(np.array([2, 5]), np.array([0.3, 0.1])),
        Options(np.array([7, 0]), np.zeros(2)),
    ]
    for capacity in range(3, 20):
        found = solve_nested(plain, [one], capacity)
        assert found.loss == pytest.approx(brute_force(plain, [one], capacity)[0], abs=1e-6)


def test_losses_linear_in_bytes_end_soon_near_the_bound():
    """All combinations cost the same: the products are too many to tell apart."""
    rng, counts, nested = np.random.default_rng(0), np.arange(10, 29), []
    for _ in range(3):
        nbytes = (np.outer(counts, rng.integers(1, 2000, 20) * 1024),) * 3
        nested.append(Nested(nbytes, tuple(-n / 1e9 for n in nbytes), counts, -counts / 1e9))
    plain = [Options(n := rng.integers(10**5, 10**6, 12), -n / 1e9) for _ in range(10)]
    least = [(n.count_nbytes + sum(v.min(axis=1) for v in n.nbytes)).min() for n in nested]
    capacity = 4 * int(sum(least) + sum(o.nbytes.min() for o in plain))
    found = solve_nested(plain, nested, capacity)
    check(plain, nested, capacity, found)
    bound = nested_bound(plain, nested, capacity)
    assert found.loss == pytest.approx(bound, rel=1e-3)
    assert found.proven == (found.loss == pytest.approx(bound, rel=1e-11))


def test_a_search_cut_short_says_so_and_still_fits():
    plain, nested = realistic(np.random.default_rng(3), 60, n_layers=5)
    low, high = floor_and_ceiling(plain, nested)
    capacity = low + (high - low) // 5
    found = solve_nested(plain, nested, capacity, max_states=1)
    check(plain, nested, capacity, found)
    assert not found.proven
    assert found.loss < nested_bound(plain, nested, capacity) * 1.1


@pytest.mark.parametrize(
    ("nbytes", "loss", "count_nbytes", "count_loss", "says"),
    [
        ([], [], [0], [0.0], "counts x options"),
        ([[[1, 2]]], [[[0.5]]], [0], [0.0], "counts x options"),
        ([[[1], [2]]], [[[0.5], [0.5]]], [0], [0.0], "as many counts"),
        ([[1, 2]], [[0.5, 0.5]], [0, 0], [0.0, 0.0], "counts x options"),
        ([[[-1]]], [[[0.5]]], [0], [0.0], "sizes from 0"),
        ([[[1]]], [[[0.5]]], [-1], [0.0], "sizes from 0"),
        ([[[1]]], [[[np.nan]]], [0], [0.0], "not NaN"),
        ([[[1]]], [[[0.5]]], [0], [-inf], "above -inf"),
        ([[[1]]], [[[inf]]], [0], [0.0], "no count"),
        ([[[1], [1]]], [[[inf], [0.0]]], [0, 0], [0.0, inf], "no count"),
    ],
)
def test_nested_refuses_what_is_no_choice(nbytes, loss, count_nbytes, count_loss, says):
    with pytest.raises(ValueError, match=says):
        nested_of(nbytes, loss, count_nbytes, count_loss)


def test_sizes_are_integers():
    with pytest.raises(ValueError, match="needed integers"):
        Nested((np.array([[1.5]]),), (np.array([[0.5]]),), np.array([0]), np.array([0.0]))
