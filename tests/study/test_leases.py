"""Several workers on one study: leases, take-over, and proposals neither lost nor doubled.

Workers are searches over one storage, or real processes; a lease holds for a second or so.
"""

import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from allocator.prediction.surrogate import LocalPrices
from allocator.samplers import SAMPLERS
from allocator.samplers.seeded import number_proposal, proposal_number
from allocator.study import leases
from allocator.study.generations import Selection
from allocator.study.leases import LEASE, Leases, left_here
from allocator.study.optuna_private import frozen_trial, set_user_attr, trial_id
from allocator.study.outcomes import VERDICTS, close_abandoned
from allocator.study.proposals import MOST_DOUBLED
from allocator.study.stop_rule import StopRule
from allocator.study.trials import (
    ABANDONED,
    DOUBLED,
    PROPOSAL,
    allocation_of,
    best_complete,
    forward_tokens,
    is_abandoned,
    not_abandoned,
    trial_counts,
)

STORAGES = ["journal", "sqlite", "postgresql", "grpc"]
# what a worker does is the same on all; what storages themselves do is tested on each
A_STORAGE = ["journal", *(pytest.param(k, marks=pytest.mark.slow) for k in STORAGES[1:])]


@pytest.fixture
def joined(formula, opened, tmp_path):
    """`joined(spec, ...)`: a worker: a search with leases; their threads end with the test."""
    held = []

    def make(spec, sampler="random", **options):
        storage = spec if isinstance(spec, InMemoryStorage) else opened(spec)
        search = formula.search(
            storage, sampler, poll_seconds=0.05,
            leases=lambda study: Leases(study, tmp_path, seconds=0.6).__enter__(), **options,
        )  # fmt: skip
        held.append(search.leases)
        return search

    yield make
    for worker in held:
        worker.__exit__(None, None, None)


@pytest.fixture
def python():
    """`python(code, ...)`: a process, which ends with the test."""
    started = []

    def start(code, *args):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        if not process.stdin.closed:
            process.communicate()


def wait_until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def die(search):
    """Ends a worker's renewals as its death would."""
    search.leases.__exit__(None, None, None)


def check(opened_study, n, *, distinct=True):
    """Exactly `n` proposals, all ended; none lost, none made twice.

    `distinct`: allocations too, which the knapsack alone would repeat in a space so small.
    """
    kept = not_abandoned(opened_study)
    assert len(kept) == n
    assert all(t.state.is_finished() for t in kept)
    assert sorted(t.system_attrs[PROPOSAL] for t in kept) == list(range(n))
    if distinct:
        assert len({allocation_of(t).digest for t in kept}) == n


# -- leases


@pytest.mark.parametrize("kind", STORAGES)
def test_a_lease_is_renewed_until_its_worker_dies(shared, joined, kind):
    spec = shared(kind)
    mine, other = joined(spec), joined(spec)
    candidate = mine.propose(1)[0]
    (seen,) = other.leases.others()
    assert mine.leases.others() == []
    first = seen.user_attrs[LEASE]
    assert first["owner"]["pid"] > 0
    assert first["seconds"] == 0.6
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert other.leases.expired() == []
        time.sleep(0.05)
    (seen,) = other.leases.others()
    assert seen.user_attrs[LEASE]["renewal"] >= 2
    died = time.monotonic()
    die(mine)
    wait_until(other.leases.expired)
    assert time.monotonic() - died >= 0.3  # of 0.6, a third at most has passed since the renewal
    assert [t.number for t in other.leases.expired()] == [candidate.trial.number]


def test_clocks_are_not_compared(joined):
    """A lease that expired years ago by the wall clock is good as long as it changes."""
    storage = InMemoryStorage()
    mine, other = joined(storage), joined(storage)
    die(mine)
    id_ = trial_id(mine.propose(1)[0].trial)
    for renewal in range(20):
        lease = {"owner": {}, "seconds": 0.5, "renewal": renewal, "expires": "1999-01-01T00:00:00Z"}
        storage.set_trial_user_attr(id_, LEASE, lease)
        assert other.leases.expired() == []
        time.sleep(0.05)
    wait_until(other.leases.expired)


def test_a_trial_without_a_lease_expires_from_when_it_was_seen(joined, formula):
    storage = InMemoryStorage()
    worker = joined(storage)
    formula.search(storage, "random").study.ask()
    time.sleep(0.7)
    assert worker.leases.expired() == []  # seen for the first time
    time.sleep(0.7)
    assert len(worker.leases.expired()) == 1


