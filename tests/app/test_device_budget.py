"""The whole device as the limit: sums made here, and the optimum against brute force."""

import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from allocator.app.study_file import BudgetSpec, DeviceBudgetSpec, chosen_budget
from allocator.decision.allocation import Allocation
from allocator.decision.budget import Budget
from allocator.decision.costs import Costs, check_budget
from allocator.decision.feasibility import make_feasible
from allocator.decision.front import Point, front
from allocator.decision.search_space import Experts, SearchSpace, bind
from allocator.errors import AllocatorError, BudgetError, SpaceError, StudyError, TargetError
from allocator.prediction.solver import solve, solve_under
from allocator.prediction.surrogate import from_profile
from allocator.targets import GGUF
from allocator.targets.device_memory import DeviceMemory, Workload
from allocator.targets.gguf.memory import kv_read_bytes

FREE = {  # group: formats left
    "layers.1.experts.down": ("Q6_K", "IQ3_S", "IQ1_S"),
    "layers.1.experts.up": ("Q4_K", "IQ2_XXS"),
    "layers.2.experts.gate": ("Q4_K", "IQ2_XXS"),
    "layers.3.shared.down": ("Q8_0", "Q4_K"),
    "embedding": ("Q8_0", "Q4_K"),
}
SETTINGS = {
    "experts_used": {4: 0.0, 3: 0.02, 2: 0.3},
    "kv_format": {"f16": 0.0, "q8_0": 0.004, "q4_0": 0.05},
}
SPACE = SearchSpace(
    schema=1,
    experts=Experts(minimum=22),
    experts_used=[2, 3, 4],
    kv_format=["q8_0", "f16", "q4_0"],
    micro_batch=[32, 512],
)
WORK = Workload(context=256, sequences=8, reserve=1 << 20)


@pytest.fixture(scope="module")
def surrogate(layouts, profiles):
    space = bind(SPACE, layouts["gguf"], profiles["gguf"].saliency)
    formats = {n: FREE.get(n, (space.formats[n][3],)) for n in space.formats}
    return from_profile(profiles["gguf"], replace(space, formats=formats), SETTINGS)


def everything(space):
    for values in itertools.product(*space.choices.values()):
        yield dict(zip(space.choices, values, strict=True))


@pytest.fixture(scope="module")
def table(surrogate):
    """Of every choice: its params, memory, bytes read per token, loss but for the jumps, jumps."""
    space = surrogate.space
    params = list(everything(space))
    allocations = [space.allocation(p) for p in params]
    memory = np.array([a.device_memory(space.layout, WORK).total for a in allocations])
    reads = np.array([a.token_bytes(space.layout, WORK.context) for a in allocations])
    losses = np.array([surrogate.losses(p) for p in params])
    return params, memory, reads, losses.sum(axis=1), losses @ surrogate.coupling_values


def test_the_space_orders_and_offers_settings(surrogate):
    space = surrogate.space
    assert space.kv_formats == ("f16", "q8_0", "q4_0")
    assert space.micro_batches == (512, 32)
    assert {"experts_used", "kv_format", "micro_batch"} <= set(space.distributions)
    some = space.allocation({**next(everything(space)), "kv_format": "q4_0", "micro_batch": 32})
    assert (some.kv_format, some.micro_batch) == ("q4_0", 32)
    assert space.allocation(space.params(some)) == some
    assert Allocation.from_json(some.to_json()) == some
    assert "micro_batch" not in replace(some, micro_batch=None).to_json()


def test_memory_is_the_sum_of_what_is_listed(surrogate, layouts):
    space, layout = surrogate.space, layouts["gguf"]
    allocation = space.largest
    memory = allocation.device_memory(layout, WORK)
    assert isinstance(memory, DeviceMemory)
    size = allocation.nbytes(layout)
    assert (
        memory.weights
        == size.encoded + size.full_precision + size.padding
        == size.file - size.header
    )
    cells, row = 8 * 256, 2 * (128 + 32)  # latent and rotated key, two bytes each
    assert memory.kv_cache == 6 * cells * row
    assert memory.reserve == 1 << 20
    assert memory.total == (
        memory.weights + memory.kv_cache + memory.compute + memory.overhead + memory.reserve
    )
    assert allocation.used(layout, Budget(1, "device", WORK)) == memory.total


