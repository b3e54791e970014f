"""The result of a comparison: a row per run, medians over seeds, a plot.

In: finished runs. Out: `compare.csv` (a row per run and held-out split), `summary.csv` (a row per
target, budget, split and searcher), `compare.png`. Invariant: runs of different inputs never stand
in one table; what cannot be compared (no baseline at these bytes, a lossless reference) is empty.
"""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from allocator.app.study_folder import StudyFolder
from allocator.comparison.bench import Bench, bench_of, ratio
from allocator.comparison.runs import CompareRequest, RunResult, results
from allocator.errors import StudyError
from allocator.files.atomic import write_whole
from allocator.files.progress import stepping
from allocator.study.intervals import ratio_interval


def table(request: CompareRequest) -> pd.DataFrame:
    """Returns a row per finished run and held-out split, then the rows of the hand rule, if asked.

    Columns `/<reference>` are ratios of mean KL; `low` and `high` the 95 % paired bootstrap
    interval of the ratio to the knapsack alone.
    """
    benches: dict[str, Bench] = {}
    rows = []
    for run in stepping(results(request.folder), "held-out figures", unit="runs", brief=True):
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
            low, high = ratio_interval(kl, others["knapsack"])
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
                "/baseline": ratio(kl.mean(), bench.baseline(split, run.weights))
                if request.baselines != "none"
                else math.nan,
            }
            row |= {f"/{name}": ratio(kl.mean(), other.mean()) for name, other in others.items()}
            rows.append(row | {"low": low, "high": high})
    for bench in benches.values() if request.baselines != "none" else ():
        rows += bench.by_hand()
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns medians and ranges over seeds, per target, budget, split, searcher and tokens."""
    keys = ["target", "bits", "split", "tokens", "sampler"]
    ratios = [c for c in frame.columns if c.startswith("/")]
    grouped = frame.groupby(keys)
    spread = grouped["kl"].agg(["median", "min", "max", "count"])
    return spread.join(grouped[[*ratios, "low", "high"]].median()).reset_index()


def check_plot() -> None:
    """Raises:
    StudyError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise StudyError("no matplotlib for the plot; pip install matplotlib")


_LOOKS = (  # colour, marker, dashes: told apart in grey, and where lines coincide
    ("#0072b2", "o", (0, ())),
    ("#d55e00", "s", (0, (5, 2))),
    ("#009e73", "^", (0, (1, 1.2))),
    ("#cc79a7", "D", (0, (6, 2, 1.5, 2))),
    ("#e69f00", "v", (0, (3, 1.5))),
    ("#56b4e9", "P", (0, (8, 3))),
    ("#4d4d4d", "X", (0, (2, 3))),
)
_N_GRID = 200
_DPI = 200


def plot(
    finished: list[RunResult],
    path: Path,
    *,
    bits_of: Mapping[int, float],
    baselines: Mapping[tuple[str, int], float] = {},
) -> None:
    """Draws the best held-out KL against forward tokens, a panel per target and budget.

    Args:
        finished: runs.
        path: of the picture.
        bits_of: effective bits by budget.
        baselines: KL of the best baseline on the report split, by target and budget; lines.

    Raises:
        StudyError: if matplotlib is not installed.
    """
    check_plot()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(r.target, r.weights) for r in finished})
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.3 * columns, 2.9 * rows + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    names = sorted({r.sampler for r in finished})
    handles: dict[str, Any] = {}
    for number, (axis, (target, weights)) in enumerate(zip(axes.flat, panels, strict=False)):
        mine = [r for r in finished if (r.target, r.weights) == (target, weights)]
        for name, tokens in sorted({(r.sampler, r.tokens) for r in mine}):
            runs = [r for r in mine if (r.sampler, r.tokens) == (name, tokens)]
            handles[name] = _draw(axis, runs, names.index(name), len(names))
        known = baselines.get((target, weights), math.nan)
        if math.isfinite(known):
            look = {"color": "0.35", "linestyle": (0, (1, 1)), "linewidth": 1.2}
            handles["best baseline"] = axis.axhline(known, **look)
        axis.set_title(f"{target}, {bits_of[weights]:.3g} bits", fontsize=10)
        axis.set_xscale("log")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        _set_ticks(axis)
        if number % columns == 0:
            axis.set_ylabel("KL, nats per token")
        if number + columns >= len(panels):
            axis.set_xlabel("forward tokens")
    figure.suptitle("Best allocation so far on the report split; lines are medians over seeds, "
                    "bands their range", fontsize=10)  # fmt: skip
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _draw(axis: Any, runs: list[RunResult], place: int, n_places: int) -> Any:
    """Draws the runs of one sampler; returns the line. Its marks lie where no other's do."""
    color, shape, dashes = _LOOKS[place % len(_LOOKS)]
    start, end = max(r.course[0].tokens for r in runs), max(r.forward_tokens for r in runs)
    grid = np.geomspace(start, end, _N_GRID)
    lines = np.array([[_at(r, x) for x in grid] for r in runs])
    axis.fill_between(grid, lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)
    step = _N_GRID // 4
    (line,) = axis.plot(
        grid, np.median(lines, 0), color=color, linestyle=dashes, linewidth=1.5, marker=shape,
        markersize=4.5, markevery=(step * (place + 1) // (n_places + 1), step),
    )  # fmt: skip
    return line


def _set_ticks(axis: Any) -> None:
    """Sets round numbers of tokens that do not overlap: at most about four."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_xlim()
    subs = (1.0, 2.0, 3.0, 5.0) if high / low < 8 else (1.0, 3.0) if high / low < 50 else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(tokens)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.tick_params(labelsize=8)


def _short(tokens: float) -> str:
    """A number of tokens in few characters: `300k`, `2M`."""
    return f"{tokens / 1e6:g}M" if tokens >= 1e6 else f"{tokens / 1e3:g}k"


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
    searched = StudyFolder(folder, progress=request.progress).inventory.n_searched_weights
    bits_of = {r.weights: r.weights * 8 / searched for r in finished}
    plot(
        finished, folder / "compare.png", bits_of=bits_of, baselines=best_baselines(frame, bits_of)
    )
    return short


def best_baselines(
    frame: pd.DataFrame, bits_of: Mapping[int, float]
) -> dict[tuple[str, int], float]:
    """Returns the KL of the best baseline on the report split, by target and budget.

    Args:
        frame: as of `table`.
        bits_of: effective bits by budget.
    """
    known = {}
    rows = frame[(frame["split"] == "report") & (frame["/baseline"] > 0)]
    for weights, bits in bits_of.items():
        for target, mine in rows[rows["bits"] == round(bits, 3)].groupby("target"):
            known[str(target), weights] = float((mine["kl"] / mine["/baseline"]).median())
    return known
