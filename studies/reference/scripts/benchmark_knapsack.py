"""Times the knapsack on instances of realistic shape, against HiGHS where that is feasible.

    python studies/reference/scripts/benchmark_knapsack.py [--highs-seconds 60] [--nested]

Bytes are those of the offered ggml formats for classes of different shapes; losses are a random
sensitivity per class times 4^-bits with noise. A composite class is a layer's retained count x
formats of gate, up and down, enumerated. A nested layer is the same for `solve_nested`, without
that. `gap` is loss over the linear bound, relative (nested cases: % of the loss).
"""

import argparse
import time

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from allocator.formats import offered
from allocator.prediction.knapsack import Options, combine, lp_bound, solve, union
from allocator.prediction.nested_knapsack import Nested, nested_bound, solve_nested

SHAPES = [
    (2048, 2048),
    (512, 2048),
    (6144, 2048),
    (2048, 768),
    (768, 2048),
    (1024, 5120),
    (64, 768),
]


def format_options(rng, shape, *, sensitivity, noise=0.1):
    formats = offered(shape, importance=True)[-12:]
    nbytes = np.array([f.nbytes(shape) for f in formats])
    bits = np.array([f.bits for f in formats])
    loss = sensitivity * 4.0**-bits * np.exp(noise * rng.standard_normal(len(bits)))
    return Options(nbytes, loss)


def simple_class(rng):
    shape = SHAPES[rng.integers(len(SHAPES))]
    shape = (shape[0] * int(rng.integers(1, 5)), shape[1])
    return format_options(rng, shape, sensitivity=np.exp(1.5 * rng.standard_normal()))


