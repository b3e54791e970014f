"""The default sampler on losses that are formulas: looks, rounds, resumption, and what it gains."""

import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from allocator.checkpoint.reading import read_inventory
from allocator.decision.budget import Budget
from allocator.prediction.surrogate import LocalPrices
from allocator.samplers import GradientStep, Problem
from allocator.samplers.auto import ROUND, AutoSampler
from allocator.samplers.knapsack import MULTIPLIERS
from allocator.samplers.seeded import SeededSampler
from allocator.study.outcomes import close_abandoned
from allocator.study.stop_rule import StopRule
from allocator.study.storages import open_storage
from allocator.study.trials import ABANDONED, GRADIENT_TOKENS, allocation_of, complete_trials
from allocator.targets import TARGETS

N_FIRST, N_TRIALS = 2, 15
LOOK_TOKENS = 50


def pieces(text, retained):
    """Formats of a group in an allocation, and the experts that each holds."""
    for piece in text.split("+"):
        fmt, _, experts = piece.partition(":")
        yield fmt, [int(e) for e in experts.split(",")] if experts else list(retained)


class Toy:
    """A loss that is additive in formats, each group's that of a profile times its own factor."""

    def __init__(self, formula, make, target="safetensors", spread=1.0):
        layout = TARGETS[target].layout(read_inventory(formula.checkpoint))
        self.groups, self.prices = layout.groups, make.profile(layout).curvature
        self.factors = {
            name: float(np.exp(spread * np.random.default_rng(zlib.crc32(name.encode())).normal()))
            for name in self.prices
        }

    def price(self, name, fmt):
        return self.factors[name] * np.array(self.prices[name][fmt])

    def loss(self, allocation):
        total = 0.0
        for name, text in allocation.formats:
            layer = self.groups[name].layer
            kept = allocation.retained_experts[layer] if ".experts." in name else [0]
            total += sum(self.price(name, f)[e].sum() for f, e in pieces(text, kept))
        return total + sum(0.3 * (1 - n / 4) for n in allocation.counts.values())

    def local_prices(self, allocation):
        """Exact: curvature is the loss of every format, moves the change from what is held."""
        curvature, moves = {}, {}
        for name, text in allocation.formats:
            curvature[name] = {f: self.price(name, f).tolist() for f in self.prices[name]}
            layer = self.groups[name].layer
            kept = allocation.retained_experts[layer] if ".experts." in name else [0]
            held = np.zeros(len(next(iter(curvature[name].values()))))
            for fmt, experts in pieces(text, kept):
                held[experts] = self.price(name, fmt)[experts]
            there = np.isin(np.arange(len(held)), kept)
            moves[name] = {
                f: ((np.array(v) - held) * there).tolist() for f, v in curvature[name].items()
            }
        return LocalPrices(curvature, moves, LOOK_TOKENS)


@pytest.fixture(scope="module")
def toys(formula, make):
    return {target: Toy(formula, make, target) for target in TARGETS}


def toy_scorer(formula, toy, before=lambda *_: None):
    class Scorer(formula.Scorer):
        def kl(self, allocation, documents):
            wave = 1 + 0.1 * np.sin(documents + zlib.crc32(allocation.digest.encode()) % 97)
            return toy.loss(allocation) * (1 + 0.2 * np.cos(documents)) * wave

    return Scorer(before)


class Watched:
    """A `GradientStep` that remembers what it was asked; its prices are noisy, as a gradient's."""

    def __init__(self, toy, fails=()):
        self.toy, self.fails, self.asked = toy, set(fails), []

    def __call__(self, allocation, part):
        self.asked.append((allocation.digest, part))
        if len(self.asked) - 1 in self.fails:
            raise KilledError
        exact = self.toy.local_prices(allocation)
        rng = np.random.default_rng([zlib.crc32(allocation.digest.encode()), part])
        curvature, moves = (
            {g: {f: (np.array(v) * np.exp(rng.normal())).tolist() for f, v in row.items()}
             for g, row in prices.items()}
            for prices in (exact.curvature, exact.moves)
        )  # fmt: skip
        return LocalPrices(curvature, moves, LOOK_TOKENS)


