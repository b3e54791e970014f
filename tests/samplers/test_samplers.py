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

from allocator.errors import StudyError
from allocator.samplers import SAMPLERS, make_sampler
from allocator.samplers.knapsack import ABANDONED
from allocator.storage import open_storage, repair_storage
from allocator.study import allocation_of, close_abandoned

N_TRIALS = 18  # TPE draws its first 10 at random; NSGA-II's third generation begins after 8
N_FIRST = 2
TESTS = Path(__file__).parents[1]


def digests(study):
    """Of the allocations scored, in order, abandoned trials left out."""
    trials = [t for t in study.get_trials() if ABANDONED not in t.user_attrs]
    return [allocation_of(t).digest for t in trials]


def proposals(study):
    return [t.params for t in study.get_trials() if ABANDONED not in t.user_attrs]


@pytest.fixture(scope="module")
def undisturbed(formula):
    """A finished search by sampler and kind of budget; read only."""
    made = {}

    def run(sampler, bounds="file", share=0.4):
        key = sampler, bounds, share
        if key not in made:
            made[key] = formula.search(InMemoryStorage(), sampler, bounds=bounds, share=share)
            made[key].run(n_trials=N_TRIALS)
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
def test_knapsack_proposes_what_is_scored(undisturbed, bounds):
    search = undisturbed("knapsack", bounds)
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


def test_nsga2_breeds_from_scored_trials(formula):
    search = formula.search(InMemoryStorage(), "nsga2", population=4, rungs=(), seed=3)
    search.run(n_trials=26)
    trials = {t._trial_id: t for t in search.study.get_trials()[N_FIRST:]}
    generation = {i: t.system_attrs["NSGAIISampler:generation"] for i, t in trials.items()}
    assert max(generation.values()) == 5
    attrs = search.study._storage.get_study_system_attrs(search.study._study_id)
    for child, trial in trials.items():
        if not generation[child]:
            continue
        parents = attrs[f"NSGAIISampler:parent:{generation[child]}"]
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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stopped_and_resumed_is_undisturbed(formula, undisturbed, tmp_path, sampler):
    for stop in (1, 5, 12, N_TRIALS):
        search = formula.search(open_storage(None, tmp_path), sampler)
        search.run(n_trials=stop)
        assert search.n_proposals() == stop
    assert digests(search.study) == digests(undisturbed(sampler).study)
    assert proposals(search.study) == proposals(undisturbed(sampler).study)


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import FormulaScorer, formula_search
from allocator.storage import open_storage

calls = []

def before(allocation, start, stop):
    calls.append(allocation.digest)
    if len(dict.fromkeys(calls)) > int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

search = formula_search(
    Path(sys.argv[2]), open_storage(None, Path(sys.argv[3])), sys.argv[4],
    scorer=FormulaScorer(before),
)
search.run(n_trials=100)
"""


@pytest.mark.parametrize(("sampler", "after"), [*zip(SAMPLERS, (13, 1, 12, 9), strict=True)])
def test_killed_and_resumed_is_undisturbed(formula, undisturbed, tmp_path, sampler, after):
    arguments = [str(TESTS), str(formula.checkpoint), str(tmp_path), sampler, str(after)]
    done = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    repair_storage(None, tmp_path)
    search = formula.search(open_storage(None, tmp_path), sampler)
    assert search.study.trials[-1].state is TrialState.RUNNING
    assert close_abandoned(search.study) == 1
    left = search.study.trials[-1]
    assert (left.state, left.user_attrs[ABANDONED]) == (TrialState.FAIL, True)
    assert left.values is None
    search.run(n_trials=N_TRIALS)
    assert len(search.study.trials) == N_TRIALS + 1
    assert digests(search.study) == digests(undisturbed(sampler).study)
    assert proposals(search.study)[left.number] == left.params


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_random_states_do_not_matter(formula, undisturbed, sampler):
    random.seed(7)
    np.random.seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist()
    search = formula.search(InMemoryStorage(), sampler)
    search.run(n_trials=12)
    assert digests(search.study) == digests(undisturbed(sampler).study)[:12]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_seed_proposes_otherwise(formula, undisturbed, sampler):
    search = formula.search(InMemoryStorage(), sampler, seed=1)
    search.run(n_trials=8)
    same = digests(undisturbed(sampler).study)[:8]
    assert digests(search.study)[:N_FIRST] == same[:N_FIRST]
    assert digests(search.study)[N_FIRST:] != same[N_FIRST:]


@pytest.mark.parametrize(
    ("name", "seed", "what"), [("annealing", 0, "annealing.*knapsack, random"), ("tpe", -1, "-1")]
)
def test_unknown_samplers_and_bad_seeds_are_refused(name, seed, what):
    with pytest.raises(StudyError, match=what):
        make_sampler(name, seed=seed, surrogate=None, budget=None)


def test_a_budget_at_the_floor_leaves_one_allocation(formula):
    search = formula.search(InMemoryStorage(), "knapsack", share=0.0)
    search.run(n_trials=3)
    assert set(digests(search.study)) == {search.space.smallest.digest}
