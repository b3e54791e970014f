"""Proposals of one worker: drawn, made feasible, and dropped where another worker has the same.

In: an Optuna study and its sampler. Out: contenders within the budget. Invariant: a worker writes
the allocation of its trial before it reads those of others, so of two that score the same at least
one sees the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import optuna

from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.feasibility import make_feasible
from allocator.files.progress import waiting
from allocator.prediction.surrogate import Surrogate
from allocator.study.accounts import Accounts
from allocator.study.contenders import Contender
from allocator.study.initial_trials import FirstTrials, enqueued_params
from allocator.study.leases import Leases
from allocator.study.optuna_private import frozen_trial, trial_id
from allocator.study.outcomes import abandon
from allocator.study.protocols import StudySampler
from allocator.study.stop_rule import NO_LIMIT, StopRule
from allocator.study.timing import Clock
from allocator.study.trials import ALLOCATION, DOUBLED, KIND

MOST_DOUBLED = 6
"""Proposals in a row that are given up because another worker is scoring the same; the next one is
scored twice."""


@dataclass
class Proposer:
    """Proposes for one worker.

    Attributes:
        study: the Optuna study.
        sampler: of the study.
        surrogate: prices what makes a proposal feasible.
        budget: the hard limit.
        first_trials: which come before the sampler's.
        accounts: of the study.
        leases: of this worker; None if nobody else works on the study.
        seconds: totals by what they were spent on.
    """

    study: optuna.Study
    sampler: StudySampler
    surrogate: Surrogate
    budget: Budget
    first_trials: FirstTrials
    accounts: Accounts
    leases: Leases | None
    seconds: dict[str, float]
    _costs: Costs = field(init=False)

    def __post_init__(self) -> None:
        self._costs = Costs(self.surrogate.space, self.budget)

    def propose(self, n: int, rule: StopRule = NO_LIMIT, *, n_tokens: int = 0) -> list[Contender]:
        """Asks for `n` proposals; for none if the first one is beyond the rule.

        Args:
            n: proposals.
            rule: of the search.
            n_tokens: the most forward tokens that they take.
        """
        contenders: list[Contender] = []
        n_doubled = 0
        while len(contenders) < n:
            contender = self.ask()
            if self.leases is not None:
                if not contenders and not self.accounts.is_within(contender, n_tokens, rule):
                    self.give_up(contender)
                    return []
                if contender.kind is None:
                    self.give_up(contender)
                    continue
                if n_doubled < MOST_DOUBLED and self.is_doubled(contender):
                    n_doubled += 1
                    self.give_up(contender, DOUBLED)
                    continue
            contenders.append(contender)
        return contenders

    def ask(self) -> Contender:
        """Asks the study for a trial and makes its proposal feasible."""
        space, clock = self.surrogate.space, Clock(self.seconds)
        self.first_trials.enqueue_next()
        with waiting("proposing"):
            trial = self.study.ask(space.distributions)
        if self.leases is not None:
            self.leases.take(trial_id(trial))  # a sampler of ours has: sampling may take long
        frozen = frozen_trial(self.study, trial)
        kind = self.first_trials.kind(frozen)
        clock.lap("storage")
        for name, seconds in (
            ("sampler", self.sampler.sampling_seconds),
            ("gradient", self.sampler.gradient_seconds),
        ):
            self.seconds["storage"] -= seconds
            self.seconds[name] += seconds
        params = make_feasible(
            space,
            self._costs,
            trial.params,
            self.surrogate.loss_at(space.complete(trial.params)),
        )
        allocation = space.allocation(params)
        stored = allocation.stored(space.layout)
        size, excess = stored.file, self.budget.excess(stored)
        used = self.budget.nbytes + excess["budget"]
        clock.lap("sampler")
        trial.set_user_attr(ALLOCATION, allocation.to_json())
        trial.set_user_attr(KIND, kind or "proposal")
        for name, over in excess.items():
            assert over <= 0, "a feasible proposal is within every limit"
            trial.set_constraint(name, over)
        clock.lap("storage")
        return Contender(trial, bool(enqueued_params(frozen)), kind, params, allocation, size, used)

    def is_doubled(self, contender: Contender) -> bool:
        """Returns whether another worker is scoring the same; a first trial never counts so.

        Of two workers both may see it, give up, and ask again.
        """
        if contender.is_queued:
            return False
        ours = contender.allocation.to_json()
        return any(t.user_attrs.get(ALLOCATION) == ours for t in self.accounts.others())

    def give_up(self, contender: Contender, why: str | bool = True) -> None:
        """Abandons a proposal, so that the proposal is made again.

        Args:
            contender: of this worker.
            why: `DOUBLED` where another worker is scoring the same.
        """
        abandon(self.study, trial_id(contender.trial), contender.trial.number, why)
        self.drop([contender])

    def drop(self, contenders: Sequence[Contender]) -> None:
        """Stops renewing the leases of contenders."""
        if self.leases is not None:
            self.leases.drop([trial_id(c.trial) for c in contenders])
