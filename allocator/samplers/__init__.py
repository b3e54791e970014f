"""Optuna samplers: stock ones, made repeatable, and our own.

In: a name, a problem, and the seed of a study. Out: a sampler for the study. Invariant: its random
state comes from (study seed, proposal number) alone, so a study that was stopped and resumed
proposes what an undisturbed one does.

A new sampler is one file, an entry in `SAMPLERS` (or a call of `register_sampler`), and a test that
inherits `allocator.testing.samplers.SamplerConformance`.
"""

from collections.abc import Callable

from optuna.samplers import BaseSampler

from allocator.errors import StudyError
from allocator.samplers import stock
from allocator.samplers.auto import AutoSampler
from allocator.samplers.evolution import LevelSwitchSampler
from allocator.samplers.knapsack import KnapsackSampler
from allocator.samplers.problem import GradientStep, Problem
from allocator.samplers.seeded import SeededSampler
from allocator.study.protocols import StudySampler
from allocator.units import check_whole

MOST_SEED = 2**32 - 1
"""Largest seed of Optuna's samplers."""

SamplerMaker = Callable[[Problem, int], BaseSampler]
"""Makes the sampler of one trial, from a problem and the trial's seed."""

SAMPLERS: dict[str, SamplerMaker] = {
    "auto": AutoSampler.of,
    "knapsack": KnapsackSampler.of,
    "random": stock.random,
    "tpe": stock.tpe,
    "nsga2": stock.nsga2,
    "evolution": LevelSwitchSampler.of,
}
"""Every sampler by its name in study.toml."""

__all__ = [
    "MOST_SEED",
    "SAMPLERS",
    "GradientStep",
    "Problem",
    "SamplerMaker",
    "check_sampler",
    "check_seed",
    "make_sampler",
    "register_sampler",
]


def register_sampler(name: str, make: SamplerMaker) -> None:
    """Adds a sampler, which study.toml and `--sampler` then know by its name.

    Raises:
        StudyError: if another one has that name.
    """
    if SAMPLERS.setdefault(name, make) is not make:
        raise StudyError(f"sampler {name!r} is registered already; choose another name")


def make_sampler(
    name: str,
    problem: Problem,
    *,
    seed: int,
    on_trial: Callable[[int], None] | None = None,
) -> StudySampler:
    """Makes the sampler of a study by its name in study.toml.

    Args:
        name: one of `SAMPLERS`.
        problem: what it is made for.
        seed: of the study.
        on_trial: called with a trial's id before anything is proposed for it.

    Raises:
        StudyError: if there is none of that name.
        AllocatorError: if the seed is none of Optuna's.
    """
    check_sampler(name)
    check_seed(seed)
    make = SAMPLERS[name]
    return SeededSampler(lambda s: make(problem, s), seed, on_trial=on_trial)


def check_sampler(name: str) -> None:
    """Raises:
    StudyError: if no sampler has that name.
    """
    if name not in SAMPLERS:
        raise StudyError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")


def check_seed(seed: int) -> None:
    """Raises:
    AllocatorError: if Optuna's samplers do not take the seed.
    """
    check_whole("seed", seed, 0, MOST_SEED)
