"""The search: an Optuna study of allocations, two objectives (proxy loss, bytes), a hard budget.

In: a space, a budget, a sampler, and a scorer (handed in; this module never loads torch). Out: a
valid Optuna study. Invariants: no trial that leaves a decode exceeds the budget; `trial.params` is
the proposal and `allocation_of(trial)` what was scored; COMPLETE means scored on the full search
split, a lost race is PRUNED without values, a non-finite loss is FAIL with its reason; a trial
whose process died is closed and its proposal made again under the same seed, so stopped and resumed
equals undisturbed.

Racing: a candidate is scored on a growing prefix of the search split. After each rung it is
compared, document by document, with every finished trial of at most its bytes (and `RACE_SLACK`);
where the mean difference is above `RACE_Z` standard errors it has lost.

Generations, for samplers that ask for them: offspring are proposed together and narrowed down in
steps, each step on more documents (`Selection`); the losers are PRUNED. How all of them ended is
written in one piece (`VERDICTS`) before the first is told: a search that dies earlier has told
none, and proposes the generation again; one that dies later has the rest told by
`close_abandoned`. So no sampler ever sees half a generation.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from allocator.allocation import Allocation
from allocator.errors import SpaceError, StudyError
from allocator.memory import Budget, FileBytes
from allocator.samplers.evolution import Selection
from allocator.space import Costs, Params, Space, repair
from allocator.surrogate import Surrogate
from allocator.trials import (
    ABANDONED,
    ALLOCATION,
    KIND,
    LOSSES,
    RESULT,
    forward_tokens,
    not_abandoned,
)

LOCK = "lock"
VERDICTS = "verdicts"
"""User attribute of a study: how the trials of its last generation ended, by number."""
RACE_Z = 2.0
RACE_SLACK = 1e-3
"""Rivals may be larger by this share: a thousandth of the bytes is worth well under a percent of
the loss, and proposals at one cap rarely have the same size to the byte."""
Verdict = tuple[str, list[float] | None]
"""A trial's state by name, and its values."""


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

    def tokens(self, stop: int) -> int:
        """Tokens of the first `stop` documents."""

    def score(self, allocation: Allocation, start: int, stop: int) -> Any:
        """Losses on documents `start:stop`."""

    def summary(self, losses: Any) -> dict[str, Any]:
        """Means of losses that began at document 0: `loss`, `tokens`, per-domain values, ..."""


@dataclass(frozen=True)
class Queued:
    """A first trial: what it is, and its allocation; the space must hold it."""

    kind: str
    allocation: Allocation


