"""The study loop: races, states, the lock, the first trials, and Optuna's own view of it."""

import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from allocator.decision.allocation import Allocation
from allocator.decision.baselines import baselines
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.errors import StudyError
from allocator.prediction.solver import STARTS, solve, solve_under
from allocator.prediction.surrogate import LocalPrices
from allocator.samplers import SAMPLERS
from allocator.study.generations import Selection
from allocator.study.initial_trials import Queued, first_trials
from allocator.study.optuna_private import set_system_attr
from allocator.study.optuna_study import open_study
from allocator.study.outcomes import VERDICTS, close_abandoned
from allocator.study.race import RACE_SLACK, Race, loses
from allocator.study.search import Search
from allocator.study.stop_rule import StopRule
from allocator.study.storages import open_storage
from allocator.study.trials import ABANDONED, GRADIENT_TOKENS, allocation_of, complete_trials

N = 12  # documents of the formula's scorer


def uniform(space, fmt, count=4, **changes):
    chosen = dict.fromkeys(space.layout.groups, fmt) | changes
    return Allocation.of(
        target=space.layout.target,
        retained={x: space.retained(x, count) for x in space.layout.layers},
        formats=chosen,
        experts_used=2,
    )


@pytest.fixture
def started(formula):
    """A search with a queue of given allocations, by name; a generous budget."""

    def make(queue, scorer=None, share=1.0, rungs=(3, 6), sampler="random"):
        search = formula.search(
            InMemoryStorage(), sampler, scorer=scorer, share=share, rungs=rungs, n_knapsack=1
        )
        first = [Queued(name, make(search.space)) for name, make in queue.items()]
        return replace(search, queue=first)

    return make


# -- races


def test_a_clearly_worse_candidate_is_pruned_without_values(started, formula):
    asked = []
    scorer = formula.Scorer(lambda a, start, stop: asked.append((start, stop)))
    search = started(
        {"good": lambda s: uniform(s, "Q5_0"), "bad": lambda s: uniform(s, "Q5_0", 3)}, scorer
    )
    good, bad = search.step(), search.step()
    assert good.state is TrialState.COMPLETE
    assert bad.state is TrialState.COMPLETE  # of fewer bytes: not a rival of anything smaller
    search = started(
        {"bad": lambda s: uniform(s, "IQ4_NL", 2), "worse": lambda s: uniform(s, "Q4_0", 2)},
        scorer,
    )
    search.step()
    asked.clear()
    bad = uniform(search.space, "Q4_0", 2, head="Q8_0", embedding="Q8_0")
    search = replace(search, queue=[search.queue[0], Queued("worse", bad)])
    change = formula.Scorer(change=lambda kl: kl * 2)
    search.scorer.change = change.change
    lost = search.step()
    assert lost.state is TrialState.PRUNED
    assert lost.values is None
    assert asked == [(0, 3)]
    assert len(lost.user_attrs["losses"]) == 3
    assert lost.intermediate_values == {30: lost.user_attrs["result"]["loss"]}
    assert lost.user_attrs["result"]["tokens"] == 30
    assert lost.user_attrs["result"]["loss"] == pytest.approx(np.mean(lost.user_attrs["losses"]))
    assert allocation_of(lost) == bad
    assert lost not in complete_trials(search.study)


def test_complete_means_the_full_split(started, formula):
    asked = []
    scorer = formula.Scorer(lambda a, start, stop: asked.append((start, stop)))
    search = started({"first": lambda s: uniform(s, "Q8_0")}, scorer, rungs=(3, 6))
    trial = search.step()
    assert trial.state is TrialState.COMPLETE
    assert asked == [(0, 3), (3, 6), (6, N)]
    whole = formula.Scorer().score(allocation_of(trial), 0, N).kl
    np.testing.assert_array_equal(trial.user_attrs["losses"], whole)
    size = allocation_of(trial).nbytes(search.space.layout)
    assert trial.values == [pytest.approx(whole.mean(), rel=1e-12), size.file]
    reports = {10 * n: pytest.approx(whole[:n].mean(), rel=1e-12) for n in (3, 6, N)}
    assert trial.intermediate_values == reports
    assert trial.intermediate_values[10 * N] == trial.values[0]


@pytest.mark.parametrize("rungs", [(), (N,), (N + 5,), (6, 3), (3, 3)])
def test_odd_rungs_still_score_every_document_once(started, formula, rungs):
    asked = []
    scorer = formula.Scorer(lambda a, start, stop: asked.extend(range(start, min(stop, N))))
    trial = started({"first": lambda s: uniform(s, "Q8_0")}, scorer, rungs=rungs).step()
    assert trial.state is TrialState.COMPLETE
    assert asked == list(range(N))
    assert len(trial.user_attrs["losses"]) == N


