"""The default: solve what finished trials, and a gradient at the best of them, say.

In: the surrogate, the budget, the finished trials, and (where it fits) a way to take a gradient.
Out: params within the byte target. Invariant: as of `SolvingSampler`; what is proposed depends on
the study's trials and the seed alone, so a resumed study proposes what an undisturbed one does.

- Rounds of `ROUND` proposals begin with a look around the incumbent (`Look`), if it is a new one:
  its curvature makes the surrogate that of the place where the search is
  (`Surrogate.towards`), and its slope prices every single switch from there
  (`Surrogate.nearby`).
- Every proposal solves the result exactly, under multipliers drawn from their posterior given all
  finished trials (Thompson sampling; `allocator.posterior`), lost races included: those are
  compared with the incumbent on the documents that both have seen.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from allocator.allocation import Allocation
from allocator.errors import SpaceError
from allocator.memory import Budget
from allocator.posterior import Observation, Posterior, fit
from allocator.samplers.knapsack import ABANDONED, SolvingSampler
from allocator.space import Params
from allocator.surrogate import Around, Surrogate

ROUND = 3
"""Own proposals from one look to the next."""
LOOKED = "auto:forward_tokens"
"""System attribute of the trial before which a look was taken: what that cost."""
SHARES = (0.3, 0.4, 0.2)
"""Of the slope, by place in the round."""
SCALES = (0.0, 0.5, 1.0)
"""Of the posterior's spread, by place in the round; 0 is its mean."""

Look = Callable[[Allocation, int], Around]
"""An allocation, and which part of the documents to use, to what a gradient says around it."""


class AutoSampler(SolvingSampler):
    """See the module.

    Args:
        surrogate: predicted losses.
        budget: the hard limit.
        seed: of this trial.
        around: None where no gradient is to be had.
        look_tokens: forward tokens of a look.

    Attributes:
        looking_seconds: what the look before the last proposal took.
    """

    at_the_cap = 0.95

    def __init__(
        self,
        surrogate: Surrogate,
        budget: Budget,
        *,
        seed: int,
        around: Look | None = None,
        look_tokens: int = 0,
    ) -> None:
        super().__init__(surrogate, budget, seed=seed)
        self._around = around
        self._look_tokens = look_tokens
        self.looking_seconds = 0.0
        self._posterior: Posterior
        self._here: tuple[Params, Around] | None = None

    def next_tokens(self, study: Study) -> int:
        """Forward tokens of the look that the next proposal begins with."""
        done = _done(study)
        looks = self._looks(done)
        begins = bool(looks) and _own(done) % ROUND == 0 and _stale(looks) == 0
        return self._look_tokens if begins else 0

    def _prepare(self, study: Study, trial: FrozenTrial, target: Budget) -> None:
        done = _done(study, before=trial.number)
        self._place, self._stale = _own(done) % ROUND, 0
        self._global = self._surrogate
        if looks := self._looks(done):
            assert self._around is not None
            now, self._stale = looks[-1], _stale(looks)
            began = time.perf_counter()
            around = self._around(_allocation(now), len(looks) - 1 - self._stale)
            self.looking_seconds = time.perf_counter() - began
            if not self._place and not self._stale:
                study._storage.set_trial_system_attr(trial._trial_id, LOOKED, around.forward_tokens)
            self._global = self._surrogate.towards(around.curvature)
            if target.nbytes == self._budget.nbytes:
                self._here = self._params(now), around
        self._posterior = fit(self._global, list(self._observations(done)))

    def _draw(self, attempt: int) -> tuple[Surrogate, dict[str, float]]:
        farther = attempt + self._stale
        scale = SCALES[self._place] if not farther else max(SCALES[self._place], 0.5)
        multipliers = self._posterior.draw(self._rng, scale=scale * 1.2**farther)
        surrogate = self._global.multiplied(multipliers)
        if self._here is not None:
            params, around = self._here
            surrogate = surrogate.nearby(params, around.moves, share=SHARES[self._place])
        return surrogate, multipliers

    def _looks(self, done: list[FrozenTrial]) -> list[FrozenTrial]:
        """The incumbent at the beginning of every round so far, this one's last."""
        if self._around is None:
            return []
        ends = range(len(done) - _own(done), len(done) + 1, ROUND)
        incumbents = [_incumbent(done[:end]) for end in ends]
        return [t for t in incumbents if t is not None and self._params(t)]

    def _params(self, trial: FrozenTrial) -> Params:
        """Complete params of what a trial scored; none if the space does not hold it."""
        space = self._surrogate.space
        try:
            return space.complete(space.params(_allocation(trial)))
        except SpaceError:
            return {}  # a first trial that keeps other experts

    def _observations(self, done: list[FrozenTrial]) -> Iterator[Observation]:
        incumbent = _incumbent(done)
        if incumbent is None:
            return
        for trial in done:
            losses: Any = np.array(trial.user_attrs.get("losses", ()))
            if not len(losses) or not np.isfinite(losses).all():
                continue
            if not (params := self._params(trial)):
                continue
            rival = np.array(incumbent.user_attrs["losses"])[: len(losses)]
            if min(losses.mean(), rival.mean()) <= 0:
                continue  # lossless within rounding: no ratio
            ratio = float(losses.mean() / rival.mean())
            spread = losses / losses.mean() - rival / rival.mean()
            yield Observation(
                params,
                max(ratio * float(incumbent.values[0]), 1e-9),
                float(spread.var() / len(losses)),
            )


def _done(study: Study, *, before: int | None = None) -> list[FrozenTrial]:
    """Trials before a number that were not abandoned."""
    trials = study.get_trials(deepcopy=False)[:before]
    return [t for t in trials if ABANDONED not in t.user_attrs]


def _own(done: list[FrozenTrial]) -> int:
    """How many were proposed, not queued."""
    return sum("fixed_params" not in t.system_attrs for t in done)


def _stale(looks: list[FrozenTrial]) -> int:
    """For how many rounds the incumbent has been looked at before."""
    return sum(t.number == looks[-1].number for t in looks) - 1


def _incumbent(done: list[FrozenTrial]) -> FrozenTrial | None:
    finished = [t for t in done if t.state == TrialState.COMPLETE]
    return min(finished, key=lambda t: (t.values[0], t.number), default=None)


def _allocation(trial: FrozenTrial) -> Allocation:
    return Allocation.from_json(trial.user_attrs["allocation"])
