"""Level-switch evolution: offspring within the budget and near the parent; improvement; steps."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from allocator.checkpoint.reading import read_inventory
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.search_space import Experts, Pin, SearchSpace, bind
from allocator.errors import StudyError
from allocator.formats import FORMATS
from allocator.prediction.solver import solve
from allocator.samplers.evolution import offspring, random_start
from allocator.study.generations import Selection
from allocator.study.initial_trials import Queued
from allocator.study.stop_rule import StopRule
from allocator.study.trials import allocation_of, complete_trials
from allocator.targets import SAFETENSORS, TARGETS

STEPS = Selection(8, ((2, 3), (6, 1)))


def used(space, budget, params):
    return space.allocation(params).used(space.layout, budget)


def bytes_of(space, name, params):
    """Of what one param decides, counted from the file's own tensors."""
    size = space.allocation(params)
    layers = space.count_params.get(name, ())
    groups = {name.removeprefix("format.")} & set(space.layout.groups)
    groups |= {g for x in layers for g in space.expert_groups[x]}
    return sum(size.stored(space.layout).group(g) for g in groups)


def levels(space, name, params):
    """Values of a param with different bytes, ascending; equals in one place."""
    table = {}
    for value in space.choices[name]:
        table.setdefault(bytes_of(space, name, {**params, name: value}), []).append(value)
    return [table[b] for b in sorted(table)]


@pytest.fixture(scope="module")
def small(formula):
    """The space of a checkpoint of zeros in a target; two numbers of experts used."""
    spec, inventory = SearchSpace(schema=1, experts_used=[1, 2]), read_inventory(formula.checkpoint)
    spaces = {t.name: bind(spec, t.layout(inventory), None) for t in TARGETS.values()}
    return lambda target: spaces[target]  # Hypothesis prints its arguments


