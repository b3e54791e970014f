"""The search stage: the launch itself, and what it leaves.

In: a study folder and a budget. Out: an Optuna study, `front.json`, `allocations/pick.json`,
`allocations/knapsack.json` and the importance vectors they need. Invariant: whatever is wrong with
the input is said before anything is measured; the pick is made on the selection split among
finalists that include the unperturbed knapsack, so there it is never worse than that.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState
from safetensors.numpy import save
from tqdm import tqdm

from allocator.app.study_file import DeviceBudgetSpec
from allocator.app.study_folder import StudyFolder
from allocator.app.workers import run_workers
from allocator.codecs import identity_of
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord, changing
from allocator.decision.budget import Budget
from allocator.decision.front import Point
from allocator.decision.front import front as front_of
from allocator.errors import SpaceError, StudyError
from allocator.files.atomic import write_whole
from allocator.files.checksums import seal
from allocator.profiling.statistics import importance_digest
from allocator.study.folder_lock import search_lock
from allocator.study.initial_trials import first_trials
from allocator.study.leases import Leases, left_here
from allocator.study.outcomes import close_abandoned
from allocator.study.search import Search
from allocator.study.storages import journal_path, mend_storage, reaching
from allocator.study.trials import (
    KIND,
    RESULT,
    allocation_of,
    complete_trials,
    is_abandoned,
    not_abandoned,
    trial_counts,
)
from allocator.targets.device_memory import DeviceMemory

_log = logging.getLogger(__name__)

N_KNAPSACK = 3
"""Unperturbed knapsack solutions among the first trials: at the cap, and below it."""
N_FINALISTS = 3
"""Trials of least search loss that the selection split decides between."""


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves.

    Attributes:
        study: the Optuna study.
        budget: the limits that held.
        pick: the allocation file of the pick.
        knapsack: the allocation file of the unperturbed knapsack at the budget, if it was finished.
        seconds: spent in this run on scoring, sampler and storage.
        trials: trials by state.
        messages: repairs made on the way, for showing.
        memory: of the pick, itemised, where the budget is a device's.
    """

    study: optuna.Study
    budget: Budget
    pick: Path
    knapsack: Path | None
    seconds: dict[str, float]
    trials: dict[str, int]
    messages: tuple[str, ...]
    memory: DeviceMemory | None = None


def search(
    study: str | Path,
    *,
    budget: str | None = None,
    weights_budget: str | None = None,
    device: DeviceBudgetSpec | None = None,
    trials: int | None = None,
    seconds: float | None = None,
    tokens: int | None = None,
    storage: str | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    join: bool = False,
    workers: int = 1,
    **options: Any,
) -> SearchResult:
    """Launches or resumes a study, then picks among its front on the selection split.

    Several searches may work on one study, on one machine or many: no trial is lost or made twice,
    and each returns when what the others had in hand at its end has ended too.

    Args:
        study: its folder.
        budget: of the whole file, e.g. `12MiB`; else study.toml's. With `device`, beside it.
        weights_budget: of the searched matrices alone. With `device`, beside it.
        device: of everything in a device's memory, and what runs there.
        trials: proposals in the study in total; if none of this, `seconds` and `tokens` is given,
            study.toml's.
        seconds: stop after so long instead.
        tokens: stop within so many forward tokens instead, profile and pick included.
        storage: a database URL, `grpc://HOST:PORT` or `journal:PATH`; by default a journal in the
            folder.
        sampler: instead of study.toml's.
        seed: instead of study.toml's.
        join: work beside a search that is running on this machine.
        workers: processes that search side by side, each with its share of the cores and its own
            copy of the model; what they find is reproducible with one alone.
        options: of `StudyFolder`.

    Raises:
        AllocatorError: one line on whatever is wrong, before anything is written.
    """
    study_folder = StudyFolder(study, **options)
    limit = study_folder.budget(file=budget, weights=weights_budget, device=device)
    study_folder.check_launch(sampler=sampler, seed=seed, trials=trials)
    journal_path(storage, study_folder.path)
    if tokens is not None:
        check_tokens(study_folder, tokens, "raise --tokens")
        tokens -= pick_tokens(study_folder)
    with search_lock(study_folder.path, join=join) as lock, reaching(storage):
        messages = mend_storage(storage, study_folder.path) if lock.exclusive_start else []
        opened = study_folder.study(limit, storage=storage, sampler=sampler, seed=seed)
        if lock.exclusive_start and (closed := _close_dead(opened, storage, study_folder.path)):
            messages.append(f"closed {closed} trial(s) of a search that died; proposing them again")
        lock.ready()
        limited = trials is not None or seconds is not None or tokens is not None
        wanted = trials if limited else study_folder.spec.trials
        with Leases(opened, study_folder.path) as leases:
            running = prepare(
                study_folder, limit, opened, sampler=sampler, seed=seed, leases=leases
            )
            deadline = None if seconds is None else time.monotonic() + seconds
            before = running.n_proposals()
            with _TrialBar(wanted, running, shown=study_folder.progress) as bar:
                if workers > 1 and (wanted is None or before < wanted):
                    launch: dict[str, Any] = {
                        "study": study_folder.path,
                        "budget": budget,
                        "weights_budget": weights_budget,
                        "device": device,
                        "trials": wanted,
                        "deadline": deadline,
                        "tokens": tokens,
                        "storage": storage,
                        "sampler": sampler,
                        "seed": seed,
                    }
                    messages += _run_workers(study_folder, running, launch, options, workers, bar)
                _run_until(running, wanted, deadline, tokens, bar)  # what workers left, if anything
        if before and running.n_proposals() == before:
            messages.append(f"no new trial: {before} were made before, which is what was asked for")
        pick, knapsack = _conclude(study_folder, running)
    memory = None
    if limit.workload is not None:
        decision = AllocationRecord.read(pick).decision
        memory = decision.device_memory(study_folder.layout, limit.workload)
    return SearchResult(
        study=running.study,
        budget=limit,
        pick=pick,
        knapsack=knapsack,
        seconds=dict(running.seconds),
        trials=trial_counts(running.study),
        messages=tuple(messages),
        memory=memory,
    )


