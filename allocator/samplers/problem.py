"""The problem that a sampler solves: predicted losses, a hard limit, and where a gradient fits."""

from collections.abc import Callable
from dataclasses import dataclass

from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.prediction.surrogate import LocalPrices, Surrogate


@dataclass(frozen=True)
class GradientStep:
    """A gradient at an allocation, which prices every change from there.

    Attributes:
        take: an allocation, and which part of the documents to use, to the prices there.
        forward_tokens: what one step takes.
    """

    take: Callable[[Allocation, int], LocalPrices]
    forward_tokens: int


@dataclass(frozen=True)
class Problem:
    """What a sampler is made for.

    Attributes:
        surrogate: predicted losses, and the space.
        budget: the hard limit.
        gradient: for samplers that take gradient steps; None where none is to be had.
        population: trials of a generation, for samplers with a population.
    """

    surrogate: Surrogate
    budget: Budget
    gradient: GradientStep | None = None
    population: int = 20
