"""What each choice of a space costs under a budget, as a sum over independent parts.

In: a space, a budget, params. Out: bytes. Invariant: the bytes of complete params are at least
those of the allocation that they propose, so params within the budget are an allocation within it.
Both are equal where no header depends on the choices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from allocator.checkpoint.inventory import FLOATS
from allocator.decision.budget import Budget
from allocator.decision.mixes import split
from allocator.decision.parameters import EXPERTS_USED, FormatOf, Params, SettingOf, parse
from allocator.decision.pricing import (
    full_precision_reads,
    group_reads,
    part_bytes,
)
from allocator.decision.space import Space
from allocator.errors import BudgetError
from allocator.targets import FullPrecision, Target, target_named
from allocator.targets.device_memory import RuntimeSettings

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Measure = Callable[[Params, list[str]], int]
"""Complete params, and names of some, to the bytes of what these decide."""


class Limit(NamedTuple):
    """A limit on bytes, and how the bytes that count against it are measured.

    Attributes:
        budget: whose limit it is.
        nbytes: the limit, less the bytes that no choice changes.
        measure: bytes of what some params decide.
    """

    budget: Budget
    nbytes: int
    measure: Measure


class Costs:
    """Bytes of each choice under a budget.

    The constant part, and what a mix adds to a header, are upper bounds where a header's length
    depends on the choices.

    Attributes:
        space: the choices.
        budget: the limit.
        beside: costs under the second limit, if there is one.
    """

    def __init__(self, space: Space, budget: Budget) -> None:
        self.space = space
        self.budget = budget
        self.beside = None if budget.beside is None else Costs(space, budget.beside)
        self._target: Target = target_named(space.layout.target)
        self._padded = budget.counts_padding
        self._part_overheads: dict[tuple[str, str], int] = {}
        self._runtime_bytes: dict[tuple[RuntimeSettings, int], int] = {}

    # -- one choice

    def group(self, name: str, value: str, count: int) -> int:
        """Returns the bytes of a group in a format or mix where its layer retains `count`."""
        group = self.space.layout.groups[name]
        parts = part_bytes(group.shape_with(count), value)
        if not self._padded:
            return sum(parts)
        nbytes = sum(self._target.padded(n) for n in parts)
        if len(parts) == 1 or not self.budget.counts_header:
            return nbytes
        key = name, value
        if key not in self._part_overheads:
            names = [fmt for fmt, _ in split(value, count)]
            self._part_overheads[key] = self._target.parts_overhead(group, names)
        return nbytes + self._part_overheads[key]

    def layer(self, layer: int, count: int) -> int:
        """Returns the bytes of a layer's router where the layer retains `count`."""
        if not self._padded:
            return 0
        return sum(self._full_precision(k, count) for k in self._routers.get(layer, ()))

    @cached_property
    def _routers(self) -> dict[int, list[FullPrecision]]:
        routers: dict[int, list[FullPrecision]] = {}
        for tensor in self.space.layout.full_precision:
            if tensor.role.has_row_per_expert and tensor.layer is not None:
                routers.setdefault(tensor.layer, []).append(tensor)
        return routers

    def _full_precision(self, tensor: FullPrecision, count: int) -> int:
        nbytes = self._target.full_precision_bytes(self.space.layout, tensor, count)
        return self._target.padded(nbytes)

    def runtime_bytes(self, settings: RuntimeSettings, n_experts: int) -> int:
        """Returns the bytes of a device beside the weights.

        Args:
            settings: of the runtime.
            n_experts: the most that a layer retains.
        """
        if not self.budget.counts_runtime:
            return 0
        key = settings, n_experts
        if key not in self._runtime_bytes:
            assert self.budget.workload is not None
            self._runtime_bytes[key] = self._target.device_memory(
                self.space.layout.inventory,
                self.budget.workload,
                settings,
                weights=0,
                n_experts=n_experts,
            ).total
        return self._runtime_bytes[key]

    @cached_property
    def constant(self) -> int:
        """Bytes that no choice changes."""
        if not self._padded:
            return 0
        layout = self.space.layout
        norms = (k for k in layout.full_precision if not k.role.has_row_per_expert)
        header = self.space.largest.stored(layout).header if self.budget.counts_header else 0
        return header + sum(self._full_precision(k, 0) for k in norms)

    # -- complete params

    def total(self, params: Params) -> int:
        """Returns the bytes of complete params; at least the bytes that are written."""
        return self.constant + self.affected(params, list(self.space.choices))

    def affected(self, params: Params, names: list[str]) -> int:
        """Returns the bytes that some of complete params decide.

        These are groups, routers, and the memory beside weights.
        """
        keys, space = [parse(n) for n in names], self.space
        layers = [x for n in names for x in space.count_params.get(n, ())]
        groups = {key.group for key in keys if isinstance(key, FormatOf)}
        groups |= {g for x in layers for g in space.expert_groups[x]}
        counts = space.layer_counts(params)
        encoded = sum(self._group_of(g, params, counts) for g in groups)
        routers = sum(self.layer(x, counts[x]) for x in layers)
        runtime = 0
        if layers or any(isinstance(key, SettingOf) for key in keys):
            settings = space.runtime_settings(params)
            runtime = self.runtime_bytes(settings, max(counts.values()))
        return encoded + routers + runtime

    def _group_of(self, group: str, params: Params, counts: dict[int, int]) -> int:
        value = params[self.space.format_params[group]]
        return self.group(group, value, counts.get(self.space.layer_of[group], 0))

    def capacity(self, settings: RuntimeSettings, count: int) -> int:
        """Returns the bytes for groups and routers where every layer retains `count`.

        Memory beside the weights of a device does not depend on their formats, so a second limit
        only lowers the capacity. The second limit may count less of groups and routers than the
        first does (no routers, no padding). Its capacity is raised by the routers; up to 31 bytes
        of padding a group stay unused.
        """
        capacity = self.budget.nbytes - self.constant - self.runtime_bytes(settings, count)
        if self.beside is None:
            return capacity
        layers = self.space.layout.layers
        uncounted = sum(self.layer(x, count) - self.beside.layer(x, count) for x in layers)
        return min(capacity, self.beside.capacity(settings, count) + uncounted)

    def spare_bytes(self, params: Params) -> int:
        """Returns the bytes that complete params leave of the tightest limit; negative if over."""
        return min(c.budget.nbytes - c.total(params) for c in self._each)

    def fits(self, params: Params) -> bool:
        """Returns whether complete params are within every limit."""
        return self.reads_fit(params) and self.spare_bytes(params) >= 0

    # -- bytes that decoding a token reads

    def reads(self, name: str, value: str, count: int, experts_used: int) -> int:
        """Returns the bytes that a token reads of a group where its layer retains `count`.

        Args:
            name: of the group.
            value: a format or mix of the group.
            count: retained experts.
            experts_used: routed experts per token.
        """
        layout = self.space.layout
        group = layout.groups[name]
        nbytes = sum(part_bytes(group.shape_with(count), value))
        return group_reads(layout, group, nbytes, experts_used=experts_used, n_experts=count)

    def other_reads(self, count: int, settings: RuntimeSettings) -> int:
        """Returns the bytes that a token reads beside the groups, where layers retain `count`."""
        layout, used = self.space.layout, settings.experts_used
        full_precision = sum(
            full_precision_reads(k, experts_used=used, n_experts=count)
            for k in layout.full_precision
        )
        context = self.budget.context
        return full_precision + self._target.kv_bytes(layout.inventory, settings.kv_format, context)

    def token_bytes(self, params: Params) -> int:
        """Returns the bytes that a token reads of complete params; at least the actual bytes."""
        return self.affected_reads(params, list(self.space.choices))

    def affected_reads(self, params: Params, names: list[str]) -> int:
        """Returns the bytes that a token reads of what some of complete params decide."""
        keys, space = [parse(n) for n in names], self.space
        counts, settings = space.layer_counts(params), space.runtime_settings(params)
        groups = {key.group for key in keys if isinstance(key, FormatOf)}
        if EXPERTS_USED in keys:
            groups = set(space.formats)
        read = 0
        for group in groups:
            value, count = params[space.format_params[group]], counts.get(space.layer_of[group], 0)
            read += self.reads(group, value, count, settings.experts_used)
        if all(isinstance(key, FormatOf) for key in keys):
            return read
        return read + self.other_reads(max(counts.values()), settings)

    def reads_fit(self, params: Params) -> bool:
        """Returns whether a token reads no more of complete params than the budget allows."""
        limit = self.budget.token_bytes
        return limit is None or self.token_bytes(params) <= limit

    # -- limits

    @property
    def _each(self) -> "tuple[Costs, ...]":
        return (self,) if self.beside is None else (self, self.beside)

    @property
    def limits(self) -> Iterable[Limit]:
        """Every limit, the one on reading last.

        The second limit on bytes comes first: memory given up under the device's raises no file's
        bytes.
        """
        for costs in self._each[::-1]:
            yield Limit(costs.budget, costs.budget.nbytes - costs.constant, costs.affected)
        if self.budget.token_bytes is not None:
            yield Limit(self.budget, self.budget.token_bytes, self.affected_reads)

    def budget_at(self, share: float) -> Budget:
        """Returns the budget with every limit on bytes nearer to the floor.

        Args:
            share: of the way from the floor to the limit, or to the ceiling where that is lower.
        """
        budget, space = self.budget, self.space
        floor, ceiling = (
            self.total(space.complete(space.params(end))) for end in (space.smallest, space.largest)
        )
        low = min(floor, budget.nbytes)
        high = budget.nbytes if share == 1 else min(ceiling, budget.nbytes)
        return replace(
            budget,
            nbytes=low + int(share * (high - low)),
            beside=None if self.beside is None else self.beside.budget_at(share),
        )