def test_equals_and_smaller_ones_are_not_pruned(started):
    same = uniform
    search = started(
        {"a": lambda s: same(s, "Q8_0"), "b": lambda s: same(s, "Q8_0"),
         "smaller and worse": lambda s: same(s, "Q4_0", 2)}
    )  # fmt: skip
    trials = [search.step() for _ in range(3)]
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    assert trials[0].values == trials[1].values
    assert trials[2].values[0] > 2 * trials[0].values[0]


def test_a_larger_rival_does_not_race(started):
    """The same losses as above, the other way round: a smaller, better rival prunes."""
    search = started(
        {"small": lambda s: uniform(s, "IQ4_NL"), "big": lambda s: uniform(s, "Q4_0", head="Q8_0")}
    )
    search.scorer.change = lambda kl: kl
    search.step()
    search.scorer.change = lambda kl: kl + 1
    assert search.step().state is TrialState.PRUNED


@pytest.mark.parametrize(("slack", "state"), [(0.99, "COMPLETE"), (1.01, "PRUNED")])
def test_rivals_may_be_larger_by_the_slack(started, slack, state):
    search = started({"larger": lambda s: uniform(s, "Q5_0"),
                      "smaller": lambda s: uniform(s, "Q5_0", head="Q4_0")})  # fmt: skip
    sizes = [q.allocation.nbytes(search.space.layout).file for q in search.queue]
    assert RACE_SLACK < 0.005 < sizes[0] / sizes[1] - 1
    race = replace(search.race, slack=slack * (sizes[0] / sizes[1] - 1))
    search = replace(search, race=race)
    assert search.step().state is TrialState.COMPLETE
    search.scorer.change = lambda kl: kl + 1
    assert search.step().state.name == state


def test_loses_is_a_paired_comparison():
    rival = np.array([1.0, 5.0, 2.0, 9.0])
    assert loses(rival + np.array([0.1, 0.11, 0.1, 0.09]), rival)
    assert not loses(rival - 0.1, rival)
    assert not loses(rival + np.array([1, -1, 1, -1]), rival)
    assert not loses(rival[::-1].copy(), rival)
    assert not loses(rival, rival)
    assert not loses([9.0], [1.0])
    error = np.std([0.0, 1.0, 2.0, 3.0], ddof=1) / 2
    shift = np.array([0.0, 1.0, 2.0, 3.0]) - 1.5
    assert loses(rival + shift + 1.01 * error, rival)
    assert not loses(rival + shift + 0.99 * error, rival)
    assert not loses(rival + shift + 2.99 * error, rival, z=3)


# -- generations

STEPS = Selection(8, ((2, 3), (6, 1)))


def begun(formula, storage, scorer=None, sampler="evolution"):
    search = formula.search(storage, sampler, scorer=scorer, n_knapsack=1)
    search.selection = STEPS
    return search


def told(study):
    """All that a study says of its trials, abandoned ones left out."""
    return [
        (t.state, t.params, t.values, t.user_attrs, t.constraints, t.intermediate_values)
        for t in study.get_trials()
        if ABANDONED not in t.user_attrs
    ]


@pytest.mark.parametrize("sampler", ["random", "evolution"])
@pytest.mark.parametrize("seed", range(3))
def test_a_generation_keeps_exactly_the_best(formula, sampler, seed):
    asked = {}
    scorer = formula.Scorer(
        lambda a, start, stop: asked.setdefault(a, []).extend(range(start, stop)),
        change=lambda kl: kl + 0.1 * np.random.default_rng(int(kl.sum() * 1e9)).random(len(kl)),
    )
    search = formula.search(InMemoryStorage(), sampler, scorer=scorer, seed=seed, n_knapsack=1)
    search.selection = STEPS
    search.run(StopRule(trials=1))
    asked.clear()
    finished = search.generation(STEPS)
    assert len(finished) == len(asked) == 8
    losses = {t.number: t.user_attrs["losses"] for t in finished}
    third = sorted(losses, key=lambda n: np.mean(losses[n][:2]))[:3]
    best = min(third, key=lambda n: np.mean(losses[n][:6]))
    for trial in finished:
        scored = N if trial.number == best else 6 if trial.number in third else 2
        assert asked[allocation_of(trial)] == list(range(scored))
        assert len(losses[trial.number]) == scored
        assert list(trial.intermediate_values) == [10 * n for n in (2, 6, N) if n <= scored]
        assert trial.user_attrs["result"]["tokens"] == 10 * scored
        assert trial.user_attrs["result"]["loss"] == pytest.approx(np.mean(losses[trial.number]))
        assert trial.state is (TrialState.COMPLETE if scored == N else TrialState.PRUNED)
        assert trial.constraints["budget"] <= 0
        if scored < N:
            assert trial.values is None
    size = allocation_of(search.study.trials[best]).nbytes(search.space.layout).file
    assert search.study.trials[best].values == [pytest.approx(np.mean(losses[best])), size]