def _close_dead(study: optuna.Study, storage: str | None, folder: Path) -> int:
    """Closes what searches of this folder left; call it only while none is alive here.

    A storage that others may share holds trials of theirs too: those are left to their leases.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return close_abandoned(study, running if storage is None else left_here(running, folder))


def _run_until(
    running: Search,
    trials: int | None,
    deadline: float | None,
    tokens: int | None,
    on_trial: Callable[[FrozenTrial], None] | None = None,
) -> None:
    seconds = None if deadline is None else max(deadline - time.monotonic(), 0)
    running.run(n_trials=trials, seconds=seconds, tokens=tokens, on_trial=on_trial)


def _run_workers(
    study_folder: StudyFolder,
    running: Search,
    launch: dict[str, Any],
    options: dict[str, Any],
    workers: int,
    on_trial: Callable[[FrozenTrial], None],
) -> list[str]:
    """Runs `work` in processes to its end, showing the whole study's trials; lines to show."""
    threads = max(study_folder.threads // workers, 1)
    chosen = {**launch, **options, "threads": threads, "progress": False}
    study, messages = running.study, []
    shown = {t.number for t in not_abandoned(study)}
    with closing(run_workers(workers, work, chosen, threads=threads)) as ticks:
        for ended in ticks:
            for worker in ended:
                for what, spent in (worker.result or {}).items():
                    running.seconds[what] += spent
                if worker.killed:
                    unfinished = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                    dead = left_here(unfinished, study_folder.path, pid=worker.pid)
                    messages.append(
                        f"worker {worker.pid} was killed (signal {worker.killed}); closed "
                        f"{close_abandoned(study, dead)} trial(s), which the others proposed again"
                    )
            for trial in not_abandoned(study):
                if trial.state.is_finished() and trial.number not in shown:
                    shown.add(trial.number)
                    on_trial(trial)
    return messages


def work(
    study: Path,
    *,
    budget: str | None,
    weights_budget: str | None,
    device: DeviceBudgetSpec | None,
    trials: int | None,
    deadline: float | None,
    tokens: int | None,
    storage: str | None,
    sampler: str | None,
    seed: int | None,
    **options: Any,
) -> dict[str, float]:
    """Joins a search as one of its worker processes, and only searches.

    Args:
        study: as of `search`, like all that is not named here.
        budget: of the whole file.
        weights_budget: of the searched matrices alone. With `device`, beside it.
        device: of everything in a device's memory.
        trials: proposals in the study in total.
        deadline: by this machine's monotonic clock, seconds.
        tokens: forward tokens of all trials and the profile.
        storage: where the trials live.
        sampler: instead of study.toml's.
        seed: instead of study.toml's.
        options: of `StudyFolder`.

    Returns:
        Seconds spent, by what they were spent on.
    """
    study_folder = StudyFolder(study, **options)
    limit = study_folder.budget(file=budget, weights=weights_budget, device=device)
    with search_lock(study_folder.path, join=True) as lock, reaching(storage):
        lock.ready()
        opened = study_folder.study(limit, storage=storage, sampler=sampler, seed=seed)
        with Leases(opened, study_folder.path) as leases:
            running = prepare(
                study_folder, limit, opened, sampler=sampler, seed=seed, leases=leases
            )
            _run_until(running, trials, deadline, tokens)
    return running.seconds


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
    study_folder: StudyFolder,
    limit: Budget,
    study: optuna.Study,
    *,
    sampler: str | None = None,
    seed: int | None = None,
    baselines: Sequence[tuple[str, Allocation]] | None = None,
    n_knapsack: int = N_KNAPSACK,
    leases: Leases | None = None,
) -> Search:
    """Everything a search needs, profile included, ready to `step` or `run`.

    Args:
        study_folder: of the study.
        limit: the budget.
        study: opened.
        sampler: instead of study.toml's.
        seed: instead of study.toml's.
        baselines: among the first trials; uniform formats and role mixes by default.
        n_knapsack: knapsack solutions among the first trials.
        leases: of this worker; None where no other search can be on the study.
    """
    if baselines is None:
        baselines = study_folder.baselines()
    study.sampler = study_folder.sampler(limit, sampler=sampler, seed=seed)
    return Search(
        study=study,
        space=study_folder.space,
        surrogate=study_folder.surrogate,
        budget=limit,
        scorer=study_folder.scorers.trials,
        rungs=study_folder.spec.calibration.rungs,
        queue=first_trials(study_folder.surrogate, limit, baselines, n_knapsack=n_knapsack),
        base_tokens=study_folder.base_tokens,
        leases=leases,
    )


