"""Conformance cases of a sampler.

In: how the sampler is made, and a search to put it into. Out: pytest cases. A new sampler's test
inherits `SamplerConformance` and names its maker:

    class TestMine(SamplerConformance):
        make = staticmethod(MySampler.of)

        @pytest.fixture
        def search_with(self): ...

The scorer of the search that the fixture makes is a formula of the allocation alone, so
that two searches with the same sampler agree.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from allocator.decision.budget import Budget
from allocator.samplers import Problem, SamplerMaker
from allocator.samplers.seeded import SeededSampler
from allocator.study.generations import Selection
from allocator.study.outcomes import close_abandoned
from allocator.study.search import Search
from allocator.study.stop_rule import StopRule
from allocator.study.trials import (
    PROPOSAL,
    allocation_of,
    forward_tokens,
    not_abandoned,
)


class SearchWith(Protocol):
    """Makes a search of a small checkpoint, whose scorer is a formula."""

    def __call__(self, storage: BaseStorage, *, share: float = 0.4, bounds: str = "file") -> Search:
        """Returns a search over `storage`, of any sampler.

        Args:
            storage: empty, or of an earlier search with the same budget.
            share: place of the budget between floor and ceiling.
            bounds: `file` or `weights`.
        """


class SamplerConformance:
    """Cases that every sampler passes.

    Attributes:
        make: makes the sampler of one trial from a problem and a seed.
        n_trials: of a search.
        proposes_feasibly: whether proposals are within the budget as they are; a search makes
            those of other samplers feasible before it scores them.
        steps: how generations are narrowed down, for samplers that ask for them.
    """

    make: ClassVar[SamplerMaker]
    n_trials: ClassVar[int] = 14
    proposes_feasibly: ClassVar[bool] = True
    steps: ClassVar[Selection] = Selection(4, ((3, 2), (6, 1)))

    @pytest.fixture
    def search_with(self) -> SearchWith:
        """Returns what makes a search; the test's folder overrides it."""
        raise NotImplementedError(
            "a test of a sampler needs a fixture `search_with`; inherit `Cases` of "
            "tests/samplers/test_conformance.py, which has one"
        )

    @pytest.fixture
    def searching(self, search_with: SearchWith) -> Callable[..., Search]:
        """Returns what makes a search with this sampler: `searching(storage, seed=0, ...)`."""
        return lambda storage, seed=0, **options: self.searching_with(
            search_with(storage, **options), seed=seed
        )

    def searching_with(self, search: Search, *, seed: int) -> Search:
        """Returns the same search with this sampler."""
        problem = Problem(search.surrogate, search.budget, population=4)
        leases = search.leases
        sampler = SeededSampler(
            lambda s: type(self).make(problem, s),
            seed,
            on_trial=None if leases is None else leases.take,
        )
        selection = self.steps if sampler.selection(search.scorer.n_documents) else None
        return replace(search, sampler=sampler, selection=selection)

    @pytest.mark.parametrize("bounds", ["file", "weights"])
    def test_what_is_scored_is_within_the_budget(
        self, searching: Callable[..., Search], bounds: str
    ) -> None:
        """Checks every allocation, and proposals of a sampler that says it proposes feasibly."""
        search = searching(InMemoryStorage(), bounds=bounds)
        search.run(StopRule(trials=self.n_trials))
        for trial in search.study.get_trials():
            allocation = allocation_of(trial)
            allocation.check(search.space.layout)
            assert allocation.used(search.space.layout, search.budget) <= search.budget.nbytes
            if self.proposes_feasibly:
                assert search.space.allocation(trial.params) == allocation

    def test_the_same_seed_proposes_the_same(self, searching: Callable[..., Search]) -> None:
        """Compares two searches trial by trial, and a third with another seed."""
        one, other, third = (searching(InMemoryStorage(), seed=seed) for seed in (0, 0, 1))
        for search in (one, other, third):
            search.run(StopRule(trials=self.n_trials))
        assert _said(one) == _said(other)
        assert [p for _, p, *_ in _said(one)] != [p for _, p, *_ in _said(third)]

    def test_stopped_and_resumed_is_undisturbed(self, searching: Callable[..., Search]) -> None:
        """Compares a search that is stopped between trials with one that is not."""
        undisturbed = searching(InMemoryStorage())
        undisturbed.run(StopRule(trials=self.n_trials))
        storage = InMemoryStorage()
        for stop in (1, self.n_trials // 2, self.n_trials):
            search = searching(storage)
            search.run(StopRule(trials=stop))
        assert _said(search) == _said(undisturbed)

    def test_killed_and_resumed_is_undisturbed(self, searching: Callable[..., Search]) -> None:
        """Compares a search whose process died while it scored with one that lives."""
        undisturbed = searching(InMemoryStorage())
        undisturbed.run(StopRule(trials=self.n_trials))
        storage = InMemoryStorage()
        search = searching(storage)
        search.run(StopRule(trials=self.n_trials // 2))
        search.proposer.propose(1)
        search = searching(storage)
        assert close_abandoned(search.study) == 1
        search.run(StopRule(trials=self.n_trials))
        assert _said(search) == _said(undisturbed)

    def test_several_workers_share_a_study(self, searching: Callable[..., Search]) -> None:
        """Lets two workers have a trial each at a time; every proposal is made once."""
        storage = InMemoryStorage()
        workers = [searching(storage) for _ in range(2)]
        for _ in range(self.n_trials // 2):
            in_hand = [(worker, worker.propose(1)) for worker in workers]
            for worker, contenders in in_hand:
                worker.tell(contenders, lost=worker.run_race(contenders))
        trials = not_abandoned(workers[0].study)
        assert all(t.state.is_finished() for t in trials)
        assert sorted(t.system_attrs[PROPOSAL] for t in trials) == list(range(len(trials)))

    def test_tokens_are_announced(self, searching: Callable[..., Search]) -> None:
        """Compares the forward tokens of a proposal with what `next_tokens` says."""
        search = searching(InMemoryStorage())
        search.run(StopRule(trials=3))
        announced = search.sampler.next_tokens(search.study, 1)
        before = search.forward_tokens()
        contender = search.proposer.propose(1)[0]
        assert search.forward_tokens() - before <= announced
        assert forward_tokens(search.study.get_trials()[contender.trial.number]) <= announced

    def test_a_space_of_one_allocation_is_searched(self, searching: Callable[..., Search]) -> None:
        """Searches at the floor, where there is one allocation."""
        search = searching(InMemoryStorage(), share=0.0, bounds="weights")
        search.run(StopRule(trials=4))
        floor = search.space.smallest.used(search.space.layout, Budget(1, "weights"))
        for trial in search.study.get_trials():
            assert allocation_of(trial).used(search.space.layout, search.budget) == floor
            assert trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def _said(search: Search) -> list[tuple[Any, ...]]:
    """All that a study says of its trials, abandoned ones left out."""
    return [
        (t.state, t.params, t.values, t.user_attrs, t.constraints, t.system_attrs)
        for t in not_abandoned(search.study)
    ]