def test_a_lease_is_there_before_anything_is_sampled(joined):
    worker = joined(InMemoryStorage(), n_knapsack=0)
    found = []
    sample = worker.study.sampler.sample_relative

    def sample_relative(study, trial, space):
        found.append(LEASE in study.get_trials()[trial.number].user_attrs)
        return sample(study, trial, space)

    worker.study.sampler.sample_relative = sample_relative
    worker.step()
    assert found == [True]


def test_left_here_knows_host_folder_and_process(joined, tmp_path, monkeypatch):
    worker = joined(InMemoryStorage())
    worker.propose(1)
    (trial,) = worker.study.get_trials()
    pid = trial.user_attrs[LEASE]["owner"]["pid"]
    assert left_here([trial], tmp_path) == left_here([trial], tmp_path, pid=pid) == [trial]
    assert left_here([trial], tmp_path, pid=pid + 1) == left_here([trial], tmp_path / "x") == []
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert left_here([trial], tmp_path) == []


def test_a_renewal_that_fails_is_tried_again(joined, caplog, monkeypatch):
    storage = InMemoryStorage()
    worker = joined(storage)
    worker.propose(1)
    write, failed = storage.set_trial_user_attr, []

    def lost(id_, key, value):
        if len(failed) < 2:
            failed.append(value)
            raise OSError("gone\nfor a while")
        write(id_, key, value)

    monkeypatch.setattr(storage, "set_trial_user_attr", lost)
    wait_until(lambda: worker.study.get_trials()[0].user_attrs[LEASE]["renewal"] > 2)
    said = [r.getMessage() for r in caplog.records if r.name == leases.__name__]
    assert said == ["a lease could not be renewed: gone"] * 2


# -- the claim


@pytest.mark.parametrize("kind", STORAGES)
def test_one_process_closes_a_trial(shared, opened, formula, kind):
    """Both have seen it RUNNING; the storage refuses whoever comes second."""
    spec = shared(kind)
    one, two = opened(spec), opened(spec)
    study = formula.search(one, "random").study
    for first, second in ((one, two), (two, one)):
        id_ = trial_id(study.ask())
        for storage in (first, second):
            assert storage.get_trial(id_).state is TrialState.RUNNING
        first.set_trial_state_values(id_, TrialState.FAIL)
        with pytest.raises(UpdateFinishedTrialError):
            second.set_trial_state_values(id_, TrialState.PRUNED)
        with pytest.raises(UpdateFinishedTrialError):
            second.set_trial_user_attr(id_, ABANDONED, True)


CLOSE = """
import sys, time
from pathlib import Path
import optuna
from allocator.study.optuna_private import trial_id
from allocator.study.storages import open_storage
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
optuna.logging.set_verbosity(optuna.logging.ERROR)
storage = open_storage(sys.argv[1], Path("."))
study = optuna.load_study(study_name="formula", storage=storage)
trials = study.get_trials()
print("ready", flush=True)
sys.stdin.readline()
won = 0
for trial in trials:
    try:
        storage.set_trial_state_values(trial_id(trial), TrialState.FAIL)
        won += 1
    except UpdateFinishedTrialError:
        pass
print(won, flush=True)
"""


@pytest.mark.parametrize("kind", STORAGES)
def test_of_processes_that_close_the_same_trials_each_is_closed_by_one(
    shared, opened, formula, python, kind
):
    spec = shared(kind)
    search = formula.search(opened(spec), "random")
    for _ in range(40):
        search.study.ask()
    closers = [python(CLOSE, spec) for _ in range(2)]
    assert [c.stdout.readline() for c in closers] == ["ready\n"] * 2
    for closer in closers:
        closer.stdin.write("go\n")
        closer.stdin.flush()
    assert sum(int(c.communicate()[0]) for c in closers) == 40


def test_a_complete_trial_that_was_marked_meanwhile_counts(joined):
    """Its worker told between the mark of whoever took it for dead and the close."""
    worker = joined(InMemoryStorage())
    candidate = worker.propose(1)[0]
    worker.run_race([candidate])
    set_user_attr(worker.study, trial_id(candidate.trial), ABANDONED, True)
    (trial,) = worker.tell([candidate], lost=[])
    assert trial.state is TrialState.COMPLETE
    assert not is_abandoned(trial)
    assert worker.n_proposals() == 1
    assert trial_counts(worker.study)["COMPLETE"] == 1
    assert close_abandoned(worker.study, [trial]) == 0
    replace(worker, queue=()).run(StopRule(trials=2))
    check(worker.study, 2)


