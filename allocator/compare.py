"""Searchers side by side: the same forward tokens, several seeds, held-out figures.

In: a study folder whose study.toml has a `[compare]` section. Out: `runs/<run>.json` (one per
finished run), and from them `compare.csv` (a row per run), `summary.csv` (a row per target, budget
and searcher), `compare.png`. Invariants: no run spends more forward tokens than it was given,
profile and original's own passes included; every run begins with the same first trial, the knapsack
alone; trials are scored on the search split, the pick is made on the selection split, and the
figures are from the report split (and a further text, if given), which no run ever sees. A run that
was stopped continues; a finished one is not run again.
"""

import ctypes
import json
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from allocator.allocation import Allocation
from allocator.baselines import hand_rule
from allocator.calibration import documents as calibration
from allocator.calibration.documents import Document, interleaved
from allocator.errors import StudyError
from allocator.files import write_whole
from allocator.front import Point, baseline_loss, lower_hull
from allocator.launch import N_FINALISTS, finalists_of, prepare
from allocator.memory import Budget
from allocator.proxy.model import SwapModel
from allocator.proxy.scorer import Scorer, mean
from allocator.records import read_allocation
from allocator.specification import CompareSpec
from allocator.storage import open_storage, repair_storage, search_lock
from allocator.study import Search, close_abandoned, open_study, trial_counts
from allocator.trials import allocation_of, forward_tokens, not_abandoned
from allocator.workspace import Workspace

Floats = npt.NDArray[np.float64]

N_POINTS = 4
"""Points of a run's course whose held-out loss is measured; the first and the last are among."""
_SCREEN_DOCUMENTS = 8  # every baseline near the budget; those near the hull again on all


@dataclass(frozen=True)
class Run:
    """One searcher on one problem."""

    target: str
    weights: int
    sampler: str
    seed: int
    tokens: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.target}-{self.weights}-{self.sampler}-{self.seed}-{self.tokens}"

    def file(self, folder: Path) -> Path:
        """What it leaves in a comparison's folder when it is finished."""
        return folder / "runs" / f"{self.name}.json"


def planned(spec: CompareSpec) -> list[Run]:
    """All runs, the ones that tell most first: first seeds, then long runs, then more seeds."""
    budgets = [int(w) for w in spec.weights]
    runs = [
        (seed, 0, Run(target, weights, sampler, seed, spec.tokens))
        for target, n_seeds in spec.seeds.items()
        for seed in range(n_seeds)
        for weights in budgets
        for sampler in spec.samplers
    ]
    runs += [
        (0, 1, Run(long.target, int(weights), long.sampler, 0, long.tokens))
        for long in spec.long
        for weights in long.weights
    ]
    order = list(spec.seeds)
    return [run for *_, run in sorted(runs, key=lambda r: (r[0], r[1], order.index(r[2].target)))]