def pick_tokens(study_folder: StudyFolder) -> int:
    """The most forward tokens that a pick takes: finalists, the knapsack alone, the original."""
    return (N_FINALISTS + 2) * study_folder.scorers.selection.n_tokens


def check_tokens(study_folder: StudyFolder, tokens: int, way_out: str) -> None:
    """Raises:
    StudyError: if `tokens` are too few for the profile, the original, one trial and the pick.
    """
    one_trial = study_folder.scorers.trials.n_tokens
    least = study_folder.base_tokens + one_trial + pick_tokens(study_folder)
    if tokens < least:
        raise StudyError(
            f"{tokens:,} forward tokens; the profile, the original, one trial and the pick take "
            f"{least:,}: {way_out}"
        )


def _conclude(study_folder: StudyFolder, running: Search) -> tuple[Path, Path | None]:
    """Picks on the selection split; writes the allocation files and the front."""
    finalists, alone = finalists_of(running)
    if not finalists:
        raise StudyError(
            f"{study_folder.path}: no trial was finished; give it more --trials, --time or --tokens"
        )
    scores = {t.number: _selection_loss(study_folder, allocation_of(t)) for t in finalists}
    best = min(finalists, key=lambda t: (scores[t.number], t.number))
    _write_importance(study_folder)
    write_front(study_folder, running.study)
    pick = _record(study_folder, running.budget, "pick", best, scores[best.number])
    if alone is None:
        return pick, None
    return pick, _record(study_folder, running.budget, "knapsack", alone, scores[alone.number])


def finalists_of(running: Search) -> tuple[list[FrozenTrial], FrozenTrial | None]:
    """Trials of different allocations that the pick is made among; the knapsack's, if finished."""
    found: dict[Allocation, FrozenTrial] = {}
    for trial in complete_trials(running.study):
        found.setdefault(allocation_of(trial), trial)
    finished = list(found.values())
    knapsack = running.queue[0].allocation
    alone = found.get(knapsack)
    finalists = finished[:N_FINALISTS]
    if alone is not None and alone.number not in {t.number for t in finalists}:
        finalists.append(alone)
    return finalists, alone


