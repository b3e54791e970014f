"""The search: an Optuna study of allocations, two objectives (proxy loss, bytes), a hard budget.

In: a space, a budget, a sampler, and a scorer (handed in; this module never loads torch). Out: a
valid Optuna study. Invariants: no trial that leaves a decode exceeds the budget; `trial.params` is
the proposal and `allocation_of(trial)` what was scored; COMPLETE means scored on the full search
split, a lost race is PRUNED without values, a non-finite loss is FAIL with its reason; a trial
whose process died is closed and its proposal made again under the same seed, so stopped and resumed
equals undisturbed.

Racing: a candidate is scored on a growing prefix of the search split. After each rung it is
compared, document by document, with every finished trial of at most its bytes; where the mean
difference is above `RACE_Z` standard errors it has lost.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from allocator.allocation import Allocation
from allocator.errors import SpaceError, StudyError
from allocator.memory import Budget
from allocator.samplers.knapsack import ABANDONED
from allocator.space import Costs, Params, Space, repair
from allocator.surrogate import Surrogate

ALLOCATION, KIND, LOSSES, RESULT, LOCK = "allocation", "kind", "losses", "result", "lock"
RACE_Z = 3.0


class _Clock:
    """Adds the time since the last lap to a total."""

    def __init__(self, totals: dict[str, float]) -> None:
        self._totals = totals
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._totals[name] += now - self._last
        self._last = now


class Losses(Protocol):
    """Per-document losses; `kl` in nats per token."""

    @property
    def kl(self) -> Any:
        """KL(original || candidate), one value per document."""

    def __add__(self, other: Any) -> Any: ...


class TrialScorer(Protocol):
    """What a search needs of a scorer."""

    @property
    def n_documents(self) -> int:
        """Documents of the full search split."""

    def score(self, allocation: Allocation, start: int, stop: int) -> Any:
        """Losses on documents `start:stop`."""

    def summary(self, losses: Any) -> dict[str, Any]:
        """Means of losses that began at document 0: `loss`, `tokens`, per-domain values, ..."""


@dataclass(frozen=True)
class Queued:
    """A first trial: what it is, and its allocation; the space must hold it."""

    kind: str
    allocation: Allocation


@dataclass
class Search:
    """A running search.

    Attributes:
        study: the Optuna study.
        space: what may be chosen.
        surrogate: prices repairs.
        budget: the hard limit.
        scorer: measures allocations.
        rungs: documents after which a candidate may lose its race, ascending.
        queue: first trials, in order.
        seconds: spent so far, by what they were spent on.
    """

    study: optuna.Study
    space: Space
    surrogate: Surrogate
    budget: Budget
    scorer: TrialScorer
    rungs: Sequence[int]
    queue: Sequence[Queued] = ()
    seconds: dict[str, float] = field(
        default_factory=lambda: {"scoring": 0.0, "sampler": 0.0, "storage": 0.0}
    )
    _costs: Costs = field(init=False)

    def __post_init__(self) -> None:
        self._costs = self.space.costs(self.budget)
        for queued in self.queue:
            self.space.params(queued.allocation)
            used = self.budget.used(queued.allocation.nbytes(self.space.layout))
            if used > self.budget.nbytes:
                raise StudyError(f"first trial {queued.kind} is over the budget")

    def n_proposals(self) -> int:
        """Trials so far, abandoned ones not counted."""
        trials = self.study.get_trials(deepcopy=False)
        return sum(ABANDONED not in t.user_attrs and t.state != TrialState.WAITING for t in trials)

    def run(
        self,
        *,
        n_trials: int | None = None,
        seconds: float | None = None,
        on_trial: Callable[[FrozenTrial], None] | None = None,
    ) -> None:
        """Runs until the study has `n_trials` proposals, or for `seconds`."""
        started = time.monotonic()
        while n_trials is None or self.n_proposals() < n_trials:
            if seconds is not None and time.monotonic() - started >= seconds:
                return
            finished = self.step()
            if on_trial is not None:
                on_trial(finished)

    def step(self) -> FrozenTrial:
        """One trial: ask, make feasible, score, tell."""
        clock = _Clock(self.seconds)
        kind = self._enqueue_next()
        trial = self.study.ask(self.space.distributions)
        clock.lap("storage")
        sampling = getattr(self.study.sampler, "sampling_seconds", 0.0)
        self.seconds["storage"] -= sampling
        self.seconds["sampler"] += sampling
        params = repair(self.space, self._costs, trial.params, self.surrogate.loss)
        allocation = self.space.allocation(params)
        size = allocation.nbytes(self.space.layout)
        used = self.budget.used(size)
        assert used <= self.budget.nbytes, "repair keeps the budget"
        clock.lap("sampler")
        trial.set_user_attr(ALLOCATION, allocation.to_json())
        trial.set_user_attr(KIND, kind or "proposal")
        trial.set_constraint("budget", used - self.budget.nbytes)
        clock.lap("storage")
        losses, lost = self._race(allocation, used)
        clock.lap("scoring")
        result = self.scorer.summary(losses) | {
            "bytes": {"encoded": size.encoded, "kept": size.kept, "file": size.file},
            "effective_bits": size.encoded * 8 / self.space.layout.inventory.n_searched_weights,
            "predicted": self.surrogate.predict(params),
            "repaired": params != self.space.complete(trial.params),
        }
        trial.set_user_attr(LOSSES, [float(v) for v in losses.kl])
        trial.set_user_attr(RESULT, result)
        self._tell(trial, float(result["loss"]), used, lost)
        clock.lap("storage")
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _enqueue_next(self) -> str | None:
        number = self.n_proposals()
        if number >= len(self.queue):
            return None
        queued = self.queue[number]
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.enqueue_trial(self.space.params(queued.allocation))
        return queued.kind

    def _race(self, allocation: Allocation, used: int) -> tuple[Any, bool]:
        rivals = [
            np.array(t.user_attrs[LOSSES])
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if t.values[1] <= used
        ]
        losses: Any = None
        start = 0
        n_documents = self.scorer.n_documents
        for stop in sorted({*(r for r in self.rungs if r < n_documents), n_documents}):
            more = self.scorer.score(allocation, start, stop)
            losses = more if losses is None else losses + more
            start = stop
            if not np.isfinite(losses.kl).all():
                return losses, False
            if stop < n_documents and any(loses(losses.kl, r[:stop]) for r in rivals):
                return losses, True
        return losses, False

    def _tell(self, trial: Trial, loss: float, used: int, lost: bool) -> None:
        if not math.isfinite(loss):
            trial.set_user_attr("reason", f"proxy loss is {loss}")
            self.study.tell(trial, state=TrialState.FAIL)
        elif lost:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, [loss, used])


def close_abandoned(study: optuna.Study) -> int:
    """Closes RUNNING trials of a dead process; only while no other search is alive."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        study._storage.set_trial_user_attr(trial._trial_id, ABANDONED, True)
        study.tell(trial.number, state=TrialState.FAIL)
    return len(running)


