"""The verbs, each one public function; the CLI parses, calls one of these, and prints.

Every function takes paths and plain values, and returns data (often a pandas table). Progress bars
are shown when `progress` is true; nothing else is printed.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState
from safetensors.numpy import save
from tqdm import tqdm

from allocator.allocation import Allocation
from allocator.calibration import documents as calibration
from allocator.calibration.profiler import importance_digest
from allocator.errors import SpaceError, StudyError, VerifyError
from allocator.files import write_whole
from allocator.formats import FORMATS
from allocator.front import Point
from allocator.front import front as front_of
from allocator.inventory import read_inventory
from allocator.materialize.checkpoint import Manifest, Written
from allocator.materialize.checkpoint import materialize as _materialize
from allocator.materialize.verify import SAFETENSORS_TOLERANCE, Verification
from allocator.materialize.verify import verify as _verify
from allocator.memory import Budget
from allocator.profile import Profile
from allocator.proxy.model import SwapModel
from allocator.proxy.scorer import Scorer, mean
from allocator.records import AllocationRecord, codec
from allocator.report import evaluate
from allocator.samplers.knapsack import ABANDONED
from allocator.storage import journal_path, open_storage, repair_storage, search_lock
from allocator.study import (
    KIND,
    RESULT,
    Search,
    allocation_of,
    complete_trials,
    first_trials,
)
from allocator.targets import target_named
from allocator.workspace import Workspace, check_same_checkpoint

N_KNAPSACK = 3
"""Unperturbed knapsack solutions among the first trials: at the cap, and below it."""
N_FINALISTS = 3
"""Trials of least search loss that the selection split decides between."""


def inspect(checkpoint: str | Path, *, target: str = "safetensors") -> pd.DataFrame:
    """Groups of a checkpoint in a target, with the formats offered; no weights are read."""
    layout = target_named(target).layout(read_inventory(checkpoint))
    rows = [
        {
            "group": g.name,
            "shape": "x".join(map(str, g.shape)),
            "weights": int(np.prod(g.shape)),
            "tensors": len(g.sources),
            "formats": " ".join(f.name for f in g.offered()),
        }
        for g in layout.groups.values()
    ]
    return pd.DataFrame(rows)


def profile(study: str | Path, **options: Any) -> Profile:
    """Builds or continues a study's profile."""
    return Workspace(study, **options).profile


@dataclass(frozen=True)
class SearchEstimate:
    """What a launch would do, measured on a few documents.

    Attributes:
        floor: bytes of the smallest allocation, counted as the budget counts.
        ceiling: of the largest.
        budget: the limit.
        groups: number of groups with more than one format.
        counts: possible retained counts.
        seconds_per_full_trial: to score one allocation on the full search split.
        profile_ready: whether the profile exists already.
        profile_seconds: to build it, if not.
        total_seconds: an upper estimate of the launch: every trial scored in full.
    """

    floor: int
    ceiling: int
    budget: Budget
    groups: int
    counts: tuple[int, ...]
    seconds_per_full_trial: float
    profile_ready: bool
    profile_seconds: float
    total_seconds: float


def estimate(
    study: str | Path,
    *,
    budget: str | None = None,
    weights_budget: str | None = None,
    trials: int | None = None,
    **options: Any,
) -> SearchEstimate:
    """Prices a launch without starting it: `search --dry-run`."""
    workspace = Workspace(study, **options)
    limit = workspace.budget(file=budget, weights=weights_budget)
    space = workspace.unranked_space
    per_token = _seconds_per_token(workspace)
    spec = workspace.spec.calibration
    search = workspace.splits[0]
    full = per_token * sum(len(d.ids) for d in search[: spec.search_documents])
    ready = (workspace.profiler.folder / "profile.json").exists()
    changes = len(list(workspace.profiler.changes()))
    measuring = changes * per_token * sum(len(d.ids) for d in search[: spec.measured_documents])
    statistics = 1.5 * per_token * sum(len(d.ids) for d in search)
    encoding = _encoding_seconds(workspace)
    profile_seconds = 0.0 if ready else statistics + measuring + encoding
    return SearchEstimate(
        floor=limit.used(space.smallest.nbytes(space.layout)),
        ceiling=limit.used(space.largest.nbytes(space.layout)),
        budget=limit,
        groups=sum(len(v) > 1 for v in space.formats.values()),
        counts=space.counts,
        seconds_per_full_trial=full,
        profile_ready=ready,
        profile_seconds=profile_seconds,
        total_seconds=profile_seconds + full * (trials or workspace.spec.trials),
    )


