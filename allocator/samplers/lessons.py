"""What trials and gradient steps say of a surrogate's choices, each worked out once in a process.

In: a surrogate, trials, gradient steps. Out: params of what trials scored, and prices of every
switch. Invariant: an answer is a function of what is asked for alone, so a sampler proposes the
same with a memory as without one; and its seconds do not grow with the number of rounds.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
from optuna.trial import FrozenTrial

from allocator.decision.allocation import Allocation
from allocator.decision.parameters import Params
from allocator.errors import SpaceError
from allocator.prediction.posterior import Observation
from allocator.prediction.surrogate import Floats, Ints, LocalPrices, Surrogate
from allocator.study.trials import LOSSES, allocation_of, best_complete


@dataclass(frozen=True)
class GradientStep:
    """A gradient at an allocation, which prices every change from there.

    Attributes:
        take: an allocation, and which part of the documents to use, to the prices there.
        forward_tokens: what one step takes.
    """

    take: Callable[[Allocation, int], LocalPrices]
    forward_tokens: int


class Scored(NamedTuple):
    """What a trial scored.

    Attributes:
        allocation: the decision.
        params: complete; none if the space does not hold the allocation.
        places: of the params, as of `Surrogate.places`.
    """

    allocation: Allocation
    params: Params
    places: Ints


@dataclass(frozen=True, eq=False)
class Step:
    """What a gradient step says.

    Attributes:
        moves: loss of every switch from the candidate, by group `counts x options`.
        forward_tokens: tokens that the step took.
    """

    moves: Mapping[str, Floats]
    forward_tokens: int


class Lessons:
    """See the module.

    Args:
        surrogate: with multipliers of 1.
        gradient: None where no gradient is to be had.
    """

    def __init__(self, surrogate: Surrogate, gradient: GradientStep | None) -> None:
        self.gradient = gradient
        self.gradient_seconds = 0.0  # that all gradient steps took
        self._surrogate = surrogate
        self._scored: dict[tuple[int, datetime | None], Scored] = {}  # by number and start
        self._steps: dict[tuple[str, int], Step] = {}  # by digest and part
        self._curved: dict[tuple[str, int], Surrogate] = {}  # of the last step that was taken
        self._mean: tuple[tuple[Step, ...], Mapping[str, Floats]] = (), {}

    def scored(self, trial: FrozenTrial) -> Scored:
        """Returns what a trial scored.

        Raises:
            StudyError: if the trial scored nothing.
        """
        key = trial.number, trial.datetime_start
        if key not in self._scored:
            allocation, space = allocation_of(trial), self._surrogate.space
            try:
                params = space.complete(space.params(allocation))
            except SpaceError:  # a first trial that keeps other experts
                self._scored[key] = Scored(allocation, {}, np.zeros(0, dtype=np.int64))
            else:
                self._scored[key] = Scored(allocation, params, self._surrogate.places(params))
        return self._scored[key]

    def step(self, allocation: Allocation, part: int) -> Step:
        """Returns what the gradient at an allocation says, on a part of the documents."""
        key = allocation.digest, part
        if key not in self._steps:
            self._take(allocation, part)
        return self._steps[key]

    def curved(self, allocation: Allocation, part: int) -> Surrogate:
        """Returns the surrogate with the curvature that a gradient step measures."""
        key = allocation.digest, part
        if key not in self._curved:
            self._take(allocation, part)
        return self._curved[key]

    def _take(self, allocation: Allocation, part: int) -> None:
        assert self.gradient is not None
        began = time.perf_counter()
        prices = self.gradient.take(allocation, part)
        self.gradient_seconds += time.perf_counter() - began
        key = allocation.digest, part
        moves = self._surrogate.table(prices.moves, allocation.counts)
        self._steps[key] = Step(moves, prices.forward_tokens)
        self._curved = {key: self._surrogate.with_curvature_at(prices.curvature)}

    def mean_moves(self, steps: Sequence[Step]) -> Mapping[str, Floats]:
        """Returns the mean of the steps' moves, by group `counts x options`."""
        key = tuple(steps)
        if key != self._mean[0]:
            groups = self._surrogate.error_losses
            self._mean = key, {g: np.mean([s.moves[g] for s in key], axis=0) for g in groups}
        return self._mean[1]

    def observations(self, done: Sequence[FrozenTrial]) -> Iterator[Observation]:
        """Yields what trials measured, by comparison with the best on the documents of both."""
        incumbent = best_complete(done)
        if incumbent is None:
            return
        rivals = np.array(incumbent.user_attrs[LOSSES])
        for trial in done:
            losses = np.array(trial.user_attrs.get(LOSSES, ()))
            if not len(losses) or not np.isfinite(losses).all():
                continue
            scored = self.scored(trial)
            if not scored.params:
                continue
            rival = rivals[: len(losses)]
            if min(losses.mean(), rival.mean()) <= 0:
                continue  # lossless within rounding: no ratio
            ratio = float(losses.mean() / rival.mean())
            spread = losses / losses.mean() - rival / rival.mean()
            yield Observation(
                scored.params,
                max(ratio * float(incumbent.values[0]), 1e-9),
                float(spread.var() / len(losses)),
                scored.places,
            )