def test_several_survivors_are_all_complete(formula):
    search = begun(formula, InMemoryStorage())
    search.run(StopRule(trials=1))
    finished = search.generation(Selection(5, ((4, 2),)))
    assert sorted(t.state.name for t in finished) == ["COMPLETE"] * 2 + ["PRUNED"] * 3
    assert [t.state.name for t in search.generation(Selection(2, ()))] == ["COMPLETE"] * 2


def test_first_trials_then_whole_generations(formula):
    seen = []
    search = formula.search(InMemoryStorage(), "evolution")
    assert search.selection == Selection(16, ((1, 4), (4, 1)))
    search.selection = STEPS
    search.run(StopRule(trials=1))
    assert search.n_proposals() == 1
    search.run(StopRule(trials=3), on_trial=seen.append)
    assert [t.number for t in seen] == list(range(1, 2 + 8))
    assert [t.user_attrs["kind"] for t in seen] == ["knapsack"] + ["proposal"] * 8
    search.run(StopRule(trials=10), on_trial=seen.append)
    assert len(seen) == 9
    assert formula.search(InMemoryStorage(), "tpe").selection is None
    search.run(StopRule(seconds=0))
    assert search.n_proposals() == 10


@pytest.mark.parametrize("bad", [0, 3, 8])
def test_offspring_without_a_finite_loss_fail_with_their_reason(formula, bad):
    calls = []

    def change(kl):
        calls.append(0)
        return kl * math.nan if len(calls) <= bad else kl

    search = begun(formula, InMemoryStorage())
    search.run(StopRule(trials=1))
    search.scorer.change = change
    states = [t.state.name for t in search.generation(STEPS)]
    assert states[:bad] == ["FAIL"] * bad
    assert states.count("COMPLETE") == (bad < 8)
    for trial in search.study.trials[1 : 1 + bad]:
        assert "nan" in trial.user_attrs["reason"]
        assert not trial.intermediate_values
        assert ABANDONED not in trial.user_attrs
        assert trial.values is None
    search.scorer.change = lambda kl: kl
    assert search.n_proposals() == 9
    search.generation(STEPS)
    assert search.n_proposals() == 17


def test_a_survivor_without_a_finite_loss_fails(formula):
    """The one survivor meets a document without a loss: nothing of the generation is COMPLETE."""
    search = begun(formula, InMemoryStorage())
    search.run(StopRule(trials=1))
    search.scorer.change = lambda kl: kl * (math.inf if len(kl) == N - 6 else 1)
    assert sorted(t.state.name for t in search.generation(STEPS)) == ["FAIL"] + ["PRUNED"] * 7


N_CALLS = 8 + 3 + 1  # scorer calls of a generation


@pytest.mark.parametrize("call", [0, 1, 7, 8, 10, 11])
@pytest.mark.parametrize("generation", [0, 1])
def test_dying_in_a_generation_and_resuming_is_undisturbed(formula, call, generation):
    undisturbed = begun(formula, InMemoryStorage())
    undisturbed.run(StopRule(trials=1 + 3 * 8))
    left = [3 + generation * N_CALLS + call]  # 3: the queue's one trial has two rungs

    def before(allocation, start, stop):
        if not left[0]:
            raise RuntimeError("killed")
        left[0] -= 1

    storage = InMemoryStorage()
    with pytest.raises(RuntimeError, match="killed"):
        begun(formula, storage, formula.Scorer(before)).run(StopRule(trials=100))
    search = begun(formula, storage)
    running = [t for t in search.study.get_trials() if t.state is TrialState.RUNNING]
    assert len(running) == 8  # nothing of a generation is told before its end
    assert close_abandoned(search.study) == 8
    assert search.n_proposals() == 1 + 8 * generation
    search.run(StopRule(trials=1 + 3 * 8))
    assert len(search.study.trials) == 1 + 4 * 8
    assert told(search.study) == told(undisturbed.study)