def _seconds_per_token(workspace: Workspace) -> float:
    scorer = Scorer(workspace.profiler.swap, workspace.splits[0][:4])
    scorer.ensure_reference(4)
    began = time.perf_counter()
    scorer.score_installed()
    return (time.perf_counter() - began) / scorer.n_tokens


_ENCODE_WEIGHTS_PER_SECOND = 7e5
"""All offered formats of one weight, one core (the sum over ggml's types, measured)."""


def _encoding_seconds(workspace: Workspace) -> float:
    weights = workspace.inventory.n_searched_weights
    return weights / _ENCODE_WEIGHTS_PER_SECOND / workspace.threads + 12


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes:
        study: the Optuna study.
        pick: the allocation file of the pick.
        knapsack: the allocation file of the unperturbed knapsack at the budget.
        seconds: spent in this run on scoring, sampler and storage.
        trials: trials by state.
        messages: repairs made on the way, for showing.
    """

    study: optuna.Study
    pick: Path
    knapsack: Path
    seconds: dict[str, float]
    trials: dict[str, int]
    messages: tuple[str, ...]


def search(
    study: str | Path,
    *,
    budget: str | None = None,
    weights_budget: str | None = None,
    trials: int | None = None,
    seconds: float | None = None,
    storage: str | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    join: bool = False,
    **options: Any,
) -> SearchResult:
    """Launches or resumes a study, then picks among its front on the selection split.

    Args:
        study: its folder.
        budget: of the whole file, e.g. `12MiB`; else study.toml's.
        weights_budget: of the searched matrices alone.
        trials: proposals in the study in total; if neither this nor `seconds` is given,
            study.toml's.
        seconds: stop after so long instead.
        storage: an RDB URL, `journal:PATH`, or None for a journal in the folder.
        sampler: instead of study.toml's.
        seed: instead of study.toml's.
        join: work beside a search that is running.
        options: of `Workspace`.

    Raises:
        AllocatorError: one line on whatever is wrong, before anything is written.
    """
    workspace = Workspace(study, **options)
    limit = workspace.budget(file=budget, weights=weights_budget)
    workspace.check_launch(sampler=sampler, seed=seed)
    with search_lock(workspace.folder, join=join) as lock:
        messages = repair_storage(storage, workspace.folder) if lock.exclusive_start else []
        running = prepare(workspace, limit, storage=storage, sampler=sampler, seed=seed)
        if lock.exclusive_start and (closed := running.close_abandoned()):
            messages.append(f"closed {closed} trial(s) of a search that died; proposing them again")
        lock.ready()
        wanted = trials if trials is not None or seconds is not None else workspace.spec.trials
        with _TrialBar(wanted, running, shown=workspace.progress) as bar:
            running.run(n_trials=wanted, seconds=seconds, on_trial=bar)
        pick, knapsack = _conclude(workspace, running)
    return SearchResult(
        study=running.study,
        pick=pick,
        knapsack=knapsack,
        seconds=dict(running.seconds),
        trials={
            s.name: sum(t.state == s for t in running.study.get_trials(deepcopy=False))
            for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        },
        messages=tuple(messages),
    )


class _TrialBar:
    """A progress bar over trials, with the least loss so far."""

    def __init__(self, wanted: int | None, running: Search, *, shown: bool) -> None:
        self._bar = tqdm(
            total=wanted,
            initial=running.n_proposals(),
            desc="search",
            unit="trial",
            disable=not shown,
        )
        self._best = min((t.values[0] for t in complete_trials(running.study)), default=math.inf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, trial: FrozenTrial) -> None:
        if trial.state == TrialState.COMPLETE:
            self._best = min(self._best, trial.values[0])
        self._bar.set_postfix_str(f"least loss {self._best:.5f}")
        self._bar.update()


def prepare(
    workspace: Workspace,
    limit: Budget,
    *,
    storage: str | None = None,
    sampler: str | None = None,
    seed: int | None = None,
) -> Search:
    """Everything a search needs, ready to `step` or `run`."""
    opened = workspace.study(limit, storage=storage, sampler=sampler, seed=seed)
    return Search(
        study=opened,
        space=workspace.space,
        surrogate=workspace.surrogate,
        budget=limit,
        scorer=workspace.scorer,
        rungs=workspace.spec.calibration.rungs,
        queue=first_trials(
            workspace.surrogate, limit, workspace.baselines(), n_knapsack=N_KNAPSACK
        ),
    )


def _conclude(workspace: Workspace, running: Search) -> tuple[Path, Path]:
    """Picks on the selection split; writes the allocation files and the front."""
    finished = complete_trials(running.study)
    if not finished:
        raise StudyError(
            f"{workspace.folder}: no trial was finished; give it more --trials or --time"
        )
    knapsack = running.queue[0].allocation
    candidates = {allocation_of(t).digest: t for t in reversed(finished[:N_FINALISTS])}
    alone = next((t for t in finished if allocation_of(t) == knapsack), finished[0])
    candidates.setdefault(allocation_of(alone).digest, alone)
    scores = {d: _selection_loss(workspace, allocation_of(t)) for d, t in candidates.items()}
    best = min(candidates, key=lambda d: (scores[d], d))
    _write_importance(workspace)
    write_front(workspace, running.study)
    return (
        _record(workspace, running.budget, "pick", candidates[best], scores[best]),
        _record(workspace, running.budget, "knapsack", alone, scores[allocation_of(alone).digest]),
    )


def _selection_loss(workspace: Workspace, allocation: Allocation) -> float:
    scorer = workspace.selection_scorer
    key = f"{calibration.digest(scorer.documents)[:16]}-{allocation.digest[:32]}"
    path = workspace.profiler.folder / f"selection-{key}.json"
    if not path.exists():
        loss = mean(scorer.score(allocation).kl, scorer.documents)
        write_whole(path, json.dumps({"loss": loss}).encode())
    return float(json.loads(path.read_text())["loss"])


def _write_importance(workspace: Workspace) -> None:
    vectors = workspace.profiler.statistics.importance
    write_whole(workspace.importance_path(importance_digest(vectors)), save(vectors))


def _record(
    workspace: Workspace, limit: Budget, name: str, trial: FrozenTrial, selection_loss: float
) -> Path:
    allocation = allocation_of(trial)
    size = allocation.nbytes(workspace.layout)
    path = workspace.folder / "allocations" / f"{name}.json"
    record = AllocationRecord(
        name=name,
        kind=str(trial.user_attrs[KIND]),
        allocation=allocation.to_json(),
        digest=allocation.digest,
        checkpoint=workspace.inventory.digest,
        importance=workspace.profile.importance,
        codec=codec(),
        bytes={
            "budget": limit.nbytes,
            "encoded": size.encoded,
            "kept": size.kept,
            "overhead": size.overhead,
            "file": size.file,
        },
        effective_bits=size.encoded * 8 / workspace.inventory.n_searched_weights,
        loss={"search": float(trial.values[0]), "selection": selection_loss},
        sha256=_known_digests(path, allocation),
    )
    write_whole(path, record.to_bytes())
    return path


def _known_digests(path: Path, allocation: Allocation) -> dict[str, str]:
    if not path.exists():
        return {}
    old = AllocationRecord.read(path)
    return old.sha256 if old.digest == allocation.digest else {}


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """One row per trial that scored something: kind, state, bytes, losses, retained counts."""
    rows = []
    for t in study.get_trials(deepcopy=False):
        if RESULT not in t.user_attrs or ABANDONED in t.user_attrs:
            continue
        result = t.user_attrs[RESULT]
        rows.append(
            {
                "trial": t.number,
                "kind": t.user_attrs[KIND],
                "state": t.state.name,
                "bytes": result["bytes"]["encoded"],
                "file_bytes": result["bytes"]["file"],
                "effective_bits": result["effective_bits"],
                "loss": result["loss"],
                "predicted": result["predicted"],
                "tokens": result["tokens"],
                "top1": result["top1"],
                "experts": " ".join(str(n) for n in allocation_of(t).counts.values()),
            }
        )
    return pd.DataFrame(rows)


def front(study: str | Path, *, storage: str | None = None, **options: Any) -> pd.DataFrame:
    """The non-dominated COMPLETE trials, smallest first; also written to `front.json`."""
    workspace = Workspace(study, **options)
    path = journal_path(storage, workspace.folder)
    try:
        if path is not None and not path.exists():
            raise KeyError(path)
        opened = optuna.load_study(
            study_name=workspace.study_name, storage=open_storage(storage, workspace.folder)
        )
    except KeyError:
        raise StudyError(
            f"{workspace.folder}: no study yet; launch `allocator search` first"
        ) from None
    return write_front(workspace, opened)


def write_front(workspace: Workspace, study: optuna.Study) -> pd.DataFrame:
    """Writes `front.json`; returns the front's rows of `trials_table`."""
    table = trials_table(study)
    done = table[table["state"] == "COMPLETE"] if len(table) else table
    points = [Point(str(r.trial), int(r.bytes), float(r.loss)) for r in done.itertuples()]
    chosen = [int(p.name) for p in front_of(points)]
    rows = done.set_index("trial").loc[chosen].reset_index() if chosen else done
    data = {
        "schema": 1,
        "split": "search",
        "lock": study.user_attrs.get("lock"),
        "front": rows.to_dict("records"),
        "trials": table.to_dict("records"),
    }
    write_whole(workspace.folder / "front.json", (json.dumps(data, indent=1) + "\n").encode())
    return rows


