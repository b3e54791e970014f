"""Score every mix that a skilled person would write, for the hull that records are held against.

    python studies/finish/scripts/hull.py STUDY RECORD [RECORD ...] [--text FILE] [--pruned]
        [--within .6 1.6] [--csv hull.csv] [--over over.csv] [--cache DIR] [--target T] [--threads N]

Mixes whose bytes are within these shares of some record's, encoded with the first record's importance, are
scored on 8 report documents; those that are at most 5 % above the lower hull of log loss over bytes there
again on 48 report documents and, with --text, on 48 windows of a text file that nothing was calibrated on.
With --pruned also mixes whose layers retain fewer experts, which no other tool writes. Prints and writes
the points (--csv), and each record over the hull at its bytes (--over), by split, finished too if it names
finished weights.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from measure import opened

from allocator.app.record_weights import record_of, source_of
from allocator.decision.baselines import baselines
from allocator.decision.front import Point, baseline_loss, lower_hull
from allocator.errors import BudgetError

N_SCREENED = 8
NEAR = 1.05


def mixes_near(study_folder, sizes, pruned, within):
    """Mixes by name, with their encoded bytes."""
    layout, inventory = study_folder.layout, study_folder.inventory
    if pruned:
        rankings = study_folder.space.rankings
    else:
        rankings = {layer: tuple(range(inventory.n_experts)) for layer in layout.layers}
    known = dict(baselines(layout, rankings, pruned=pruned, skilled=True))
    counted = {name: (a, a.nbytes(layout).encoded) for name, a in known.items()}
    return {
        name: (allocation, nbytes)
        for name, (allocation, nbytes) in counted.items()
        if any(within[0] * size < nbytes < within[1] * size for size in sizes)
    }


def hull_at(points, nbytes):
    """The hull's loss; infinite outside of it, where every point is kept."""
    try:
        return baseline_loss(points, nbytes)
    except BudgetError:
        return float("inf")


def over_hull(own, mixes, nbytes, n=1000):
    """The hull's loss, and the paired bootstrap interval of `own`, `(documents,)`, over it."""
    rng = np.random.default_rng(0)

    def hull_of(documents):
        return hull_at([Point(p.name, p.nbytes, kl[documents].mean()) for p, kl in mixes], nbytes)

    chosen = rng.integers(0, len(own), (n, len(own)))
    ratios = [own[documents].mean() / hull_of(documents) for documents in chosen]
    return hull_of(np.arange(len(own))), *np.quantile(ratios, [0.025, 0.975])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--pruned", action="store_true")
    parser.add_argument("--within", type=float, nargs=2, default=(0.6, 1.6))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--over", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    study_folder, encodings, scorers = opened(
        args.study, args.records[0],
        text=args.text, cache=args.cache, threads=args.threads, target=args.target,
    )  # fmt: skip
    layout, records = study_folder.layout, {path: record_of(path) for path in args.records}
    sizes = [r.bytes["encoded"] for r in records.values()]
    near = mixes_near(study_folder, sizes, args.pruned, args.within)
    rough = [
        Point(name, n, float(scorers["report"].score(a, 0, N_SCREENED).kl.mean()))
        for name, (a, n) in near.items()
    ]
    print(f"{len(rough)} mixes screened", flush=True)
    on_hull = {point.name for point in lower_hull(rough)}
    kept = [p for p in rough if p.name in on_hull or p.loss <= NEAR * hull_at(rough, p.nbytes)]
    kl = {p.name: {s: x.score(near[p.name][0]).kl for s, x in scorers.items()} for p in kept}
    rows = [
        {
            "target": layout.target,
            "mix": p.name,
            "bytes": p.nbytes,
            "bits": round(p.nbytes * 8 / study_folder.inventory.n_searched_weights, 3),
            **{split: kl[p.name][split].mean() for split in scorers},
        }
        for p in sorted(kept, key=lambda p: -p.nbytes)
    ]
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.4f"), flush=True)
    over = []
    for path, record in records.items():
        named = {"unfinished": record.unfinished} | (
            {"finished": record} if record.finished else {}
        )
        for (part, one), (split, scorer) in product(named.items(), scorers.items()):
            source = source_of(study_folder, one, beside=path, encodings=encodings)
            own = scorer.score(source.candidate).kl
            mixes = [(p, kl[p.name][split]) for p in kept]
            loss, low, high = over_hull(own, mixes, record.bytes["encoded"])
            over.append(
                {
                    "target": layout.target,
                    "bits": round(record.effective_bits, 3),
                    "allocation": path.stem,
                    "split": split,
                    "pruned": args.pruned,
                    "part": part,
                    "hull": loss,
                    "loss": own.mean(),
                    "ratio": own.mean() / loss,
                    "low": low,
                    "high": high,
                }
            )
    print(pd.DataFrame(over).to_string(index=False, float_format="%.4f"), flush=True)
    for path, new in ((args.csv, rows), (args.over, over)):
        if path is not None:
            known = pd.read_csv(path) if path.is_file() else pd.DataFrame()
            pd.concat([known, pd.DataFrame(new)]).to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
