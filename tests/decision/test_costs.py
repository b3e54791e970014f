"""Bytes of choices: at least those of the allocation that they propose, and equal where exact."""

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocator.decision.budget import Budget
from allocator.decision.costs import Costs, check_budget
from allocator.decision.feasibility import make_feasible
from allocator.errors import BudgetError
from allocator.formats import FORMATS
from allocator.targets import TARGETS
from allocator.targets.device_memory import Workload
from allocator.units import parse_bytes

TARGET_NAMES = list(TARGETS)
BOUNDS = ["file", "weights"]
WORK = Workload(context=256, sequences=8, reserve=1 << 20)
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


DOWN = "layers.1.experts.down"


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("target", TARGET_NAMES)
@quick
@given(data=st.data())
def test_costs_are_bytes_or_a_little_more(spaces, draw, target, bounds, data):
    space = spaces[target]
    budget = Budget(1, bounds)
    params = draw(data, space)
    used = space.allocation(params).used(space.layout, budget)
    cost = Costs(space, budget).total(params)
    if target == "gguf" or bounds == "weights":
        assert cost == used
    else:
        assert 0 <= cost - used < 2000  # digits of a header


@quick
@given(data=st.data())
def test_costs_on_a_device_are_bytes(on_device, draw, data):
    """Memory and bytes read per token are exact where all layers retain as many experts."""
    space, params = on_device, draw(data, on_device)
    costs, allocation = Costs(space, Budget(1, "device", WORK)), space.allocation(params)
    memory = allocation.device_memory(space.layout, WORK)
    assert costs.total(params) == memory.total
    assert costs.token_bytes(params) == allocation.token_bytes(space.layout, WORK.context)
    assert costs.spare_bytes(params) == 1 - memory.total


@quick
@given(data=st.data(), share=st.floats(0, 1), other=st.floats(0, 1), least=st.floats(1, 60))
def test_params_that_fit_are_allocations_that_fit(on_device, draw, data, share, other, least):
    """Costs, the limits of a budget and its excess agree, whichever limit binds."""
    space, layout = on_device, on_device.layout
    ends = [end.stored(layout) for end in (space.smallest, space.largest)]
    work = replace(WORK, bandwidth=10**8, min_tokens_per_second=least)
    low, high = (end.device_memory(work).total for end in ends)
    beside = Budget(
        ends[0].file.file + int(other * (ends[1].file.file - ends[0].file.file)), "file"
    )
    budget = Budget(low + int(share * (high - low)), "device", work, beside)
    params = draw(data, space)
    costs, stored = Costs(space, budget), space.allocation(params).stored(layout)
    over = budget.excess(stored)
    assert set(over) == {"budget", "beside", "token_bytes"}
    assert over["budget"] == stored.device_memory(work).total - budget.nbytes
    assert over["beside"] == stored.file.file - beside.nbytes
    assert over["token_bytes"] == stored.token_bytes(256) - work.token_bytes
    assert budget.admits(stored) == all(v <= 0 for v in over.values())
    if costs.fits(params):
        assert budget.admits(stored)
    names = list(space.choices)
    fit = all(limit.measure(params, names) <= limit.nbytes for limit in costs.limits)
    assert fit == costs.fits(params)


@pytest.mark.parametrize("value", ["Q8_0*20+Q6_K", "IQ2_XXS*8+IQ1_S", "Q8_0", "IQ1_S"])
@pytest.mark.parametrize("count", [6, 8, 9, 20, 21, 24])
def test_costs_of_every_group_in_one_choice(spaces, value, count):
    """What `Costs.total` says is an upper bound of the file, and exact for the weights."""
    space = spaces["safetensors"]
    params = space.complete(space.params(space.smallest))
    params |= {n: value for n, v in space.choices.items() if value in v}
    params |= dict.fromkeys(space.count_params, count)
    allocation = space.allocation(params)
    allocation.check(space.layout)
    size = allocation.nbytes(space.layout)
    assert Costs(space, Budget(1, "weights")).total(params) == size.encoded
    assert 0 <= Costs(space, Budget(1, "file")).total(params) - size.file < 2000
    one, two = (f for f in (value.replace("*", "+").split("+")[i] for i in (0, -1)))
    n = int(value.split("*")[1].split("+")[0]) if "*" in value else count
    by_hand = 65536 * (
        min(n, count) * FORMATS[one].bits / 8 + max(count - n, 0) * FORMATS[two].bits / 8
    )
    for bounds, slack in (("weights", 0), ("file", 160 if "*" in value and count > n else 0)):
        found = Costs(space, Budget(1, bounds)).group(DOWN, value, count)
        assert 0 <= found - by_hand <= slack


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("target", TARGET_NAMES)
def test_floor(spaces, target, bounds):
    space = spaces[target]
    floor = space.smallest.used(space.layout, Budget(1, bounds))
    check_budget(space, Budget(floor, bounds))
    under = Budget(floor - 1, bounds)
    with pytest.raises(BudgetError) as caught:
        check_budget(space, under)
    assert f"{floor - 1:,} bytes ({bounds}) is under the floor of {floor:,}" in str(caught.value)
    assert "with 6 experts per layer" in str(caught.value)
    assert "lower [experts] minimum or loosen pins" in str(caught.value)
    bits = float(re.search(r"([\d.]+) (?:bits|or more)", str(caught.value))[1])
    size = re.search(r"budget ([\d.]+\wiB)", str(caught.value))[1]
    n_weights = space.layout.inventory.n_searched_weights
    least = parse_bytes(size) if bounds == "file" else int(bits * n_weights / 8)
    check_budget(space, Budget(least, bounds))
    with pytest.raises(BudgetError):
        check_budget(space, Budget(least - n_weights // 400, bounds))
    params = space.complete(space.params(space.largest))
    with pytest.raises(BudgetError, match="is under the floor"):
        make_feasible(space, Costs(space, under), params, lambda name, value: 0.0)
    at = make_feasible(space, Costs(space, Budget(floor, bounds)), params, lambda name, value: 0.0)
    assert space.allocation(at).used(space.layout, Budget(floor, bounds)) <= floor
    with pytest.raises(BudgetError, match="needed a positive size"):
        check_budget(space, Budget(0, bounds))