def score(
    study: str | Path, allocation: str | Path, *, base: str | None = None, **options: Any
) -> dict[str, Any]:
    """Scores any allocation on the search split: loss, per domain, bytes, effective bits."""
    workspace = Workspace(study, **options)
    decision = workspace.read_allocation(allocation, base=base)
    size = decision.nbytes(workspace.layout)
    losses = workspace.scorer.score(decision)
    return workspace.scorer.summary(losses) | {
        "digest": decision.digest,
        "bytes": {"encoded": size.encoded, "kept": size.kept, "file": size.file},
        "effective_bits": size.encoded * 8 / workspace.inventory.n_searched_weights,
        "experts": decision.counts,
    }


def explain(study: str | Path, allocation: str | Path, **options: Any) -> pd.DataFrame:
    """Per decision of an allocation: bytes, predicted loss, and the next step up and down.

    Columns `up` and `down` name the neighbouring value; `up_bytes` and `up_loss` are what it adds.
    """
    workspace = Workspace(study, **options)
    decision = workspace.read_allocation(allocation)
    surrogate, space = workspace.surrogate, workspace.space
    costs = space.costs(Budget(1 << 62, "weights"))
    params: dict[str, Any] = {f"format.{g}": f for g, f in decision.formats}
    params |= {n: decision.counts[layers[0]] for n, layers in space.count_params.items()}
    rows = []
    for name, value in params.items():
        values = sorted(
            space.choices[name], key=lambda v: FORMATS[v].bits if isinstance(v, str) else v
        )
        if value not in values:
            raise SpaceError(f"{name} = {value}: not in this study's space; score it instead")
        row = {
            "decision": name,
            "value": value,
            "bytes": costs.affected(params, [name]),
            "predicted_loss": surrogate.loss(name, value),
        }
        at = values.index(value)
        for label, index in (("up", at + 1), ("down", at - 1)):
            inside = 0 <= index < len(values)
            other = values[index] if inside else None
            row[label] = other
            row[f"{label}_bytes"] = (
                costs.affected({**params, name: other}, [name]) - row["bytes"] if inside else None
            )
            row[f"{label}_loss"] = (
                surrogate.loss(name, other) - row["predicted_loss"] if inside else None
            )
        rows.append(row)
    return pd.DataFrame(rows)


