"""Held-out KL of finished allocations over that of the same allocations unfinished.

    python studies/finish/scripts/measure.py STUDY RECORD [RECORD ...] [--text FILE] [--part all]
        [--csv summary.csv] [--model reference] [--cache DIR] [--threads N]

Each RECORD names finished weights (`allocator finish`). Unfinished and finished weights are scored by one
model in this run, on 48 report documents of the study and, with --text, on 48 windows of a text file that
nothing was calibrated on. Prints and appends rows: model, target, bits, split, part, ratio, and its 95 %
paired bootstrap interval over documents.
"""

import argparse
from pathlib import Path

import pandas as pd

from allocator.app.record_weights import record_of, source_of
from allocator.app.study_folder import StudyFolder
from allocator.comparison.table import interval
from allocator.scoring.documents import interleaved

N_DOCUMENTS = 48


def rows_of(study_folder, scorers, path, *, model, part):
    """Scores one record, unfinished and finished, on every split."""
    record = record_of(path)
    if record is None or record.finished is None:
        raise SystemExit(f"{path}: names no finished weights; run `allocator finish` first")
    encodings = study_folder.encodings.of(record.importance, beside=path)
    sources = [
        source_of(study_folder, r, beside=path, encodings=encodings)
        for r in (record.unfinished, record)
    ]
    for split, scorer in scorers.items():
        before, after = (scorer.score(source.candidate).kl for source in sources)
        low, high = interval(after, before)
        yield {
            "model": model,
            "target": record.decision.target,
            "bits": round(record.effective_bits, 3),
            "allocation": path.stem,
            "split": split,
            "part": part,
            "unfinished": before.mean(),
            "finished": after.mean(),
            "ratio": after.mean() / before.mean(),
            "low": low,
            "high": high,
            "documents": len(before),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--part", default="all", help="what was finished, for the column")
    parser.add_argument("--model", default="reference", help="for the column")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    options = {"cache": args.cache, "threads": args.threads, "target": args.target}
    study_folder = StudyFolder(args.study, **{k: v for k, v in options.items() if v is not None})
    splits = {"report": study_folder.calibration.report[:N_DOCUMENTS]}
    if args.text is not None:
        splits["text"] = interleaved(study_folder.calibration.read(args.text))[:N_DOCUMENTS]
    encodings = study_folder.encodings.of(
        record_of(args.records[0]).importance, beside=args.records[0]
    )
    model = study_folder.scorers.model_with(encodings)
    scorers = {name: study_folder.scorers.on(docs, model=model) for name, docs in splits.items()}
    rows = []
    for path in args.records:
        rows += rows_of(study_folder, scorers, path, model=args.model, part=args.part)
        print(pd.DataFrame(rows[-len(scorers) :]).to_string(index=False, float_format="%.4f"))
    if args.csv is not None:
        known = pd.read_csv(args.csv) if args.csv.is_file() else pd.DataFrame()
        pd.concat([known, pd.DataFrame(rows)]).to_csv(args.csv, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