class Bench:
    """A comparison's folder, opened for one target.

    Args:
        folder: of the study.
        target: of these runs.
        text: a further held-out file.
        cache: as of `Workspace`.
        threads: as of `Workspace`.
    """

    def __init__(
        self,
        folder: Path,
        target: str,
        *,
        text: Path | None = None,
        cache: Path | None = None,
        threads: int = 1,
    ) -> None:
        self.folder = folder
        self.workspace = Workspace(folder, cache=cache, threads=threads, target=target)
        self._text = text
        self._swaps: dict[str, SwapModel] = {}
        self._baselines: dict[tuple[str, int], float] = {}

    @property
    def spec(self) -> CompareSpec:
        """The section of study.toml."""
        return compare_spec(self.workspace)

    # -- held-out losses

    @cached_property
    def splits(self) -> dict[str, Sequence[Document]]:
        """Held-out documents by name."""
        n = self.spec.report_documents
        found: dict[str, Sequence[Document]] = {"report": self.workspace.report[:n]}
        if self._text is not None:
            found["text"] = interleaved(self.workspace.read_documents(self._text))[:n]
        return found

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        workspace = self.workspace
        scorers = {
            name: Scorer(workspace.profiler.swap, documents, threads=workspace.threads)
            for name, documents in self.splits.items()
        }
        return {**scorers, "selection": workspace.selection_scorer}

    def kl(
        self,
        split: str,
        allocation: Allocation,
        n: int | None = None,
        *,
        encoded: tuple[str, Path] | None = None,
    ) -> Floats:
        """Per-document KL, kept in the cache.

        Args:
            split: `selection` or a held-out one.
            allocation: what is scored.
            n: the first documents only.
            encoded: digest of the importance it is encoded with, and its file; this study's
                importance by default.
        """
        scorer = self._scorers[split]
        importance = self.workspace.profile.importance
        if encoded is not None and encoded[0] != importance:
            importance = encoded[0]
            scorer = self._foreign(*encoded, split)
        documents = scorer.documents[:n]
        name = (
            f"{calibration.digest(documents)[:16]}-{importance[:16]}-{allocation.digest[:32]}.npy"
        )
        path = self.workspace.cache / "held-out" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _npy(scorer.score(allocation, 0, len(documents)).kl))
        return np.asarray(np.load(path))

    def _foreign(self, importance: str, path: Path, split: str) -> Scorer:
        """Scores what was encoded with other importance than this study's."""
        if importance not in self._swaps:
            bank = self.workspace.bank_for(importance, beside=path)
            self._swaps[importance] = SwapModel(self.workspace.layout, bank.decoded)
        return Scorer(self._swaps[importance], self._scorers[split].documents)

    def loss(self, split: str, allocation: Allocation) -> float:
        """Its token-weighted mean, nats per token."""
        return mean(self.kl(split, allocation), self._scorers[split].documents)

    # -- one run

    def run(self, run: Run) -> None:
        """Runs or continues one run and writes its file; does nothing if it is finished."""
        done = run.file(self.folder)
        if done.exists():
            return
        folder = done.parent / run.name
        folder.mkdir(parents=True, exist_ok=True)
        storage = f"journal:{folder / 'journal'}"
        with search_lock(folder, join=False) as lock:
            if done.exists():
                return
            repair_storage(storage, folder)
            search = self._search(run, storage, folder)
            close_abandoned(search.study)
            lock.ready()
            began = time.monotonic()
            search.run(tokens=run.tokens - self.selection_tokens)
            result = self._result(run, search, time.monotonic() - began)
            write_whole(done, (json.dumps(result) + "\n").encode())

    @property
    def selection_tokens(self) -> int:
        """The most forward tokens that the pick takes: finalists, the knapsack, the original."""
        return (N_FINALISTS + 2) * self.workspace.selection_scorer.n_tokens

    def _search(self, run: Run, storage: str, folder: Path) -> Search:
        workspace = self.workspace
        budget = Budget(run.weights, "weights")
        workspace.unranked_space.check_budget(budget)
        least = workspace.base_tokens + workspace.scorer.n_tokens + self.selection_tokens
        if run.tokens < least:
            raise StudyError(
                f"{run.name}: {run.tokens:,} forward tokens; the profile, the original, one "
                f"trial and the pick take {least:,}; raise tokens under [compare]"
            )
        study = open_study(open_storage(storage, folder), "study", self._lock(run))
        return prepare(
            workspace,
            budget,
            study,
            sampler=run.sampler,
            seed=run.seed,
            baselines=(),
            n_knapsack=1,
        )

    def _lock(self, run: "Run | RunResult") -> dict[str, Any]:
        return self.workspace.lock(Budget(run.weights, "weights"), run.sampler, run.seed)

    def check(self, run: "RunResult") -> None:
        """Raises:
        StudyError: if a finished run was made with other inputs than study.toml names now.
        """
        lock = self._lock(run)
        odd = [key for key in lock if run.lock.get(key) != lock[key]]
        if odd:
            made = Run(run.target, run.weights, run.sampler, run.seed, run.tokens)
            raise StudyError(
                f"{made.file(self.folder)}: made with another {odd[0]} than study.toml names "
                "now; restore it, or delete the run and compare again"
            )

    def _result(self, run: Run, search: Search, seconds: float) -> dict[str, Any]:
        finalists, alone = finalists_of(search)
        if alone is None:
            raise StudyError(f"{run.name}: the knapsack alone has no finite loss; see its journal")
        losses = {t.number: self.loss("selection", allocation_of(t)) for t in finalists}
        pick = min(finalists, key=lambda t: (losses[t.number], t.number))
        course = [
            self._point(tokens, trial)
            for tokens, trial in _thinned(list(_course(search.study, search.base_tokens)))
        ]
        spent = search.forward_tokens()
        spent += (len(finalists) + 1) * self.workspace.selection_scorer.n_tokens
        course.append(self._point(spent, pick))
        return {
            "schema": 1,
            **asdict(run),
            "lock": self._lock(run),
            "forward_tokens": spent,
            "base_tokens": search.base_tokens,
            "seconds": seconds,
            "spent": search.seconds,
            "trials": trial_counts(search.study),
            "course": course,
            "knapsack": allocation_of(alone).to_json(),
            "pick": allocation_of(pick).to_json(),
        }

    def _point(self, tokens: int, trial: FrozenTrial) -> dict[str, float]:
        """The best so far after so many forward tokens, and its held-out losses."""
        allocation = allocation_of(trial)
        held = {s: self.loss(s, allocation) for s in ("selection", *self.splits)}
        return {"tokens": tokens, "search": float(trial.values[0]), **held}

    # -- references

    def baseline(self, split: str, weights: int) -> float:
        """Loss of uniform formats and role mixes at exactly these bytes (lower hull)."""
        if (split, weights) not in self._baselines:
            self._baselines[split, weights] = self._baseline(split, weights)
        return self._baselines[split, weights]

    def _baseline(self, split: str, weights: int) -> float:
        rows = [
            (a, a.nbytes(self.workspace.layout).encoded)
            for _, a in self.workspace.baselines(pruned=True)
        ]
        rows = [(a, n) for a, n in rows if 0.6 * weights < n < 1.6 * weights]

        def points(chosen: list[tuple[Allocation, int]], documents: int | None) -> list[Point]:
            return [
                Point(str(i), n, float(self.kl(split, a, documents).mean()))
                for i, (a, n) in enumerate(chosen)
            ]

        rough = points(rows, _SCREEN_DOCUMENTS)
        on_hull = {p.name for p in lower_hull(rough)}
        near = [
            row
            for row, p in zip(rows, rough, strict=True)
            if p.name in on_hull or p.loss <= 1.05 * _hull_loss(rough, p.nbytes)
        ]
        return baseline_loss(points(near, None), weights)

    def by_hand(self) -> list[dict[str, Any]]:
        """Rows of the seed paper's hand rule, at the sizes that it comes to."""
        layout, gates = self.workspace.layout, self.workspace.profile.saliency["gate"]
        rankings = {
            x: tuple(np.argsort(-np.array(v), kind="stable").tolist()) for x, v in gates.items()
        }
        rows = []
        for name, allocation in hand_rule(layout, rankings):
            nbytes = allocation.nbytes(layout).encoded
            for split in self.splits:
                kl = self.kl(split, allocation)
                rows.append(
                    {
                        "target": self.workspace.target,
                        "bits": round(nbytes * 8 / layout.inventory.n_searched_weights, 3),
                        "sampler": name,
                        "seed": 0,
                        "tokens": 0,
                        "split": split,
                        "documents": len(kl),
                        "kl": kl.mean(),
                        "experts": " ".join(map(str, allocation.counts.values())),
                        "/baseline": kl.mean() / self.baseline(split, nbytes),
                    }
                )
        return rows

    def references(self, split: str, weights: int) -> dict[str, Floats]:
        """Per-document KL of the allocations named in study.toml for these bytes.

        Raises:
            AllocatorError: if a file is missing, or is of another checkpoint or layout.
        """
        bits = weights * 8 / self.workspace.inventory.n_searched_weights
        found = {}
        for name, pattern in self.spec.references.items():
            path = self.folder / pattern.format(
                target=self.workspace.target, weights=weights, bits=round(bits, 2)
            )
            allocation, record = read_allocation(path)
            allocation.check(self.workspace.layout)
            encoded = None if record is None else (record.importance, path)
            found[name] = self.kl(split, allocation, encoded=encoded)
        return found