def materialize(
    study: str | Path,
    allocation: str | Path,
    out: str | Path,
    *,
    container: str | None = None,
    record: bool = False,
    **options: Any,
) -> Written:
    """Writes the checkpoint of an allocation file.

    Args:
        study: the folder it belongs to.
        allocation: a file as `search` writes it.
        out: directory to make.
        container: `gguf` or `safetensors`; the study's target by default.
        record: note the weights' sha256 in the allocation file, for `reproduce`.
        options: of `Workspace`.
    """
    workspace = Workspace(study, **options)
    path = Path(allocation)
    wanted = AllocationRecord.read(path)
    check_same_checkpoint(wanted.checkpoint, workspace.inventory)
    bank = workspace.bank_for(wanted.importance)
    container = container or workspace.spec.target
    written = _materialize(
        wanted.decision, bank, Path(out), container=container, importance=wanted.importance
    )
    if record:
        digests = wanted.sha256 | {container: written.manifest.sha256[written.manifest.file]}
        write_whole(path, msgspec.structs.replace(wanted, sha256=digests).to_bytes())
    return written


def verify(
    study: str | Path, folder: str | Path, *, documents: int | None = None, **options: Any
) -> Verification:
    """Re-opens a written checkpoint in its runtime and compares it with its allocation.

    Args:
        study: the folder it belongs to.
        folder: the checkpoint's directory.
        documents: of the search split, scored in torch and in the runtime; by default those that a
            trial is scored on, and then the trial's loss must come out again.
        options: of `Workspace`.

    Raises:
        VerifyError: at the first thing that is not as it should be.
    """
    workspace = Workspace(study, **options)
    manifest = Manifest.read(Path(folder))
    check_same_checkpoint(manifest.checkpoint, workspace.inventory)
    bank = workspace.bank_for(manifest.importance)
    scored = documents or workspace.spec.calibration.search_documents
    scorer = Scorer(
        SwapModel(workspace.layout, bank.decoded),
        workspace.splits[0][:scored],
        progress="torch" if workspace.progress else None,
    )
    found = _verify(Path(folder), bank, scorer, progress=workspace.progress)
    for path in sorted((workspace.folder / "allocations").glob("*.json")):
        record = AllocationRecord.read(path)
        if documents is None and record.digest == manifest.allocation:
            off = abs(record.loss["search"] - found.loss)
            if off > SAFETENSORS_TOLERANCE:
                raise VerifyError(
                    f"{folder}: proxy loss {found.loss:.6f}, {path.name} says "
                    f"{record.loss['search']:.6f}; the study was run on another calibration "
                    "or version"
                )
    return found


