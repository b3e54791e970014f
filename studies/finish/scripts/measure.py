"""Held-out KL of finished allocations over that of the same allocations unfinished.

    python studies/finish/scripts/measure.py STUDY RECORD [RECORD ...] [--text FILE] [--part all]
        [--between MIX MIX] [--csv summary.csv] [--model reference] [--cache DIR] [--threads N]

Each RECORD names finished weights (`allocator finish`). Unfinished and finished weights are scored by one
model in this run, on 48 report documents of the study and, with --text, on 48 windows of a text file that
nothing was calibrated on. Prints and appends rows: model, target, bits, split, part, ratio, and its 95 %
paired bootstrap interval over documents.

With --between, two finished mixes of fewer and of more bytes, further rows hold the finished record against
what lies between these at its bytes, log loss linear in encoded bytes: `over mixes` unfinished, `over
finished mixes` finished. Their column `unfinished` is the mixes' loss.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from allocator.app.record_weights import record_of, source_of
from allocator.app.study_folder import StudyFolder
from allocator.scoring.documents import interleaved
from allocator.study.intervals import ratio_interval as interval

N_DOCUMENTS = 48


def losses_of(study_folder, scorers, path):
    """Scores one record: it, and its losses per document, unfinished and finished, by split."""
    record = record_of(path)
    if record is None or record.finished is None:
        raise SystemExit(f"{path}: names no finished weights; run `allocator finish` first")
    encodings = study_folder.encodings.of(record.importance, beside=path)
    sources = [
        source_of(study_folder, r, beside=path, encodings=encodings)
        for r in (record.unfinished, record)
    ]
    losses = {
        split: tuple(scorer.score(source.candidate).kl for source in sources)
        for split, scorer in scorers.items()
    }
    return record, losses


def opened(study, first, *, text, **options):
    """Opens a study under a record's importance: it, its encodings, and scorers by split."""
    study_folder = StudyFolder(study, **{k: v for k, v in options.items() if v is not None})
    splits = {"report": study_folder.calibration.report[:N_DOCUMENTS]}
    if text is not None:
        splits["text"] = interleaved(study_folder.calibration.read(text))[:N_DOCUMENTS]
    encodings = study_folder.encodings.of(record_of(first).importance, beside=first)
    model = study_folder.scorers.model_with(encodings)
    scorers = {name: study_folder.scorers.on(docs, model=model) for name, docs in splits.items()}
    return study_folder, encodings, scorers


def row(record, path, split, part, model, before, after, low, high):
    """A row of the table; `before` and `after` are means."""
    return {
        "model": model,
        "target": record.decision.target,
        "bits": round(record.effective_bits, 3),
        "allocation": path.stem,
        "split": split,
        "part": part,
        "unfinished": before,
        "finished": after,
        "ratio": after / before,
        "low": low,
        "high": high,
        "documents": N_DOCUMENTS,
    }


def between(smaller, larger, share):
    """The loss between two mixes, `(..., documents)` to `(...)`: the mean logs' weighted mean."""
    return np.exp((1 - share) * np.log(smaller.mean(-1)) + share * np.log(larger.mean(-1)))


def against(after, smaller, larger, share, n=2000):
    """The mixes' loss at its bytes, and the paired bootstrap interval of `after` over that."""
    chosen = np.random.default_rng(0).integers(0, len(after), (n, len(after)))
    ratios = after[chosen].mean(-1) / between(smaller[chosen], larger[chosen], share)
    return float(between(smaller, larger, share)), *np.quantile(ratios, [0.025, 0.975])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--part", default="all", help="what was finished, for the column")
    parser.add_argument("--between", type=Path, nargs=2, help="two finished mixes")
    parser.add_argument("--model", default="reference", help="for the column")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    study_folder, _, scorers = opened(
        args.study, args.records[0],
        text=args.text, cache=args.cache, threads=args.threads, target=args.target,
    )  # fmt: skip
    mixes = [losses_of(study_folder, scorers, path) for path in args.between or ()]
    rows = []
    for path in args.records:
        record, losses = losses_of(study_folder, scorers, path)
        for split, (before, after) in losses.items():
            of = (record, path, split)
            low, high = interval(after, before)
            rows.append(row(*of, args.part, args.model, before.mean(), after.mean(), low, high))
            if not mixes:
                continue
            (smaller, of_smaller), (larger, of_larger) = mixes
            sizes = [r.bytes["encoded"] for r in (smaller, record, larger)]
            share = (sizes[1] - sizes[0]) / (sizes[2] - sizes[0])
            if not 0 <= share <= 1:
                raise SystemExit(f"{path}: {sizes[1]:,} B is not between the mixes' {sizes}")
            for finished, part in enumerate(("over mixes", "over finished mixes")):
                pair = of_smaller[split][finished], of_larger[split][finished]
                loss, low, high = against(after, *pair, share)
                rows.append(row(*of, part, args.model, loss, after.mean(), low, high))
        print(
            pd.DataFrame(rows)
            .query(f"allocation == {path.stem!r}")
            .to_string(index=False, float_format="%.4f"),
            flush=True,
        )
    if args.csv is not None:
        known = pd.read_csv(args.csv) if args.csv.is_file() else pd.DataFrame()
        pd.concat([known, pd.DataFrame(rows)]).to_csv(args.csv, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