def _npy(values: Floats) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _hull_loss(points: list[Point], nbytes: int) -> float:
    hull = lower_hull(points)
    if not hull[0].nbytes <= nbytes <= hull[-1].nbytes:
        return math.inf
    return baseline_loss(points, nbytes)


def _course(study: optuna.Study, base: int) -> Iterator[tuple[int, FrozenTrial]]:
    """Every new best trial with the forward tokens spent by its end."""
    tokens, best = base, math.inf
    for trial in not_abandoned(study):
        tokens += forward_tokens(trial)
        if trial.state == TrialState.COMPLETE and trial.values[0] < best:
            best = trial.values[0]
            yield tokens, trial


def _thinned(course: list[tuple[int, FrozenTrial]]) -> list[tuple[int, FrozenTrial]]:
    wanted = np.linspace(0, len(course) - 1, min(N_POINTS, len(course))).round().astype(int)
    return [course[i] for i in dict.fromkeys(wanted.tolist())]


def compare_spec(workspace: Workspace) -> CompareSpec:
    """The `[compare]` section.

    Raises:
        StudyError: if there is none.
    """
    spec = workspace.spec.compare
    if spec is None:
        raise StudyError(
            f"{workspace.folder}/study.toml: no [compare] section; see studies/benchmark/study.toml"
        )
    return spec


