"""Baseline, knapsack alone and the study's pick at five budgets, both targets, on held-out text.

    python studies/reference/scripts/budgets.py --text VALIDATION.jsonl [--calibration CALIBRATION.jsonl]

Every run is a study of its own under --work (journals there; resumable: run the same command again).
Writes baselines.csv beside this study's study.toml and, into budgets/, budgets.csv and every run's
allocation files (with the importance vectors that allocations/ does not have).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from allocator import api
from allocator.calibration.documents import interleaved
from allocator.files import write_whole
from allocator.front import Point, baseline_loss, lower_hull
from allocator.proxy.scorer import Scorer, mean
from allocator.workspace import Workspace

HERE = Path(__file__).resolve().parent.parent
BUDGETS = {2.25: 8_234_496, 1.75: 6_404_608, 3.0: 10_979_328, 2.0: 7_319_552, 4.0: 14_639_104}
SCREEN_DOCUMENTS = 8  # every baseline near the budgets; those near the hull again on all documents


def study_folder(args, target, bits, source="generated"):
    folder = args.work / f"{source}-{target}-{bits}"
    folder.mkdir(parents=True, exist_ok=True)
    if source == "generated":
        documents = f'documents = "{HERE}/generated/calibration.jsonl"\nsplits = "{HERE}/splits.json"'
    else:
        documents = f'documents = "{args.calibration.resolve()}"'
    (folder / "study.toml").write_text(
        f'schema = 1\ncheckpoint = "{HERE}/model"\ntarget = "{target}"\nseed = {args.seed}\n'
        f"[budget]\nweights = {BUDGETS[bits]}\n[calibration]\n{documents}\n"
        f'report = "{HERE}/generated/report.jsonl"\nsearch_documents = {args.search_documents}\n'
        f"selection_documents = {args.selection_documents}\n"
    )
    return folder


def run(args, target, bits, source="generated"):
    folder = study_folder(args, target, bits, source)
    done = folder / "result.json"
    if not done.exists():
        trials = args.trials if source == "generated" else args.text_trials
        result = api.search(folder, trials=trials, threads=args.threads, progress=True)
        write_whole(done, json.dumps({"seconds": result.seconds, "trials": result.trials}).encode())
    print(folder.name, done.read_text(), flush=True)
    return folder


class Held:
    """Per-document KL of allocations on the held-out splits, kept on disk."""

    def __init__(self, args, workspace):
        self.args, self.workspace = args, workspace
        self.splits = {"report": workspace.report[: args.documents]}
        if args.text:
            windows = interleaved(workspace.read_documents(args.text))
            self.splits["text"] = windows[: args.documents]
        self.scorers = {k: Scorer(workspace.profiler.swap, v) for k, v in self.splits.items()}

    def kl(self, split, allocation, n=None):
        documents = self.splits[split][:n]
        name = f"{split}-{len(documents)}-{self.workspace.profile.importance[:8]}-{allocation.digest[:32]}.npy"
        path = self.args.work / "kl" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            np.save(path, self.scorers[split].score(allocation, 0, len(documents)).kl)
        return np.load(path)


def near_hull(held, split):
    """Names of the baselines that may touch the lower hull near the budgets, from a few documents."""
    workspace = held.workspace
    rows = [(n, a, a.nbytes(workspace.layout).encoded) for n, a in workspace.baselines(pruned=True)]
    rows = [r for r in rows if 5_000_000 < r[2] < 17_000_000]
    rough = [Point(n, b, float(held.kl(split, a, SCREEN_DOCUMENTS).mean())) for n, a, b in rows]
    inside = [p for p in rough if p in (hull := lower_hull(rough))]
    ends = hull[0].nbytes, hull[-1].nbytes
    inside += [
        p for p in rough
        if ends[0] < p.nbytes < ends[1] and p.loss <= 1.05 * baseline_loss(rough, p.nbytes)
    ]
    return {p.name for p in inside}


def baseline_points(held, split, names):
    """The baselines of these names on all documents."""
    layout = held.workspace.layout
    rows = [(n, a) for n, a in held.workspace.baselines(pruned=True) if n in names]
    return [Point(n, a.nbytes(layout).encoded, float(held.kl(split, a).mean())) for n, a in rows]


def interval(a, b, seed=0, n=2000):
    """95 % paired bootstrap interval over documents of mean(a)/mean(b)."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(a), (n, len(a)))
    return np.quantile(a[draws].mean(1) / b[draws].mean(1), [0.025, 0.975])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--work", type=Path, default=HERE.parent.parent / ".cache" / "budgets")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--text-trials", type=int, default=1, help="1 is the knapsack alone")
    parser.add_argument("--search-documents", type=int, default=64)
    parser.add_argument("--selection-documents", type=int, default=128)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="per process; default all cores")
    parser.add_argument("--only", choices=("gguf", "safetensors"), help="run this target's studies, "
                        "write no table: for two processes side by side")
    args = parser.parse_args()
    table, baselines, names_of = [], [], {}
    runs = [(bits, target, "generated") for bits in BUDGETS for target in ("gguf", "safetensors")]
    if args.calibration:
        runs += [(bits, "safetensors", "text") for bits in BUDGETS]
    runs = [r for r in runs if args.only in (None, r[1])]
    folders = {r: run(args, r[1], r[0], r[2]) for r in runs}
    if args.only:
        return
    for source, target in dict.fromkeys((s, t) for _, t, s in runs):
        held = None
        for bits in BUDGETS:
            folder = folders[bits, target, source]
            if held is None:
                held = Held(args, Workspace(folder, threads=args.threads, progress=True))
                for k in held.splits:
                    if k not in names_of:
                        names_of[k] = near_hull(held, k)
                points = {k: baseline_points(held, k, names_of[k]) for k in held.splits}
                baselines += [
                    {"calibration": source, "target": target, "split": k, "name": p.name,
                     "bytes": p.nbytes, "kl": p.loss} for k, ps in points.items() for p in ps
                ]
            for split in held.splits:
                kl, names = {}, {}
                for name in ("knapsack", "pick"):
                    allocation = held.workspace.read_allocation(folder / "allocations" / f"{name}.json")
                    kl[name] = held.kl(split, allocation)
                    names[name] = allocation
                size = names["pick"].nbytes(held.workspace.layout).encoded
                base = baseline_loss(points[split], size)
                low, high = interval(kl["pick"], kl["knapsack"])
                table.append({
                    "calibration": source, "target": target, "bits": bits, "split": split,
                    "documents": len(kl["pick"]), "baseline": base, "knapsack": kl["knapsack"].mean(),
                    "pick": kl["pick"].mean(), "pick/baseline": kl["pick"].mean() / base,
                    "pick/knapsack": kl["pick"].mean() / kl["knapsack"].mean(),
                    "low": low, "high": high,
                    "knapsack experts": " ".join(map(str, names["knapsack"].counts.values())),
                    "pick experts": " ".join(map(str, names["pick"].counts.values())),
                })
    frame = pd.DataFrame(table).sort_values(["calibration", "split", "target", "bits"])
    print(frame.to_string(index=False, float_format="{:.4f}".format))
    answers = HERE / "budgets"
    answers.mkdir(exist_ok=True)
    frame.to_csv(answers / "budgets.csv", index=False, float_format="%.6g")
    for (bits, target, source), folder in folders.items():
        if source != "generated":
            continue
        for path in sorted((folder / "allocations").iterdir()):
            name = f"{target}-{bits}-{path.name}" if path.suffix == ".json" else path.name
            if not (HERE / "allocations" / path.name).exists() or path.suffix == ".json":
                write_whole(answers / name, path.read_bytes())
    pd.DataFrame(baselines).to_csv(HERE / "baselines.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
