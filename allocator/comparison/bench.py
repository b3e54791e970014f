"""One run of a comparison, and what its answer is compared with.

In: a study folder with a `[compare]` section, and one of its targets. Out: `runs/<run>.json` for a
run; held-out losses of allocations, references and the baseline. Invariants: no run spends more
forward tokens than it was given, profile, the original's own passes and the pick included; every
run begins with the same first trial, the knapsack alone; trials are scored on the search split, the
pick is made on the selection split, and the figures are from the report split (and a further text,
if given), which no run ever sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt
import optuna
from optuna.trial import FrozenTrial, TrialState

from allocator.app.allocation_files import check_same_checkpoint
from allocator.app.pick import check_tokens, finalists_of, pick_tokens
from allocator.app.request import Launch
from allocator.app.resources import ResourceOptions
from allocator.app.search_setup import prepare
from allocator.app.study_file import CompareSpec
from allocator.app.study_folder import StudyFolder
from allocator.comparison.runs import CompareRequest, Run, RunResult, compare_spec
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import read_allocation
from allocator.decision.baselines import baselines, hand_rule
from allocator.decision.budget import Budget
from allocator.decision.costs import check_budget
from allocator.decision.front import Point, baseline_loss, lower_hull
from allocator.decision.space import Space
from allocator.errors import AllocatorError, BudgetError, StudyError
from allocator.files.atomic import write_whole
from allocator.files.checksums import load_arrays, save_arrays, seal
from allocator.files.progress import stepping
from allocator.scoring import documents as calibration
from allocator.scoring.documents import Document, interleaved
from allocator.study.folder_lock import search_lock
from allocator.study.optuna_study import open_study
from allocator.study.outcomes import close_abandoned
from allocator.study.search import Search
from allocator.study.stop_rule import StopRule
from allocator.study.storages import mend_storage, open_storage
from allocator.study.trials import allocation_of, forward_tokens, not_abandoned, trial_counts

if TYPE_CHECKING:
    from allocator.scoring.streamed_scorer import AnyScorer


Floats = npt.NDArray[np.float64]

Reference = tuple[Allocation, tuple[str, Path] | None]
"""An allocation, and what it is encoded with, as of `Bench.kl`."""

_Sized = tuple[Allocation, int]
"""An allocation, and the bytes of its searched matrices."""

N_POINTS = 4
"""Points of a run's course whose held-out loss is measured; the first and the last are among."""
_SCREEN_DOCUMENTS = 8  # every baseline near the budget; those near the hull again on all