def composite_class(rng, n_experts=128):
    layer = np.exp(rng.standard_normal())
    per_count = []
    curve = rng.uniform(1.5, 4)
    for count in range(n_experts // 4, n_experts + 1, 2):
        parts = [
            format_options(rng, (count, *shape), sensitivity=layer * s)
            for shape, s in (((768, 2048), 1.0), ((768, 2048), 1.3), ((2048, 768), 2.5))
        ]
        both, _ = combine(parts[0], parts[1])
        all3, _ = combine(both, parts[2])
        pruned = layer * 0.2 * (1 - count / n_experts) ** curve
        per_count.append(Options(all3.nbytes, all3.loss + pruned))
    return union(per_count)[0]


def nested_layer(rng, counts, n_options):
    """Twelve formats per projection; beyond them mixes, a share of the experts in each of two."""
    layer, kept = np.exp(rng.standard_normal()), counts[:, None] / counts.max()
    nbytes, loss = [], []
    for shape, s in (((768, 2048), 1.0), ((768, 2048), 1.3), ((2048, 768), 2.5)):
        one = format_options(rng, shape, sensitivity=layer * s)
        a, b = rng.integers(len(one.loss), size=(2, n_options - 12))
        share = rng.uniform(0.1, 0.9, n_options - 12)
        in_a = np.round(share * counts[:, None]).astype(int)
        mixed = in_a * one.nbytes[a] + (counts[:, None] - in_a) * one.nbytes[b]
        gain = rng.uniform(0.8, 1.0, n_options - 12)  # the less important experts in the smaller
        between = gain * (share * one.loss[a] + (1 - share) * one.loss[b])
        nbytes.append(np.hstack([np.outer(counts, one.nbytes), mixed]))
        loss.append(kept * np.append(one.loss, between))
    pruned = layer * 0.2 * (1 - kept[:, 0]) ** rng.uniform(1.5, 4)
    return Nested(tuple(nbytes), tuple(loss), counts * 2048 * 4, pruned)


def nested_capacity(plain, nested, share):
    """Between the smallest of everything and what has the least loss."""
    low = sum(int(o.nbytes.min()) for o in plain)
    high = sum(int(o.nbytes[o.loss.argmin()]) for o in plain)
    for n in nested:
        low += int((n.count_nbytes + sum(b.min(axis=1) for b in n.nbytes)).min())
        high += int(n.count_nbytes[-1])
        high += sum(int(b[-1, v[-1].argmin()]) for b, v in zip(n.nbytes, n.loss, strict=True))
    return low + int(share * (high - low))


def capacity_between(classes, share):
    low = sum(int(c.nbytes.min()) for c in classes)
    high = sum(int(c.nbytes[c.loss.argmin()]) for c in classes)
    return low + int(share * (high - low))


def highs(classes, capacity, seconds):
    """Loss that HiGHS finds, and whether it claims the optimum within the capacity.

    It stops at an absolute gap of 1e-6, so the optimum is scaled to about 1e4; it oversteps a
    constraint by up to 1e-6, so bytes are whole units.
    """
    owner = np.repeat(np.arange(len(classes)), [len(c.loss) for c in classes])
    nbytes = np.concatenate([c.nbytes for c in classes])
    loss = np.concatenate([c.loss for c in classes])
    unit = np.gcd.reduce(nbytes)
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    got = milp(
        loss * (1e4 / lp_bound(classes, capacity)),
        integrality=np.ones(len(loss)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((nbytes // unit)[None].astype(float), -np.inf, capacity // unit),
        ],
        options={"mip_rel_gap": 0, "time_limit": seconds},
    )
    if got.x is None:
        return np.nan, False
    chosen = np.round(got.x) == 1
    return float(loss[chosen].sum()), got.status == 0 and nbytes[chosen].sum() <= capacity


CASES = {
    "80 x 12": (80, 0),
    "500 x 12": (500, 0),
    "2000 x 12": (2000, 0),
    "60 composite": (0, 60),
    "2000 x 12 + 60 composite": (2000, 60),
}

NESTED_CASES = {  # plain classes of 12 options, layers, counts, options per projection
    "45 x 12 + 5 x 19 x 3 x 40": (45, 5, np.arange(28, 65, 2), 40),
    "1820 x 12 + 60 x 256 x 3 x 12": (1820, 60, np.arange(1, 257), 12),
}


def time_nested(repeats=3):
    print(f"{'nested case':32}{'share':>6}{'seconds':>9}{'proven':>8}{'gap, %':>10}{'counts':>8}")
    for name, (n_plain, n_layers, counts, n_options) in NESTED_CASES.items():
        rng = np.random.default_rng(0)
        for share in (0.02, 0.1, 0.3, 0.6, 0.9):
            plain = [simple_class(rng) for _ in range(n_plain)]
            nested = [nested_layer(rng, counts, n_options) for _ in range(n_layers)]
            capacity = nested_capacity(plain, nested, share)
            took = []
            for _ in range(repeats):
                began = time.perf_counter()
                found = solve_nested(plain, nested, capacity)
                took.append(time.perf_counter() - began)
            gap = 100 * (1 - nested_bound(plain, nested, capacity) / found.loss)
            line = f"{name:32}{share:6}{np.median(took):9.4f}{found.proven!s:>8}{gap:10.1e}"
            print(f"{line}{len({c for c, _ in found.nested}):8}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--highs-seconds", type=float, default=60, help="0 leaves HiGHS out")
    parser.add_argument("--nested", action="store_true", help="only the nested cases")
    args = parser.parse_args()
    time_nested()
    if args.nested:
        return
    print(f"{'case':26}{'share':>6}{'points':>8}{'seconds':>9}{'proven':>8}{'gap':>9}   HiGHS")
    for name, (n_simple, n_composite) in CASES.items():
        rng = np.random.default_rng(0)
        for share in (0.1, 0.3, 0.6):
            classes = [simple_class(rng) for _ in range(n_simple)]
            classes += [composite_class(rng) for _ in range(n_composite)]
            capacity = capacity_between(classes, share)
            began = time.perf_counter()
            found = solve(classes, capacity)
            took = time.perf_counter() - began
            bound = lp_bound(classes, capacity)
            line = f"{name:26}{share:6}{sum(len(c.loss) for c in classes):8}{took:9.3f}"
            line += f"{found.proven!s:>8}{found.loss / bound - 1:9.1e}   "
            if args.highs_seconds:
                began = time.perf_counter()
                other, done = highs(classes, capacity, args.highs_seconds)
                line += f"{time.perf_counter() - began:.2f} s, {'optimal' if done else 'stopped'}, "
                line += f"loss {other / found.loss - 1:+.1e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
