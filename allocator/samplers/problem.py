"""The problem that a sampler solves: predicted losses, a hard limit, and where a gradient fits."""

from dataclasses import dataclass
from functools import cached_property

from allocator.decision.budget import Budget
from allocator.prediction.surrogate import Surrogate
from allocator.samplers.lessons import GradientStep, Lessons

__all__ = ["GradientStep", "Problem"]


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

    @cached_property
    def lessons(self) -> Lessons:
        """What trials and gradient steps teach, worked out once for all samplers of the study."""
        return Lessons(self.surrogate, self.gradient)
