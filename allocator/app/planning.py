"""The sizes of a model, and first allocations for a device, from its `config.json` alone.

In: an inventory by shapes, a device budget, a prior. Out: a `Plan`: parameters, floor and ceiling
in each target, and an allocation for each of some retained counts, itemised. Invariant: bytes are
those that a search counts. Losses come from priors, so they are predictions and never measurements.
The experts that a planned allocation retains are placeholders, since no ranking is known.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from allocator.checkpoint.inventory import MXFP4, Inventory
from allocator.decision.allocation import Allocation
from allocator.decision.baselines import HAND_COUNTS, hand_rule
from allocator.decision.budget import Budget
from allocator.decision.pricing import extremes
from allocator.decision.search_space import Experts, SearchSpace, bind
from allocator.decision.space import Space
from allocator.errors import BudgetError, SpaceError, TargetError
from allocator.families import Role
from allocator.families.config import quantization_method
from allocator.files.atomic import write_whole
from allocator.files.outputs import check_output_file
from allocator.prediction.priors import Prior
from allocator.prediction.solver import solve
from allocator.prediction.surrogate import Surrogate
from allocator.targets import TARGETS, Layout, target_named
from allocator.targets.device_memory import DeviceMemory

RUNTIME = next(target.name for target in TARGETS.values() if target.predicts_memory)
"""The target whose runtime's memory is known."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A model in numbers; parameters without those of multi-token prediction and without padding.

    Attributes:
        family: transformers' name of the architecture.
        parameters: in all.
        active: parameters that a token passes through, embedding and head counted whole.
        embedding: active parameters in the embedding, of which a token reads one row.
        nextn: parameters of multi-token prediction, which no target stores.
        layers: of the decoder.
        moe_layers: layers with routed experts.
        experts: routed experts per MoE layer.
        experts_used: routed experts per token.
    """

    family: str
    parameters: int
    active: int
    embedding: int
    nextn: int
    layers: int
    moe_layers: int
    experts: int
    experts_used: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the most bytes of a target's tensor data at a retained count.

    Attributes:
        target: its name.
        experts: retained, in every MoE layer.
        floor: bytes with every group in its smallest format.
        ceiling: bytes with every group in its largest.
    """

    target: str
    experts: int
    floor: int
    ceiling: int