def die_after(tells, search, *, n_trials, monkeypatch):
    """Runs a search that dies after so many tells."""
    left, tell = [tells], optuna.Study.tell

    def killed(*args, **kwargs):
        if not left[0]:
            raise RuntimeError("killed")
        left[0] -= 1
        return tell(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", killed)
        with pytest.raises(RuntimeError, match="killed"):
            search.run(StopRule(trials=n_trials))


@pytest.mark.parametrize("tells", range(8))
def test_dying_between_tells_and_resuming_is_undisturbed(formula, monkeypatch, tells):
    undisturbed = begun(formula, InMemoryStorage())
    undisturbed.run(StopRule(trials=1 + 3 * 8))
    storage = InMemoryStorage()
    search = begun(formula, storage)
    search.run(StopRule(trials=1 + 8))
    die_after(tells, search, n_trials=1 + 3 * 8, monkeypatch=monkeypatch)
    search = begun(formula, storage)
    n_running = sum(t.state is TrialState.RUNNING for t in search.study.get_trials())
    assert n_running == 8 - tells
    assert close_abandoned(search.study) == 0  # all had ended
    search.run(StopRule(trials=1 + 3 * 8))
    assert len(search.study.trials) == 1 + 3 * 8
    assert told(search.study) == told(undisturbed.study)


def test_dying_before_the_verdicts_are_written_abandons_all(formula, monkeypatch):
    undisturbed = begun(formula, InMemoryStorage())
    undisturbed.run(StopRule(trials=1 + 2 * 8))
    storage = InMemoryStorage()
    search = begun(formula, storage)
    search.run(StopRule(trials=1 + 8))
    assert len(search.study.user_attrs[VERDICTS]) == 8
    set_user_attr = optuna.Study.set_user_attr

    def killed(study, key, value):
        if key == VERDICTS:
            raise RuntimeError("killed")
        set_user_attr(study, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "set_user_attr", killed)
        with pytest.raises(RuntimeError, match="killed"):
            search.generation(STEPS)
    search = begun(formula, storage)
    assert close_abandoned(search.study) == 8
    search.run(StopRule(trials=1 + 2 * 8))
    assert told(search.study) == told(undisturbed.study)


# -- batches


class Wide:
    """A scorer of four candidates in a pass; notes every pass, and dies in one if told so."""

    def __init__(self, formula, dies_in=None, **options):
        self.scorer = formula.Scorer(**options)
        self.scorer.side_by_side = 4
        self.passes, self.dies_in = [], dies_in
        score_many = self.scorer.score_many

        def noted(allocations, start, stop):
            if len(self.passes) == self.dies_in:
                raise RuntimeError("killed")
            self.passes.append((len(allocations), start, stop))
            return score_many(allocations, start, stop)

        self.scorer.score_many = noted


def wide(formula, storage, sampler="knapsack", dies_in=None, **options):
    scorer = Wide(formula, dies_in)
    search = formula.search(storage, sampler, scorer=scorer.scorer, **options)
    search.passes = scorer.passes
    return search


def test_a_batch_races_together_a_pass_per_rung(formula):
    search = wide(formula, InMemoryStorage(), sampler="random")
    search.run(StopRule(trials=1))
    assert [t.user_attrs["kind"] for t in search.study.trials] == ["knapsack"] * 2 + [
        "proposal"
    ] * 2
    assert search.passes == [(4, 0, 3), (4, 3, 6), (4, 6, N)]  # nobody to race against
    search.run(StopRule(trials=20))
    assert search.n_proposals() == 20
    for batch in range(1, 5):
        trials = search.study.trials[4 * batch : 4 * batch + 4]
        rivals = [
            t for t in search.study.trials[: 4 * batch] if t.state is TrialState.COMPLETE
        ]  # those of the batch do not race each other
        for trial in trials:
            losses = trial.user_attrs["losses"]
            size = allocation_of(trial).nbytes(search.space.layout).file
            lost = next(
                (
                    rung
                    for rung in (3, 6)
                    if any(
                        r.values[1] <= size * (1 + RACE_SLACK)
                        and loses(losses[:rung], r.user_attrs["losses"][:rung])
                        for r in rivals
                    )
                ),
                None,
            )
            assert len(losses) == (lost or N)
            assert trial.state is (TrialState.PRUNED if lost else TrialState.COMPLETE)
    rows = sum(n * (stop - start) for n, start, stop in search.passes)
    assert rows == sum(len(t.user_attrs["losses"]) for t in search.study.trials)
    assert any(t.state is TrialState.PRUNED for t in search.study.trials)
    search.run(StopRule(trials=21))
    assert search.n_proposals() == 24  # a batch that was begun is finished


@pytest.mark.parametrize("sampler", ["random", "evolution"])
@pytest.mark.parametrize("at", [0, 2, 4, 7])
def test_dying_in_a_batch_and_resuming_is_undisturbed(formula, sampler, at):
    def started(storage, dies_in=None):
        search = wide(formula, storage, sampler, dies_in)
        search.selection = search.selection and STEPS
        return search

    undisturbed = started(InMemoryStorage())
    undisturbed.run(StopRule(trials=16))
    storage = InMemoryStorage()
    search = started(storage, at)
    with pytest.raises(RuntimeError, match="killed"):
        search.run(StopRule(trials=16))
    n_running = sum(t.state is TrialState.RUNNING for t in search.study.trials)
    assert n_running in (2, 4, 8)  # of evolution's, two are queued, then eight are a generation
    search = started(storage)
    assert close_abandoned(search.study) == n_running
    search.run(StopRule(trials=16))
    assert told(search.study) == told(undisturbed.study)
    assert search.forward_tokens() == undisturbed.forward_tokens()


@pytest.mark.parametrize("tells", range(4))
def test_dying_between_the_tells_of_a_batch_loses_none(formula, monkeypatch, tells):
    undisturbed = wide(formula, InMemoryStorage())
    undisturbed.run(StopRule(trials=12))
    storage = InMemoryStorage()
    search = wide(formula, storage)
    search.run(StopRule(trials=4))
    die_after(tells, search, n_trials=12, monkeypatch=monkeypatch)
    search = wide(formula, storage)
    assert close_abandoned(search.study) == 0
    search.run(StopRule(trials=12))
    assert told(search.study) == told(undisturbed.study)


def test_a_generation_is_scored_side_by_side(formula):
    alone, beside = begun(formula, InMemoryStorage()), wide(formula, InMemoryStorage(), "evolution")
    passes = beside.passes
    beside = replace(beside, selection=STEPS, queue=beside.queue[:1])
    for search in (alone, beside):
        search.run(StopRule(trials=9))
    assert passes[-4:] == [(4, 0, 2), (4, 0, 2), (3, 2, 6), (1, 6, N)]
    assert told(alone.study) == told(beside.study)


def test_a_batch_with_a_loss_that_is_no_number_tells_the_others(formula):
    search = wide(formula, InMemoryStorage(), sampler="random")
    score_many = search.scorer.score_many

    def one_bad(allocations, start, stop):
        losses = score_many(allocations, start, stop)
        if start == 0:
            losses[1].kl[0] = math.nan
        return losses

    search.scorer.score_many = one_bad
    assert [t.state.name for t in search.batch(4)] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


# -- what cannot be scored


@pytest.mark.parametrize(("at", "value"), [(0, math.nan), (5, math.inf), (11, math.nan)])
def test_a_loss_that_is_no_number_fails_with_its_reason(started, at, value):
    search = started({"first": lambda s: uniform(s, "Q8_0")})
    original = search.scorer.score

    def score(allocation, start, stop):
        losses = original(allocation, start, stop)
        losses.kl[[i == at for i in range(start, stop)]] = value
        return losses

    search.scorer.score = score
    trial = search.step()
    assert trial.state is TrialState.FAIL
    assert trial.values is None
    assert str(value) in trial.user_attrs["reason"]
    assert ABANDONED not in trial.user_attrs
    assert search.n_proposals() == 1
    del search.scorer.score
    assert search.step().state is TrialState.COMPLETE  # the study goes on, and races nobody


def test_an_error_of_the_scorer_is_not_swallowed(started, formula):
    def fail(allocation, start, stop):
        raise RuntimeError("the model is gone")

    search = started({"first": lambda s: uniform(s, "Q8_0")}, formula.Scorer(fail))
    with pytest.raises(RuntimeError, match="gone"):
        search.step()
    assert search.study.trials[0].state is TrialState.RUNNING
    assert close_abandoned(search.study) == 1
    assert search.n_proposals() == 0
    search.scorer.before = lambda *_: None
    assert search.step().user_attrs["kind"] == "first"


def test_allocation_of_refuses_a_trial_without_one(formula):
    search = formula.search(InMemoryStorage(), "random")
    trial = search.study.ask(search.space.distributions)
    with pytest.raises(StudyError, match="trial 0"):
        allocation_of(search.study.trials[trial.number])


# -- constraints and Optuna's tools


@pytest.mark.parametrize("bounds", ["file", "weights"])
def test_the_constraint_is_stored_and_kept(formula, bounds):
    search = formula.search(InMemoryStorage(), "tpe", bounds=bounds)
    search.run(StopRule(trials=8))
    for trial in search.study.get_trials():
        used = allocation_of(trial).used(search.space.layout, search.budget)
        assert trial.constraints == {"budget": used - search.budget.nbytes}
        assert trial.constraints["budget"] <= 0


def test_optunas_own_tools_read_the_study(formula, tmp_path):
    search = formula.search(open_storage(None, tmp_path), "knapsack")
    search.run(StopRule(trials=10))
    study = optuna.load_study(study_name="formula", storage=open_storage(None, tmp_path))
    done = [t for t in study.trials if t.state is TrialState.COMPLETE]
    front = {
        t.number
        for t in done
        if not any(
            o.values[0] <= t.values[0] and o.values[1] <= t.values[1] and o.values != t.values
            for o in done
        )
    }
    assert {t.number for t in study.best_trials} == front
    frame = study.trials_dataframe()
    assert len(frame) == 10
    assert {"values_proxy_loss", "values_bytes", "user_attrs_kind"} <= set(frame.columns)
    assert set(search.space.distributions) == {
        c.removeprefix("params_") for c in frame.columns if c.startswith("params_")
    }
    assert study.metric_names == ["proxy_loss", "bytes"]
    for trial in done:
        assert trial.distributions == search.space.distributions


def test_the_same_allocation_twice_has_the_same_loss(started):
    search = started({n: lambda s: uniform(s, "Q5_0", 3) for n in ("a", "b", "c")}, rungs=())
    trials = [search.step() for _ in range(3)]
    assert len({allocation_of(t).digest for t in trials}) == 1
    assert len({tuple(t.values) for t in trials}) == 1
    assert complete_trials(search.study)[0].number == 0


def test_an_allocation_that_was_scored_is_looked_up(started, formula):
    """The third proposal is the first one again: no pass, and the same record."""
    requests = []
    scorer = formula.Scorer(before=lambda allocation, *span: requests.append(span))
    plan = {"a": lambda s: uniform(s, "Q5_0", 3), "b": lambda s: uniform(s, "Q8_0", 4)}
    search = started(plan | {"c": plan["a"]}, rungs=(3, 6), scorer=scorer)
    first, _ = search.step(), search.step()
    n_before = len(requests)
    again = search.step()
    assert len(requests) == n_before > 0
    assert again.number == 2
    assert allocation_of(again) == allocation_of(first)
    assert (again.values, again.user_attrs["losses"]) == (first.values, first.user_attrs["losses"])
    assert again.user_attrs["result"] == first.user_attrs["result"]


def test_complete_trials_best_first(formula):
    search = formula.search(InMemoryStorage(), "random")
    search.run(StopRule(trials=10))
    losses = [t.values[0] for t in complete_trials(search.study)]
    assert losses == sorted(losses)
    assert len(losses) > 1


def test_run_stops_at_the_count_or_the_clock(formula):
    search = formula.search(InMemoryStorage(), "random")
    for _ in range(2):  # a study gets its first trial, also where time is over, and no more
        search.run(StopRule(seconds=0))
        assert search.n_proposals() == 1
    seen = []
    search.run(StopRule(trials=3), on_trial=seen.append)
    assert [t.number for t in seen] == [1, 2]
    search.run(StopRule(trials=3), on_trial=seen.append)
    assert len(seen) == 2
    assert min(search.seconds.values()) >= 0


# -- the lock

LOCK = {"checkpoint": "c" * 64, "budget": "100 (file)", "space": "s" * 64, "seed": 0}


@pytest.mark.parametrize(
    ("key", "value"), [("budget", "101 (file)"), ("space", "t" * 64), ("seed", 1)]
)
def test_a_changed_input_is_refused_by_name(tmp_path, key, value):
    open_study(open_storage(None, tmp_path), "s", LOCK)
    assert open_study(open_storage(None, tmp_path), "s", LOCK).user_attrs["lock"] == LOCK
    before = (tmp_path / "journal").read_bytes()
    with pytest.raises(StudyError) as caught:
        open_study(open_storage(None, tmp_path), "s", {**LOCK, key: value})
    assert f"{key} = " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(f"{other} = " in str(caught.value) for other in LOCK if other != key)
    assert (tmp_path / "journal").read_bytes() == before
    assert open_study(open_storage(None, tmp_path), "s", LOCK).user_attrs["lock"] == LOCK


def test_a_foreign_study_is_refused(tmp_path):
    foreign = optuna.create_study(
        storage=open_storage(None, tmp_path), study_name="s", directions=["minimize"] * 2
    )
    foreign.tell(foreign.ask(), [1.0, 2.0])
    with pytest.raises(StudyError, match="not one of ours"):
        open_study(open_storage(None, tmp_path), "s", LOCK)


# -- the first trials


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize("target", ["safetensors", "gguf"])
def test_first_trials_are_knapsack_solutions_then_baselines_that_fit(formula, target, bounds):
    search = formula.search(InMemoryStorage(), "random", target=target, bounds=bounds)
    space, budget = search.space, search.budget
    known = list(baselines(space.layout, space.rankings, pruned=True))
    queue = first_trials(search.surrogate, budget, known, n_knapsack=3)
    kinds = [q.kind for q in queue]
    n_knapsack = kinds.count("knapsack")
    assert 1 < n_knapsack <= 3
    assert kinds[:n_knapsack] == ["knapsack"] * n_knapsack
    sizes = [q.allocation.used(space.layout, budget) for q in queue]
    assert max(sizes) <= budget.nbytes
    assert sizes[:n_knapsack] == sorted(sizes[:n_knapsack], reverse=True)
    assert queue[0].allocation == space.allocation(solve(search.surrogate, budget, starts=STARTS))
    assert len({q.allocation.digest for q in queue}) == len(queue)
    fitting = [
        name
        for name, a in known
        if a.used(space.layout, budget) <= budget.nbytes
        and all(f in space.formats[g] for g, f in a.formats)
    ]
    assert 0 < len(set(fitting)) < len(known)
    assert set(kinds[n_knapsack:]) <= set(fitting)
    slack = len(space.layout.groups) * 4  # a safetensors header's bound
    assert set(fitting) - set(kinds) <= {
        n for n, a in known
        if a.used(space.layout, budget) + slack > budget.nbytes
        or a.digest in {q.allocation.digest for q in queue}
    }  # fmt: skip


def pruning_at(search, scale):
    """Its surrogate, pruning at a scale of what experts lose in their smallest formats."""
    space = search.space
    losses = {
        x: scale * sum(search.surrogate.error_losses[g].max() for g in space.expert_groups[x])
        * (1 - np.array(space.counts) / space.counts[-1]) ** 1.5
        for x in space.layout.layers
    }  # fmt: skip
    return replace(search.surrogate, count_losses=losses)


@pytest.mark.parametrize("target", ["safetensors", "gguf"])
@pytest.mark.parametrize("truth", [1.0, 0.5, 0.25])
def test_where_pruning_costs_less_than_measured_a_first_trial_says_so(formula, target, truth):
    """Losses are those of the surrogate, pruning at a share of what it thinks."""
    search = formula.search(InMemoryStorage(), "random", target=target, share=0.25)
    space, budget, surrogate = search.space, search.budget, pruning_at(search, 2.0)
    queue = first_trials(surrogate, budget, [], n_knapsack=2, pruning_factors=(0.5, 0.25))
    kinds = [q.kind for q in queue]
    assert kinds[:2] == ["knapsack", "pruned"]
    assert kinds[-1] == "knapsack"
    assert all(q.allocation.fits(space.layout, budget) for q in queue)
    retained = [sum(q.allocation.counts.values()) for q in queue if q.kind == "pruned"]
    assert retained == sorted(retained, reverse=True)
    assert sum(queue[0].allocation.counts.values()) > retained[-1]
    real = surrogate.multiplied({f"experts.{x}": truth for x in space.layout.layers})
    measured = [real.predict(space.complete(space.params(q.allocation))) for q in queue]
    assert min(measured) == pytest.approx(real.predict(solve(real, budget, starts=STARTS)))
    if truth == 0.25:
        assert min(measured) < 0.95 * measured[0]


@pytest.mark.parametrize("target", ["safetensors", "gguf"])
@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0])
def test_several_starts_end_in_the_best_of_many(formula, target, scale):
    """Against the best solution under any routing loss; one start may end in a worse one."""
    search = formula.search(InMemoryStorage(), "random", target=target, share=0.25)
    surrogate, costs = pruning_at(search, scale), Costs(search.space, search.budget)
    many = [solve_under(surrogate, costs, s) for s in np.geomspace(1e-5, 1, 40)]
    least = min(surrogate.predict(p) for p in many)
    solved = solve(surrogate, search.budget, starts=STARTS)
    assert surrogate.predict(solved) == pytest.approx(least)
    one = surrogate.predict(solve(surrogate, search.budget))
    assert one >= least * (1 - 1e-12)
    if (target, scale) == ("safetensors", 1.0):
        assert one > 1.05 * least


