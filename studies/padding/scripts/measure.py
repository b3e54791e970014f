"""Search a model whose experts are 224 wide as it is, and padded to 256, at equal bytes.

    python studies/padding/scripts/measure.py OUT [--bits 2.25 3 4.25] [--trials 10] [--cache DIR] [--threads N]

OUT/model is what `narrow.py` made. Two studies of it on the reference's documents, OUT/plain and OUT/padded
(`expert_width = 256`), are searched at the same bytes of weights. Bits count the checkpoint's own weights. Both
picks are scored on 48 report documents; OUT/padding.csv has a row per budget: KL of both, padded over plain with
its paired bootstrap interval, and the experts that both retain. A budget below a study's floor has no KL.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd

from allocator import api
from allocator.app.record_weights import record_of
from allocator.app.study_folder import StudyFolder
from allocator.errors import BudgetError
from allocator.study.intervals import ratio_interval as interval

REFERENCE = Path(__file__).parents[2] / "reference"
WIDTHS = {"plain": None, "padded": 256}
N_DOCUMENTS = 48
STUDY = """schema = 1
checkpoint = "../model"
target = "gguf"
{width}
[budget]
weights = {weights}

[calibration]
documents = "generated/calibration.jsonl"
splits = "splits.json"
report = "generated/report.jsonl"
search_documents = 64
selection_documents = 64
rungs = [8, 32]
"""


def study(out, name, bits, options):
    """The folder of one search, and the bytes of its weights."""
    folder = out / f"{name}-{bits}"
    if not folder.exists():
        (folder / "generated").mkdir(parents=True)
        for file in ("splits.json", "generated/calibration.jsonl", "generated/report.jsonl"):
            shutil.copy(REFERENCE / file, folder / file)
    width = "" if WIDTHS[name] is None else f"expert_width = {WIDTHS[name]}\n"
    toml = folder / "study.toml"
    toml.write_text(STUDY.format(width=width, weights=1))
    weights = int(bits * StudyFolder(folder, **options).inventory.n_searched_weights / 8)
    toml.write_text(STUDY.format(width=width, weights=weights))
    return folder, weights


def pick(folder, trials, options):
    """Searches; None where the budget is below the floor."""
    try:
        api.search(folder, trials=trials, **options)
    except BudgetError as error:
        print(error, flush=True)
        return None
    path = folder / "allocations/pick.json"
    return path, record_of(path)


def report(folder, path, options):
    opened = StudyFolder(folder, **options)
    encodings = opened.encodings.of(record_of(path).importance, beside=path)
    model = opened.scorers.model_with(encodings)
    scorer = opened.scorers.on(opened.calibration.report[:N_DOCUMENTS], model=model)
    return scorer.score(record_of(path).decision).kl


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=(2.25, 3, 4.25))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    options = {"threads": args.threads, "cache": args.cache or args.out / "cache"}
    rows = []
    for bits in args.bits:
        row, kl = {"bits": bits}, {}
        for name in WIDTHS:
            folder, row["bytes"] = study(args.out, name, bits, options)
            if (made := pick(folder, args.trials, options)) is None:
                continue
            path, record = made
            kl[name] = report(folder, path, options)
            row[name] = kl[name].mean()
            row[f"{name}_experts"] = " ".join(map(str, record.decision.counts.values()))
        if len(kl) == 2:
            row["ratio"] = row["padded"] / row["plain"]
            row["low"], row["high"] = interval(kl["padded"], kl["plain"])
        rows.append(row)
        print(pd.DataFrame([row]).to_string(index=False), flush=True)
        pd.DataFrame(rows).to_csv(args.out / "padding.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
