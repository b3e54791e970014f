import itertools
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from allocator.formats import offered
from allocator.prediction.knapsack import Options, combine, lp_bound, pareto, solve, union

SHAPES = [(2048, 2048), (512, 2048), (6144, 2048), (2048, 768), (1024, 5120), (64, 256)]


def options(*pairs):
    nbytes, loss = zip(*pairs, strict=True)
    return Options(np.array(nbytes), np.array(loss, dtype=float))


def realistic(rng, n_classes):
    """Bytes of the offered ggml formats; losses of random sensitivity, falling as 4^-bits."""
    classes = []
    for _ in range(n_classes):
        rows, columns = SHAPES[rng.integers(len(SHAPES))]
        shape = (rows * int(rng.integers(1, 5)), columns)
        formats = offered(shape, importance=True)
        bits = np.array([f.bits for f in formats])
        loss = np.exp(1.5 * rng.standard_normal() + 0.3 * rng.standard_normal(len(bits))) / 4**bits
        classes.append(Options(np.array([f.nbytes(shape) for f in formats]), loss))
    return classes


def floor_and_ceiling(classes):
    return sum(int(c.nbytes.min()) for c in classes), sum(int(c.nbytes.max()) for c in classes)


def brute_force(classes, capacity):
    """Least (loss, bytes) over all choices that fit."""
    fit = []
    for choice in itertools.product(*(range(len(c.loss)) for c in classes)):
        nbytes = sum(int(c.nbytes[i]) for c, i in zip(classes, choice, strict=True))
        if nbytes <= capacity:
            loss = sum(float(c.loss[i]) for c, i in zip(classes, choice, strict=True))
            fit.append((loss, nbytes))
    return min(fit, default=None)


def as_program(classes, capacity):
    """The 0/1 program, bytes divided by their greatest common divisor."""
    owner = np.repeat(np.arange(len(classes)), [len(c.loss) for c in classes])
    nbytes = np.concatenate([c.nbytes for c in classes])
    unit = max(int(np.gcd.reduce(nbytes)), 1)
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    loss = np.concatenate([c.loss for c in classes])
    return loss, one_each, (nbytes // unit)[None].astype(float), capacity // unit


def highs(classes, capacity):
    """HiGHS stops at an absolute gap of 1e-6 (SciPy offers no option): scale the optimum to 1e4."""
    loss, one_each, nbytes, limit = as_program(classes, capacity)
    found = milp(
        loss * (1e4 / lp_bound(classes, capacity)),
        integrality=np.ones(len(loss)),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(nbytes, -np.inf, limit)],
        options={"mip_rel_gap": 0},
    )
    assert found.status == 0, found.message
    chosen = np.round(found.x) == 1
    assert nbytes[0, chosen].sum() <= limit
    return float(loss[chosen].sum())


def check(classes, capacity, found):
    """A solution says the truth about itself."""
    chosen = list(zip(classes, found.choice, strict=True))
    assert found.nbytes == sum(int(c.nbytes[i]) for c, i in chosen) <= capacity
    assert found.loss == pytest.approx(sum(c.loss[i] for c, i in chosen), rel=1e-12, abs=1e-12)


def instances(losses):
    sizes = st.one_of(st.integers(0, 12), st.integers(0, 10**13))
    one = st.lists(st.tuples(sizes, losses), min_size=1, max_size=5).map(lambda p: options(*p))
    return st.lists(one, min_size=0, max_size=5)


# Sums of eighths are exact, so that ties are ties for brute force and for us.
@settings(max_examples=200, deadline=None)
@given(instances(st.integers(-40, 40).map(lambda n: n / 8)), st.floats(-0.1, 1.1))
def test_equals_brute_force_ties_included(classes, share):
    low, high = floor_and_ceiling(classes)
    capacity = int(low + share * (high - low))
    found, best = solve(classes, capacity), brute_force(classes, capacity)
    if found is None:
        assert best is None
        assert lp_bound(classes, capacity) == inf
    else:
        check(classes, capacity, found)
        assert found.proven
        assert (found.loss, found.nbytes) == best


