"""KL of picks that were calibrated on different texts, on one held-out text.

    python studies/calibration/scripts/measure.py OUT --own calibration.jsonl --held-out validation.jsonl
        [--model DIR] [--weights BYTES] [--trials N] [--documents N] [--cache DIR] [--threads N] [--full]

Makes two studies under OUT, `own` calibrated on --own and `default` on the default text, with equal counts of
documents, windows, trials and the same seed; searches both; scores both picks, unfinished, each with the encoded
weights of its own importance, on the same held-out windows. Prints KL of each, their ratio and its 95 % paired
bootstrap interval over windows, and appends a row to OUT/summary.csv.

The profile is streamed and measures prices on a sixteenth of the rows, which is all that makes it cheap; --full
measures all rows in memory, on the documents that studies take by default.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from allocator import api
from allocator.app.record_weights import record_of, source_of
from allocator.app.study_folder import StudyFolder
from allocator.scoring.documents import interleaved
from allocator.study.intervals import ratio_interval

COUNTS = {
    "statistics_documents": 96, "measured_documents": 4, "curvature_documents": 8, "search_documents": 24,
    "selection_documents": 48,
}  # fmt: skip
FULL_COUNTS = {"statistics_documents": 128, "search_documents": 48, "selection_documents": 64}


def write_study(folder, args, documents):
    lines = [
        "schema = 1",
        f'checkpoint = "{args.model.resolve()}"',
        'target = "gguf"',
        "seed = 0",
        f"trials = {args.trials}",
        "[budget]",
        f"weights = {args.weights}",
        "[calibration]",
        *([f'documents = "{documents.resolve()}"'] if documents else []),
        *(f"{key} = {n}" for key, n in (FULL_COUNTS if args.full else COUNTS).items()),
        *([] if args.full else ["rungs = [8]", "[streamed]", "candidates = 4", "rows = 0.0625"]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.toml").write_text("\n".join(lines) + "\n")


def losses(folder, pick, args, options):
    """KL of a pick per held-out window."""
    study_folder = StudyFolder(folder, **options)
    documents = interleaved(study_folder.calibration.read(args.held_out))[: args.documents]
    record = record_of(pick)
    encodings = study_folder.encodings.of(record.importance, beside=pick)
    source = source_of(study_folder, record, beside=pick, encodings=encodings)
    model = study_folder.scorers.model_with(encodings)
    return np.array(study_folder.scorers.on(documents, model=model).score(source.candidate).kl)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--own", type=Path, required=True, help="text of the model's own kind")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("studies/reference/model"))
    parser.add_argument(
        "--weights", type=int, default=8234496, help="2.25 bits of the reference model"
    )
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--documents", type=int, default=64, help="held-out windows")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    options = {"cache": args.cache or args.out / "cache", "threads": args.threads, "progress": True}
    found = {}
    for name, text in (("own", args.own), ("default", None)):
        write_study(args.out / name, args, text)
        result = api.search(args.out / name, **options)
        found[name] = losses(args.out / name, result.pick, args, options)
        print(name, *result.calibration, f"KL {found[name].mean():.4f}", sep="\n  ", flush=True)
    own, default = found["own"], found["default"]
    low, high = ratio_interval(default, own)
    row = {
        "trials": args.trials, "full": args.full, "windows": len(own), "own": own.mean(),
        "default": default.mean(), "ratio": default.mean() / own.mean(), "low": low, "high": high,
    }  # fmt: skip
    print(f"default over own: {row['ratio']:.3f} ({low:.3f} to {high:.3f})")
    file = args.out / "summary.csv"
    pd.DataFrame([row]).to_csv(file, mode="a", header=not file.exists(), index=False)


if __name__ == "__main__":
    main()