def loses(candidate: Any, rival: Any, *, z: float = RACE_Z) -> bool:
    """Whether paired losses are worse by more than `z` standard errors."""
    difference = np.asarray(candidate) - np.asarray(rival)
    if len(difference) < 2:
        return False
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return bool(difference.mean() > z * error)


def open_study(storage: BaseStorage, name: str, lock: dict[str, Any]) -> optuna.Study:
    """Creates the study, or opens it if it was launched with the same inputs.

    Args:
        storage: Optuna's.
        name: of the study within the storage.
        lock: the resolved inputs; equal for every launch of one study.

    Raises:
        StudyError: if the study was launched with other inputs, naming the first that differs.
    """
    try:  # first: creating what exists adds a line to the journal
        study = optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
    known = study.user_attrs.get(LOCK)
    if known is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(f"study {name!r} in this storage is not one of ours; use another name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["proxy_loss", "bytes"])
        study.set_user_attr(LOCK, lock)
        return study
    for key in lock:
        if known.get(key) != lock[key]:
            raise StudyError(
                f"study {name!r} was launched with {key} = {_short(known.get(key))}, now it is "
                f"{_short(lock[key])}; a changed study is a new one: "
                "use another folder or --storage"
            )
    return study


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def allocation_of(trial: FrozenTrial) -> Allocation:
    """What a trial scored; the only reader of a trial's decision.

    Raises:
        StudyError: if the trial scored nothing.
    """
    if ALLOCATION not in trial.user_attrs:
        raise StudyError(f"trial {trial.number} scored no allocation ({trial.state.name})")
    return Allocation.from_json(trial.user_attrs[ALLOCATION])


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials scored on the full search split, best loss first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda t: (t.values[0], t.values[1], t.number))


def first_trials(
    surrogate: Surrogate,
    budget: Budget,
    baselines: Sequence[tuple[str, Allocation]],
    *,
    n_knapsack: int,
) -> list[Queued]:
    """The unperturbed knapsack solutions, at the cap first, then the baselines that fit.

    Args:
        surrogate: solved.
        budget: the cap.
        baselines: names and allocations; those the space does not hold, or over the cap, are left
            to the committed references.
        n_knapsack: solutions, at byte targets spread between floor and cap.
    """
    space = surrogate.space
    costs = space.costs(budget)
    floor = min(costs.total(space.complete(space.params(space.smallest))), budget.nbytes)
    queue: dict[str, Queued] = {}

    def add(kind: str, allocation: Allocation) -> None:
        queue.setdefault(allocation.digest, Queued(kind, allocation))

    for i in range(n_knapsack):
        share = 1 - i / max(1, n_knapsack)
        target = Budget(floor + int(share * (budget.nbytes - floor)), budget.bounds)
        add("knapsack", space.allocation(surrogate.solve(target)))
    for name, allocation in baselines:
        if _held(space, allocation) and costs.total(_full(space, allocation)) <= budget.nbytes:
            add(name, allocation)
    return list(queue.values())


def _full(space: Space, allocation: Allocation) -> Params:
    return space.complete(space.params(allocation))


def _held(space: Space, allocation: Allocation) -> bool:
    try:
        space.params(allocation)
    except SpaceError:
        return False
    return True