@pytest.mark.parametrize("noise", [0.003, 0.1, 5.0])
@pytest.mark.parametrize("share", [0, 0.02, 0.2, 0.5, 0.8, 1])
def test_the_solution_is_brute_force_over_weights_and_settings(surrogate, table, share, noise):
    params, memory, _, smooth, squared = table
    budget = Budget(int(np.quantile(memory, share)), "device", WORK)
    costs = Costs(surrogate.space, budget)
    found = solve_under(surrogate, costs, noise)
    linear = smooth + squared / (2 * noise)
    here = params.index(found)
    assert memory[here] <= budget.nbytes
    assert costs.total(found) == memory[here]
    best = linear[memory <= budget.nbytes].min()
    assert linear[here] == pytest.approx(best, rel=1e-12)


def test_what_room_is_left_goes_to_the_micro_batch(surrogate, table):
    _, memory, *_ = table
    found = solve(surrogate, Budget(int(memory.max()), "device", WORK))
    assert found["micro_batch"] == 512
    assert (found["experts_used"], found["kv_format"]) == (4, "f16")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4, 0.8])
def test_a_limit_on_reading_is_held_and_costs_little(surrogate, table, share):
    params, memory, reads, smooth, squared = table
    limit = int(np.quantile(reads, share))
    work = replace(WORK, bandwidth=limit * 10, min_tokens_per_second=10)
    budget = Budget(int(np.quantile(memory, 0.5)), "device", work)
    assert budget.token_bytes == limit
    found = solve(surrogate, budget)
    here = params.index(found)
    assert memory[here] <= budget.nbytes
    assert reads[here] <= limit
    total = smooth + np.sqrt(squared)
    best = total[(memory <= budget.nbytes) & (reads <= limit)].min()
    assert total[here] <= 1.03 * best


