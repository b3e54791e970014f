"""Proposals made feasible: never over a limit, and steps where a byte costs least."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocator.checkpoint.reading import read_inventory
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs
from allocator.decision.feasibility import make_feasible
from allocator.decision.search_space import SearchSpace, bind
from allocator.targets import GGUF, TARGETS
from allocator.targets.device_memory import Workload

TARGET_NAMES = list(TARGETS)
BOUNDS = ["file", "weights"]
WORK = Workload(context=256, sequences=8, reserve=1 << 20)
quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


def loss_of(space):
    """Random losses that fall with every step up; of one param's value."""
    rng = np.random.default_rng(0)
    steps = {n: np.cumsum(rng.exponential(size=len(v))) for n, v in space.choices.items()}

    def loss(name, value):
        at = space.choices[name].index(value)
        return float(steps[name][at if name.startswith("format.") else -1 - at])

    return loss


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("target", TARGET_NAMES)
@quick
@given(data=st.data(), share=st.floats(0, 1.2))
def test_feasible(spaces, draw, target, bounds, data, share):
    space, loss = spaces[target], loss_of(spaces[target])
    layout = space.layout
    low, high = (a.used(layout, Budget(1, bounds)) for a in (space.smallest, space.largest))
    budget = Budget(low + int(share * (high - low)), bounds)
    costs = Costs(space, budget)
    params = draw(data, space)
    feasible = make_feasible(space, costs, params, loss)
    allocation = space.allocation(feasible)
    assert allocation.used(layout, budget) <= budget.nbytes
    assert make_feasible(space, costs, feasible, loss) == feasible
    if costs.total(params) <= budget.nbytes:
        assert feasible == params
    for name, values in space.choices.items():  # nothing grows
        moved = values.index(feasible[name]) - values.index(params[name])
        assert moved >= 0 if name.startswith("format.") else moved <= 0


def test_steps_where_a_byte_costs_least(spaces):
    space = spaces["gguf"]
    params = space.complete(space.params(space.largest))
    costs = Costs(space, Budget(1, "weights"))
    budget = Budget(costs.total(params) - 1, "weights")

    def loss(name, value):
        step = space.choices[name].index(value)
        return 0.0 if name == "format.layers.2.experts.up" else float(step)

    feasible = make_feasible(space, Costs(space, budget), params, loss)
    changed = {n: v for n, v in feasible.items() if v != params[n]}
    assert changed in ({"format.layers.2.experts.up": "Q8_0"}, {"experts.all": 23})


@pytest.mark.parametrize("bounds", BOUNDS)
def test_passes_steps_that_padding_hides(tmp_path, make, bounds):
    """One row of 32 weights: 64, 34 and 22 bytes are 64, 64 and 32 in a file padded to 32."""
    tensors = make.tensors() | {
        f"model.layers.{i}.self_attn.{n}_proj.weight": (1, 32) for i in (0, 1) for n in "kv"
    }
    inventory = read_inventory(make.zeros(tmp_path, tensors=tensors))
    layout = GGUF.layout(replace(inventory, without_tokenizer=True))
    space = bind(SearchSpace(schema=1), layout, None)
    smallest = space.complete(space.params(space.smallest))
    low = Costs(space, Budget(10**9, bounds)).total(smallest)
    costs = Costs(space, Budget(low, bounds))
    params = space.complete(space.params(space.largest))
    feasible = make_feasible(space, costs, params, lambda name, value: 0.0)
    assert costs.total(feasible) <= low


@quick
@given(data=st.data(), share=st.floats(0, 1), other=st.floats(0, 1), speed=st.floats(0, 1))
def test_no_limit_is_exceeded_on_a_device(on_device, draw, data, share, other, speed):
    """Memory, the file beside it, and what a token reads, together."""
    space, layout, loss = on_device, on_device.layout, loss_of(on_device)
    small, large = (end.stored(layout) for end in (space.smallest, space.largest))

    def between(low, high, at):
        return low + int(at * (high - low))

    read = between(small.token_bytes(256), large.token_bytes(256), speed)
    work = replace(WORK, bandwidth=read, min_tokens_per_second=1)
    low, high = (end.device_memory(work).total for end in (small, large))
    beside = Budget(between(small.file.file, large.file.file, other), "file")
    budget = Budget(between(low, high, share), "device", work, beside)
    params = draw(data, space)
    feasible = make_feasible(space, Costs(space, budget), params, loss)
    assert budget.admits(space.allocation(feasible).stored(layout))
    assert make_feasible(space, Costs(space, budget), feasible, loss) == feasible
    if Costs(space, budget).fits(params):
        assert feasible == params
