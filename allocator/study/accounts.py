"""Counts of the trials and tokens that a study has spent, and whether a worker may spend more.

In: the trials of a study, those of other workers included. Out: counts, and whether a stop rule
allows another trial. Invariant: of workers that ask at the same time only as many go ahead as the
rule allows; trials of workers that died are counted when they are made again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from allocator.study.contenders import Contender
from allocator.study.leases import Leases
from allocator.study.optuna_private import frozen_trial
from allocator.study.outcomes import close_abandoned
from allocator.study.protocols import TrialScorer
from allocator.study.stop_rule import StopRule
from allocator.study.trials import PROPOSAL, forward_tokens, not_abandoned


@dataclass
class Accounts:
    """What a study has spent.

    Attributes:
        study: the Optuna study.
        scorer: for the tokens of documents.
        base_tokens: forward tokens that the study took before its first trial.
        leases: of this worker; None if nobody else works on the study.
    """

    study: optuna.Study
    scorer: TrialScorer
    base_tokens: int = 0
    leases: Leases | None = None

    def n_proposals(self) -> int:
        """Returns the number of trials so far, abandoned ones not counted."""
        return sum(t.state != TrialState.WAITING for t in not_abandoned(self.study))

    def forward_tokens(self) -> int:
        """Returns the tokens through all layers so far, `base_tokens` included.

        Abandoned trials are left out: they are made again.
        """
        return self.base_tokens + sum(map(forward_tokens, not_abandoned(self.study)))

    def others(self) -> list[FrozenTrial]:
        """Returns the RUNNING trials of other workers."""
        return [] if self.leases is None else self.leases.others()

    def close_expired(self) -> None:
        """Closes trials of workers that died, so that their proposals are made again."""
        if self.leases is not None and (expired := self.leases.expired()):
            close_abandoned(self.study, expired)

    def may_begin(self, rule: StopRule, next_tokens: Callable[[], int]) -> bool:
        """Returns whether another batch or generation may begin, time apart.

        Args:
            rule: of the search.
            next_tokens: the most forward tokens that it takes.
        """
        if rule.trials is not None and self.n_proposals() >= rule.trials:
            return False
        if rule.tokens is None:
            return True
        spent = self.forward_tokens() + self._promised(self.others())
        return spent + next_tokens() <= rule.tokens

    def is_within(self, first: Contender, n_tokens: int, rule: StopRule) -> bool:
        """Returns whether a batch may be scored, whoever else asked meanwhile.

        Only trials asked for earlier count, so of several workers that ask at once some may. A
        proposal numbered beyond the limit is not made even where one before it was given up
        meanwhile: that one is made again.

        Args:
            first: trial of the batch.
            n_tokens: the most forward tokens that the batch takes.
            rule: of the search.
        """
        before = [t for t in not_abandoned(self.study) if t.number < first.trial.number]
        mine = frozen_trial(self.study, first.trial)
        number = mine.system_attrs.get(PROPOSAL, 0)
        if rule.trials is not None and max(len(before), number) >= rule.trials:
            return False
        if rule.tokens is None:
            return True
        running = [t for t in before if not t.state.is_finished()]
        # the gradient step before `mine` is among `n_tokens`
        spent = self.forward_tokens() - forward_tokens(mine) + self._promised(running)
        return spent + n_tokens <= rule.tokens

    def _promised(self, running: Sequence[FrozenTrial]) -> int:
        """The most that trials of others may take beyond what is known of them."""
        return len(running) * self.scorer.tokens(self.scorer.n_documents)
