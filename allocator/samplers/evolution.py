"""Level-switch evolution with selection in steps (EvoPress, arXiv 2410.14649): a control.

In: the costs of a space under a budget, and the finished trials. Out: one offspring of the best of
them, within the budget. Invariant: every proposal is feasible as it is.

A unit is one param of the space, a level one of its values; neighbouring levels differ in bytes. An
offspring is drawn as the published code does for units of unequal size: n units, n the lesser of
two draws from {1, 2, 3}, are raised a level; then random units are lowered until the budget holds;
offspring of more than ten changes, or that gave up much more than they got, are drawn again. Three
things are ours, because our units differ in bytes a hundredfold and a large one would never move:
one draw in four goes the other way round (n lowered, then others raised); what pays for the n is
drawn among units large enough to do so within the ten changes; no unit goes both ways.
The selection among the offspring of a generation is the study's (`Selection`).
"""

import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from allocator.decision.costs import Costs
from allocator.decision.parameters import EXPERTS_USED, Params, largest_first
from allocator.samplers.base import WholeSampler
from allocator.samplers.problem import Problem
from allocator.study.generations import Selection
from allocator.study.trials import best_complete, key_of, proposed

_SWITCHES = 3  # drawn twice from 1.._SWITCHES, the lesser taken: 1 is likeliest
_MOST_CHANGES = 10
_LOWERED_FIRST = 0.25  # share of draws
_LEAST_RETURN = 0.8  # of the bytes that lowering saved, raising spends at least this share
_ATTEMPTS = 100


class LevelSwitchSampler(WholeSampler):
    """See the module.

    Args:
        costs: of the space, under the budget.
        seed: of this trial.

    """

    def __init__(self, costs: Costs, *, seed: int) -> None:
        super().__init__(costs.space, seed=seed)
        self._costs = costs

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Self:
        """Makes the sampler of one trial."""
        return cls(Costs(problem.surrogate.space, problem.budget), seed=seed)

    def selection(self, n_documents: int) -> Selection:
        """Returns the default selection, since one trial at a time would tell little."""
        return Selection.over(n_documents)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes an offspring of the best finished trial that was not proposed before."""
        space = self._space
        parent = self._parent(study)
        if parent is None:
            child = random_start(self._costs, self._rng)
        else:
            seen = proposed(study)
            child = parent
            for _ in range(_ATTEMPTS):
                drawn = offspring(self._costs, parent, self._rng)
                child = drawn or child
                if drawn and key_of({n: drawn[n] for n in space.distributions}) not in seen:
                    break
        return {name: child[name] for name in space.distributions}

    def _parent(self, study: Study) -> Params | None:
        """The params of the best finished trial; its proposal was feasible as it was."""
        best = best_complete(study.get_trials(deepcopy=False), nbytes=self._costs.budget.nbytes)
        return None if best is None else self._space.complete(best.params)


def random_start(costs: Costs, rng: np.random.Generator) -> Params:
    """Returns the largest of everything, with random units lowered until it fits the budget."""
    space = costs.space
    walk = _Walk(costs, space.complete(space.params(space.largest)), rng)
    while (walk.spare_bytes < 0 or not costs.fits(walk.params)) and walk.lower():
        pass
    return walk.params


def offspring(costs: Costs, parent: Params, rng: np.random.Generator) -> Params | None:
    """Draws complete params within the budget; None if too far from the parent, or equal."""
    walk = _Walk(costs, dict(parent), rng)
    raised_first = rng.random() >= _LOWERED_FIRST
    for _ in range(int(rng.integers(1, _SWITCHES + 1, size=2).min())):
        walk.switch() if raised_first else walk.lower()
    while walk.changes_left > 0 and walk.debt > 0:
        if raised_first and walk.spare_bytes >= 0:
            return None  # gave up too much
        pay = walk.lower if walk.spare_bytes < 0 else walk.raise_within
        if not pay(least=walk.debt / walk.changes_left):
            return None
    is_good = walk.debt <= 0 and walk.params != parent and costs.fits(walk.params)
    return walk.params if is_good else None


@dataclass
class _Walk:
    """Params on the move, a level of a unit at a time; no unit goes both ways."""

    costs: Costs
    params: Params
    rng: np.random.Generator
    n_changes: int = 0
    added: int = 0
    removed: int = 0
    spare_bytes: int = 0  # of the budget
    _directions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spare_bytes = self.costs.spare_bytes(self.params)

    @property
    def changes_left(self) -> int:
        return _MOST_CHANGES - self.n_changes

    @property
    def debt(self) -> float:
        """Bytes over the budget; within it, bytes of the least return that are not spent."""
        return (
            -self.spare_bytes if self.spare_bytes < 0 else _LEAST_RETURN * self.removed - self.added
        )

    def switch(self) -> bool:
        """Raises a random unit, within the budget or not; one without bytes goes either way."""
        return self._move(1)

    def raise_within(self, *, least: float) -> bool:
        """Raises a random unit that fits and adds at least `least` bytes; False if none does."""
        return self._move(1, least, self.spare_bytes)

    def lower(self, *, least: float = 0) -> bool:
        """Lowers a random unit that saves at least `least` bytes; False if none does."""
        return self._move(-1, least)

    def _move(self, direction: int, least: float = 0, most: float = math.inf) -> bool:
        names = list(self.costs.space.choices)
        for i in self.rng.permutation(len(names)):
            name = names[i]
            if self._directions.get(name, direction) != direction:
                continue
            if name == EXPERTS_USED.name and direction > 0:
                level = self._sideways(name)
            else:
                level = self._neighbour(name, direction)
            if level is None or not least <= abs(level[1]) <= most:
                continue
            self.params[name], change = level
            self._directions[name] = direction
            self.n_changes += 1
            self.added += max(change, 0)
            self.removed += max(-change, 0)
            self.spare_bytes -= change
            return True
        return False

    def _neighbour(self, name: str, direction: int) -> tuple[Any, int] | None:
        """The next level of more (or fewer) bytes, and the change in bytes."""
        values = self.costs.space.choices[name]
        at = values.index(self.params[name])
        ahead = values[:at][::-1] if largest_first(name) == (direction > 0) else values[at + 1 :]
        before = self.costs.affected(self.params, [name])
        for value in ahead:
            change = self.costs.affected({**self.params, name: value}, [name]) - before
            if change * direction > 0:  # padding may hide a step
                return value, change
        return None

    def _sideways(self, name: str) -> tuple[Any, int] | None:
        values = self.costs.space.choices[name]
        at = values.index(self.params[name])
        neighbours = [values[i] for i in (at - 1, at + 1) if 0 <= i < len(values)]
        if not neighbours:
            return None
        value = neighbours[self.rng.integers(len(neighbours))]
        before = self.costs.affected(self.params, [name])
        return value, self.costs.affected({**self.params, name: value}, [name]) - before