@dataclass(frozen=True, slots=True)
class PlannedAllocation:
    """An allocation of a plan, with its bytes and expected loss.

    Attributes:
        name: `first` (least expected loss within the budget), `floor` (where nothing fits), `hand
            rule`, or `first, hand rule's bytes`.
        experts: retained, in every MoE layer.
        memory: bytes on the device.
        spare: bytes that the budget leaves; negative where it does not fit.
        fits: whether it is within the memory, and within the bytes that a token may read.
        token_bytes: bytes that a decoded token reads at full context.
        tokens_per_second: most that the bandwidth allows; None where the bandwidth is unknown.
        loss: expected loss, nats per token; None where it is unknown: the prior's space does not
            hold the allocation, or experts are pruned and the prior knows nothing of pruning.
        allocation: the decision, with placeholders for experts.
    """

    name: str
    experts: int
    memory: DeviceMemory
    spare: int
    fits: bool
    token_bytes: int
    tokens_per_second: float | None
    loss: float | None
    allocation: Allocation


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of a model, and first allocations.

    Attributes:
        summary: the model.
        bounds: per target, at all experts, at the asked counts, and at the least that a search
            offers.
        candidates: allocations per count, largest first; none without a budget.
        notes: caveats of the figures.
    """

    summary: Summary
    bounds: tuple[Bounds, ...]
    candidates: tuple[PlannedAllocation, ...]
    notes: tuple[str, ...]


def plan(
    inventory: Inventory,
    *,
    prior: Prior,
    budget: Budget | None = None,
    counts: Sequence[int] = (),
    kv_format: str | None = None,
    micro_batch: int | None = None,
) -> Plan:
    """Returns what is known of a model before its weights are fetched.

    Args:
        inventory: by shapes (`planned_inventory`), or read.
        prior: expected losses.
        budget: a device's; without a budget there are no candidates.
        counts: retained experts per MoE layer; by default all, and the shares of `HAND_COUNTS`.
        kv_format: of keys and values; the runtime's default if None.
        micro_batch: tokens computed at once; the runtime's default if None.

    Raises:
        SpaceError: if the router cannot serve a count.
        TargetError: if the runtime does not store keys and values so.
    """
    chosen = tuple(dict.fromkeys(counts)) or _usual_counts(inventory)
    chosen = tuple(sorted(chosen, reverse=True))
    _check_counts(inventory, chosen)
    layouts, notes = {}, []
    for target in TARGETS.values():
        try:
            layouts[target.name] = target.layout(inventory)
        except TargetError as error:
            notes.append(f"no figures for target {target.name}: {error}")
    least = _least_count(inventory)
    offered = sorted({inventory.n_experts, least, *chosen}, reverse=True)
    sizes = Plan(
        summary=summarised(inventory),
        bounds=tuple(_bounds(x, c) for x in layouts.values() for c in offered),
        candidates=(),
        notes=(
            *notes,
            *dict.fromkeys(note for x in layouts.values() for note in x.notes),
            *_quantized(inventory),
            "floor and ceiling are tensor data, without a file's header",
        ),
    )
    if budget is None or RUNTIME not in layouts:
        return sizes
    spec = SearchSpace(
        schema=1,
        kv_format=None if kv_format is None else [kv_format],
        micro_batch=None if micro_batch is None else [micro_batch],
    )
    candidates = tuple(
        c if prior.pruned or count == inventory.n_experts else replace(c, loss=None)
        for count in chosen
        for c in _candidates(spec, layouts[RUNTIME], prior, budget, count)
    )
    return replace(sizes, candidates=candidates, notes=(*sizes.notes, *_caveats(inventory, prior)))


def summarised(inventory: Inventory) -> Summary:
    """Returns a model in numbers."""
    sizes: dict[str, int] = {"": 0, "nextn": 0, "routed": 0, "embedding": 0}
    for tensor in (each.as_stored for each in inventory.tensors.values()):
        nextn = tensor.role is Role.NEXTN
        sizes["nextn" if nextn else ""] += prod(tensor.shape)
        if not nextn and (tensor.role.is_expert or tensor.role is Role.EXPERT_BIAS):
            sizes["routed"] += prod(tensor.shape)
        if tensor.role is Role.EMBEDDING:
            sizes["embedding"] += prod(tensor.shape)
    used, n = inventory.experts_used, inventory.n_experts
    return Summary(
        family=inventory.family.model_type,
        parameters=sizes[""],
        active=sizes[""] - sizes["routed"] * (n - used) // n,
        embedding=sizes["embedding"],
        nextn=sizes["nextn"],
        layers=inventory.n_layers,
        moe_layers=len(inventory.moe_layers),
        experts=n,
        experts_used=used,
    )


def first_paths(plan: Plan, folder: Path) -> dict[Path, PlannedAllocation]:
    """Returns the paths where `write_first` writes the allocations that fit.

    Raises:
        BudgetError: if no allocation of the plan fits.
        OutputError: if a path is taken by something else.
    """
    first = {folder / f"first-{c.experts}.json": c for c in plan.candidates if c.name == "first"}
    if not first:
        raise BudgetError(
            "no allocation to write: none of the counts fits the device, or none was given; give "
            "--device-memory, or fewer --experts"
        )
    for path in first:
        check_output_file("--out", path)
    return first


def write_first(plan: Plan, folder: Path) -> tuple[Path, ...]:
    """Writes the allocations that fit, as `first-<experts>.json`.

    The experts that they retain are placeholders: the first of every router group.

    Returns:
        The paths.

    Raises:
        AllocatorError: if no allocation fits, or a path is taken by something else.
    """
    first = first_paths(plan, folder)
    for path, candidate in first.items():
        text = json.dumps(candidate.allocation.to_json(), indent=1) + "\n"
        write_whole(path, text.encode())
    return tuple(first)


# -- what is asked for


def _usual_counts(inventory: Inventory) -> tuple[int, ...]:
    groups, least = inventory.expert_groups, inventory.least_experts(inventory.experts_used)
    shares = (round(s * inventory.n_experts / groups) * groups for s in HAND_COUNTS)
    return tuple(dict.fromkeys(max(n, least) for n in shares))


def _least_count(inventory: Inventory) -> int:
    """The least count that a search offers by default."""
    groups = inventory.expert_groups
    least = max(inventory.n_experts // 4, inventory.least_experts(inventory.experts_used))
    return -(-least // groups) * groups


def _check_counts(inventory: Inventory, counts: Sequence[int]) -> None:
    groups, least = inventory.expert_groups, inventory.least_experts(inventory.experts_used)
    for count in counts:
        if not least <= count <= inventory.n_experts or count % groups:
            raise SpaceError(
                f"{count} experts: the router needs {least}..{inventory.n_experts}"
                + (f", in multiples of {groups}" if groups > 1 else "")
            )


# -- bytes


def _bounds(layout: Layout, count: int) -> Bounds:
    return Bounds(layout.target, count, *extremes(layout, target_named(layout.target), count))


# -- candidates


def _candidates(
    spec: SearchSpace, layout: Layout, prior: Prior, budget: Budget, count: int
) -> list[PlannedAllocation]:
    experts = Experts(minimum=count, maximum=count)
    space = bind(_with_experts(spec, experts), layout, None)
    surrogate = prior.surrogate(space)
    planned = [_first(surrogate, budget) or _priced("floor", surrogate, budget, space.smallest)]
    share = count / layout.inventory.n_experts
    for _, by_hand in hand_rule(layout, space.rankings, retained=(share,)):
        by_hand = replace(
            by_hand, kv_format=space.kv_formats[0], micro_batch=space.micro_batches[0]
        )
        hand = _priced("hand rule", surrogate, budget, by_hand)
        same = replace(budget, nbytes=hand.memory.total)
        equal = _first(surrogate, same, name="first, hand rule's bytes")
        planned += [hand] if equal is None else [hand, _against(equal, budget)]
    return planned


def _with_experts(spec: SearchSpace, experts: Experts) -> SearchSpace:
    return SearchSpace(
        schema=1, experts=experts, kv_format=spec.kv_format, micro_batch=spec.micro_batch
    )


def _first(
    surrogate: Surrogate, budget: Budget, *, name: str = "first"
) -> PlannedAllocation | None:
    """The allocation of least expected loss within a budget; None if no allocation fits."""
    try:
        params = solve(surrogate, budget)
    except BudgetError:
        return None
    return _priced(name, surrogate, budget, surrogate.space.allocation(params))


def _against(candidate: PlannedAllocation, budget: Budget) -> PlannedAllocation:
    spare = budget.nbytes - candidate.memory.total
    return replace(candidate, spare=spare, fits=candidate.fits and spare >= 0)


def _priced(
    name: str, surrogate: Surrogate, budget: Budget, allocation: Allocation
) -> PlannedAllocation:
    space: Space = surrogate.space
    layout, workload = space.layout, budget.workload
    assert workload is not None
    memory = allocation.device_memory(layout, workload)
    read = allocation.token_bytes(layout, workload.context)
    try:
        loss = surrogate.predict(space.complete(space.params(allocation)))
    except SpaceError:  # a fallback that no search offers
        loss = None
    return PlannedAllocation(
        name=name,
        experts=max(allocation.counts.values()),
        memory=memory,
        spare=budget.nbytes - memory.total,
        fits=allocation.fits(layout, budget),
        token_bytes=read,
        tokens_per_second=workload.tokens_per_second(read),
        loss=loss,
        allocation=allocation,
    )


def _quantized(inventory: Inventory) -> tuple[str, ...]:
    """A note on quantized weights in config.json, where the plan takes other weights."""
    method = quantization_method(inventory.config)
    if method in (None, "fp8") or any(t.dtype == MXFP4 for t in inventory.tensors.values()):
        return ()
    return (
        f"config.json has quant_method {method!r}: planned as the bfloat16 checkpoint "
        "that it was made from",
    )


def _caveats(inventory: Inventory, prior: Prior) -> tuple[str, ...]:
    pruning = (
        "they include pruning"
        if prior.pruned
        else "what pruning costs is unknown, so rows with fewer experts have none"
    )
    groups = inventory.expert_groups
    family = inventory.family
    return (
        *family.plan_notes(family.text_config(inventory.config)),
        f"losses are predictions, not measurements: {prior.source}; {pruning}",
        "which experts are kept is a placeholder, "
        + (f"the first of each of {groups} router groups" if groups > 1 else "those from 0 on")
        + ": no ranking is known without weights",
    )