@pytest.mark.parametrize("kind", A_STORAGE)
def test_a_slow_worker_drops_its_result_and_goes_on(shared, joined, caplog, kind):
    spec = shared(kind)
    slow, quick = joined(spec), joined(spec)
    slow.run(StopRule(trials=3))

    def before(allocation, start, stop):
        if start == 0 and not before.stalled:
            before.stalled = True
            die(slow)  # silent, but not dead
            quick.run(StopRule(trials=8))

    before.stalled = False
    slow.scorer.before = before
    seen = []
    with caplog.at_level(logging.WARNING):
        slow.run(StopRule(trials=10), on_trial=seen.append)
    assert [m for m in caplog.messages if "taken over" in m] == [
        "trial 3 was taken over by another worker: this one was silent for longer than its lease; "
        "its result is dropped"
    ]
    assert is_abandoned(slow.study.get_trials()[3])
    assert [t.number for t in seen] == [9, 10]
    check(slow.study, 10)


# -- proposals


def test_the_least_free_number_is_proposed_again(joined):
    """A dead worker's proposal is made again under its own seed, not the next one's."""
    storage = InMemoryStorage()
    dead, living = joined(storage), joined(storage)
    living.run(StopRule(trials=3))
    lost = dead.propose(1)[0]
    later = living.step()
    die(dead)
    wait_until(living.leases.expired)
    living.run(StopRule(trials=5))
    again = living.study.get_trials()[5]
    assert (again.number, again.params) == (5, lost.trial.params)
    assert again.params != later.params
    check(living.study, 5)


def test_trials_asked_for_at_once_have_numbers_of_their_own(joined):
    storage, asked = InMemoryStorage(), []

    def other_first(id_):
        one.leases.take(id_)
        asked.append(two.proposer.ask())

    one = joined(storage, n_knapsack=0, on_trial=other_first)
    two = joined(storage, n_knapsack=0)
    first = one.proposer.ask()
    numbers = [t.system_attrs[PROPOSAL] for t in one.study.get_trials()]
    assert numbers == [0, 1]
    assert first.allocation != asked[0].allocation


def test_what_another_scores_is_given_up(joined):
    storage = InMemoryStorage()
    one, two = joined(storage, n_knapsack=0), joined(storage, n_knapsack=0)
    taken = one.propose(1)[0]
    ask, doubled = two.proposer.ask, []

    def same():
        found = ask()
        if len(doubled) < 2:
            doubled.append(found.trial.number)
            found.trial.set_user_attr("allocation", taken.allocation.to_json())
            found.allocation = taken.allocation
        return found

    two.proposer.ask = same
    (kept,) = two.propose(1)
    trials = two.study.get_trials()
    assert [is_abandoned(trials[n]) for n in doubled] == [True, True]
    assert kept.trial.number == 3
    assert kept.allocation != taken.allocation
    retried = [trials[n].params for n in doubled]
    assert retried[0] != retried[1]  # with other random numbers, or it would be the same for ever
    assert retried[1] != kept.trial.params
    doubled.clear()
    two.proposer.is_doubled = lambda candidate: True
    two.propose(1)  # a bounded number of times
    assert len(two.study.get_trials()) == 4 + MOST_DOUBLED + 1


def test_one_trial_too_many_is_given_up(joined):
    storage = InMemoryStorage()
    one, two = joined(storage), joined(storage)
    one.run(StopRule(trials=3))
    first = one.propose(1, StopRule(trials=4))
    assert two.propose(1, StopRule(trials=4)) == []  # both had seen three
    assert len(first) == 1
    assert is_abandoned(two.study.get_trials()[-1])
    one.run_race(first)
    one.tell(first, lost=[])
    two.run(StopRule(trials=4))
    check(two.study, 4)


def test_of_a_proposal_given_up_meanwhile_the_number_is_not_lost(joined):
    """It was in hand when the next one was numbered, and is not when that asks whether it may."""
    storage = InMemoryStorage()
    one, two = joined(storage), joined(storage)
    one.run(StopRule(trials=3))
    in_hand = two.proposer.ask()
    is_within = one.accounts.is_within

    def given_up_meanwhile(*args):
        two.proposer.give_up(in_hand, DOUBLED)
        return is_within(*args)

    one.accounts.is_within = given_up_meanwhile
    assert one.propose(1, StopRule(trials=4)) == []
    one.accounts.is_within = is_within
    one.run(StopRule(trials=4))
    check(one.study, 4)


