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

Several at once: batches, where a scorer takes several candidates in one pass, race side by side;
generations, for samplers that ask for them, are narrowed down in steps, each step on more documents
(`Selection`), and the losers are PRUNED. How all of them ended is written in one piece (`VERDICTS`)
before the first is told: a search that dies earlier has told none, and proposes them again; one
that dies later has the rest told by `close_abandoned`. So no sampler ever sees half of them.

Several workers (`leases`): each asks, writes its allocation, then reads the others'. A trial that
is one too many, or that scores what another is scoring, is given up; trials of dead workers are
closed by whoever sees their lease expire.
"""

import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.feasibility import make_feasible
from allocator.decision.parameters import Params
from allocator.decision.pricing import FileBytes
from allocator.decision.space import Space
from allocator.errors import StudyError
from allocator.prediction.surrogate import Surrogate
from allocator.study.generations import Selection
from allocator.study.initial_trials import Queued
from allocator.study.leases import Leases
from allocator.study.outcomes import VERDICTS, Verdict, abandon, close, close_abandoned
from allocator.study.trials import (
    ALLOCATION,
    DOUBLED,
    KIND,
    LOSSES,
    PROPOSAL,
    RESULT,
    Key,
    forward_tokens,
    is_abandoned,
    key_of,
    not_abandoned,
)
from allocator.targets.device_memory import Workload

LOCK = "lock"
RACE_Z = 1.0
"""Near-ties are worth little: against 2.0, on 18 journals of the benchmark, an eighth fewer tokens
are scored (auto: 18 %), and the least search loss is .06 % higher, at most .9 %."""
RACE_SLACK = 1e-3
"""Rivals may be larger by this share: a thousandth of the bytes is worth well under a percent of
the loss, and proposals at one cap rarely have the same size to the byte."""
_POLL_SECONDS = 0.5  # while other workers finish
_ATTEMPTS = 6  # proposals that another worker is scoring, before one is scored twice

_log = logging.getLogger(__name__)


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
    """What a search needs of a scorer.

    One that scores several candidates in a pass has `side_by_side`, how many, and
    `score_many(allocations, start, stop)`: a list of losses in that order.
    """

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
class Limits:
    """Where a study ends.

    Attributes:
        n_trials: proposals; None for no limit.
        tokens: forward tokens, `Search.base_tokens` included; None for no limit.
    """

    n_trials: int | None = None
    tokens: int | None = None


@dataclass(eq=False)
class _Candidate:
    """A trial on its way: what it proposes, and its losses so far, from document 0 on.

    Its kind is None where it is a first trial that another worker makes too.
    """

    trial: Trial
    queued: bool
    kind: str | None
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
        leases: of this worker, where others may work on the study; None if nobody does.
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
    leases: Leases | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("scoring", "gradient", "sampler", "storage"), 0.0)
    )
    _costs: Costs = field(init=False)
    _queued_keys: dict[Allocation, Key] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._costs = Costs(self.space, self.budget)
        if self.leases is not None and hasattr(self.study.sampler, "on_trial"):
            self.study.sampler.on_trial = self.leases.take
        if self.selection is None and getattr(self.study.sampler, "generational", False):
            self.selection = Selection.over(self.scorer.n_documents)
        if self.selection is not None:
            self.selection.check(self.scorer.n_documents)
        for queued in self.queue:
            self.space.params(queued.allocation)
            if not queued.allocation.fits(self.space.layout, self.budget):
                raise StudyError(f"first trial {queued.kind} is over the budget")

    @property
    def side_by_side(self) -> int:
        """Candidates that the scorer takes in one pass."""
        return int(getattr(self.scorer, "side_by_side", 1))

    def n_proposals(self) -> int:
        """Trials so far, abandoned ones not counted."""
        return sum(t.state != TrialState.WAITING for t in not_abandoned(self.study))

    def run(
        self,
        *,
        n_trials: int | None = None,
        seconds: float | None = None,
        tokens: int | None = None,
        on_trial: Callable[[FrozenTrial], None] | None = None,
    ) -> None:
        """Runs until the study has `n_trials` proposals, for `seconds`, or within forward `tokens`.

        A batch or generation that was begun is finished, so there may be more trials. The next one
        is begun only if `tokens` suffice for it even if it loses no race, and if every trial that
        others have in hand does so too.

        Returns when what others had in hand at the end has ended as well; what their death leaves
        is made here. `on_trial` is called with the trials that ended here.
        """
        limits = Limits(n_trials, tokens)
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        awaited: set[int] | None = None
        while True:
            self._take_over()
            if time.monotonic() < deadline and self._may_begin(limits):
                awaited = None
                for trial in self._next(limits):
                    if on_trial is not None and not is_abandoned(trial):
                        on_trial(trial)
                continue
            others = {t.number for t in self._others()}
            awaited = others if awaited is None else awaited & others
            if not awaited:
                return
            time.sleep(_POLL_SECONDS)

    def step(self) -> FrozenTrial:
        """One trial: ask, make feasible, score, tell."""
        return self.batch(1)[0]

    def batch(self, n: int, limits: Limits = Limits()) -> list[FrozenTrial]:
        """`n` trials that race side by side; none if they were one too many."""
        candidates = self._propose(n, limits)
        return self._tell(candidates, lost=self._race(candidates))

    def generation(
        self,
        selection: Selection,
        limits: Limits = Limits(),
    ) -> list[FrozenTrial]:
        """Offspring of one parent, narrowed down in steps; the last one(s) get the full split."""
        candidates = self._propose(selection.n_offspring, limits)
        return self._tell(candidates, lost=self._narrow(candidates, selection))

    def _next(self, limits: Limits) -> list[FrozenTrial]:
        if (n := self._n_batch()) is None:
            assert self.selection is not None
            return self.generation(self.selection, limits)
        return self.batch(n, limits)

    def _n_batch(self) -> int | None:
        """How many the next batch has; None if a generation is next."""
        if self.selection is None:
            return self.side_by_side
        return min(self.side_by_side, len(self._missing())) or None

    # -- limits, and other workers

    def forward_tokens(self) -> int:
        """Tokens through all layers so far: `base_tokens`, trials, and what samplers measured.

        Abandoned trials are left out: they are made again.
        """
        return self.base_tokens + sum(map(forward_tokens, not_abandoned(self.study)))

    def _next_tokens(self) -> int:
        """The most that the next batch or generation may cost."""
        n_documents = self.scorer.n_documents
        if (n := self._n_batch()) is not None:
            proposed = max(n - len(self._missing()), 0)
            looking = getattr(self.study.sampler, "next_tokens", lambda study, n: 0)
            looked = int(looking(self.study, proposed)) if proposed else 0
            return n * self.scorer.tokens(n_documents) + looked
        assert self.selection is not None
        ends = [0, *(d for d, _ in self.selection.steps), n_documents]
        survivors = [self.selection.n_offspring, *(s for _, s in self.selection.steps)]
        spans = (b - a for a, b in pairwise(map(self.scorer.tokens, ends)))
        return sum(n * s for n, s in zip(spans, survivors, strict=True))

    def _may_begin(self, limits: Limits) -> bool:
        if limits.n_trials is not None and self.n_proposals() >= limits.n_trials:
            return False
        if limits.tokens is None:
            return True
        spent = self.forward_tokens() + self._promised(self._others())
        return spent + self._next_tokens() <= limits.tokens

    def _promised(self, running: Sequence[FrozenTrial]) -> int:
        """The most that trials in hand may cost beyond what is known of them."""
        return len(running) * self.scorer.tokens(self.scorer.n_documents)

    def _is_within(self, first: _Candidate, n_tokens: int, limits: Limits) -> bool:
        """Whether trials that begin with `first` may be scored, whoever else asked meanwhile.

        Only trials asked for earlier count, so of several that ask at once some may. A proposal
        numbered beyond the limit is not made even where one before it was given up meanwhile: that
        one is made again.
        """
        before = [t for t in not_abandoned(self.study) if t.number < first.trial.number]
        mine = self.study._storage.get_trial(first.trial._trial_id)
        number = mine.system_attrs.get(PROPOSAL, 0)
        if limits.n_trials is not None and max(len(before), number) >= limits.n_trials:
            return False
        if limits.tokens is None:
            return True
        running = [t for t in before if not t.state.is_finished()]
        spent = self.forward_tokens() - forward_tokens(mine) + self._promised(running)
        return spent + n_tokens <= limits.tokens  # the look before `mine` is among these

    def _others(self) -> list[FrozenTrial]:
        return [] if self.leases is None else self.leases.others()

    def _take_over(self) -> None:
        if self.leases is not None and (expired := self.leases.expired()):
            close_abandoned(self.study, expired)

    def _is_doubled(self, candidate: _Candidate) -> bool:
        """Whether another worker is scoring the same; both may give up, and ask again.

        A first trial is made all the same.
        """
        if candidate.queued:
            return False
        ours = candidate.allocation.to_json()
        return any(t.user_attrs.get(ALLOCATION) == ours for t in self._others())

    def _give_up(self, candidate: _Candidate, why: str | bool = True) -> None:
        abandon(self.study, candidate.trial._trial_id, candidate.trial.number, why)
        self._drop([candidate])

    def _drop(self, candidates: Sequence[_Candidate]) -> None:
        if self.leases is not None:
            self.leases.drop([c.trial._trial_id for c in candidates])

    # -- the queue

    def _key(self, queued: Queued) -> Key:
        if queued.allocation not in self._queued_keys:
            self._queued_keys[queued.allocation] = key_of(self.space.params(queued.allocation))
        return self._queued_keys[queued.allocation]

    def _missing(self) -> list[Queued]:
        """First trials that are in no trial yet, in order."""
        made = Counter(key_of(p) for t in not_abandoned(self.study) if (p := _fixed(t)))
        missing = []
        for queued in self.queue:
            key = self._key(queued)
            made[key] -= 1
            if made[key] < 0:
                missing.append(queued)
        return missing

    def _enqueue_next(self) -> None:
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and (missing := self._missing()):
            self.study.enqueue_trial(self.space.params(missing[0].allocation))

    def _kind(self, trial: FrozenTrial) -> str | None:
        """Which first trial this is, `proposal` if none; None if one of the same was earlier."""
        if not (fixed := _fixed(trial)):
            return "proposal"
        key = key_of(fixed)
        kinds = [q.kind for q in self.queue if self._key(q) == key]
        if not kinds:
            return "proposal"  # enqueued by hand
        earlier = not_abandoned(self.study, before=trial.number)
        n_before = sum(key_of(p) == key for t in earlier if (p := _fixed(t)))
        return kinds[n_before] if n_before < len(kinds) else None

    # -- one trial, or several

    def _propose(self, n: int, limits: Limits) -> list[_Candidate]:
        """Asks for `n`; for none if the first one is beyond the limits."""
        n_tokens = 0 if limits.tokens is None else self._next_tokens()
        candidates: list[_Candidate] = []
        attempts = 0
        while len(candidates) < n:
            candidate = self._ask()
            if self.leases is not None:
                if not candidates and not self._is_within(candidate, n_tokens, limits):
                    self._give_up(candidate)
                    return []
                if candidate.kind is None:
                    self._give_up(candidate)
                    continue
                if attempts < _ATTEMPTS and self._is_doubled(candidate):
                    attempts += 1
                    self._give_up(candidate, DOUBLED)
                    continue
            candidates.append(candidate)
        return candidates

    def _ask(self) -> _Candidate:
        clock = _Clock(self.seconds)
        self._enqueue_next()
        trial = self.study.ask(self.space.distributions)
        if self.leases is not None:
            self.leases.take(trial._trial_id)  # a sampler of ours has: sampling may take long
        frozen = self.study._storage.get_trial(trial._trial_id)
        kind = self._kind(frozen)
        clock.lap("storage")
        for name, attribute in (("sampler", "sampling_seconds"), ("gradient", "gradient_seconds")):
            spent = getattr(self.study.sampler, attribute, 0.0)
            self.seconds["storage"] -= spent
            self.seconds[name] += spent
        params = make_feasible(
            self.space,
            self._costs,
            trial.params,
            self.surrogate.loss_at(self.space.complete(trial.params)),
        )
        allocation = self.space.allocation(params)
        stored = allocation.stored(self.space.layout)
        size, excess = stored.file, self.budget.excess(stored)
        used = self.budget.nbytes + excess["budget"]
        clock.lap("sampler")
        trial.set_user_attr(ALLOCATION, allocation.to_json())
        trial.set_user_attr(KIND, kind or "proposal")
        for name, over in excess.items():
            assert over <= 0, "a feasible proposal is within every limit"
            trial.set_constraint(name, over)
        clock.lap("storage")
        return _Candidate(trial, bool(_fixed(frozen)), kind, params, allocation, size, used)

    def _score(self, candidates: Sequence[_Candidate], stop: int) -> None:
        """Measures what is missing of the first `stop` documents, of each the same."""
        clock = _Clock(self.seconds)
        for some in _chunks(candidates, self.side_by_side):
            start = 0 if some[0].losses is None else len(some[0].losses.kl)
            if self.side_by_side > 1:
                more = self.scorer.score_many([c.allocation for c in some], start, stop)  # type: ignore[attr-defined]
            else:
                more = [self.scorer.score(some[0].allocation, start, stop)]
            for candidate, losses in zip(some, more, strict=True):
                known = candidate.losses
                candidate.losses = losses if known is None else known + losses
        clock.lap("scoring")

    def _race(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Scores rung by rung; those that lost. The others are scored in full, or not finite."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        rivals = [(t.values[1], np.array(t.user_attrs[LOSSES])) for t in done]
        n_documents = self.scorer.n_documents

        def has_lost(candidate: _Candidate, stop: int) -> bool:
            most = candidate.used * (1 + RACE_SLACK)
            return any(n <= most and loses(candidate.losses.kl, r[:stop]) for n, r in rivals)

        left, lost = list(candidates), []
        for stop in sorted({*(r for r in self.rungs if r < n_documents), n_documents}):
            self._score(left, stop)
            left = [c for c in left if c.finite]
            if stop < n_documents:
                lost += [c for c in left if has_lost(c, stop)]
                left = [c for c in left if c not in lost]
        return lost

    def _narrow(self, candidates: Sequence[_Candidate], selection: Selection) -> list[_Candidate]:
        """Scores step by step, the best go on; those that did not."""
        left = list(candidates)
        whole = (self.scorer.n_documents, selection.n_offspring)
        for documents, survivors in (*selection.steps, whole):
            self._score(left, documents)
            left = [c for c in left if c.finite]
            # equals stay in order of proposal
            left = sorted(left, key=lambda c: float(self.scorer.summary(c.losses)["loss"]))
            left = left[:survivors]
        return [c for c in candidates if c.finite and c not in left]

    def _tell(
        self, candidates: Sequence[_Candidate], *, lost: Sequence[_Candidate]
    ) -> list[FrozenTrial]:
        """Records and closes candidates that ended together; what was taken over is dropped."""
        clock = _Clock(self.seconds)
        verdicts: dict[str, Verdict] = {}
        for candidate in candidates:
            try:
                verdicts[str(candidate.trial.number)] = self._record(
                    candidate, lost=candidate in lost
                )
            except UpdateFinishedTrialError:
                _log.warning(_TAKEN_OVER, candidate.trial.number)
        if len(verdicts) > 1:
            owner = "" if self.leases is None else f":{self.leases.owner.name}"
            self.study.set_user_attr(VERDICTS + owner, verdicts)
        for number, verdict in verdicts.items():
            if not close(self.study, int(number), verdict):
                _log.warning(_TAKEN_OVER, int(number))
        self._drop(candidates)
        clock.lap("storage")
        trials = self.study.get_trials(deepcopy=False)
        return [trials[c.trial.number] for c in candidates]

    def _record(self, candidate: _Candidate, *, lost: bool) -> Verdict:
        trial, size = candidate.trial, candidate.size
        result = self.scorer.summary(candidate.losses) | {
            "bytes": {"encoded": size.encoded, "kept": size.full_precision, "file": size.file},
            "effective_bits": size.encoded * 8 / self.space.layout.inventory.n_searched_weights,
            "predicted": self.surrogate.predict(candidate.params),
            "repaired": candidate.params != self.space.complete(trial.params),
        }
        if self.budget.workload is not None:
            result |= self._on_device(candidate.allocation, self.budget.workload)
        trial.set_user_attr(LOSSES, [float(v) for v in candidate.losses.kl])
        trial.set_user_attr(RESULT, result)
        loss = float(result["loss"])
        if not math.isfinite(loss):
            trial.set_user_attr("reason", f"proxy loss is {loss}")
            return TrialState.FAIL.name, None
        if lost:
            return TrialState.PRUNED.name, None
        return TrialState.COMPLETE.name, [loss, candidate.used]

    def _on_device(self, allocation: Allocation, workload: Workload) -> dict[str, Any]:
        layout = self.space.layout
        read = allocation.token_bytes(layout, workload.context)
        return {
            "memory": asdict(allocation.device_memory(layout, workload)),
            "token_bytes": read,
            "tokens_per_second": workload.tokens_per_second(read),
        }


_TAKEN_OVER = (
    "trial %d was taken over by another worker: this one was silent for longer than its lease; "
    "its result is dropped"
)


def _fixed(trial: FrozenTrial) -> Params:
    """Params of a trial that was enqueued."""
    fixed: Params = trial.system_attrs.get("fixed_params", {})
    return fixed


def _chunks(candidates: Sequence[_Candidate], size: int) -> Iterator[Sequence[_Candidate]]:
    for start in range(0, len(candidates), size):
        yield candidates[start : start + size]


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