def test_prices_under_which_nothing_else_is_pruned_add_no_trial(formula):
    search = formula.search(InMemoryStorage(), "random", share=1.0)
    queue = first_trials(search.surrogate, search.budget, [], n_knapsack=1, pruning_factors=(0.5,))
    assert [q.kind for q in queue] == ["knapsack"]


def test_baselines_that_the_space_cannot_hold_are_left_out(formula):
    search = formula.search(InMemoryStorage(), "random", share=1.0)
    space = search.space
    offered = uniform(space, "Q8_0")
    other_format = uniform(space, "F16")
    retained = {x: tuple(sorted(space.rankings[x][1:4])) for x in space.layout.layers}
    other_experts = Allocation.of(
        target="safetensors", retained=retained, formats=offered.format_of, experts_used=2
    )
    known = [("format", other_format), ("experts", other_experts), ("offered", offered)]
    kinds = [q.kind for q in first_trials(search.surrogate, search.budget, known, n_knapsack=1)]
    assert kinds == ["knapsack", "offered"]


def test_a_first_trial_over_the_budget_is_refused(formula):
    search = formula.search(InMemoryStorage(), "random", share=0.2)
    with pytest.raises(StudyError, match="too big"):
        Search(
            study=search.study, sampler=search.sampler, surrogate=search.surrogate,
            budget=search.budget, scorer=search.scorer, race=Race(),
            queue=[Queued("too big", search.space.largest)],
        )  # fmt: skip


