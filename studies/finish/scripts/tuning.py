"""Tunes a committed allocation without choosing its codes anew; prints losses over those before.

    python studies/finish/scripts/tuning.py --tokens 20480 61440 --kinds norms,routers all

Losses are KL(original || candidate), nats per token, on report documents (`before`, `after`, and
their ratio with a paired bootstrap interval over documents) and on selection documents (ratio).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from allocator.app.study_folder import StudyFolder
from allocator.export.stored import StoredWeights
from allocator.export.tensors import EncodedTensors
from allocator.finishing.relative_changes import KINDS, RelativeChanges
from allocator.finishing.tuning import TuningSettings, tune
from allocator.scoring.scorer import Scorer
from allocator.scoring.swap_model import SwapModel
from allocator.study.intervals import ratio_interval

STUDY = Path(__file__).parents[2] / "reference"


def main():
    """Prints one line per kinds, tokens and rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allocation", type=Path, default=STUDY / "allocations/pick.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20_480, 61_440])
    parser.add_argument("--kinds", nargs="+", default=["norms,routers", "all"])
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=TuningSettings().batch_tokens)
    parser.add_argument("--selection", type=int, default=48, help="documents")
    parser.add_argument("--report", type=int, default=48, help="documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = StudyFolder(STUDY, cache=options.cache, threads=1)
    allocation, importance = study.read_encoded(options.allocation)
    encodings = study.encodings.of(importance, beside=options.allocation)
    source = EncodedTensors(encodings, allocation)
    swap = SwapModel(study.layout, encodings.decoded)
    report = Scorer(swap, study.calibration.report[: options.report], layer_input_bytes=0)
    plain = RelativeChanges(source)
    start = plain.weights(np.zeros(plain.n, np.float32), "start").candidate
    before = report.score(start).kl
    for kinds in options.kinds:
        chosen = KINDS if kinds == "all" else tuple(kinds.split(","))
        for tokens in options.tokens:
            for rate in options.rates or [None]:
                settings = TuningSettings(
                    tokens=tokens, kinds=chosen, rate=rate, batch_tokens=options.batch,
                    seed=options.seed,
                )  # fmt: skip
                since = time.process_time()
                selection = Scorer(swap, study.calibration.selection[: options.selection])
                done = tune(source, study.calibration.search, selection, settings)
                seconds = time.process_time() - since
                weights = StoredWeights(study.layout, allocation, done.tensors, done.digest)
                after = report.score(weights.candidate).kl
                ratio, (low, high) = after.sum() / before.sum(), ratio_interval(after, before)
                checks = " ".join(f"{c.loss / done.before:.3f}@{c.rate:.2g}" for c in done.checks)
                print(
                    f"{kinds} {tokens:,} tokens: report {before.mean():.4f} -> {after.mean():.4f},"
                    f" ratio {ratio:.3f} ({low:.3f}-{high:.3f}), selection "
                    f"{done.after / done.before:.3f}, {seconds:.0f} CPU s; {checks}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