# -- all runs


def run_all(
    folder: Path,
    runs: Sequence[Run],
    *,
    text: Path | None,
    cache: Path | None,
    workers: int,
) -> Iterator[Run]:
    """Runs what is not finished, in order, in processes of one core each; yields as they end."""
    waiting = [run for run in runs if not run.file(folder).exists()]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    for target in dict.fromkeys(run.target for run in waiting):  # one profile before many runs
        _ = Bench(folder, target, cache=cache, threads=workers).workspace.profile
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        futures = [pool.submit(_run, folder, run, text, cache) for run in waiting]
        for run, future in zip(waiting, futures, strict=True):
            future.result()
            yield run


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _begin_worker() -> None:
    """One core for torch; a killed comparison leaves no worker behind (Linux)."""
    import torch

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


_BENCHES: dict[tuple[Path, str], Bench] = {}  # of a worker process: a loaded model each


def _run(folder: Path, run: Run, text: Path | None, cache: Path | None) -> None:
    key = (folder, run.target)
    if key not in _BENCHES:
        _BENCHES[key] = Bench(folder, run.target, text=text, cache=cache, threads=1)
    _BENCHES[key].run(run)


# -- what came out


class _Point(msgspec.Struct):
    tokens: int
    search: float
    selection: float
    report: float
    text: float | None = None


class RunResult(msgspec.Struct):
    """A finished run's file."""

    schema: int
    target: str
    weights: int
    sampler: str
    seed: int
    tokens: int
    lock: dict[str, Any]
    forward_tokens: int
    base_tokens: int
    seconds: float
    spent: dict[str, float]
    trials: dict[str, int]
    course: list[_Point]
    knapsack: dict[str, Any]
    pick: dict[str, Any]


def results(folder: Path) -> list[RunResult]:
    """All finished runs."""
    found = []
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=RunResult))
        except msgspec.DecodeError as error:
            raise StudyError(f"{path}: no run ({error}); delete it and compare again") from None
    return found