@settings(deadline=None, max_examples=150)
@given(
    target=st.sampled_from(sorted(TARGETS)), bounds=st.sampled_from(["file", "weights"]),
    share=st.integers(0, 1000), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_offspring_are_within_the_budget_and_near_the_parent(small, target, bounds, share, seed):
    space = small(target)
    ends = (space.smallest, space.largest)
    low, high = (a.used(space.layout, Budget(1, bounds)) for a in ends)
    slack = 200 if bounds == "file" else 0  # a header's bound
    budget = Budget(low + slack + share * (high - low) // 1000, bounds)
    rng = np.random.default_rng(seed)
    parent = random_start(Costs(space, budget), rng)
    assert used(space, budget, parent) <= budget.nbytes
    child = offspring(Costs(space, budget), parent, rng)
    if child is None:
        return
    assert used(space, budget, child) <= budget.nbytes
    assert set(child) == set(space.choices)
    moved = [n for n in child if child[n] != parent[n]]
    assert 1 <= len(moved) <= 10
    ladders = {n: levels(space, n, parent) for n in moved if n != "experts_used"}
    at = {n: [next(i for i, row in enumerate(x) if p[n] in row) for p in (parent, child)]
          for n, x in ladders.items()}  # fmt: skip
    assert all(a != b for a, b in at.values())
    assert sum(abs(a - b) for a, b in at.values()) <= 10
    if any(n.startswith("experts.") for n in moved) or high <= budget.nbytes:
        return  # then the bytes of one unit depend on another; or nothing can be raised
    change = {n: bytes_of(space, n, child) - bytes_of(space, n, parent) for n in ladders}
    lost = -sum(c for c in change.values() if c < 0)
    assert sum(c for c in change.values() if c > 0) >= (0.8 if bounds == "weights" else 0.7) * lost


def test_a_step_is_one_level(small):
    """With every unit but two pinned, one goes a level up and the other a level down."""
    spec = SearchSpace(
        schema=1, formats=["Q8_0", "Q5_0", "Q4_0"], experts=Experts(minimum=4),
        pin=[Pin("*experts*", format="Q4_0"), Pin("layers.1.*", format="Q4_0"),
             Pin("embedding", format="Q4_0"), Pin("head", format="Q4_0"),
             Pin("layers.0.attention.k", format="Q4_0"),
             Pin("layers.0.attention.v", format="Q4_0")],
    )  # fmt: skip
    space = bind(spec, small("safetensors").layout, None)
    q, o = "format.layers.0.attention.q", "format.layers.0.attention.o"
    assert set(space.distributions) == {q, o}
    parent = space.complete({q: "Q5_0", o: "Q5_0"})
    budget = Budget(used(space, Budget(1, "weights"), parent), "weights")
    rng = np.random.default_rng(0)

    def drawn(blocks):  # more than the parent's: of each unit, 64 x 64 weights
        wider = Budget(budget.nbytes + blocks * 64 * 64 // 32, "weights")
        children = [offspring(Costs(space, wider), parent, rng) for _ in range(400)]
        return Counter((c[q], c[o]) for c in children if c is not None)

    # Q8_0 has 12 bytes a block more than Q5_0, Q4_0 has 4 less
    assert not drawn(0)
    assert not drawn(7)
    assert set(drawn(8)) == {("Q8_0", "Q4_0"), ("Q4_0", "Q8_0")}
    found = drawn(12)
    assert set(found) == {("Q8_0", "Q4_0"), ("Q4_0", "Q8_0"), ("Q8_0", "Q5_0"), ("Q5_0", "Q8_0")}
    assert min(found.values()) > 2  # either order, either unit
    assert ("Q8_0", "Q8_0") not in drawn(23)
    assert ("Q8_0", "Q8_0") in drawn(24)


def test_as_many_are_lowered_as_raised_and_one_is_likeliest(layouts):
    """Ten equal units, a level up 16 bytes a block, down 17: the lesser of two draws from 1..3."""
    fixed = ("*.mlp.*", "*.shared.*", "*.down", "embedding", "*.q_?", "*.o", "*.kv_a")
    spec = SearchSpace(
        schema=1, formats=["Q5_K", "Q4_K", "IQ3_S", "Q5_0"], experts=Experts(minimum=24),
        pin=[Pin(pattern, format="Q4_K") for pattern in fixed],
    )  # fmt: skip
    space = bind(spec, layouts["gguf"], None)
    assert len(space.distributions) == 10
    parent = space.complete(dict.fromkeys(space.distributions, "Q4_K"))
    costs = Costs(space, Budget(used(space, Budget(1, "weights"), parent), "weights"))
    rng = np.random.default_rng(1)
    drawn = Counter()
    for _ in range(1800):
        child = offspring(costs, parent, rng)
        formats = Counter(child[n] for n in space.distributions)
        assert formats["Q5_K"] == formats["IQ3_S"]
        drawn[formats["Q5_K"]] += 1
    assert set(drawn) == {1, 2, 3}
    for n, ninths in ((1, 5), (2, 3), (3, 1)):
        assert abs(drawn[n] - 200 * ninths) < 70


def test_counts_go_up_and_down_where_all_layers_share_one(spaces, surrogates):
    """One count of five layers has more bytes than ten small units."""
    space, surrogate = spaces["gguf"], surrogates["gguf"]
    budget = Budget(8234496, "weights")
    parent = space.complete(solve(surrogate, budget))
    rng = np.random.default_rng(3)
    parent["experts.all"] -= 1
    drawn = (offspring(Costs(space, budget), parent, rng) for _ in range(4000))
    change = Counter(c["experts.all"] - parent["experts.all"] for c in drawn if c is not None)
    assert set(change) >= {-1, 0, 1}
    assert change[0] > 1000


def test_units_without_bytes_are_switched_too(small):
    space = small("safetensors")
    costs = Costs(space, Budget(60_000, "weights"))
    rng = np.random.default_rng(2)
    parent = random_start(costs, rng)
    for before, after in ((1, 2), (2, 1)):
        parent["experts_used"] = before
        children = [offspring(costs, parent, rng) for _ in range(300)]
        assert after in {c["experts_used"] for c in children if c is not None}


def optimum(space, budget, loss):
    """Least additive loss of formats within the budget, by going through all sums of bytes."""
    best = {0: 0.0}
    for name, values in space.choices.items():
        if not name.startswith("format."):
            continue
        group = space.layout.groups[name.removeprefix("format.")]
        options = [(FORMATS[v].nbytes(group.shape), loss[name, v]) for v in values]
        after = {}
        for total, lost in best.items():
            for nbytes, more in options:
                at = total + nbytes
                if at <= budget.nbytes and lost + more < after.get(at, np.inf):
                    after[at] = lost + more
        best = after
    return min(best.values())


def climbed(space, budget, seed):
    """An additive loss after 2,000 offspring, and at the start, both over the least there is."""
    costs, rng = Costs(space, budget), np.random.default_rng(seed)
    loss = {}
    for name, values in space.choices.items():
        scale = float(np.exp(rng.normal()))
        if name.startswith("format."):
            loss |= {(name, v): scale * 4 ** -FORMATS[v].bits for v in values}

    def total(params):
        return sum(loss[n, v] for n, v in params.items() if n.startswith("format."))

    parent = random_start(costs, rng)
    began, least = total(parent), optimum(space, budget, loss)
    for _ in range(2000):
        child = offspring(costs, parent, rng)
        if child is not None and total(child) < total(parent):
            parent = child
    return total(parent) / least, began / least


def test_switches_reach_the_optimum_of_an_additive_loss(tiny):
    """Of six losses at least half to the optimum; the others end where no few switches help."""
    spec = SearchSpace(schema=1, experts=Experts(minimum=4))
    space = bind(spec, SAFETENSORS.layout(tiny), None)
    low, high = (a.nbytes(space.layout).encoded for a in (space.smallest, space.largest))
    budget = Budget(low + (high - low) // 3, "weights")
    ended, began = zip(*(climbed(space, budget, seed) for seed in range(6)), strict=True)
    assert min(began) > 5
    assert max(ended) < 1.5
    assert sum(x < 1 + 1e-9 for x in ended) >= 3


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_generations_improve_on_the_best_of_the_queue(formula, target):
    search = formula.search(InMemoryStorage(), "evolution", target=target)
    search = replace(search, queue=[Queued("smallest", search.space.smallest)], selection=STEPS)
    search.run(StopRule(trials=1))
    parents = [complete_trials(search.study)[0]]
    for _ in range(25):
        finished = search.generation(STEPS)
        states = Counter(t.state for t in finished)
        assert states == {TrialState.PRUNED: 7, TrialState.COMPLETE: 1}
        parent = search.space.complete(parents[-1].params)
        for trial in finished:  # all of a generation come from the parent it began with
            child = search.space.complete(trial.params)
            assert 1 <= sum(child[n] != parent[n] for n in child) <= 10
            assert allocation_of(trial) == search.space.allocation(child)
        parents.append(complete_trials(search.study)[0])
    losses = [t.values[0] for t in parents]
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    assert len({t.number for t in parents}) > 5
    digests = [allocation_of(t).digest for t in search.study.get_trials()]
    assert len(set(digests)) == len(digests)  # no proposal is made twice


def test_without_a_finished_trial_it_starts_at_random_within_the_budget(formula):
    search = formula.search(InMemoryStorage(), "evolution", share=0.3)
    search = replace(search, queue=(), selection=STEPS)
    finished = search.generation(STEPS)
    assert len({allocation_of(t).digest for t in finished}) == 8
    for trial in finished:
        assert used(search.space, search.budget, trial.params) <= search.budget.nbytes
        assert not trial.user_attrs["result"]["repaired"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_budgets_at_the_ends_are_searched(formula, share):
    search = formula.search(InMemoryStorage(), "evolution", share=share, bounds="weights")
    search.selection = STEPS
    search.run(StopRule(trials=12))
    sizes = {t.values[1] for t in complete_trials(search.study)}
    assert max(sizes) <= search.budget.nbytes


@pytest.mark.parametrize(
    ("n_documents", "steps"),
    [(64, ((8, 4), (24, 1))), (12, ((1, 4), (4, 1))), (2, ((1, 1),)), (1, ())],
)
def test_the_default_selection(n_documents, steps):
    selection = Selection.over(n_documents)
    assert selection == Selection(16, steps)
    selection.check(n_documents)


@pytest.mark.parametrize(
    ("n_offspring", "steps"),
    [(4, ((12, 1),)), (4, ((3, 5),)), (4, ((3, 2), (3, 1))), (4, ((6, 2), (3, 1))),
     (4, ((3, 1), (6, 2))), (4, ((3, 0),)), (0, ()), (4, ((0, 2),))],
)  # fmt: skip
def test_selections_that_narrow_nothing_are_refused(n_offspring, steps):
    with pytest.raises(StudyError, match="documents that ascend below 12"):
        Selection(n_offspring, steps).check(12)