def reproduce(
    allocation: str | Path,
    out: str | Path | None = None,
    *,
    study: str | Path | None = None,
    containers: Sequence[str] = (),
    **options: Any,
) -> list[Written]:
    """Rebuilds the checkpoints of a committed allocation and compares their sha256.

    Args:
        allocation: `<study>/allocations/<name>.json`.
        out: parent directory; `<study>/out` by default.
        study: if the file lies elsewhere.
        containers: which; by default those whose sha256 the file records, else the target.
        options: of `Workspace`.

    Raises:
        CheckpointError: if the source checkpoint is another one.
        VerifyError: if a rebuilt file differs from the recorded one.
    """
    path = Path(allocation)
    record = AllocationRecord.read(path)
    folder = Path(study) if study is not None else path.resolve().parent.parent
    parent = Path(out) if out is not None else folder / "out"
    check_same_checkpoint(record.checkpoint, Workspace(folder).inventory)
    parent.mkdir(parents=True, exist_ok=True)
    rebuilt = []
    for container in containers or tuple(record.sha256) or (record.decision.target,):
        written = materialize(
            folder, path, parent / f"{record.name}-{container}", container=container, **options
        )
        digest = written.manifest.sha256[written.manifest.file]
        if container in record.sha256 and digest != record.sha256[container]:
            raise VerifyError(
                f"{written.folder}: sha256 {digest[:12]}…, {path.name} records "
                f"{record.sha256[container][:12]}… (written by {record.codec}, here {codec()}); "
                "install the versions of constraints.txt"
            )
        rebuilt.append(written)
    return rebuilt


__all__ = [
    "estimate", "evaluate", "explain", "front", "inspect", "materialize", "profile",
    "reproduce", "score", "search", "trials_table", "verify",
]  # fmt: skip
