"""The search: an Optuna study of allocations, two objectives (proxy loss, bytes), a hard budget.

In: a space, a budget, a sampler, and a scorer (handed in; this module never loads torch). Out: a
valid Optuna study. Invariants: no trial that leaves a decode exceeds the budget; `trial.params` is
the proposal and `allocation_of(trial)` what was scored; a trial whose process died is closed and
its proposal made again under the same seed, so stopped and resumed equals undisturbed.

A batch is asked for (`proposals`), races against finished trials (`race`), is recorded (`results`)
and told. Where a scorer takes several candidates in one pass, a batch has several. A sampler may
ask for generations instead, which are narrowed down in steps, each on more documents. After each
rung or step, a trial's mean loss so far is its intermediate value at the tokens scored so far.

How trials that ended together did is written in one piece (`VERDICTS`) before the first is told: a
search that dies earlier has told none, and proposes them again; one that dies later has the rest
told by `close_abandoned`. So no sampler ever sees half of them.

Several workers (`leases`, `accounts`): each asks, writes its allocation, then reads the others'. A
trial that is one too many, or that scores what another is scoring, is given up; trials of dead
workers are closed by whoever sees their lease expire.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from allocator.decision.budget import Budget
from allocator.decision.space import Space
from allocator.files.progress import waiting
from allocator.prediction.surrogate import Surrogate
from allocator.study.accounts import Accounts
from allocator.study.contenders import Contender, ContenderScorer
from allocator.study.generations import Selection
from allocator.study.initial_trials import FirstTrials, Queued
from allocator.study.leases import Leases
from allocator.study.optuna_private import report
from allocator.study.outcomes import VERDICTS, Verdict, close
from allocator.study.proposals import Proposer
from allocator.study.protocols import StudySampler, TrialScorer
from allocator.study.race import Race
from allocator.study.results import Recorder
from allocator.study.stop_rule import NO_LIMIT, StopRule
from allocator.study.timing import SPENT_ON, Clock
from allocator.study.trials import LOSSES, is_abandoned

_TAKEN_OVER = (
    "trial %d was taken over by another worker: this one was silent for longer than its lease; "
    "its result is dropped"
)

_log = logging.getLogger(__name__)


@dataclass
class Search:
    """A running search.

    Attributes:
        study: the Optuna study; it samples with `sampler` from here on.
        sampler: of the study.
        surrogate: prices what makes proposals feasible; its space is what is searched.
        budget: the hard limit.
        scorer: measures allocations.
        race: when a candidate is stopped.
        queue: first trials, in order.
        selection: within a generation; by default what the sampler asks for.
        base_tokens: forward tokens that the study took before its first trial.
        leases: of this worker, where others may work on the study; None if nobody does.
        poll_seconds: time between two looks at other workers, while this one waits for them.
        seconds: spent so far, by what they were spent on.
        accounts: of the study.
        proposer: of this worker.
    """

    study: optuna.Study
    sampler: StudySampler
    surrogate: Surrogate
    budget: Budget
    scorer: TrialScorer
    race: Race = field(default_factory=Race)
    queue: Sequence[Queued] = ()
    selection: Selection | None = None
    base_tokens: int = 0
    leases: Leases | None = None
    poll_seconds: float = 0.5
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPENT_ON, 0.0))
    accounts: Accounts = field(init=False)
    proposer: Proposer = field(init=False)
    _first_trials: FirstTrials = field(init=False)
    _recorder: Recorder = field(init=False)
    _contender_scorer: ContenderScorer = field(init=False)

    def __post_init__(self) -> None:
        self.study.sampler = self.sampler
        if self.selection is None:
            self.selection = self.sampler.selection(self.scorer.n_documents)
        if self.selection is not None:
            self.selection.check(self.scorer.n_documents)
        self._first_trials = FirstTrials(self.study, self.surrogate.space, self.queue, self.budget)
        self._recorder = Recorder(self.surrogate, self.budget, self.scorer)
        self._contender_scorer = ContenderScorer(self.scorer)
        self.accounts = Accounts(self.study, self.scorer, self.base_tokens, self.leases)
        self.proposer = Proposer(
            study=self.study,
            sampler=self.sampler,
            surrogate=self.surrogate,
            budget=self.budget,
            first_trials=self._first_trials,
            accounts=self.accounts,
            leases=self.leases,
            seconds=self.seconds,
        )

    @property
    def space(self) -> Space:
        """What is searched."""
        return self.surrogate.space

    def n_proposals(self) -> int:
        """Returns the number of trials so far, abandoned ones not counted."""
        return self.accounts.n_proposals()

    def forward_tokens(self) -> int:
        """Returns the tokens through all layers so far, `base_tokens` included."""
        return self.accounts.forward_tokens()

    def run(self, rule: StopRule, *, on_trial: Callable[[FrozenTrial], None] | None = None) -> None:
        """Runs until the rule stops it.

        A started batch or generation is always completed, so there may be more trials than the rule
        says. The next one starts only if the rule's tokens suffice for it even if it loses no race,
        and if every trial of other workers does so, too.

        Returns when the trials that other workers have at the end have ended as well; if such a
        worker dies, its proposals are made here. A time limit that is over at the start still lets
        a study have its first trial, so that there is something to pick.

        Args:
            rule: when to stop.
            on_trial: called with the trials that ended here.
        """
        rule = rule.started()
        with ExitStack() as waits:
            self._run(rule, on_trial, waits)

    def _run(
        self, rule: StopRule, on_trial: Callable[[FrozenTrial], None] | None, waits: ExitStack
    ) -> None:
        awaited: set[int] | None = None
        while True:
            self.accounts.close_expired()
            if (not rule.is_late or not self.n_proposals()) and self.may_begin(rule):
                awaited = None
                waits.close()
                for trial in self._next(rule):
                    if on_trial is not None and not is_abandoned(trial):
                        on_trial(trial)
                continue
            others = {t.number for t in self.accounts.others()}
            if awaited is None:
                waits.enter_context(waiting("waiting for trials of other workers"))
            awaited = others if awaited is None else awaited & others
            if not awaited:
                return
            time.sleep(self.poll_seconds)

    def step(self) -> FrozenTrial:
        """Makes one trial: asks, makes feasible, scores, tells."""
        return self.batch(1)[0]

    def batch(self, n: int, rule: StopRule = NO_LIMIT) -> list[FrozenTrial]:
        """Makes `n` trials that race side by side; none if they are beyond the rule."""
        contenders = self.propose(n, rule)
        return self.tell(contenders, lost=self.run_race(contenders))

    def generation(self, selection: Selection, rule: StopRule = NO_LIMIT) -> list[FrozenTrial]:
        """Makes offspring of one parent, narrowed down in steps; the last get the full split."""
        contenders = self.propose(selection.n_offspring, rule)
        return self.tell(contenders, lost=self._narrow(contenders, selection))

    def may_begin(self, rule: StopRule) -> bool:
        """Returns whether the rule allows another batch or generation, time apart."""
        return self.accounts.may_begin(rule, self._next_tokens)

    def _next(self, rule: StopRule) -> list[FrozenTrial]:
        if (n := self._n_batch()) is None:
            assert self.selection is not None
            return self.generation(self.selection, rule)
        return self.batch(n, rule)

    def _n_batch(self) -> int | None:
        """How many trials the next batch has; None if a generation is next."""
        if self.selection is None:
            return self.scorer.side_by_side
        return min(self.scorer.side_by_side, len(self._first_trials.missing())) or None

    def _next_tokens(self) -> int:
        """The most forward tokens that the next batch or generation takes."""
        n_documents = self.scorer.n_documents
        if (n := self._n_batch()) is not None:
            n_sampled = max(n - len(self._first_trials.missing()), 0)
            sampling = self.sampler.next_tokens(self.study, n_sampled) if n_sampled else 0
            return n * self.scorer.tokens(n_documents) + sampling
        assert self.selection is not None
        return self.selection.tokens(self.scorer.tokens, n_documents)

    def propose(self, n: int, rule: StopRule = NO_LIMIT) -> list[Contender]:
        """Asks for `n` proposals; for none if the first one is beyond the rule."""
        n_tokens = 0 if rule.tokens is None else self._next_tokens()
        return self.proposer.propose(n, rule, n_tokens=n_tokens)

    def _score(self, contenders: Sequence[Contender], stop: int) -> None:
        clock = Clock(self.seconds)
        self._contender_scorer.score(contenders, stop)
        clock.lap("scoring")
        for contender in (c for c in contenders if c.is_finite):
            loss = float(self.scorer.summary(contender.losses)["loss"])
            with suppress(UpdateFinishedTrialError):  # taken over, as `tell` says
                report(self.study, contender.trial, loss, step=self.scorer.tokens(stop))
        clock.lap("storage")

    def run_race(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Scores contenders rung by rung; returns those that lost.

        The others are scored in full, or have a loss that is no number.
        """
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        rivals = [(t.values[1], np.array(t.user_attrs[LOSSES])) for t in done]
        n_documents = self.scorer.n_documents
        return self.race.run(contenders, rivals, self._score, n_documents=n_documents)

    def _narrow(self, contenders: Sequence[Contender], selection: Selection) -> list[Contender]:
        """Scores step by step, the best go on; those that did not."""
        survivors = list(contenders)
        whole = (self.scorer.n_documents, selection.n_offspring)
        for n_documents, n_survivors in (*selection.steps, whole):
            self._score(survivors, n_documents)
            survivors = [c for c in survivors if c.is_finite]
            # equals stay in order of proposal
            survivors.sort(key=lambda c: float(self.scorer.summary(c.losses)["loss"]))
            survivors = survivors[:n_survivors]
        return [c for c in contenders if c.is_finite and c not in survivors]

    def tell(
        self, contenders: Sequence[Contender], *, lost: Sequence[Contender]
    ) -> list[FrozenTrial]:
        """Records and closes contenders that ended together.

        The result of a trial that another worker has taken over is dropped, with a warning.

        Args:
            contenders: scored.
            lost: those of them that lost.
        """
        clock = Clock(self.seconds)
        verdicts: dict[str, Verdict] = {}
        for contender in contenders:
            number = contender.trial.number
            try:
                verdicts[str(number)] = self._recorder.record(contender, lost=contender in lost)
            except UpdateFinishedTrialError:
                _log.warning(_TAKEN_OVER, number)
        if len(verdicts) > 1:
            owner = "" if self.leases is None else f":{self.leases.owner.name}"
            self.study.set_user_attr(VERDICTS + owner, verdicts)
        for text, verdict in verdicts.items():
            if not close(self.study, int(text), verdict):
                _log.warning(_TAKEN_OVER, int(text))
        self.proposer.drop(contenders)
        clock.lap("storage")
        trials = self.study.get_trials(deepcopy=False)
        return [trials[c.trial.number] for c in contenders]