def check_budget(space: Space, budget: Budget) -> None:
    """Raises an error where a budget is below the smallest allocation.

    Raises:
        BudgetError: if not even the smallest allocation fits, with what it is made of.
        TargetError: if the budget is a device's, and nothing is known of the target's runtime.
    """
    for limit in budget.limits:
        _check_bytes(space, limit)
    if budget.token_bytes is not None:
        _check_token_bytes(space, budget, budget.token_bytes)


def _check_bytes(space: Space, limit: Budget) -> None:
    limit.check_positive()
    smallest, stored = space.smallest, space.smallest.stored(space.layout)
    used = limit.used(stored)
    if used <= limit.nbytes:
        return
    biggest = sorted(space.layout.groups, key=lambda n: -stored.group(n))[:3]
    parts = ", ".join(f"{n} {stored.group(n):,} as {smallest.format_of[n]}" for n in biggest)
    raise BudgetError(
        f"budget of {limit.nbytes:,} bytes ({limit.bounds}) is under the floor of {used:,}: "
        f"{limit.ways_out(stored)}; the floor is {limit.itemised(stored)}, with {space.counts[0]} "
        f"experts per layer (largest: {parts})"
    )


def holds_whole_model(space: Space, budget: Budget) -> bool:
    """Returns whether a budget holds all experts and every tensor unquantized."""
    largest = space.largest
    floats = set(largest.format_of.values()) <= {*FLOATS}
    return floats and budget.admits(largest.stored(space.layout))


