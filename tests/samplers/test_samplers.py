"""Samplers drive a study of a formula: feasible, repeatable, the same after a stop or a kill."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from allocator.errors import AllocatorError
from allocator.samplers import SAMPLERS, make_sampler
from allocator.study.generations import Selection
from allocator.study.optuna_private import trial_id
from allocator.study.outcomes import close_abandoned
from allocator.study.stop_rule import StopRule
from allocator.study.storages import mend_storage, open_storage
from allocator.study.trials import ABANDONED, allocation_of

N_TRIALS = 18  # TPE draws its first 10 at random; NSGA-II's third generation begins after 8
N_FIRST = 2
STEPS = Selection(4, ((3, 2), (6, 1)))  # four generations of evolution
TESTS = Path(__file__).parents[1]


def digests(study):
    """Of the allocations scored, in order, abandoned trials left out."""
    trials = [t for t in study.get_trials() if ABANDONED not in t.user_attrs]
    return [allocation_of(t).digest for t in trials]


def proposals(study):
    return [t.params for t in study.get_trials() if ABANDONED not in t.user_attrs]


def started(formula, storage, sampler, **options):
    search = formula.search(storage, sampler, **options)
    search.selection = search.selection and STEPS
    return search


def whole(sampler, n_trials):
    """How many proposals a run to `n_trials` makes: a generation is finished."""
    n = STEPS.n_offspring
    last = N_FIRST + max(0, n_trials - N_FIRST + n - 1) // n * n
    return last if sampler == "evolution" and n_trials > N_FIRST else n_trials


@pytest.fixture(scope="module")
def undisturbed(formula):
    """A finished search by sampler and kind of budget; read only."""
    made = {}

    def run(sampler, bounds="file", share=0.4):
        key = sampler, bounds, share
        if key not in made:
            made[key] = started(formula, InMemoryStorage(), sampler, bounds=bounds, share=share)
            made[key].run(StopRule(trials=N_TRIALS))
        return made[key]

    return run


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_scored_allocation_is_within_the_budget(undisturbed, sampler, bounds):
    search = undisturbed(sampler, bounds)
    trials = search.study.get_trials()
    assert len(trials) == N_TRIALS
    assert len(set(digests(search.study))) > N_TRIALS // 2
    for trial in trials:
        size = allocation_of(trial).nbytes(search.space.layout)
        used = size.file if bounds == "file" else size.encoded
        assert used <= search.budget.nbytes
        if trial.state is TrialState.COMPLETE:
            assert trial.values[1] == used


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize("sampler", ["auto", "knapsack", "evolution"])
def test_our_samplers_propose_what_is_scored(undisturbed, sampler, bounds):
    search = undisturbed(sampler, bounds)
    assert set(search.space.distributions) == set(search.study.trials[-1].params)
    for trial in search.study.get_trials():
        assert search.space.allocation(trial.params) == allocation_of(trial)
        assert not trial.user_attrs["result"]["repaired"]


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_stock_proposals_are_kept_and_their_repair_is_scored(undisturbed, sampler):
    search = undisturbed(sampler, "weights", 0.15)
    repaired = 0
    for trial in search.study.get_trials()[N_FIRST:]:
        raw = search.space.allocation(trial.params)
        over = raw.nbytes(search.space.layout).encoded > search.budget.nbytes
        assert (raw != allocation_of(trial)) == over
        assert trial.user_attrs["result"]["repaired"] == over
        repaired += over
    assert repaired > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_first_trials_come_first(undisturbed, sampler):
    search = undisturbed(sampler)
    queued = [q.allocation.digest for q in search.queue]
    assert len(queued) == N_FIRST
    assert digests(search.study)[:N_FIRST] == queued
    assert [t.user_attrs["kind"] for t in search.study.trials[: N_FIRST + 1]] == [
        *(q.kind for q in search.queue),
        "proposal",
    ]


def generations(study):
    return {trial_id(t): t.system_attrs["NSGAIISampler:generation"] for t in study.get_trials()}


def bred_from(study, generation):
    attrs = study._storage.get_study_system_attrs(study._study_id)
    return attrs[f"NSGAIISampler:parent:{generation}"]


def test_nsga2_breeds_from_scored_trials(formula):
    search = formula.search(InMemoryStorage(), "nsga2", population=4, rungs=(), seed=3)
    search.run(StopRule(trials=26))
    trials = {trial_id(t): t for t in search.study.get_trials()}
    generation = generations(search.study)
    assert max(generation.values()) == 6
    for child, trial in trials.items():
        if not generation[child]:
            continue
        parents = bred_from(search.study, generation[child])
        assert len(parents) == 4
        for parent in parents:
            assert generation[parent] < generation[child]
            assert trials[parent].state is TrialState.COMPLETE
            assert trials[parent].values[1] <= search.budget.nbytes
        inherited = sum(
            any(trials[p].params[name] == value for p in parents)
            for name, value in trial.params.items()
        )
        assert inherited >= 0.6 * len(trial.params)  # the rest is mutation


def test_nsga2_breeds_from_the_first_trials(formula):
    """Optuna gives what is enqueued whole no generation, so its first parents are random ones."""
    search = formula.search(InMemoryStorage(), "nsga2", population=4, rungs=(), n_knapsack=3)
    search.run(StopRule(trials=6))
    assert list(generations(search.study).values()) == [0, 0, 0, 0, 1, 1]
    trials = search.study.get_trials()
    parents = {t.number for t in trials if trial_id(t) in bred_from(search.study, 1)}
    assert parents == {0, 1, 2, 3}  # three of the queue
    values = [set(t.params.items()) for t in trials]
    for child in values[4:]:
        from_queue = child & (values[0] | values[1] | values[2])
        assert len(from_queue - values[3]) > 0.2 * len(child)


def test_a_queue_longer_than_the_population_is_all_bred_from(formula):
    search = formula.search(InMemoryStorage(), "nsga2", population=2, rungs=(), n_knapsack=5)
    assert len(search.queue) == 5
    search.run(StopRule(trials=7))
    assert list(generations(search.study).values()) == [0, 0, 1, 1, 2, 2, 3]
    trials = {trial_id(t): t.number for t in search.study.get_trials()}
    assert {trials[i] for i in bred_from(search.study, 2)} <= {0, 1, 2, 3}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stopped_and_resumed_is_undisturbed(formula, undisturbed, tmp_path, sampler):
    for stop in (1, 5, 12, N_TRIALS):
        search = started(formula, open_storage(None, tmp_path), sampler)
        search.run(StopRule(trials=stop))
        assert search.n_proposals() == whole(sampler, stop)
    assert digests(search.study) == digests(undisturbed(sampler).study)
    assert proposals(search.study) == proposals(undisturbed(sampler).study)


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import FormulaScorer, formula_search
from allocator.study.generations import Selection
from allocator.study.stop_rule import StopRule
from allocator.study.storages import open_storage

begun = []

def before(allocation, start, stop):
    begun.extend([allocation] * (start == 0))
    if len(begun) > int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

search = formula_search(
    Path(sys.argv[2]), open_storage(None, Path(sys.argv[3])), sys.argv[4],
    scorer=FormulaScorer(before),
)
search.selection = search.selection and Selection(4, ((3, 2), (6, 1)))
search.run(StopRule(trials=100))
"""