@pytest.mark.parametrize("target", ["safetensors", "gguf"])
def test_a_file_budget_at_the_floor_is_searched(formula, target):
    search = formula.search(InMemoryStorage(), "random", target=target, share=0.0)
    floor = search.space.smallest.nbytes(search.space.layout).file
    assert search.budget == Budget(floor, "file")
    search.run(StopRule(trials=3))
    for trial in search.study.get_trials():  # IQ4_NL and Q4_0 have the same bytes
        assert allocation_of(trial).nbytes(search.space.layout).file == floor


# -- forward tokens

LENGTHS = (40, 30, 25, 20, 15, 12, 10, 8, 6, 5, 4, 3)  # of documents: the first are the longest
LOOK_TOKENS = 77


class Spent:
    """Counts tokens that a scorer and a look are asked for, those in memory once."""

    def __init__(self):
        self.tokens, self.looks = 0, set()

    def before(self, allocation, start, stop):
        self.tokens += sum(LENGTHS[start:stop])

    def local_prices(self, allocation, part):
        if (allocation.digest, part) not in self.looks:
            self.looks.add((allocation.digest, part))
            self.tokens += LOOK_TOKENS
        prices = {}
        for name, group in self.layout.groups.items():
            n = group.shape[0] if group.role.is_expert else 1
            prices[name] = {f.name: [4.0**-f.bits / n] * n for f in group.offered()}
        return LocalPrices(prices, prices, LOOK_TOKENS)


