"""Every sampler passes the shipped cases; a new one is one file and one registration."""

from itertools import count
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler, RandomSampler

from allocator.errors import StudyError
from allocator.samplers import SAMPLERS, check_sampler, register_sampler, stock
from allocator.samplers.auto import AutoSampler
from allocator.samplers.base import WholeSampler
from allocator.samplers.evolution import LevelSwitchSampler
from allocator.samplers.knapsack import KnapsackSampler
from allocator.study.stop_rule import StopRule
from allocator.study.trials import allocation_of
from allocator.testing.samplers import SamplerConformance


class Cases(SamplerConformance):
    @pytest.fixture
    def search_with(self, formula):
        return lambda storage, **options: formula.search(storage, "random", **options)


class TestAuto(Cases):
    make = staticmethod(AutoSampler.of)


class TestKnapsack(Cases):
    make = staticmethod(KnapsackSampler.of)


class TestEvolution(Cases):
    make = staticmethod(LevelSwitchSampler.of)


class TestRandom(Cases):
    make = staticmethod(stock.random)
    proposes_feasibly = False


class TestTPE(Cases):
    make = staticmethod(stock.tpe)
    proposes_feasibly = False


class TestNSGA2(Cases):
    make = staticmethod(stock.nsga2)
    proposes_feasibly = False


# -- a sampler of one's own


class SmallestButOne(WholeSampler):
    """The smallest allocation, one group at its largest format."""

    @classmethod
    def of(cls, problem, seed):
        return cls(problem.surrogate.space, seed=seed)

    def sample_relative(self, study, trial, search_space):
        params = self._space.params(self._space.smallest)
        name = self._rng.choice(sorted(self._space.distributions))
        return params | {name: self._space.choices[name][int(self._rng.integers(2))]}


class TestSmallestButOne(Cases):
    make = staticmethod(SmallestButOne.of)
    proposes_feasibly = False


class Drifting(SmallestButOne):
    """Draws from a state that outlives the trial."""

    _drawn = count()

    def sample_relative(self, study, trial, search_space):
        self._rng = np.random.default_rng(next(self._drawn))
        return super().sample_relative(study, trial, search_space)


def test_the_cases_fail_for_a_sampler_with_a_state_of_its_own(formula):
    class Bad(Cases):
        make = staticmethod(Drifting.of)

    cases = Bad()

    def searching(storage, seed=0, **options):
        return cases.searching_with(formula.search(storage, "random", **options), seed=seed)

    for case in (cases.test_the_same_seed_proposes_the_same,
                 cases.test_stopped_and_resumed_is_undisturbed):  # fmt: skip
        with pytest.raises(AssertionError):
            case(searching)


@pytest.fixture
def registered():
    """`registered(name, make)`: for the test."""
    names = []

    def register(name, make):
        register_sampler(name, make)
        names.append(name)

    yield register
    for name in names:
        del SAMPLERS[name]


def test_a_registered_sampler_is_known_by_its_name(formula, registered):
    with pytest.raises(StudyError, match="unknown sampler 'mine'"):
        check_sampler("mine")
    registered("mine", SmallestButOne.of)
    check_sampler("mine")
    search = formula.search(optuna.storages.InMemoryStorage(), "mine", n_knapsack=1)
    search.run(StopRule(trials=4))
    assert len({allocation_of(t).digest for t in search.study.get_trials()}) > 1
    with pytest.raises(StudyError, match="'mine' is registered already"):
        register_sampler("mine", stock.random)


def test_a_stock_sampler_asks_for_nothing(formula, registered):
    """One of Optuna's, with attributes of its own that mean something else here."""

    class Odd(RandomSampler):
        selection = SimpleNamespace()
        gradient_seconds = "no number"

    def make(problem, seed) -> BaseSampler:
        return Odd(seed)

    registered("odd", make)
    search = formula.search(optuna.storages.InMemoryStorage(), "odd")
    assert search.selection is None
    search.run(StopRule(trials=4))
    assert search.sampler.next_tokens(search.study, 5) == 0
    assert search.seconds["gradient"] == 0
