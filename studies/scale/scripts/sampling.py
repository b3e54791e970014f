"""How good a profile from a share of the rows is: the knapsack that it leads to, measured.

    python studies/scale/scripts/sampling.py [STUDY] [--rows 1 0.25 0.0625 0.015625] [--csv FILE]

For every share of rows, the streamed profile of the study's model (minutes for the reference), then
the exact solution under several budgets, scored with the model in memory on the selection split,
beside the solution of the profile that is measured in memory. Printed: KL, its ratio to the latter,
and what the profile predicted over what was measured.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from allocator.app.study_folder import StudyFolder
from allocator.decision.budget import Budget
from allocator.prediction.solver import solve
from allocator.prediction.surrogate import from_profile
from allocator.profiling.streamed_profiler import StreamedProfiler
from allocator.scoring.scorer import mean

BITS = (3.0, 2.25, 1.75)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("studies/reference"))
    parser.add_argument("--rows", type=float, nargs="+", default=[1, 1 / 4, 1 / 16, 1 / 64])
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    study_folder = StudyFolder(given.study)
    rows, whole = [], {}
    for share in (None, *given.rows):
        began = time.perf_counter()
        profiler = study_folder.profiler
        if share is not None:
            inputs = replace(profiler.inputs, sampled_rows=share)
            profiler = StreamedProfiler(inputs, study_folder.cache, threads=study_folder.threads)
        profile = profiler.profile()
        seconds = time.perf_counter() - began
        surrogate = from_profile(profile, profiler.space(study_folder.search_space))
        for bits in BITS:
            nbytes = int(bits / 8 * study_folder.inventory.n_searched_weights)
            params = solve(surrogate, Budget(nbytes, "weights"))
            allocation = surrogate.space.allocation(params)
            scorer = study_folder.scorers.selection
            kl = mean(scorer.score(allocation).kl, scorer.documents)
            whole.setdefault(bits, kl)
            row = {"rows": share or "in memory", "bits": bits, "kl": kl, "ratio": kl / whole[bits]}
            row |= {"predicted": surrogate.predict(params) / kl, "seconds": seconds}
            print(row, flush=True)
            rows.append(row)
    frame = pd.DataFrame(rows)
    print(frame.to_string(index=False))
    if given.csv:
        frame.to_csv(given.csv, index=False)


if __name__ == "__main__":
    main()