@dataclass(eq=False)
class _Candidate:
    """A trial on its way: what it proposes, and its losses so far, from document 0 on."""

    trial: Trial
    params: Params
    allocation: Allocation
    size: FileBytes
    used: int
    losses: Any = None

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.losses.kl).all())


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
        selection: within a generation; None takes the default if the sampler asks for generations.
        base_tokens: forward tokens that the study cost before its first trial.
        seconds: spent so far, by what they were spent on.
    """

    study: optuna.Study
    space: Space
    surrogate: Surrogate
    budget: Budget
    scorer: TrialScorer
    rungs: Sequence[int]
    queue: Sequence[Queued] = ()
    selection: Selection | None = None
    base_tokens: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("scoring", "gradient", "sampler", "storage"), 0.0)
    )
    _costs: Costs = field(init=False)

    def __post_init__(self) -> None:
        self._costs = self.space.costs(self.budget)
        if self.selection is None and getattr(self.study.sampler, "generational", False):
            self.selection = Selection.over(self.scorer.n_documents)
        if self.selection is not None:
            self.selection.check(self.scorer.n_documents)
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
        tokens: int | None = None,
        on_trial: Callable[[FrozenTrial], None] | None = None,
    ) -> None:
        """Runs until the study has `n_trials` proposals, for `seconds`, or within forward `tokens`.

        A generation that was begun is finished, so there may be more trials. The next trial or
        generation is begun only if `tokens` suffice for it even if it loses no race.
        """
        started = time.monotonic()
        while n_trials is None or self.n_proposals() < n_trials:
            if seconds is not None and time.monotonic() - started >= seconds:
                return
            if tokens is not None and self.forward_tokens() + self._next_tokens() > tokens:
                return
            if self.selection is None or self.n_proposals() < len(self.queue):
                finished = [self.step()]
            else:
                finished = self.generation(self.selection)
            if on_trial is not None:
                for trial in finished:
                    on_trial(trial)

    def forward_tokens(self) -> int:
        """Tokens through all layers so far: `base_tokens`, trials, and what samplers measured.

        Abandoned trials are left out: they are made again.
        """
        return self.base_tokens + sum(map(forward_tokens, not_abandoned(self.study)))

    def _next_tokens(self) -> int:
        """The most that the next trial or generation may cost."""
        n_documents = self.scorer.n_documents
        if self.n_proposals() < len(self.queue):
            return self.scorer.tokens(n_documents)
        if self.selection is None:
            looking = getattr(self.study.sampler, "next_tokens", lambda study: 0)(self.study)
            return self.scorer.tokens(n_documents) + int(looking)
        ends = [0, *(d for d, _ in self.selection.steps), n_documents]
        survivors = [self.selection.n_offspring, *(s for _, s in self.selection.steps)]
        spans = (b - a for a, b in pairwise(map(self.scorer.tokens, ends)))
        return sum(n * s for n, s in zip(spans, survivors, strict=True))

    def step(self) -> FrozenTrial:
        """One trial: ask, make feasible, score, tell."""
        candidate = self._propose()
        lost = self._race(candidate)
        return self._tell([candidate], lost=[candidate] if lost else [])[0]

    def generation(self, selection: Selection) -> list[FrozenTrial]:
        """Offspring of one parent, narrowed down in steps; the last one(s) get the full split."""
        candidates = [self._propose() for _ in range(selection.n_offspring)]
        left = candidates
        whole = (self.scorer.n_documents, selection.n_offspring)
        for documents, survivors in (*selection.steps, whole):
            for candidate in left:
                self._score(candidate, documents)
            left = [c for c in left if c.finite]
            # equals stay in order of proposal
            left = sorted(left, key=lambda c: float(self.scorer.summary(c.losses)["loss"]))
            left = left[:survivors]
        return self._tell(candidates, lost=[c for c in candidates if c.finite and c not in left])

    def _propose(self) -> _Candidate:
        clock = _Clock(self.seconds)
        kind = self._enqueue_next()
        trial = self.study.ask(self.space.distributions)
        clock.lap("storage")
        for name, attribute in (("sampler", "sampling_seconds"), ("gradient", "looking_seconds")):
            spent = getattr(self.study.sampler, attribute, 0.0)
            self.seconds["storage"] -= spent
            self.seconds[name] += spent
        params = repair(
            self.space,
            self._costs,
            trial.params,
            self.surrogate.around(self.space.complete(trial.params)),
        )
        allocation = self.space.allocation(params)
        size = allocation.nbytes(self.space.layout)
        used = self.budget.used(size)
        assert used <= self.budget.nbytes, "repair keeps the budget"
        clock.lap("sampler")
        trial.set_user_attr(ALLOCATION, allocation.to_json())
        trial.set_user_attr(KIND, kind or "proposal")
        trial.set_constraint("budget", used - self.budget.nbytes)
        clock.lap("storage")
        return _Candidate(trial, params, allocation, size, used)

    def _enqueue_next(self) -> str | None:
        number = self.n_proposals()
        if number >= len(self.queue):
            return None
        queued = self.queue[number]
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.enqueue_trial(self.space.params(queued.allocation))
        return queued.kind

    def _score(self, candidate: _Candidate, stop: int) -> None:
        """Measures what is missing of the first `stop` documents."""
        clock = _Clock(self.seconds)
        start = 0 if candidate.losses is None else len(candidate.losses.kl)
        more = self.scorer.score(candidate.allocation, start, stop)
        candidate.losses = more if candidate.losses is None else candidate.losses + more
        clock.lap("scoring")

    def _race(self, candidate: _Candidate) -> bool:
        """Scores rung by rung; True if it lost, else it is scored in full or not finite."""
        rivals = [
            np.array(t.user_attrs[LOSSES])
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if t.values[1] <= candidate.used * (1 + RACE_SLACK)
        ]
        n_documents = self.scorer.n_documents
        for stop in sorted({*(r for r in self.rungs if r < n_documents), n_documents}):
            self._score(candidate, stop)
            if not candidate.finite:
                return False
            if stop < n_documents and any(loses(candidate.losses.kl, r[:stop]) for r in rivals):
                return True
        return False

    def _tell(
        self, candidates: Sequence[_Candidate], *, lost: Sequence[_Candidate]
    ) -> list[FrozenTrial]:
        """Records and closes candidates that ended together."""
        clock = _Clock(self.seconds)
        verdicts = {str(c.trial.number): self._record(c, lost=c in lost) for c in candidates}
        if len(verdicts) > 1:
            self.study.set_user_attr(VERDICTS, verdicts)
        for number, verdict in verdicts.items():
            _close(self.study, int(number), verdict)
        clock.lap("storage")
        trials = self.study.get_trials(deepcopy=False)
        return [trials[c.trial.number] for c in candidates]

    def _record(self, candidate: _Candidate, *, lost: bool) -> Verdict:
        trial, size = candidate.trial, candidate.size
        result = self.scorer.summary(candidate.losses) | {
            "bytes": {"encoded": size.encoded, "kept": size.kept, "file": size.file},
            "effective_bits": size.encoded * 8 / self.space.layout.inventory.n_searched_weights,
            "predicted": self.surrogate.predict(candidate.params),
            "repaired": candidate.params != self.space.complete(trial.params),
        }
        trial.set_user_attr(LOSSES, [float(v) for v in candidate.losses.kl])
        trial.set_user_attr(RESULT, result)
        loss = float(result["loss"])
        if not math.isfinite(loss):
            trial.set_user_attr("reason", f"proxy loss is {loss}")
            return TrialState.FAIL.name, None
        if lost:
            return TrialState.PRUNED.name, None
        return TrialState.COMPLETE.name, [loss, candidate.used]


def _close(study: optuna.Study, number: int, verdict: Verdict) -> None:
    state, values = verdict
    study.tell(number, values, state=TrialState[state])


def close_abandoned(study: optuna.Study) -> int:
    """Closes RUNNING trials of a dead process; only while no other search is alive.

    Returns:
        How many were abandoned; those that had ended, but for being told so, are not among them.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    verdicts = study.user_attrs.get(VERDICTS, {})
    ended = [t for t in running if str(t.number) in verdicts]
    for trial in ended:
        _close(study, trial.number, verdicts[str(trial.number)])
    abandoned = [t for t in running if str(t.number) not in verdicts]
    for trial in abandoned:
        study._storage.set_trial_user_attr(trial._trial_id, ABANDONED, True)
        study.tell(trial.number, state=TrialState.FAIL)
    return len(abandoned)


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


def trial_counts(study: optuna.Study) -> dict[str, int]:
    """How many trials ended how; abandoned ones, which were made again, are left out."""
    states = [t.state for t in not_abandoned(study)]
    return {
        s.name: states.count(s) for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }


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