def test_numbers_taken_at_once_differ(joined):
    """The other took the same between the look at what is free and the note of it."""
    storage = InMemoryStorage()
    one, two, third = (joined(storage, n_knapsack=0) for _ in range(3))
    one.run(StopRule(trials=3))
    asked = []

    def freed_and_taken(study, trial):
        number = proposal_number(study, trial)
        if not asked:
            asked.append(None)
            third.proposer.give_up(in_hand)
            asked[0] = two.proposer.ask()
        return number

    in_hand = third.proposer.ask()
    stock = optuna.load_study(study_name="formula", storage=storage, sampler=RandomSampler())
    first = stock.ask()
    number_proposal(stock, frozen_trial(stock, first), choose=freed_and_taken)
    assert first.number < asked[0].trial.number
    kept = [t.system_attrs[PROPOSAL] for t in not_abandoned(one.study)]
    assert sorted(kept) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("share", [1.0, 1.5, 2.0])
def test_tokens_hold_for_all_workers(joined, share):
    """At 120 a trial, beside one in hand; whatever is asked for at once."""
    storage = InMemoryStorage()
    one, two = joined(storage, rungs=()), joined(storage, rungs=())
    limits = StopRule(tokens=int(share * 120))
    assert one.may_begin(limits)
    assert two.may_begin(limits)
    first = one.propose(1, limits)
    assert two.may_begin(limits) == (share == 2)
    assert len(two.propose(1, limits)) == (share == 2)
    assert len(first) == 1


def test_a_run_returns_when_all_have_ended(joined):
    storage = InMemoryStorage()
    one, two = joined(storage), joined(storage)
    candidates = one.propose(1)
    die(one)
    began = time.monotonic()
    two.run(StopRule(trials=4))  # three of its own, and the dead worker's
    assert time.monotonic() - began > 0.3
    check(two.study, 4)
    assert is_abandoned(two.study.get_trials()[candidates[0].trial.number])
    two.run(StopRule(seconds=0))


def test_time_is_over_for_what_was_taken_over(joined):
    storage = InMemoryStorage()
    one, two = joined(storage), joined(storage)
    two.run(StopRule(trials=1))
    one.propose(1)
    die(one)
    two.run(StopRule(seconds=0))
    assert [t.state.name for t in two.study.get_trials()] == ["COMPLETE", "FAIL"]