def test_reading_is_counted_as_used(surrogate, layouts):
    space, layout = surrogate.space, layouts["gguf"]
    some = space.allocation(
        {n: v[0] for n, v in space.choices.items()} | {"experts_used": 3, "kv_format": "q8_0"}
    )
    expected = 0
    for name, group in layout.groups.items():
        nbytes = some.stored(layout).group(name)
        if group.role.is_expert:
            nbytes = -(-nbytes * 3 // some.counts[group.layer])
        expected += nbytes  # the embedding is the head too
    expected += sum(k.nbytes(some.counts.get(k.layer, 0)) for k in layout.full_precision)
    expected += kv_read_bytes(layout.inventory, kv_format="q8_0", context=256)
    assert some.token_bytes(layout, 256) == expected


@pytest.fixture(scope="module")
def sizes(surrogate, table):
    """Of every choice, what counts against a limit beside the device."""
    space = surrogate.space
    found = [space.allocation(p).nbytes(space.layout) for p in table[0]]
    return {kind: np.array([getattr(s, of) for s in found])
            for kind, of in (("file", "file"), ("weights", "encoded"))}  # fmt: skip


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize(("share", "other"), [(0.5, 0), (0.5, 0.2), (0.2, 0.5), (1, 0.6), (0.3, 1)])
def test_the_solution_is_brute_force_under_two_limits(
    surrogate, table, sizes, bounds, share, other
):
    """The second may count no padding, none of which is in these groups."""
    params, memory, _, smooth, squared = table
    beside = Budget(int(np.quantile(sizes[bounds], other)), bounds)
    budget = Budget(int(np.quantile(memory, share)), "device", WORK, beside)
    costs = Costs(surrogate.space, budget)
    linear = smooth + squared / 0.2
    both = (memory <= budget.nbytes) & (sizes[bounds] <= beside.nbytes)
    here = params.index(solve_under(surrogate, costs, 0.1))
    assert both[here]
    assert linear[here] == pytest.approx(linear[both].min(), rel=1e-12)
    assert costs.spare_bytes(params[here]) == min(
        budget.nbytes - memory[here], beside.nbytes - sizes[bounds][here]
    )


def test_either_limit_binds(surrogate, table, sizes):
    params, memory, *_ = table
    alone = Budget(int(np.quantile(memory, 0.5)), "device", WORK)
    plain = params.index(solve(surrogate, alone))
    for bounds, nbytes in sizes.items():
        loose, tight = (Budget(int(nbytes[plain]) - less, bounds) for less in (0, 1))
        assert solve(surrogate, replace(alone, beside=loose)) == params[plain]
        here = params.index(solve(surrogate, replace(alone, beside=tight)))
        assert nbytes[here] < nbytes[plain]


@pytest.mark.parametrize("bounds", ["file", "weights"])
@pytest.mark.parametrize("seed", range(2))
def test_repair_holds_what_is_beside(surrogate, table, sizes, bounds, seed):
    params, memory, *_ = table
    space, rng = surrogate.space, np.random.default_rng(seed)
    beside = Budget(int(np.quantile(sizes[bounds], 0.2)), bounds)
    budget = Budget(int(np.quantile(memory, 0.4)), "device", WORK, beside)
    costs = Costs(space, budget)
    for i in rng.integers(len(params), size=20):
        loss = surrogate.loss_at(params[i])
        repaired = make_feasible(space, costs, params[i], loss)
        here = params.index(repaired)
        assert memory[here] <= budget.nbytes
        assert sizes[bounds][here] <= beside.nbytes
        assert space.allocation(repaired).fits(space.layout, budget)
        assert make_feasible(space, costs, repaired, loss) == repaired
        if memory[i] <= budget.nbytes and sizes[bounds][i] <= beside.nbytes:
            assert repaired == params[i]


def test_targets_lie_between_floor_and_both_limits(surrogate, table, sizes):
    space, memory = surrogate.space, table[1]
    least, most = int(sizes["weights"].min()), int(sizes["weights"].max())
    beside = Budget(most, "weights")
    budget = Budget(int(memory.max()), "device", WORK, beside)
    assert Costs(space, budget).budget_at(1) == budget
    half = Costs(space, budget).budget_at(0.5)
    assert half.beside.nbytes == least + (most - least) // 2
    assert half.nbytes == memory.min() + (memory.max() - memory.min()) // 2
    assert str(half) == f"{half.nbytes} (device) and {half.beside.nbytes} (weights)"
    check_budget(space, Costs(space, budget).budget_at(0))
    with pytest.raises(BudgetError, match=rf"{least - 1:,} bytes \(weights\) is under the floor"):
        check_budget(space, replace(budget, beside=Budget(least - 1, "weights")))


@pytest.mark.parametrize("seed", range(4))
def test_repair_holds_both_limits(surrogate, table, seed):
    params, memory, reads, *_ = table
    space, rng = surrogate.space, np.random.default_rng(seed)
    limit = int(np.quantile(reads, 0.2))
    work = replace(WORK, bandwidth=limit, min_tokens_per_second=1)
    budget = Budget(int(np.quantile(memory, 0.2)), "device", work)
    costs = Costs(space, budget)
    for i in rng.integers(len(params), size=20):
        loss = surrogate.loss_at(params[i])
        repaired = make_feasible(space, costs, params[i], loss)
        allocation = space.allocation(repaired)
        assert allocation.fits(space.layout, budget)
        assert make_feasible(space, costs, repaired, loss) == repaired
        if space.allocation(params[i]).fits(space.layout, budget) and costs.fits(params[i]):
            assert repaired == params[i]


def test_the_front_has_three_axes():
    points = [
        Point("slow", 10, 0.1, 50), Point("fast", 10, 0.2, 40), Point("worse", 12, 0.2, 45),
        Point("large", 20, 0.05, 60), Point("same", 10, 0.1, 50),
    ]  # fmt: skip
    assert {p.name for p in front(points)} == {"slow", "fast", "large"}


# -- refusals


def test_the_floor_is_itemised(surrogate, table):
    floor = int(table[1].min())
    with pytest.raises(
        BudgetError, match=r"--device-memory .*--context.*keys and values.*compute buffers"
    ):
        check_budget(surrogate.space, Budget(floor - 1, "device", WORK))
    check_budget(surrogate.space, Budget(floor, "device", WORK))
    slow = replace(WORK, bandwidth=1000, min_tokens_per_second=1)
    with pytest.raises(BudgetError, match=r"may read 1,000 bytes.*--min-tokens-per-second"):
        check_budget(surrogate.space, Budget(1 << 40, "device", slow))


def test_our_own_loader_has_no_device_budget(spaces):
    space = spaces["safetensors"]
    with pytest.raises(TargetError, match="use target gguf"):
        check_budget(space, Budget(1 << 30, "device", WORK))
    for changes, said in (({"kv_format": "q8_0"}, "kv_format"), ({"micro_batch": 8}, "micro_")):
        with pytest.raises(TargetError, match=said):
            replace(space.largest, **changes).check(space.layout)
    with pytest.raises(TargetError, match="or target gguf"):
        bind(SearchSpace(schema=1, kv_format=["f16", "q8_0"]), space.layout, None)


@pytest.mark.parametrize(
    "changes", [{"kv_format": "q5_k"}, {"kv_format": "q8_0/x"}, {"micro_batch": 0}]
)
def test_llama_cpp_has_no_such_setting(surrogate, changes):
    allocation = surrogate.space.largest
    with pytest.raises((TargetError, SpaceError), match=next(iter(changes))):
        replace(allocation, **changes).check(surrogate.space.layout)


PRESET = 'schema = 1\nname = "x"\nmemory = "1GiB"\nbandwidth = "10GB"\nsource = "here"\n'


def test_a_budget_is_the_command_lines_over_the_studys(tmp_path):
    (tmp_path / "x.toml").write_text(PRESET)
    known = BudgetSpec(device=DeviceBudgetSpec(memory="2GiB", context=512, bandwidth="1GB"))
    budget = chosen_budget(known, tmp_path)
    assert budget == Budget(2 << 30, "device", Workload(context=512, bandwidth=10**9))
    budget = chosen_budget(
        known, tmp_path, BudgetSpec(device=DeviceBudgetSpec(reserve="1MiB", sequences=2))
    )
    assert budget.workload == Workload(512, 2, 1 << 20, 10**9)
    budget = chosen_budget(known, tmp_path, BudgetSpec(device=DeviceBudgetSpec(preset="x.toml")))
    assert (budget.nbytes, budget.workload) == (1 << 30, Workload(512, bandwidth=10**10))
    assert chosen_budget(known, tmp_path, BudgetSpec(weights="5MB")) == Budget(5_000_000, "weights")
    # what is no limit leaves the study's
    both = msgspec.structs.replace(known, file="5MB")
    found = chosen_budget(both, tmp_path, BudgetSpec(device=DeviceBudgetSpec(bandwidth="3GB")))
    workload = Workload(512, bandwidth=3 * 10**9)
    assert found == Budget(2 << 30, "device", workload, Budget(5_000_000, "file"))
    found = chosen_budget(both, tmp_path, BudgetSpec(device=DeviceBudgetSpec(memory="1GiB")))
    assert found == Budget(1 << 30, "device", Workload(512, bandwidth=10**9))
    found = chosen_budget(
        both, tmp_path, BudgetSpec(weights="4MB", device=DeviceBudgetSpec(context=64))
    )
    workload = Workload(64, bandwidth=10**9)
    assert found == Budget(2 << 30, "device", workload, Budget(4_000_000, "weights"))
    # a limit beside the device: the command line's, or the study's
    device = DeviceBudgetSpec(sequences=3)
    for found in (
        chosen_budget(known, tmp_path, BudgetSpec(device=device, file="5MB")),
        chosen_budget(msgspec.structs.replace(known, file="5MB", device=device.over(known.device)),
                      tmp_path),
    ):  # fmt: skip
        beside = Budget(5_000_000, "file")
        assert found == Budget(2 << 30, "device", Workload(512, 3, 0, 10**9), beside)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (DeviceBudgetSpec(), "without memory"),
        (DeviceBudgetSpec(memory="1GiB", context=0), "context 0"),
        (DeviceBudgetSpec(memory="1GiB", reserve="-1"), "'-1': needed a size such as"),
        (DeviceBudgetSpec(memory="1GiB", min_tokens_per_second=1), "needs the device's bandwidth"),
        (DeviceBudgetSpec(memory="1GiB", bandwidth="1GB", min_tokens_per_second=0), "positive"),
        (DeviceBudgetSpec(preset="none.toml"), "no such file"),
    ],
)
def test_what_makes_no_sense_of_a_device_is_said(tmp_path, spec, said):
    with pytest.raises(AllocatorError, match=said):
        spec.budget(tmp_path)


def test_file_and_weights_are_refused_together(tmp_path):
    device = DeviceBudgetSpec(memory="1GiB")
    for beside in ({}, {"device": device}):
        given = {"file": "1GB", "weights": "1GB", **beside}
        with pytest.raises(StudyError, match="needed one budget"):
            chosen_budget(BudgetSpec(), tmp_path, BudgetSpec(**given))
        with pytest.raises(StudyError, match="needed one budget"):
            chosen_budget(BudgetSpec(**given), tmp_path)


def test_a_graph_that_is_not_known_bounds_files_alone(layouts):
    known = layouts["gguf"].inventory
    gguf = replace(known.family.for_gguf(), graph=None)
    inventory = replace(known, family=replace(known.family, gguf=gguf))
    space = bind(SearchSpace(schema=1), GGUF.layout(inventory), None)
    check_budget(space, Budget(1 << 40, "file"))
    with pytest.raises(TargetError, match=r"to compute \w+ is not known.*--budget") as refused:
        check_budget(space, Budget(1 << 40, "device", WORK))
    assert "\n" not in str(refused.value)
