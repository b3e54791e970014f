"""The default sampler: it solves a surrogate fitted to finished trials and gradients at the best.

In: the surrogate, the budget, the finished trials, and (where it fits) a way to take a gradient.
Out: params within the byte target. Invariant: as of `SolvingSampler`; what is proposed depends on
the study's trials and the seed alone, so a resumed study proposes what an undisturbed one does.

- Rounds of `ROUND` proposals begin with a gradient step at the incumbent (`GradientStep`), each on
  other documents. Its curvature makes the surrogate that of the place where the search is
  (`Surrogate.with_curvature_at`). Its slope prices every single switch from there; slopes of all
  rounds are averaged, incumbents being near each other, and count the more the more there are
  (`Surrogate.local`).
- Every proposal solves the result exactly, under multipliers drawn from their posterior given all
  finished trials (Thompson sampling; `allocator.prediction.posterior`), lost races included: those
  are compared with the incumbent on the documents that both have seen.
"""

from collections.abc import Mapping
from typing import Self

from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.decision.budget import Budget
from allocator.decision.parameters import Params
from allocator.prediction.posterior import Posterior, fit
from allocator.prediction.surrogate import Floats, Surrogate
from allocator.samplers.knapsack import SolvingSampler
from allocator.samplers.lessons import Lessons
from allocator.samplers.problem import Problem
from allocator.study.optuna_private import set_system_attr
from allocator.study.trials import (
    GRADIENT_TOKENS,
    PROPOSAL,
    best_complete,
    not_abandoned,
)

ROUND = 5
"""Own proposals from one gradient step to the next."""
NOISY_STEPS = 2.0
"""Gradient steps whose average is as much noise as signal: `n` steps count with the share
`n / (n + NOISY_STEPS)`."""
PLACES = ((1.0, 0.0), (0.7, 0.5), (1.3, 0.5), (0.7, 1.0), (1.0, 1.0))
"""By place in the round: a factor of that share, and of the posterior's spread."""

INCUMBENT = "auto:incumbent"
"""System attribute of a trial that begins a round: `PROPOSAL` of the incumbent then, where the
round's gradient step is taken."""

_Slopes = tuple[Params, Mapping[str, Floats], int]
"""The incumbent, what gradient steps say of every switch from there in the mean, and how many."""


class AutoSampler(SolvingSampler):
    """See the module.

    Args:
        surrogate: predicted losses.
        budget: the hard limit.
        seed: of this trial.
        lessons: of the surrogate, shared by the samplers of a study; new ones by default.
    """

    at_the_cap = 0.95

    def __init__(
        self,
        surrogate: Surrogate,
        budget: Budget,
        *,
        seed: int,
        lessons: Lessons | None = None,
    ) -> None:
        super().__init__(surrogate, budget, seed=seed)
        self._lessons = lessons or Lessons(surrogate, None)
        self._gradient = self._lessons.gradient
        self._place = 0  # in the round
        self._curved = surrogate  # with the curvature at the incumbent
        self._posterior: Posterior | None = None
        self._slopes: _Slopes | None = None
        self._is_near = False  # whether the byte target is near enough to the incumbent

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Self:
        """Makes the sampler of one trial."""
        return cls(problem.surrogate, problem.budget, seed=seed, lessons=problem.lessons)

    def next_tokens(self, study: Study, n: int) -> int:
        """Returns the forward tokens of the gradient steps that the next `n` proposals take."""
        done = not_abandoned(study)
        if self._gradient is None or best_complete(done) is None:
            return 0
        own = _own(done)
        rounds = sum(i % ROUND == 0 for i in range(own, own + n))
        return rounds * self._gradient.forward_tokens

    def _learn(self, study: Study, trial: FrozenTrial) -> None:
        done = not_abandoned(study, before=trial.number)
        self._place = _own(done) % ROUND
        self._curved, self._slopes = self._surrogate, None
        if not self._place:
            incumbent = best_complete(done)
            number = None if incumbent is None else incumbent.system_attrs.get(PROPOSAL)
            set_system_attr(study, trial, INCUMBENT, number)
        if incumbents := self._incumbents(done):
            scored = [self._lessons.scored(t) for t in incumbents]
            before = self._lessons.gradient_seconds
            steps = [self._lessons.step(s.allocation, part) for part, s in enumerate(scored)]
            self._curved = self._lessons.curved(scored[-1].allocation, len(scored) - 1)
            self.gradient_seconds = self._lessons.gradient_seconds - before
            if not self._place:
                set_system_attr(study, trial, GRADIENT_TOKENS, steps[-1].forward_tokens)
            self._slopes = scored[-1].params, self._lessons.mean_moves(steps), len(steps)
        self._posterior = fit(self._curved, list(self._lessons.observations(done)))

    def _aim(self, target: Budget) -> None:
        self._is_near = target.nbytes == self._budget.nbytes

    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        assert self._posterior is not None
        factor, scale = PLACES[self._place]
        scale = max(scale, 0.5) * 1.2**attempt if attempt else scale
        multipliers = self._posterior.draw(self._rng, scale=scale)
        surrogate = self._curved.multiplied(multipliers)
        if self._slopes is not None and self._is_near:
            params, moves, n_steps = self._slopes
            share = min(factor * n_steps / (n_steps + NOISY_STEPS), 1.0)
            surrogate = surrogate.local(params, moves, share=share)
        return surrogate, multipliers

    def _incumbents(self, done: list[FrozenTrial]) -> list[FrozenTrial]:
        """The incumbent at the beginning of every round so far, this one's last.

        The trial that began a round notes the incumbent then: trials that ran at the same time may
        have ended since.
        """
        if self._gradient is None:
            return []
        begins = range(len(done) - _own(done), len(done) + 1, ROUND)
        proposals = {t.system_attrs[PROPOSAL]: t for t in done if PROPOSAL in t.system_attrs}
        incumbents = [_best_then(done, begin, proposals) for begin in begins]
        return [t for t in incumbents if t is not None and self._lessons.scored(t).params]


def _best_then(
    done: list[FrozenTrial], begin: int, proposals: Mapping[int, FrozenTrial]
) -> FrozenTrial | None:
    """The incumbent when the trial at this place was asked for; `proposals` are by number."""
    if begin < len(done) and INCUMBENT in done[begin].system_attrs:
        return proposals.get(done[begin].system_attrs[INCUMBENT])
    return best_complete(done[:begin])


def _own(done: list[FrozenTrial]) -> int:
    """How many were proposed, not queued."""
    return sum("fixed_params" not in t.system_attrs for t in done)