@pytest.mark.parametrize("limit", ["trials", "tokens"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_worker_alone_does_what_a_search_without_leases_does(joined, formula, sampler, limit):
    def local_prices(allocation, part):
        prices = {}
        for name, group in alone.space.layout.groups.items():
            n = group.shape[0] if group.role.is_expert else 1
            prices[name] = {f.name: [4.0**-f.bits / n] * n for f in group.offered()}
        return LocalPrices(prices, prices, 77)

    options = {"local_prices": local_prices, "gradient_tokens": 77}
    alone = formula.search(InMemoryStorage(), sampler, **options)
    worker = joined(InMemoryStorage(), sampler, **options)
    for n in (8, 19):
        rule = StopRule(trials=n) if limit == "trials" else StopRule(tokens=130 * n)
        for search in (alone, worker):
            if search.selection is not None:
                search.selection = Selection(8, ((2, 3), (6, 1)))
            search.run(rule)
    told = [
        [(t.state, t.params, t.values, t.system_attrs) for t in search.study.get_trials()]
        for search in (alone, worker)
    ]
    assert told[0] == told[1]
    assert len(told[0]) > 8
    assert alone.forward_tokens() == worker.forward_tokens()


# -- the queue


def test_first_trials_are_found_by_content(joined):
    """A dead worker's first trial is made again as what it was; others' are not repeated."""
    storage = InMemoryStorage()
    one, two = joined(storage), joined(storage)
    kinds = [f"kind {i}" for i in range(len(one.queue))]
    queue = [replace(q, kind=k) for q, k in zip(one.queue, kinds, strict=True)]
    assert len(queue) == 2
    one, two = replace(one, queue=queue), replace(two, queue=queue)
    one.propose(1)
    assert two.step().user_attrs["kind"] == "kind 1"
    assert two.step().user_attrs["kind"] == "proposal"
    die(one)
    wait_until(two.leases.expired)
    two.run(StopRule(trials=4))
    made = {t.number: t.user_attrs["kind"] for t in not_abandoned(two.study)}
    assert made == {1: "kind 1", 2: "proposal", 3: "kind 0", 4: "proposal"}


def test_of_a_first_trial_enqueued_twice_the_later_is_given_up(joined):
    storage = InMemoryStorage()
    one, two = joined(storage), joined(storage)
    params = one.space.params(one.queue[0].allocation)
    for worker in (one, two):
        worker.study.enqueue_trial(params)
    kept = [w.propose(1)[0] for w in (one, two)]
    assert [c.allocation for c in kept] == [q.allocation for q in one.queue]
    assert [is_abandoned(t) for t in one.study.get_trials()] == [False, True, False]


def test_a_trial_enqueued_by_hand_is_a_proposal(joined):
    worker = joined(InMemoryStorage())
    by_hand = worker.space.params(worker.space.smallest)
    worker.study.enqueue_trial(by_hand)
    worker.run(StopRule(trials=4))
    kinds = [t.user_attrs["kind"] for t in worker.study.get_trials()]
    assert kinds == ["proposal", "knapsack", "knapsack", "proposal"]
    assert worker.study.get_trials()[0].params == by_hand


# -- generations


def test_generations_of_two_workers_do_not_clobber_each_other(joined, monkeypatch):
    """Both die between their verdicts and their tells: all are told, none abandoned."""
    storage = InMemoryStorage()
    one, two = joined(storage, "evolution"), joined(storage, "evolution")
    one.run(StopRule(trials=2))
    tell = optuna.Study.tell

    def killed(*args, **kwargs):
        raise RuntimeError("killed")

    for worker in (one, two):
        with monkeypatch.context() as patch:
            patch.setattr(optuna.Study, "tell", killed)
            with pytest.raises(RuntimeError, match="killed"):
                worker.generation(Selection(4, ((2, 1),)))
        die(worker)
    assert optuna.Study.tell is tell
    assert sum(key.startswith(VERDICTS) for key in one.study.user_attrs) == 2
    third = joined(storage, "evolution")
    wait_until(third.leases.expired)
    third.run(StopRule(trials=10))
    states = [t.state.name for t in third.study.get_trials()[2:]]
    assert sorted(states) == ["COMPLETE"] * 2 + ["PRUNED"] * 6
    assert best_complete(third.study.get_trials()) is not None


# -- processes

TESTS = Path(__file__).parents[1]
WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, optuna
from allocator.study.leases import Leases
from allocator.study.stop_rule import StopRule
from allocator.study.storages import open_storage
checkpoint, spec, folder, sampler, n, pause = sys.argv[2:]
optuna.logging.set_verbosity(optuna.logging.ERROR)

def before(allocation, start, stop):
    if not start:
        print("scoring", flush=True)
    time.sleep(float(pause))

search = conftest.formula_search(
    Path(checkpoint), open_storage(spec, Path(folder)), sampler,
    scorer=conftest.FormulaScorer(before), poll_seconds=0.1,
    leases=lambda study: Leases(study, Path(folder), seconds=3.0),
)
with search.leases:
    print("ready", flush=True)
    sys.stdin.readline()
    search.run(StopRule(trials=int(n)))
print("done", flush=True)
"""


def begin(*processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


@pytest.mark.parametrize("sampler", [pytest.param("random", marks=pytest.mark.slow), "knapsack"])
@pytest.mark.parametrize("kind", A_STORAGE)
def test_killed_in_mid_scoring_its_trial_is_made_by_the_others(
    shared, opened, formula, python, tmp_path, kind, sampler
):
    spec = shared(kind)
    search = formula.search(opened(spec), sampler)
    start = [TESTS, formula.checkpoint, spec, tmp_path, sampler, 10]
    workers = [python(WORKER, *start, 0.05) for _ in range(2)]
    stuck = python(WORKER, *start, 1000)
    begin(stuck, *workers)
    assert stuck.stdout.readline() == "scoring\n"
    stuck.kill()
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert out.endswith("done\n"), err
        assert out.count("scoring") > 1
    check(search.study, 10, distinct=sampler == "random")
    lost = [t for t in search.study.get_trials() if is_abandoned(t)]
    assert stuck.pid in {t.user_attrs[LEASE]["owner"]["pid"] for t in lost}
    kinds = [t.user_attrs["kind"] for t in not_abandoned(search.study)]
    assert kinds.count("knapsack") == len(search.queue)
    stuck.communicate()


def test_tokens_hold_for_processes(shared, opened, formula, python, tmp_path):
    """Two at once: what was spent is within the limit, and nearly all of it."""
    spec = shared("journal")
    search = formula.search(opened(spec), "knapsack")
    code = WORKER.replace("trials=int(n)", "tokens=int(n)")
    workers = [
        python(code, TESTS, formula.checkpoint, spec, tmp_path, "knapsack", 1000, 0.02)
        for _ in range(2)
    ]
    begin(*workers)
    for worker in workers:
        assert worker.communicate(timeout=60)[0].endswith("done\n")
    spent = sum(map(forward_tokens, not_abandoned(search.study)))
    assert 1000 - 120 < spent <= 1000
    assert np.isfinite([t.values[0] for t in not_abandoned(search.study) if t.values]).all()