@settings(max_examples=200, deadline=None)
@given(instances(st.floats(-1e9, 1e9, allow_subnormal=False) | st.floats(-1, 1)), st.floats(0, 1))
def test_equals_brute_force_for_any_losses(classes, share):
    low, high = floor_and_ceiling(classes)
    capacity = int(low + share * (high - low))
    found, best = solve(classes, capacity), brute_force(classes, capacity)
    if best is None:  # the share was rounded below the floor
        assert found is None
        return
    check(classes, capacity, found)
    rounding = 1e-14 * sum(float(np.abs(c.loss).max()) for c in classes)
    assert abs(found.loss - best[0]) <= rounding
    assert lp_bound(classes, capacity) <= best[0] + rounding


def test_equals_brute_force_where_sizes_often_coincide():
    rng = np.random.default_rng(4)
    for _ in range(600):
        n_classes = int(rng.integers(3, 6))
        classes = [Options(rng.integers(0, 6, 4), rng.random(4)) for _ in range(n_classes)]
        low, high = floor_and_ceiling(classes)
        capacity = int(rng.integers(low, high + 1))
        assert solve(classes, capacity).loss == pytest.approx(
            brute_force(classes, capacity)[0], rel=1e-12
        )


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_losses_of_any_magnitude(scale):
    rng = np.random.default_rng(0)
    plain = [Options(rng.integers(0, 100, 4), rng.random(4)) for _ in range(5)]
    capacity = sum(floor_and_ceiling(plain)) // 3
    scaled = [replace(c, loss=c.loss * scale) for c in plain]
    found = solve(scaled, capacity)
    assert found.loss == pytest.approx(brute_force(plain, capacity)[0] * scale, rel=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_equals_highs(seed):
    rng = np.random.default_rng(seed)
    classes = realistic(rng, int(rng.integers(2, 81)))
    low, high = floor_and_ceiling(classes)
    capacity = int(low + rng.random() ** 2 * 0.6 * (high - low))
    found = solve(classes, capacity)
    check(classes, capacity, found)
    assert found.proven
    assert found.loss == pytest.approx(highs(classes, capacity), rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_equals_highs_when_every_class_has_the_same_sizes(seed):
    rng = np.random.default_rng(seed)
    nbytes = np.array([f.nbytes((256, 256)) for f in offered((256, 256), importance=True)])
    bits = nbytes * 8 / 65536
    classes = [Options(nbytes, rng.integers(1, 4) * 4.0**-bits) for _ in range(60)]
    capacity = int(nbytes.min() * 60 * rng.uniform(1, 3))
    assert solve(classes, capacity).loss == pytest.approx(highs(classes, capacity), rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_lp_bound_equals_highs_relaxation(seed):
    rng = np.random.default_rng(seed)
    classes = realistic(rng, 30)
    low, _ = floor_and_ceiling(classes)
    # every option fits beside the smallest of the others: no option is left out of our relaxation
    capacity = low + max(int(np.ptp(c.nbytes)) for c in classes) * int(rng.integers(1, 10))
    loss, one_each, nbytes, limit = as_program(classes, capacity)
    bound = lp_bound(classes, capacity)
    relaxed = linprog(
        loss / bound, A_ub=nbytes, b_ub=limit, A_eq=one_each, b_eq=np.ones(30), bounds=(0, 1)
    )
    assert relaxed.fun == pytest.approx(1, rel=1e-9)
    assert bound <= solve(classes, capacity).loss


def test_capacity_at_the_edges():
    classes = realistic(np.random.default_rng(5), 40)
    low, high = floor_and_ceiling(classes)
    smallest = tuple(int(c.nbytes.argmin()) for c in classes)
    assert solve(classes, low).choice == smallest
    assert solve(classes, low).nbytes == low
    assert solve(classes, low - 1) is None
    assert solve(classes, -1) is None
    assert lp_bound(classes, low - 1) == inf
    best = tuple(int(c.loss.argmin()) for c in classes)
    for capacity in (high, high + 1, 10**30):
        assert solve(classes, capacity).choice == best
        assert lp_bound(classes, capacity) == pytest.approx(solve(classes, capacity).loss)


def test_no_classes_cost_nothing():
    found = solve([], 0)
    assert (found.choice, found.nbytes, found.loss, found.proven) == ((), 0, 0.0, True)
    assert solve([], -1) is None
    assert lp_bound([], 0) == 0.0


def test_more_bytes_at_the_same_loss_are_never_taken():
    classes = [options((9, 1.0), (3, 1.0), (5, 1.0)), options((4, 0.0), (2, 0.5), (7, -0.0))]
    assert solve(classes, 100).choice == (1, 0)
    assert solve(classes, 6).choice == (1, 1)


def test_same_input_same_choice():
    classes = realistic(np.random.default_rng(1), 80)
    capacity = sum(floor_and_ceiling(classes)) // 4
    assert solve(classes, capacity) == solve(classes, capacity)


def correlated(seed, n_classes=60):
    """Loss falls by one per byte, in steps of hardly comparable sizes: a subset-sum in disguise."""
    rng = np.random.default_rng(seed)
    sizes = [np.append(0, rng.integers(10**11, 10**12, 5)) for _ in range(n_classes)]
    classes = [Options(n, 1 - n / 1e12 - 0.02 * (n > 0)) for n in sizes]
    return classes, int(sum(int(n.max()) for n in sizes) * 0.37)


def test_a_search_cut_short_says_so_and_still_fits():
    classes, capacity = correlated(0)
    found = solve(classes, capacity, max_states=50)
    check(classes, capacity, found)
    assert not found.proven
    assert lp_bound(classes, capacity) <= found.loss <= lp_bound(classes, capacity) + 0.1


def test_pareto_is_what_nothing_matches():
    rng = np.random.default_rng(2)
    for _ in range(50):
        nbytes, loss = rng.integers(0, 9, 12), rng.integers(0, 9, 12) / 2
        points = sorted(set(zip(nbytes.tolist(), loss.tolist(), strict=True)))
        best = [
            p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
        ]
        keep = pareto(nbytes, loss)
        assert list(zip(nbytes[keep].tolist(), loss[keep].tolist(), strict=True)) == best


def test_composite_classes_have_the_optimum_of_their_parts():
    """Retained count x formats of three projections, as one class per layer."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        layers = []  # layer -> count -> (loss of pruning, three projections)
        for _ in range(2):
            counts = []
            for kept in (2, 3, 4):
                parts = [
                    Options(kept * np.array([3, 5, 8]), rng.integers(0, 64, 3) / 8)
                    for _ in range(3)
                ]
                counts.append((float(rng.integers(0, 8)), parts))
            layers.append(counts)
        low = 2 * 3 * 2 * 3
        capacity = int(rng.integers(low, 3 * low))

        classes, made_of = [], []
        for counts in layers:
            per_count, inner = [], []
            for pruned, (gate, up, down) in counts:
                pair, pair_of = combine(gate, up)
                whole, whole_of = combine(pair, down)
                per_count.append(replace(whole, loss=whole.loss + pruned))
                inner.append([(*pair_of[i], j) for i, j in whole_of])
            joined, source = union(per_count)
            classes.append(joined)
            made_of.append([(k, inner[k][i]) for k, i in source])
        found = solve(classes, capacity)

        loss, nbytes = 0.0, 0
        for counts, made, choice in zip(layers, made_of, found.choice, strict=True):
            count, formats = made[choice]
            pruned, parts = counts[count]
            loss += pruned + sum(p.loss[f] for p, f in zip(parts, formats, strict=True))
            nbytes += sum(p.nbytes[f] for p, f in zip(parts, formats, strict=True))
        assert (loss, nbytes) == (found.loss, found.nbytes)
        layer_choices = [
            [
                (pruned + sum(ls), sum(bs))
                for pruned, parts in counts
                for ls, bs in zip(
                    itertools.product(*(p.loss.tolist() for p in parts)),
                    itertools.product(*(p.nbytes.tolist() for p in parts)),
                    strict=True,
                )
            ]
            for counts in layers
        ]
        best = min(
            (a[0] + b[0], a[1] + b[1])
            for a, b in itertools.product(*layer_choices)
            if a[1] + b[1] <= capacity
        )
        assert (loss, nbytes) == best


@pytest.mark.parametrize(
    ("nbytes", "loss", "says"),
    [
        ([], [], "at least one option"),
        ([1, 2], [0.5], "one loss per option"),
        ([1.5], [0.5], "one integer"),
        ([-1], [0.5], "sizes from 0"),
        ([1], [np.nan], "finite losses"),
        ([1], [inf], "finite losses"),
    ],
)
def test_options_refuse_what_is_no_option(nbytes, loss, says):
    with pytest.raises(ValueError, match=says):
        Options(np.array(nbytes), np.array(loss))
