"""The result of a comparison: a row per run, medians over seeds, a plot.

In: finished runs. Out: `compare.csv` (a row per run and held-out split), `summary.csv` (a row per
target, budget, split and searcher), `compare.png`. Invariant: runs of different inputs never stand
in one table; what cannot be compared (no baseline at these bytes, a lossless reference) is empty.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from allocator.app.study_folder import StudyFolder
from allocator.comparison.bench import Bench, bench_of, ratio
from allocator.comparison.runs import CompareRequest, RunResult, results
from allocator.errors import StudyError
from allocator.files.atomic import write_whole

Floats = npt.NDArray[np.float64]


def table(request: CompareRequest) -> pd.DataFrame:
    """Returns a row per finished run and held-out split, then the rows of the hand rule.

    Columns `/<reference>` are ratios of mean KL; `low` and `high` the 95 % paired bootstrap
    interval of the ratio to the knapsack alone.
    """
    benches: dict[str, Bench] = {}
    rows = []
    for run in results(request.folder):
        if run.target not in benches:
            benches[run.target] = bench_of(request, run.target, threads=request.workers)
        bench = benches[run.target]
        pick, alone = bench.check(run)
        for split in bench.splits:
            kl = bench.kl(split, pick)
            others = {
                "knapsack": bench.kl(split, alone),
                **bench.references(split, run.weights),
            }
            low, high = interval(kl, others["knapsack"])
            row = {
                "target": run.target,
                "bits": round(run.weights * 8 / bench.study_folder.inventory.n_searched_weights, 3),
                "sampler": run.sampler,
                "seed": run.seed,
                "tokens": run.tokens,
                "split": split,
                "documents": len(kl),
                "kl": kl.mean(),
                "experts": " ".join(map(str, pick.counts.values())),
                "complete": run.trials.get("COMPLETE", 0),
                "pruned": run.trials.get("PRUNED", 0),
                "spent": run.forward_tokens,
                "overhead": run.spent.overhead,
                "/baseline": ratio(kl.mean(), bench.baseline(split, run.weights)),
            }
            row |= {f"/{name}": ratio(kl.mean(), other.mean()) for name, other in others.items()}
            rows.append(row | {"low": low, "high": high})
    for bench in benches.values():
        rows += bench.by_hand()
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns medians and ranges over seeds, per target, budget, split, searcher and tokens."""
    keys = ["target", "bits", "split", "tokens", "sampler"]
    ratios = [c for c in frame.columns if c.startswith("/")]
    grouped = frame.groupby(keys)
    spread = grouped["kl"].agg(["median", "min", "max", "count"])
    return spread.join(grouped[[*ratios, "low", "high"]].median()).reset_index()


def interval(a: Floats, b: Floats, *, seed: int = 0, n: int = 2000) -> tuple[float, float]:
    """Returns the 95 % paired bootstrap interval of `mean(a) / mean(b)`; NaN if `b` is 0.

    Args:
        a: losses, `(documents,)`.
        b: of the same documents.
        seed: of the draws.
        n: draws of documents.
    """
    if not (b > 0).all():
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(a), (n, len(a)))
    ratios = a[drawn].mean(1) / b[drawn].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def check_plot() -> None:
    """Raises:
    StudyError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise StudyError("no matplotlib for the plot; pip install matplotlib")


def plot(finished: list[RunResult], path: Path, *, bits_of: dict[int, float]) -> None:
    """Draws the best held-out KL against forward tokens, a panel per target and budget.

    Raises:
        StudyError: if matplotlib is not installed.
    """
    check_plot()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(r.target, r.weights) for r in finished})
    columns = min(5, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(4 * columns, 3.4 * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    names = sorted({r.sampler for r in finished})
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, (target, weights) in zip(axes.flat, panels, strict=False):
        mine = [r for r in finished if (r.target, r.weights) == (target, weights)]
        for name, tokens in sorted({(r.sampler, r.tokens) for r in mine}):
            runs = [r for r in mine if (r.sampler, r.tokens) == (name, tokens)]
            start = max(r.course[0].tokens for r in runs)
            end = max(r.forward_tokens for r in runs)
            grid = np.linspace(start, end, 200)
            lines = np.array([[_at(r, x) for x in grid] for r in runs])
            axis.plot(grid, np.median(lines, 0), color=colors[name], label=name)
            axis.fill_between(
                grid, lines.min(0), lines.max(0), color=colors[name], alpha=0.15, linewidth=0
            )
        axis.set_title(f"{target}, {bits_of[weights]:.3g} bits")
        axis.set_xlabel("forward tokens")
        axis.set_xscale("log")
    axes[0][0].set_ylabel("KL on the report split, nats/token")
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _at(run: RunResult, tokens: float) -> float:
    """Held-out loss of the best so far at some tokens, from the first point on."""
    return [p.report for p in run.course if p.tokens <= tokens][-1]


def write_results(request: CompareRequest) -> pd.DataFrame:
    """Writes `compare.csv`, `summary.csv` and `compare.png`; returns the summary."""
    folder, frame = request.folder, table(request)
    short = summary(frame)
    for name, rows in (("compare.csv", frame), ("summary.csv", short)):
        text_rows = rows.to_csv(index=False, float_format="%.6g")
        write_whole(folder / name, text_rows.encode())
    finished = results(folder)
    searched = StudyFolder(folder).inventory.n_searched_weights
    plot(
        finished,
        folder / "compare.png",
        bits_of={r.weights: r.weights * 8 / searched for r in finished},
    )
    return short