def budget_notes(space: Space, budget: Budget) -> tuple[str, ...]:
    """Returns a line on a budget that leaves nothing to decide; none on other budgets."""
    if holds_whole_model(space, budget):
        return ("the budget holds the whole model: nothing needs to be compressed",)
    if budget.admits(space.largest.stored(space.layout)):
        return ("the budget holds every tensor in its largest format that is offered",)
    return ()


def _check_token_bytes(space: Space, budget: Budget, limit: int) -> None:
    read = space.smallest.token_bytes(space.layout, budget.context)
    if read > limit:
        raise BudgetError(
            f"a token may read {limit:,} bytes at most, the smallest allocation reads {read:,} "
            f"({space.experts_used[0]} experts used, keys and values in {space.kv_formats[-1]}); "
            "lower --min-tokens-per-second or --context, or offer fewer experts_used"
        )


@dataclass(frozen=True, eq=False)
class ChoiceBytes:
    """Bytes of every choice of a space that count against one kind of limit.

    Attributes:
        groups: by group, `counts x options`; one row for a group without routed experts.
        routers: by MoE layer, `counts`.
    """

    groups: dict[str, Ints]
    routers: dict[int, Ints]
    _reads: dict[int, dict[str, Floats]] = field(default_factory=dict)

    @classmethod
    def of(cls, costs: Costs) -> "ChoiceBytes":
        """Returns the bytes of every choice under a budget."""
        space = costs.space

        def rows(group: str, values: tuple[Any, ...]) -> Ints:
            counts = space.counts if space.layout.groups[group].role.is_expert else (0,)
            return np.array([[costs.group(group, v, n) for v in values] for n in counts], np.int64)

        return cls(
            {group: rows(group, values) for group, values in space.formats.items()},
            {
                x: np.array([costs.layer(x, n) for n in space.counts], np.int64)
                for x in space.layout.layers
            },
        )

    def reads(self, costs: Costs, experts_used: int) -> dict[str, Floats]:
        """Returns the bytes that a token reads of every choice, by group `counts x options`."""
        if experts_used not in self._reads:
            space = costs.space
            self._reads[experts_used] = {
                g: np.array(
                    [
                        [costs.reads(g, v, n, experts_used) for v in names]
                        for n in (space.counts if len(self.groups[g]) > 1 else space.counts[:1])
                    ],
                    np.float64,
                )
                for g, names in space.formats.items()
            }
        return self._reads[experts_used]


@dataclass(frozen=True, eq=False)
class ChoiceBytesCache:
    """`ChoiceBytes` of one space, computed once per kind of limit."""

    _tables: dict[str, ChoiceBytes] = field(default_factory=dict)

    def of(self, costs: Costs) -> ChoiceBytes:
        """Returns the bytes of every choice under a budget."""
        kind = costs.budget.bounds
        if kind not in self._tables:
            self._tables[kind] = ChoiceBytes.of(costs)
        return self._tables[kind]
