"""Which experts stay: rankings, measured single removals, and swaps across the boundary.

    python studies/benchmark/scripts/experts.py

Per MoE layer of the original (nothing quantized): the KL of keeping 18 and 12 of 24 experts by every
ranking; the KL of removing one expert alone ("measured", also as a ranking, and its outliers: super
experts); and swaps between the last kept and the first dropped experts, accepted where they lower the
KL on the search documents. Everything is judged on selection documents. Prints and writes
experts.csv.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from allocator.app.study_folder import StudyFolder
from allocator.decision.search_space import SALIENCIES
from allocator.scoring.candidates import Candidate
from allocator.scoring.scorer import Scorer

HERE = Path(__file__).resolve().parent.parent


class Layers:
    """KL of one layer keeping some experts, everything else the original's."""

    def __init__(self, study_folder, documents):
        self.swap, self.layout = study_folder.profiler.model, study_folder.layout
        self.scorer = Scorer(self.swap, documents, from_original=True)
        self.known = {}

    def kl(self, layer, experts):
        key = layer, tuple(sorted(experts))
        if key not in self.known:
            n = self.layout.inventory.n_experts
            retained = dict.fromkeys(self.layout.layers, tuple(range(n))) | {layer: key[1]}
            self.scorer.ensure_reference(len(self.scorer.documents))
            original = Candidate.original(self.layout)
            self.swap.put(replace(original, retained_experts=retained))
            self.known[key] = float(self.scorer.score_installed().kl.mean())
        return self.known[key]


def swapped(search, layer, ranking, count, *, width, rounds):
    """Greedy swaps between the last `width` kept and the first `width` dropped."""
    kept, dropped = list(ranking[:count]), list(ranking[count:])
    best = search.kl(layer, kept)
    for _ in range(rounds):
        tries = [
            (search.kl(layer, [e for e in kept if e != out] + [into]), out, into)
            for out in kept[-width:]
            for into in dropped[:width]
        ]
        loss, out, into = min(tries)
        if loss >= best:
            break
        best = loss
        kept = [into if e == out else e for e in kept]
        dropped = [out if e == into else e for e in dropped]
    return kept


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--held", type=int, default=24)
    args = parser.parse_args()
    study_folder = StudyFolder(HERE, threads=1)
    saliency = study_folder.profile.saliency
    search = Layers(study_folder, study_folder.calibration.search[: args.documents])
    held = Layers(study_folder, study_folder.calibration.selection[: args.held])
    n = study_folder.inventory.n_experts
    rows = []
    for layer in study_folder.layout.layers:
        alone = np.array(
            [search.kl(layer, [e for e in range(n) if e != gone]) for gone in range(n)]
        )
        ranks = {m: np.array(saliency[m][layer]) for m in SALIENCIES} | {"measured": alone}
        print(
            f"layer {layer}: one expert removed: median {np.median(alone):.5f}, largest {np.sort(alone)[-3:].round(5)} "
            f"(experts {np.argsort(alone)[-3:]}); rank correlation with it: "
            + ", ".join(
                f"{m} {spearmanr(v, alone)[0]:.2f}" for m, v in ranks.items() if m != "measured"
            ),
            flush=True,
        )
        for count in (3 * n // 4, n // 2):
            row = {"layer": layer, "count": count}
            for method, values in ranks.items():
                row[method] = held.kl(layer, np.argsort(-values, kind="stable")[:count].tolist())
            order = np.argsort(-ranks["fisher"], kind="stable").tolist()
            row["fisher + swaps"] = held.kl(
                layer, swapped(search, layer, order, count, width=4, rounds=3)
            )
            rows.append(row)
            print(" ", {k: round(v, 5) for k, v in row.items()}, flush=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(HERE / "experts.csv", index=False, float_format="%.6g")
    print(frame.drop(columns=["layer"]).groupby("count").mean().to_string())


if __name__ == "__main__":
    main()