class Bench:
    """A comparison's folder, opened for one target.

    Args:
        folder: of the study.
        target: of these runs.
        text: a further held-out file.
        options: as of `ResourceOptions`, but for one thread by default.
    """

    def __init__(
        self,
        folder: Path,
        target: str,
        *,
        text: Path | None = None,
        **options: Unpack[ResourceOptions],
    ) -> None:
        options.setdefault("threads", 1)
        self.folder = folder
        self.study_folder = StudyFolder(folder, target=target, **options)
        self._text = text
        self._baselines: dict[tuple[str, int], float] = {}
        self._digests: dict[tuple[str, int | None], str] = {}
        self._references: dict[int, dict[str, Reference]] = {}

    @cached_property
    def spec(self) -> CompareSpec:
        """The section of study.toml."""
        return compare_spec(self.folder)

    def check_inputs(self, runs: Sequence[Run]) -> None:
        """Reads what these runs need and is cheap to read.

        Raises:
            AllocatorError: one line on whatever is wrong.
        """
        _ = self.splits
        for run in runs:
            try:
                self._check_run(run)
            except AllocatorError as error:
                raise StudyError(f"{run.name}: {error}") from None
            self.reference_files(run.weights)

    def check_importance(self, runs: Sequence[Run]) -> None:
        """Reads the importance vectors of references; needs this study's statistics.

        Raises:
            CheckpointError: if a file of importance vectors is missing or damaged.
        """
        for run in runs:
            for _, encoded in self.reference_files(run.weights).values():
                if encoded is not None:
                    self.study_folder.encodings.of(encoded[0], beside=encoded[1])

    def _check_run(self, run: Run) -> None:
        check_budget(self.study_folder.unranked_space, Budget(run.weights, "weights"))
        check_tokens(self.study_folder, run.tokens, "raise tokens under [compare]")

    # -- held-out losses

    @cached_property
    def splits(self) -> dict[str, Sequence[Document]]:
        """Held-out documents by name.

        Raises:
            AllocatorError: if one cannot be read, is too short, or is no held-out one.
        """
        n = self.spec.report_documents
        report = self.study_folder.calibration.report
        if n is not None and n > len(report):
            raise StudyError(
                f"{self.folder}/study.toml: report_documents = {n} under [compare], the report "
                f"split has {len(report)}; lower it"
            )
        splits: dict[str, Sequence[Document]] = {"report": report[:n]}
        if self._text is not None:
            text = self.study_folder.calibration.read(self._text)
            used = {d.ids for split in self.study_folder.calibration.splits for d in split}
            if any(d.ids in used for d in text):
                raise StudyError(
                    f"{self._text}: shares a document with search or selection; needed a text that "
                    "no run sees"
                )
            splits["text"] = interleaved(text)[:n]
        return splits

    @cached_property
    def _scorers(self) -> dict[str, AnyScorer]:
        scorers = {name: self.study_folder.scorers.on(part) for name, part in self.splits.items()}
        return {**scorers, "selection": self.study_folder.scorers.selection}

    def kl(
        self,
        split: str,
        allocation: Allocation,
        n: int | None = None,
        *,
        encoded: tuple[str, Path] | None = None,
    ) -> Floats:
        """Returns KL per document, `(documents,)`; caches it.

        Args:
            split: `selection` or a held-out one.
            allocation: what is scored.
            n: the first documents only.
            encoded: digest of the importance it is encoded with, and its file; this study's
                importance by default.
        """
        scorer = self._scorers[split]
        importance = self.study_folder.profile.importance
        if encoded is not None and encoded[0] != importance:
            importance, beside = encoded
            scorer = self.study_folder.scorers.encoded_with(
                importance, scorer.documents, beside=beside
            )
        path = self._path(split, n, importance, allocation)
        known = load_arrays(path)
        if known is None:
            stop = len(scorer.documents[:n])
            known = {"kl": np.asarray(scorer.score(allocation, 0, stop).kl)}
            save_arrays(path, known)
        return np.asarray(known["kl"])

    def _path(self, split: str, n: int | None, importance: str, allocation: Allocation) -> Path:
        """The file of one allocation's losses on the first `n` documents of a split."""
        name = f"{self._digest(split, n)[:16]}-{importance[:16]}-{allocation.digest[:32]}"
        return self.study_folder.cache / "held-out" / f"{name}.safetensors"

    def _digest(self, split: str, n: int | None = None) -> str:
        """The digest of the first `n` documents of a split, read once for thousands of files."""
        if (split, n) not in self._digests:
            selection = self.study_folder.calibration.selection_documents
            documents = ({"selection": selection} | self.splits)[split]
            self._digests[split, n] = calibration.digest(documents[:n])
        return self._digests[split, n]

    def loss(self, split: str, allocation: Allocation) -> float:
        """Returns the token-weighted mean of `kl`, nats per token."""
        from allocator.scoring.scorer import mean

        return mean(self.kl(split, allocation), self._scorers[split].documents)

    # -- one run

    def run(self, run: Run) -> None:
        """Runs or continues one run and writes its file; does nothing if it is finished."""
        done = run.file(self.folder)
        if done.exists():
            return
        self._check_run(run)
        folder = done.parent / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with search_lock(folder, join=False) as lock:
            if done.exists():
                return
            mend_storage(None, folder)
            search = self._search(run, folder)
            close_abandoned(search.study)
            lock.ready()
            began = time.monotonic()
            search.run(StopRule(tokens=run.tokens - pick_tokens(self.study_folder)))
            result = self._result(run, search, time.monotonic() - began)
            write_whole(done, seal(result))

    def _search(self, run: Run, folder: Path) -> Search:
        launch = _launch(run)
        lock = self.study_folder.lock(launch)
        study = open_study(open_storage(None, folder), "study", lock)
        return prepare(
            self.study_folder, launch, study, baselines=(), n_knapsack=1, pruning_factors=()
        )

    def _lock(self, run: Run) -> dict[str, Any]:
        """The inputs of a run: those of its search, and where it picks and is reported."""
        lock = self.study_folder.lock(_launch(run))
        return {
            **lock,
            "selection split": self._digest("selection"),
            "report split": self._digest("report"),
        }

    def check(self, result: RunResult) -> tuple[Allocation, Allocation]:
        """Returns the pick and the knapsack alone of a finished run.

        Raises:
            StudyError: if it was made with other inputs than study.toml names now, or is damaged.
        """
        file = result.run.file(self.folder)
        lock = self._lock(result.run)
        changed = [key for key in lock if result.lock.get(key) != lock[key]]
        if changed:
            raise StudyError(
                f"{file}: made with another {changed[0]} than study.toml names now; restore it, or "
                "move the run away and compare again"
            )
        try:
            pick, alone = (Allocation.from_json(a) for a in (result.pick, result.knapsack))
            for allocation in (pick, alone):
                allocation.check(self.study_folder.layout)
        except AllocatorError as error:
            raise StudyError(
                f"{file}: {error}; restore it, or move it away and compare again"
            ) from None
        return pick, alone

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
        spent += (len(finalists) + 1) * self.study_folder.scorers.selection.n_tokens
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
        """The best trial after `tokens` forward tokens, and its held-out losses."""
        allocation = allocation_of(trial)
        losses = {s: self.loss(s, allocation) for s in ("selection", *self.splits)}
        return {"tokens": tokens, "search": float(trial.values[0]), **losses}

    # -- references

    def baseline(self, split: str, weights: int) -> float:
        """Returns the loss of uniform formats and role mixes at exactly these bytes (lower hull).

        NaN where none of them is that small, or that large.
        """
        if (split, weights) not in self._baselines:
            self._baselines[split, weights] = self._baseline(split, weights)
        return self._baselines[split, weights]

    def _baseline(self, split: str, weights: int) -> float:
        return _hull_loss(self._points(split, self._close(split, weights)), weights)

    def _points(self, split: str, rows: list[_Sized], documents: int | None = None) -> list[Point]:
        shown = stepping(rows, f"baselines on {split}", unit="allocations", brief=True)
        losses = [float(self.kl(split, a, documents).mean()) for a, _ in shown]
        pairs = zip(rows, losses, strict=True)
        # a lossless one has no place on a hull of logarithms
        return [Point(str(i), n, x) for i, ((_, n), x) in enumerate(pairs) if x > 0]

    def _near(self, space: Space, weights: int) -> list[_Sized]:
        """Baselines near these bytes, with a space's ranking of experts."""
        layout = self.study_folder.layout
        named = baselines(layout, space.rankings, pruned=True, skilled=True)
        rows = ((a, a.nbytes(layout).encoded) for _, a in named)
        return [(a, n) for a, n in rows if 0.6 * weights < n < 1.6 * weights]

    def _close(self, split: str, weights: int) -> list[_Sized]:
        """Those of them that are close to the hull on the first documents."""
        rows = self._near(self.study_folder.space, weights)
        rough = self._points(split, rows, _SCREEN_DOCUMENTS)
        on_hull = {p.name for p in lower_hull(rough)}
        return [
            rows[int(p.name)]
            for p in rough
            if p.name in on_hull or not p.loss > 1.05 * _hull_loss(rough, p.nbytes)
        ]

    def baseline_costs(self, budgets: Sequence[int]) -> tuple[int, int]:
        """Returns how many baselines lack a loss, and the most forward tokens that these take.

        Args:
            budgets: bytes of the searched matrices.
        """
        study_folder, layout = self.study_folder, self.study_folder.layout
        is_profiled = (study_folder.profiler.folder / "profile.json").is_file()
        space = study_folder.space if is_profiled else study_folder.unranked_space
        by_hand = self._by_hand() if is_profiled else hand_rule(layout, space.rankings)
        hand = [(a, a.nbytes(layout).encoded) for _, a in by_hand]
        missing: dict[tuple[str, str], int] = {}  # tokens by allocation and documents

        def is_known(split: str, n: int | None, row: _Sized) -> bool:
            importance = study_folder.profile.importance if is_profiled else ""
            return is_profiled and self._path(split, n, importance, row[0]).exists()

        def add(split: str, n: int | None, rows: list[_Sized]) -> None:
            n_tokens = sum(len(d.ids) for d in self.splits[split][:n])
            for row in rows:
                if not is_known(split, n, row):
                    missing[row[0].digest, self._digest(split, n)] = n_tokens

        for split in self.splits:
            add(split, None, hand)
            for weights in {*budgets, *(n for _, n in hand)}:
                rows = self._near(space, weights)
                add(split, _SCREEN_DOCUMENTS, rows)
                if all(is_known(split, _SCREEN_DOCUMENTS, row) for row in rows):
                    rows = self._close(split, weights)
                add(split, None, rows)
        return len({allocation for allocation, _ in missing}), sum(missing.values())

    def _by_hand(self) -> Iterator[tuple[str, Allocation]]:
        gates = self.study_folder.profile.saliency["gate"]
        rankings = {
            x: tuple(np.argsort(-np.array(v), kind="stable").tolist()) for x, v in gates.items()
        }
        return hand_rule(self.study_folder.layout, rankings)

    def by_hand(self) -> list[dict[str, Any]]:
        """Returns rows of the seed paper's hand rule, at the sizes that it comes to."""
        layout, rows = self.study_folder.layout, []
        for name, allocation in self._by_hand():
            nbytes = allocation.nbytes(layout).encoded
            for split in self.splits:
                kl = self.kl(split, allocation)
                rows.append(
                    {
                        "target": self.study_folder.target,
                        "bits": round(nbytes * 8 / layout.inventory.n_searched_weights, 3),
                        "sampler": name,
                        "seed": 0,
                        "tokens": 0,
                        "split": split,
                        "documents": len(kl),
                        "kl": kl.mean(),
                        "experts": " ".join(map(str, allocation.counts.values())),
                        "/baseline": ratio(kl.mean(), self.baseline(split, nbytes)),
                    }
                )
        return rows

    def references(self, split: str, weights: int) -> dict[str, Floats]:
        """Returns KL per document, `(documents,)`, of study.toml's references for these bytes."""
        return {
            name: self.kl(split, allocation, encoded=encoded)
            for name, (allocation, encoded) in self.reference_files(weights).items()
        }

    def reference_files(self, weights: int) -> dict[str, Reference]:
        """Returns the references of study.toml for these bytes, by name.

        Raises:
            StudyError: if a file is missing, or is of another checkpoint or layout.
        """
        if weights not in self._references:
            self._references[weights] = self._read_references(weights)
        return self._references[weights]

    def _read_references(self, weights: int) -> dict[str, Reference]:
        bits = weights * 8 / self.study_folder.inventory.n_searched_weights
        references: dict[str, Reference] = {}
        for name, pattern in self.spec.references.items():
            path = self.folder / pattern.format(
                target=self.study_folder.target, weights=weights, bits=round(bits, 2)
            )
            try:
                allocation, record = read_allocation(path)
                if record is not None:
                    check_same_checkpoint(record.checkpoint, self.study_folder.inventory)
                allocation.check(self.study_folder.layout)
            except AllocatorError as error:
                about = "" if str(path) in str(error) else f"{path}: "
                raise StudyError(f"reference {name!r}: {about}{error}") from None
            encoded = None if record is None else (record.importance, path)
            references[name] = allocation, encoded
        return references


def bench_of(request: CompareRequest, target: str, *, threads: int = 1) -> Bench:
    """Opens the folder of a comparison for one target.

    Args:
        request: of the comparison.
        target: of the runs.
        threads: cores.
    """
    return Bench(
        request.folder,
        target,
        text=request.text,
        cache=request.cache,
        threads=threads,
        progress=request.progress,
    )


def _launch(run: Run) -> Launch:
    return Launch(Budget(run.weights, "weights"), run.sampler, run.seed)


def ratio(loss: float, other: float) -> float:
    """Returns the ratio of two losses; NaN where `other` is no positive number."""
    return float(loss) / float(other) if other > 0 else math.nan


def _hull_loss(points: list[Point], nbytes: int) -> float:
    """The baseline at these bytes; NaN where no point is that small, or that large."""
    try:
        return baseline_loss(points, nbytes)
    except BudgetError:
        return math.nan


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
