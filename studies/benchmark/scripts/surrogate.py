"""How well the prediction ranks and measures: random feasible allocations at every budget.

    python studies/benchmark/scripts/surrogate.py [--n 100] [--documents 16]

For each budget of study.toml, `n` random proposals are made feasible (as a study does with a stock
sampler's) and scored on the first documents of the search split; prints rank correlation and ratio of
predicted to measured KL, and appends every point to surrogate.csv (resumable).
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from allocator.app.study_folder import StudyFolder
from allocator.comparison.runs import compare_spec
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.feasibility import make_feasible
from allocator.prediction.solver import solve
from allocator.scoring.scorer import Scorer

HERE = Path(__file__).resolve().parent.parent


def proposals(study_folder, budget, n, near):
    """Random params, repaired; `near` draws factors around the knapsack instead, of that spread."""
    space, surrogate = study_folder.space, study_folder.surrogate
    costs = Costs(space, budget)
    rng = np.random.default_rng(0)
    for _ in range(n):
        if near:
            names = surrogate.multiplied_names
            factors = np.exp(near * rng.standard_normal(len(names)))
            multipliers = dict(zip(names, factors.tolist(), strict=True))
            params = solve(surrogate.multiplied(multipliers), budget)
        else:
            drawn = {k: v[rng.integers(len(v))] for k, v in space.choices.items()}
            params = make_feasible(space, costs, drawn, surrogate.loss_at(space.complete(drawn)))
        yield params


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--target", default="safetensors")
    args = parser.parse_args()
    study_folder = StudyFolder(HERE, target=args.target, threads=1)
    scorer = Scorer(study_folder.profiler.model, study_folder.calibration.search[: args.documents])
    path = HERE / "surrogate.csv"
    done = (
        pd.read_csv(path)
        if path.exists()
        else pd.DataFrame(columns=["target", "weights", "kind", "i"])
    )
    for weights in compare_spec(HERE).budgets:
        for kind, near in (("random", 0.0), ("near", 1.0)):
            have = set(
                done[
                    (done.target == args.target) & (done.weights == weights) & (done.kind == kind)
                ].i
            )
            for i, params in enumerate(
                proposals(study_folder, Budget(weights, "weights"), args.n, near)
            ):
                if i in have:
                    continue
                row = {
                    "target": args.target,
                    "weights": weights,
                    "kind": kind,
                    "i": i,
                    "predicted": study_folder.surrogate.predict(params),
                    "measured": scorer.score(study_folder.space.allocation(params)).kl.mean(),
                }
                done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
                done.to_csv(path, index=False, float_format="%.6g")
            mine = done[
                (done.target == args.target) & (done.weights == weights) & (done.kind == kind)
            ]
            ratio = mine.predicted / mine.measured
            print(
                f"{args.target} {weights * 8 / study_folder.inventory.n_searched_weights:.2f} bits, {len(mine)} {kind}: "
                f"rank correlation {spearmanr(mine.predicted, mine.measured)[0]:.3f}, predicted / measured "
                f"median {ratio.median():.3f}, 5..95 % {ratio.quantile(0.05):.3f}..{ratio.quantile(0.95):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