class KilledError(Exception):
    """The process dies."""


def started(formula, toy, storage, *, look=None, before=lambda *_: None, share=0.15, **options):
    return formula.search(
        storage, "auto", scorer=toy_scorer(formula, toy, before), local_prices=look, share=share,
        gradient_tokens=LOOK_TOKENS if look else 0, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(formula, toys):
    """A finished search with looks, and its `Watched`; read only."""
    look = Watched(toys["safetensors"])
    search = started(formula, toys["safetensors"], InMemoryStorage(), look=look)
    search.run(StopRule(trials=N_TRIALS))
    return SimpleNamespace(search=search, look=look)


def told(study):
    """All that a study says of its trials, abandoned ones left out."""
    trials = [t for t in study.get_trials() if ABANDONED not in t.user_attrs]
    return [
        (t.state, t.params, t.values, t.user_attrs, t.constraints, t.system_attrs) for t in trials
    ]


# -- what is proposed


@pytest.mark.parametrize("looking", [False, True])
@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize("target", TARGETS)
def test_proposals_are_feasible_and_within_their_target(formula, toys, target, bounds, looking):
    targets = []  # first and last one of every proposal

    class Noting(AutoSampler):
        at_the_cap = 0.5

        def targets(self):
            first = None
            for target, attempts in super().targets():
                if first is None:
                    first = target
                    targets.append(None)
                targets[-1] = first, target
                yield target, attempts

    toy = toys[target]
    look = Watched(toy) if looking else None
    search = started(formula, toy, InMemoryStorage(), look=look, target=target, bounds=bounds)
    gradient = GradientStep(look, LOOK_TOKENS) if looking else None
    problem = Problem(search.surrogate, search.budget, gradient=gradient)
    sampler = SeededSampler(lambda seed: Noting.of(problem, seed), 0)
    search = replace(search, sampler=sampler)
    search.run(StopRule(trials=N_TRIALS))
    own = search.study.get_trials()[N_FIRST:]
    assert len(targets) == len(own)
    low = search.space.smallest.used(search.space.layout, Budget(1, bounds))
    below = 0
    for trial, (first, budget) in zip(own, targets, strict=True):
        assert set(trial.params) == set(search.space.distributions)
        allocation = allocation_of(trial)
        assert search.space.allocation(trial.params) == allocation
        assert not trial.user_attrs["result"]["repaired"]
        allocation.check(search.space.layout)
        used = allocation.used(search.space.layout, budget)
        assert low <= used <= budget.nbytes <= search.budget.nbytes
        assert set(trial.system_attrs[MULTIPLIERS]) == set(search.surrogate.multiplied_names)
        below += first.nbytes < search.budget.nbytes
    assert 2 < below < len(own) - 2


def test_most_proposals_are_at_the_cap_and_few_are_made_twice(undisturbed):
    search = undisturbed.search
    trials = search.study.get_trials()
    digests = [allocation_of(t).digest for t in trials]
    assert len(set(digests)) > 0.8 * len(digests)
    sizes = [allocation_of(t).used(search.space.layout, search.budget) for t in trials]
    near = sum(n > 0.95 * search.budget.nbytes for n in sizes[N_FIRST:])
    assert near > 0.7 * (len(trials) - N_FIRST)


# -- looks


def incumbent(trials):
    done = [t for t in trials if t.state is TrialState.COMPLETE]
    return min(done, key=lambda t: t.values[0])


def test_looks_are_around_the_incumbent_at_the_start_of_every_round(undisturbed):
    trials = undisturbed.search.study.get_trials()
    asked, firsts = iter(undisturbed.look.asked), []
    for first in range(N_FIRST, len(trials), ROUND):  # once: what was seen is remembered
        look = allocation_of(incumbent(trials[:first])).digest, len(firsts)
        assert next(asked) == look
        firsts.append(first)
    assert next(asked, None) is None
    assert len(firsts) > 1
    noted = {
        t.number: t.system_attrs[GRADIENT_TOKENS]
        for t in trials
        if GRADIENT_TOKENS in t.system_attrs
    }
    assert noted == dict.fromkeys(firsts, LOOK_TOKENS)
    spent = sum(t.user_attrs["result"]["tokens"] for t in trials)
    assert undisturbed.search.forward_tokens() == spent + LOOK_TOKENS * len(firsts)


def test_what_is_seen_there_changes_the_proposals(formula, toys, undisturbed):
    blind = started(formula, toys["safetensors"], InMemoryStorage())
    blind.run(StopRule(trials=N_TRIALS))
    trials = blind.study.get_trials()
    assert len(trials) == N_TRIALS
    assert not any(GRADIENT_TOKENS in t.system_attrs for t in trials)
    seeing = [t.params for t in undisturbed.search.study.get_trials()]
    assert [t.params for t in trials][:N_FIRST] == seeing[:N_FIRST]
    assert trials[N_FIRST].params != seeing[N_FIRST]


def test_without_a_finished_trial_there_is_no_look(formula, toys):
    look = Watched(toys["safetensors"])
    search = started(formula, toys["safetensors"], InMemoryStorage(), look=look, n_knapsack=0)
    search.step()
    assert look.asked == []
    search.run(StopRule(trials=ROUND + 1))
    assert len(look.asked) == 1  # the first round had none; the second begins with one
    assert look.asked[0][1] == 0
    noted = [GRADIENT_TOKENS in t.system_attrs for t in search.study.get_trials()]
    assert noted == [False] * ROUND + [True]


def test_what_is_remembered_changes_no_proposal(formula, toys, undisturbed):
    """A sampler that reads every former trial and look anew proposes the same, trial by trial."""
    look = Watched(toys["safetensors"])
    search = started(formula, toys["safetensors"], InMemoryStorage(), look=look)

    def forgetful(seed):
        gradient = GradientStep(look, LOOK_TOKENS)
        return AutoSampler.of(Problem(search.surrogate, search.budget, gradient=gradient), seed)

    search = replace(search, sampler=SeededSampler(forgetful, 0))
    search.run(StopRule(trials=N_TRIALS))
    assert told(search.study) == told(undisturbed.search.study)
    assert len(look.asked) > len(undisturbed.look.asked)


def test_a_mean_of_looks_is_that_of_all_of_them(formula, toys):
    search = started(formula, toys["safetensors"], InMemoryStorage())
    look = Watched(toys["safetensors"])
    lessons = Problem(search.surrogate, search.budget, gradient=GradientStep(look, 1)).lessons
    allocation = search.space.smallest
    prices = [look(allocation, part).moves for part in range(3)]
    steps = [lessons.step(allocation, part) for part in range(3)]
    for n in (1, 3, 2):
        for group, rows in lessons.mean_moves(steps[:n]).items():
            tables = [search.surrogate.table(p, allocation.counts)[group] for p in prices[:n]]
            np.testing.assert_allclose(rows, sum(tables) / n, rtol=1e-12)


# -- stops and kills


@pytest.mark.parametrize("stops", [(3, 6, 9), (2, 4, 5, 7, 8)])
def test_stopped_and_resumed_is_undisturbed(formula, toys, undisturbed, tmp_path, stops):
    for stop in (*stops, N_TRIALS):
        look = Watched(toys["safetensors"])
        storage = open_storage(None, tmp_path)
        search = started(formula, toys["safetensors"], storage, look=look)
        search.run(StopRule(trials=stop))
    assert told(search.study) == told(undisturbed.search.study)
    assert search.forward_tokens() == undisturbed.search.forward_tokens()


@pytest.mark.parametrize(
    ("where", "at"),
    [("in the look", n) for n in (0, 1, 2)] + [("after it", n) for n in (0, 1, 3, 6, 7)]
    + [("in the last documents", n) for n in (0, 2)],
)  # fmt: skip
def test_killed_and_resumed_is_undisturbed(formula, toys, undisturbed, where, at):
    toy, storage = toys["safetensors"], InMemoryStorage()
    begun = []

    def before(allocation, start, stop):
        begun.extend([allocation] * (start == 0))
        if len(begun) == N_FIRST + at + 1 and (where == "after it" or stop == 12):
            raise KilledError

    inside = where == "in the look"
    look = Watched(toy, fails=[at] if inside else ())
    search = started(
        formula, toy, storage, look=look, before=(lambda *_: None) if inside else before
    )
    with pytest.raises(KilledError):
        search.run(StopRule(trials=N_TRIALS))
    assert search.study.trials[-1].state is TrialState.RUNNING
    assert search.study.trials[-1].number == N_FIRST + (at * ROUND if inside else at)
    search = started(formula, toy, storage, look=Watched(toy))
    assert close_abandoned(search.study) == 1
    search.run(StopRule(trials=N_TRIALS))
    assert len(search.study.trials) == N_TRIALS + 1
    assert told(search.study) == told(undisturbed.search.study)
    assert search.forward_tokens() == undisturbed.search.forward_tokens()


# -- what it gains


def gains(formula, toy, *, looking, seed, n_trials=16, **options):
    """The best proposal's loss over the knapsack's."""
    look = toy_look(toy) if looking else None
    search = started(
        formula, toy, InMemoryStorage(), look=look, seed=seed, n_knapsack=1, rungs=(), **options
    )
    search.run(StopRule(trials=n_trials))
    first = search.study.get_trials()[0]
    assert first.user_attrs["kind"] == "knapsack"
    best = complete_trials(search.study)[0]
    return toy.loss(allocation_of(best)) / toy.loss(allocation_of(first))


def toy_look(toy):
    return lambda allocation, part: toy.local_prices(allocation)


@pytest.mark.parametrize("looking", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_it_beats_the_knapsack_where_the_profile_is_wrong(formula, toys, target, looking):
    found = [
        gains(formula, toys[target], target=target, looking=looking, seed=seed, share=share)
        for seed in (0, 1) for share in (0.15, 0.5)
    ]  # fmt: skip
    assert sum(x < 1 for x in found) >= 2
    assert np.mean(found) < 0.95


def test_a_lossless_incumbent_ends_nothing(formula):
    """Everything fits in the checkpoint's own formats: losses are zero, or rounding below it."""
    for rounding in (0.0, -1e-9):
        scorer = formula.Scorer(change=lambda kl, x=rounding: 0 * kl + x)
        search = formula.search(
            InMemoryStorage(), "auto", scorer=scorer, share=1.0, n_knapsack=1, rungs=()
        )
        search.run(StopRule(trials=5))
        trials = search.study.get_trials()
        assert [t.state for t in trials] == [TrialState.COMPLETE] * 5
        assert allocation_of(trials[0]) == search.space.largest


def test_a_trial_without_a_finite_loss_is_passed_over(formula, toys):
    toy, look = toys["safetensors"], Watched(toys["safetensors"])
    search = started(formula, toy, InMemoryStorage(), look=look)
    search.run(StopRule(trials=3))
    search.scorer.change = lambda kl: kl * np.nan
    search.run(StopRule(trials=5))
    search.scorer.change = lambda kl: kl
    search.run(StopRule(trials=9))
    states = [t.state.name for t in search.study.get_trials()]
    assert states[3:5] == ["FAIL", "FAIL"]
    assert "FAIL" not in states[:3] + states[5:]
    assert all(np.isfinite(list(t.system_attrs[MULTIPLIERS].values())).all()
               for t in search.study.get_trials()[N_FIRST:])  # fmt: skip