def table(folder: Path, *, text: Path | None, cache: Path | None, threads: int) -> pd.DataFrame:
    """A row per finished run and held-out split: its pick beside the references; the hand rule.

    Columns `/<reference>` are ratios of mean KL; `low` and `high` the 95 % paired bootstrap
    interval of the ratio to the knapsack alone.
    """
    benches: dict[str, Bench] = {}
    rows = []
    for run in results(folder):
        if run.target not in benches:
            benches[run.target] = Bench(folder, run.target, text=text, cache=cache, threads=threads)
        bench = benches[run.target]
        bench.check(run)
        pick, alone = (Allocation.from_json(a) for a in (run.pick, run.knapsack))
        for split in bench.splits:
            kl = bench.kl(split, pick)
            beside = {"knapsack": bench.kl(split, alone), **bench.references(split, run.weights)}
            low, high = interval(kl, beside["knapsack"])
            row = {
                "target": run.target,
                "bits": round(run.weights * 8 / bench.workspace.inventory.n_searched_weights, 3),
                "sampler": run.sampler,
                "seed": run.seed,
                "tokens": run.tokens,
                "split": split,
                "documents": len(kl),
                "kl": kl.mean(),
                "experts": " ".join(map(str, pick.counts.values())),
                "complete": run.trials["COMPLETE"],
                "pruned": run.trials["PRUNED"],
                "spent": run.forward_tokens,
                "overhead": (run.spent["sampler"] + run.spent["storage"])
                / max(sum(run.spent.values()), 1e-9),
                "/baseline": kl.mean() / bench.baseline(split, run.weights),
            }
            row |= {f"/{name}": kl.mean() / other.mean() for name, other in beside.items()}
            rows.append(row | {"low": low, "high": high})
    for bench in benches.values():
        rows += bench.by_hand()
    return pd.DataFrame(rows)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Medians and ranges over seeds, per target, budget, split, searcher and tokens."""
    keys = ["target", "bits", "split", "tokens", "sampler"]
    ratios = [c for c in frame.columns if c.startswith("/")]
    grouped = frame.groupby(keys)
    found = grouped["kl"].agg(["median", "min", "max", "count"])
    return found.join(grouped[[*ratios, "low", "high"]].median()).reset_index()


def interval(a: Floats, b: Floats, *, seed: int = 0, n: int = 2000) -> tuple[float, float]:
    """95 % paired bootstrap interval over documents of `mean(a) / mean(b)`."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(a), (n, len(a)))
    ratios = a[drawn].mean(1) / b[drawn].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def plot(found: list[RunResult], path: Path, *, bits_of: dict[int, float]) -> None:
    """Best held-out KL against forward tokens: a panel per target and budget, median and spread.

    Raises:
        StudyError: if matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise StudyError("no matplotlib for the plot; pip install moe-allocator[plots]") from None
    panels = sorted({(r.target, r.weights) for r in found})
    columns = min(5, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(4 * columns, 3.4 * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    names = sorted({r.sampler for r in found})
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, (target, weights) in zip(axes.flat, panels, strict=False):
        mine = [r for r in found if (r.target, r.weights) == (target, weights)]
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


# -- the verb


@dataclass(frozen=True)
class CompareEstimate:
    """What a comparison will take.

    Attributes:
        runs: not finished yet.
        finished: runs that are.
        tokens: forward tokens still to run.
        seconds: wall-clock guess, from a timed forward pass.
    """

    runs: tuple[Run, ...]
    finished: int
    tokens: int
    seconds: float


def chosen_runs(
    folder: Path,
    *,
    targets: Sequence[str] | None = None,
    samplers: Sequence[str] | None = None,
    weights: Sequence[int] | None = None,
    seeds: int | None = None,
) -> list[Run]:
    """The planned runs, narrowed down by what is given.

    Raises:
        StudyError: if nothing is left, or there is no `[compare]`.
    """
    spec = compare_spec(Workspace(folder))
    found = [
        run
        for run in planned(spec)
        if (targets is None or run.target in targets)
        and (samplers is None or run.sampler in samplers)
        and (weights is None or run.weights in weights)
        and (seeds is None or run.seed < seeds)
    ]
    if not found:
        raise StudyError(
            f"{folder}: no run is left of {', '.join(spec.samplers)} at {spec.weights}; "
            "loosen --target, --sampler, --weights or --seeds"
        )
    return found


def estimate(
    folder: Path, runs: Sequence[Run], *, cache: Path | None, workers: int
) -> CompareEstimate:
    """Prices the runs that are not finished."""
    waiting = [r for r in runs if not r.file(folder).exists()]
    seconds, tokens = 0.0, 0
    for target in dict.fromkeys(r.target for r in waiting):
        bench = Bench(folder, target, cache=cache, threads=1)
        mine = [r for r in waiting if r.target == target]
        workspace = bench.workspace
        documents = workspace.splits[0][:8]
        scorer = Scorer(workspace.profiler.swap, documents)
        scorer.ensure_reference(len(documents))
        began = time.perf_counter()
        scorer.score_installed()
        per_token = (time.perf_counter() - began) / scorer.n_tokens
        ready = (workspace.profiler.folder / "profile.json").exists()
        base = workspace.base_tokens if ready else 0
        n_held = sum(len(d.ids) for d in workspace.selection_scorer.documents)
        n_held += sum(len(d.ids) for split in bench.splits.values() for d in split)
        searched = sum(r.tokens - base for r in mine)
        tokens += searched
        seconds += per_token * (searched + len(mine) * N_POINTS * n_held)
    done = len(runs) - len(waiting)
    return CompareEstimate(tuple(waiting), done, tokens, seconds / workers)


def write_results(
    folder: Path, *, text: Path | None, cache: Path | None, threads: int
) -> pd.DataFrame:
    """Writes `compare.csv`, `summary.csv` and `compare.png`; returns the summary."""
    frame = table(folder, text=text, cache=cache, threads=threads)
    short = summary(frame)
    for name, rows in (("compare.csv", frame), ("summary.csv", short)):
        text_rows = rows.to_csv(index=False, float_format="%.6g")
        write_whole(folder / name, text_rows.encode())
    found = results(folder)
    searched = Workspace(folder).inventory.n_searched_weights
    plot(
        found,
        folder / "compare.png",
        bits_of={r.weights: r.weights * 8 / searched for r in found},
    )
    return short