@pytest.mark.parametrize("side_by_side", [1, pytest.param(3, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("rungs", [(), (3, 6)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_run_spends_more_tokens_than_it_was_given(formula, sampler, rungs, side_by_side):
    whole = sum(LENGTHS)
    offspring = 8 * 70 + 3 * 72 + 36  # eight on 2 documents, three on 4 more, one on the rest
    for tokens in (0, whole - 1, whole, 2 * whole - 1, 1000, 2222, 2223, 2300, 2377, 2500):
        spent = Spent()
        search = formula.search(
            InMemoryStorage(), sampler, rungs=rungs, local_prices=spent.local_prices,
            gradient_tokens=LOOK_TOKENS,
            scorer=formula.Scorer(spent.before, lengths=LENGTHS), n_knapsack=1,
        )  # fmt: skip
        spent.layout = search.space.layout
        search.scorer.side_by_side = side_by_side
        search = replace(search, base_tokens=300)
        search.selection = search.selection and STEPS
        for given in (tokens // 2, tokens):  # a second run continues
            search.run(StopRule(tokens=300 + given))
            assert search.forward_tokens() == 300 + spent.tokens
            assert spent.tokens <= given
        most = offspring if sampler == "evolution" and search.n_proposals() else whole
        if side_by_side > 1 and (sampler != "evolution" or not search.n_proposals()):
            most *= 1 if sampler == "evolution" else side_by_side
        looks = -(-side_by_side // 5) * (sampler == "auto")  # rounds of five
        assert spent.tokens + most + LOOK_TOKENS * looks > tokens
    assert bool(spent.looks) == (sampler == "auto" and side_by_side < 7)
    assert search.n_proposals() > 6


def test_tokens_of_a_trial_that_died_are_not_counted_twice(formula):
    """Its proposal is made again; a search that was killed ends where an undisturbed one does."""
    undisturbed = formula.search(InMemoryStorage(), "random")
    undisturbed.run(StopRule(tokens=700))
    calls = []

    def before(*_):
        calls.append(0)
        if len(calls) == 8:
            raise RuntimeError("killed")

    storage = InMemoryStorage()
    with pytest.raises(RuntimeError, match="killed"):
        formula.search(storage, "random", scorer=formula.Scorer(before)).run(StopRule(tokens=700))
    search = formula.search(storage, "random")
    died = search.study.trials[-1]
    set_system_attr(search.study, died, GRADIENT_TOKENS, 500)
    assert close_abandoned(search.study) == 1
    search.run(StopRule(tokens=700))
    assert told(search.study) == told(undisturbed.study)
    assert search.forward_tokens() == undisturbed.forward_tokens()