def _selection_loss(study_folder: StudyFolder, allocation: Allocation) -> float:
    return study_folder.profiler.selection_loss(allocation, study_folder.scorers.selection)


def _write_importance(study_folder: StudyFolder) -> None:
    vectors = study_folder.profiler.statistics.importance
    write_whole(study_folder.encodings.path(importance_digest(vectors)), save(vectors))


def _record(
    study_folder: StudyFolder, limit: Budget, name: str, trial: FrozenTrial, selection_loss: float
) -> Path:
    allocation = allocation_of(trial)
    size = allocation.nbytes(study_folder.layout)
    memory = None
    if limit.workload is not None:
        memory = allocation.device_memory(study_folder.layout, limit.workload)
    path = study_folder.path / "allocations" / f"{name}.json"
    record = AllocationRecord(
        name=name,
        kind=str(trial.user_attrs[KIND]),
        allocation=allocation.to_json(),
        digest=allocation.digest,
        checkpoint=study_folder.inventory.digest,
        importance=study_folder.profile.importance,
        codec=identity_of(allocation.stored_formats),
        bytes={
            "budget": limit.nbytes,
            "encoded": size.encoded,
            "kept": size.full_precision,
            "overhead": size.overhead,
            "file": size.file,
        }
        | limit.by_name
        | ({} if memory is None else _prefixed("device", asdict(memory) | {"total": memory.total})),
        effective_bits=size.encoded * 8 / study_folder.inventory.n_searched_weights,
        loss={"search": float(trial.values[0]), "selection": selection_loss},
        workload={}
        if limit.workload is None
        else {n: getattr(limit.workload, n) for n in ("context", "sequences", "reserve")},
    )
    with changing(path):
        known = _known_digests(path, allocation)
        write_whole(path, msgspec.structs.replace(record, sha256=known).to_bytes())
    return path


def _prefixed(prefix: str, sizes: dict[str, int]) -> dict[str, int]:
    return {f"{prefix}_{name}": nbytes for name, nbytes in sizes.items()}


def _known_digests(path: Path, allocation: Allocation) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        old = AllocationRecord.read(path)
    except SpaceError as error:
        _log.warning("%s; written anew", error)
        return {}
    return old.sha256 if old.digest == allocation.digest else {}


def trials_table(study: optuna.Study) -> pd.DataFrame:
    """One row per trial that scored something: kind, state, bytes, losses, retained counts."""
    rows = []
    for t in study.get_trials(deepcopy=False):
        if RESULT not in t.user_attrs or is_abandoned(t) or not t.state.is_finished():
            continue
        result = t.user_attrs[RESULT]
        allocation = allocation_of(t)
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
                "experts": " ".join(str(n) for n in allocation.counts.values()),
            }
            | (_on_device(allocation, result) if "memory" in result else {})
        )
    return pd.DataFrame(rows)


def _on_device(allocation: Allocation, result: dict[str, Any]) -> dict[str, Any]:
    """What a trial under a device's budget has beside the other columns."""
    return {
        "memory_bytes": sum(result["memory"].values()),
        "token_bytes": result["token_bytes"],
        "tokens_per_second": result["tokens_per_second"],
        **allocation.runtime_settings._asdict(),
    }


def write_front(study_folder: StudyFolder, study: optuna.Study) -> pd.DataFrame:
    """Writes `front.json`; returns the front's rows of `trials_table`.

    Under a device's budget it is in three axes: memory, loss, and bytes read per token.
    """
    table = trials_table(study)
    done = table[table["state"] == "COMPLETE"] if len(table) else table
    size, read = ("memory_bytes", "token_bytes") if "memory_bytes" in done else ("bytes", None)
    points = [
        Point(str(r["trial"]), int(r[size]), float(r["loss"]), int(r[read]) if read else 0)
        for r in done.to_dict("records")
    ]
    chosen = [int(p.name) for p in front_of(points)]
    rows = done.set_index("trial").loc[chosen].reset_index() if chosen else done
    data = {
        "schema": 1,
        "split": "search",
        "lock": study.user_attrs.get("lock"),
        "front": rows.to_dict("records"),
        "trials": table.to_dict("records"),
    }
    write_whole(study_folder.path / "front.json", seal(data))
    return rows