KILLED_AFTER = {"random": 1, "tpe": 12, "nsga2": 9, "evolution": 8}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_killed_and_resumed_is_undisturbed(formula, undisturbed, tmp_path, sampler):
    after = KILLED_AFTER.get(sampler, 13)
    arguments = [str(TESTS), str(formula.checkpoint), str(tmp_path), sampler, str(after)]
    done = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    mend_storage(None, tmp_path)
    search = started(formula, open_storage(None, tmp_path), sampler)
    assert search.study.trials[-1].state is TrialState.RUNNING
    n_abandoned = STEPS.n_offspring if sampler == "evolution" else 1
    assert close_abandoned(search.study) == n_abandoned
    left = search.study.trials[-1]
    assert (left.state, left.user_attrs[ABANDONED]) == (TrialState.FAIL, True)
    assert left.values is None
    search.run(StopRule(trials=N_TRIALS))
    assert len(search.study.trials) == N_TRIALS + n_abandoned
    assert digests(search.study) == digests(undisturbed(sampler).study)
    assert proposals(search.study)[left.number] == left.params


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_random_states_do_not_matter(formula, undisturbed, sampler):
    random.seed(7)
    np.random.seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist()
    search = started(formula, InMemoryStorage(), sampler)
    search.run(StopRule(trials=12))
    n = whole(sampler, 12)
    assert digests(search.study) == digests(undisturbed(sampler).study)[:n]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_seed_proposes_otherwise(formula, undisturbed, sampler):
    search = started(formula, InMemoryStorage(), sampler, seed=1)
    search.run(StopRule(trials=8))
    same = digests(undisturbed(sampler).study)[: whole(sampler, 8)]
    assert digests(search.study)[:N_FIRST] == same[:N_FIRST]
    assert digests(search.study)[N_FIRST:] != same[N_FIRST:]


@pytest.mark.parametrize(
    ("name", "seed", "what"),
    [("annealing", 0, "annealing.*auto, knapsack, random"), ("tpe", -1, "-1")],
)
def test_unknown_samplers_and_bad_seeds_are_refused(name, seed, what):
    with pytest.raises(AllocatorError, match=what):
        make_sampler(name, None, seed=seed)


@pytest.mark.parametrize("sampler", ["auto", "knapsack"])
def test_nothing_is_proposed_twice_while_there_is_something_else(formula, sampler):
    search = formula.search(InMemoryStorage(), sampler)
    search.run(StopRule(trials=40))
    assert len({allocation_of(t).digest for t in search.study.get_trials()}) == 40


@pytest.mark.parametrize("sampler", ["auto", "knapsack"])
def test_a_budget_above_the_ceiling_leaves_the_front_to_look_for(formula, sampler):
    search = formula.search(InMemoryStorage(), sampler, share=2)
    search.run(StopRule(trials=20))
    assert len({allocation_of(t).digest for t in search.study.get_trials()}) > 15


@pytest.mark.parametrize("sampler", ["auto", "knapsack"])
def test_a_budget_at_the_floor_leaves_one_allocation(formula, sampler):
    search = formula.search(InMemoryStorage(), sampler, share=0.0)
    search.run(StopRule(trials=3))
    assert set(digests(search.study)) == {search.space.smallest.digest}
