"""What may be chosen of a checkpoint in a target, and what each choice costs.

In: a layout, the values offered of every decision (`search_space.bind`), and a ranking of each
layer's experts. Out: a `Space`: Optuna distributions, and the map from params to `Allocation` and
back; its `Costs` under a budget. Invariant: every format offered stores its group as named;
`allocation(params(a)) == a` for every allocation `a` of the space, and `params(allocation(p))` is
`p` in its canonical form (`canonical` of every format at its layer's retained count).

Params: `experts.<layer>` (or `experts.all` where the target knows one count), `format.<group>`,
`experts_used`, `kv_format`, `micro_batch`. A choice with one possible value is fixed and has no
param. Beside formats, a group of routed experts may choose a mix: `IQ2_XXS*8+IQ1_S` stores the
first 8 experts of the layer's ranking in IQ2_XXS, the other retained ones in IQ1_S.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from allocator.decision.allocation import KV_FORMAT as USUAL_KV_FORMAT
from allocator.decision.allocation import Allocation, kept_share, token_share
from allocator.decision.budget import Budget
from allocator.decision.parameters import (
    EXPERTS_USED,
    KNOWN,
    KV_FORMAT,
    MICRO_BATCH,
    ExpertsOf,
    FormatOf,
    Params,
    SettingOf,
    parse,
)
from allocator.errors import BudgetError, SpaceError
from allocator.formats import FORMATS, in_parts, parts_text
from allocator.targets import Layout, target_named
from allocator.targets.device_memory import MICRO_BATCH as USUAL_MICRO_BATCH
from allocator.targets.device_memory import RuntimeSettings

Loss = Callable[[str, Any], float]
"""Predicted loss of one param's value, nats per token."""


@dataclass(frozen=True)
class Space:
    """A search space bound to a layout.

    Attributes:
        layout: the target bound to the checkpoint.
        formats: offered formats and mixes by group, largest first with all experts retained.
        counts: possible retained counts of a layer, ascending.
        tied: all layers retain the same count.
        rankings: expert indices by MoE layer, the ones to keep first.
        experts_used: possible numbers of routed experts per token.
        kv_formats: possible formats of keys and values, largest first.
        micro_batches: possible numbers of tokens computed at once, descending; None leaves it to
            the runtime.
    """

    layout: Layout
    formats: Mapping[str, tuple[str, ...]]
    counts: tuple[int, ...]
    tied: bool
    rankings: Mapping[int, tuple[int, ...]]
    experts_used: tuple[int, ...]
    kv_formats: tuple[str, ...] = (USUAL_KV_FORMAT,)
    micro_batches: tuple[int | None, ...] = (None,)

    @cached_property
    def count_params(self) -> dict[str, tuple[int, ...]]:
        """Param of a retained count to the layers it decides."""
        if self.tied:
            return {ExpertsOf(None).name: self.layout.layers}
        return {ExpertsOf(layer).name: (layer,) for layer in self.layout.layers}

    @cached_property
    def format_params(self) -> dict[str, str]:
        """Param of the format by group."""
        return {group: FormatOf(group).name for group in self.formats}

    @cached_property
    def count_param_of(self) -> dict[int, str]:
        """Param of the retained count by MoE layer."""
        return {x: name for name, layers in self.count_params.items() for x in layers}

    @cached_property
    def layer_of(self) -> dict[str, int]:
        """Layer by group; -1 outside the layers."""
        return {n: -1 if g.layer is None else g.layer for n, g in self.layout.groups.items()}

    @cached_property
    def expert_groups(self) -> dict[int, tuple[str, ...]]:
        """Groups of routed experts by MoE layer."""
        return {
            layer: tuple(
                n for n, g in self.layout.groups.items() if g.layer == layer and g.role.is_expert
            )
            for layer in self.layout.layers
        }

    @cached_property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Every decision and its possible values; experts ascending, the others largest first."""
        table: dict[str, tuple[Any, ...]] = dict.fromkeys(self.count_params, self.counts)
        table |= {self.format_params[group]: names for group, names in self.formats.items()}
        table[EXPERTS_USED.name] = self.experts_used
        if len(self.kv_formats) > 1:
            table[KV_FORMAT.name] = self.kv_formats
        if len(self.micro_batches) > 1:
            table[MICRO_BATCH.name] = self.micro_batches
        return table

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of the decisions that have more than one value."""
        found: dict[str, BaseDistribution] = {}
        for name, values in self.choices.items():
            if len(values) < 2:
                continue
            step = None if parse(name).largest_first else values[1] - values[0]
            if step is not None and values == tuple(range(values[0], values[-1] + 1, step)):
                found[name] = IntDistribution(values[0], values[-1], step=step)
            else:
                found[name] = CategoricalDistribution(values)
        return found

    def complete(self, params: Mapping[str, Any]) -> Params:
        """Params with the fixed choices filled in, checked.

        Raises:
            SpaceError: if a param is unknown, missing or outside its choices.
        """
        if unknown := set(params) - set(self.choices):
            raise SpaceError(f"unknown param {min(unknown)!r}; known: {KNOWN}")
        full: Params = {}
        for name, values in self.choices.items():
            value = params.get(name, values[0] if len(values) == 1 else None)
            if value not in values:
                raise SpaceError(f"param {name} is {value!r}, needed one of {values}")
            full[name] = value
        return full

    def allocation(self, params: Mapping[str, Any]) -> Allocation:
        """The allocation that params propose.

        Raises:
            SpaceError: as `complete`.
        """
        full = self.complete(params)
        counts = self.layer_counts(full)
        return Allocation.of(
            target=self.layout.target,
            retained={layer: self.retained(layer, n) for layer, n in counts.items()},
            formats={
                group: parts_text(
                    self.parts(group, full[name], counts.get(self.layer_of[group], 0))
                )
                for group, name in self.format_params.items()
            },
            experts_used=full[EXPERTS_USED.name],
            kv_format=full.get(KV_FORMAT.name, self.kv_formats[0]),
            micro_batch=full.get(MICRO_BATCH.name, self.micro_batches[0]),
        )

    @property
    def first_settings(self) -> Params:
        """The first value of every setting that has a param."""
        return {n: values[0] for n, values in self.choices.items() if is_setting(n)}

    def runtime_settings(self, params: Params) -> RuntimeSettings:
        """Returns the settings that complete params choose, the runtime's own where they do not."""
        batch = params.get(MICRO_BATCH.name, self.micro_batches[0])
        return RuntimeSettings(
            params[EXPERTS_USED.name],
            params.get(KV_FORMAT.name, self.kv_formats[0]),
            batch or USUAL_MICRO_BATCH,
        )

    def layer_counts(self, params: Params) -> dict[int, int]:
        """Retained count by MoE layer, of complete params."""
        return {x: params[n] for n, layers in self.count_params.items() for x in layers}

    def params(self, allocation: Allocation) -> Params:
        """The params that propose an allocation, in canonical form; only those that are searched.

        Raises:
            SpaceError: if the space does not hold the allocation.
        """
        full: Params = {
            name: allocation.counts.get(layers[0]) for name, layers in self.count_params.items()
        }
        full |= {FormatOf(group).name: choice_of(text) for group, text in allocation.formats}
        full[EXPERTS_USED.name] = allocation.experts_used
        settings = {
            KV_FORMAT.name: allocation.kv_format,
            MICRO_BATCH.name: allocation.micro_batch,
        }
        full |= {name: value for name, value in settings.items() if name in self.choices}
        if self.allocation(full) != allocation:
            raise SpaceError(
                "the allocation retains other experts than this space's ranking, or is told "
                "settings that it does not offer"
            )
        return {name: full[name] for name in self.distributions}

    def retained(self, layer: int, count: int) -> tuple[int, ...]:
        """The experts a layer keeps when it keeps `count`."""
        return self._ranked(layer, 0, count)

    def parts(self, group: str, value: str, count: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What a group stores: formats and the experts that each holds.

        Args:
            group: its name.
            value: one of its formats or mixes.
            count: experts that its layer retains; no matter outside of routed experts, whose one
                part has no experts.
        """
        layer = self._routed.get(group)
        if layer is None:
            return ((value, ()),)
        found, start = [], 0
        for name, n in split(value, count):
            found.append((name, self._ranked(layer, start, start + n)))
            start += n
        return tuple(found)

    @cached_property
    def _routed(self) -> dict[str, int]:
        """MoE layer by group of routed experts."""
        return {g: layer for layer, groups in self.expert_groups.items() for g in groups}

    @cached_property
    def _slices(self) -> dict[tuple[int, int, int], tuple[int, ...]]:
        return {}

    def _ranked(self, layer: int, start: int, stop: int) -> tuple[int, ...]:
        """Experts of these ranks, ascending."""
        key = layer, start, stop
        if key not in self._slices:
            self._slices[key] = tuple(sorted(self.rankings[layer][start:stop]))
        return self._slices[key]

    def costs(self, budget: Budget) -> "Costs":
        """What each choice costs under a budget."""
        return Costs(self, budget)

    @cached_property
    def smallest(self) -> Allocation:
        """Every group in its smallest format, as few experts as allowed."""
        return self.allocation(
            {n: v[-1] if largest_first(n) else v[0] for n, v in self.choices.items()}
        )

    @cached_property
    def largest(self) -> Allocation:
        """Every group in its largest format, all allowed experts."""
        return self.allocation(
            {n: v[0] if largest_first(n) else v[-1] for n, v in self.choices.items()}
        )

    def between(self, budget: Budget, share: float) -> Budget:
        """Every limit on bytes at a share of the way to it, or the ceiling, from the floor."""
        floor, ceiling = (
            self.costs(budget).total(self.complete(self.params(end)))
            for end in (self.smallest, self.largest)
        )
        low = min(floor, budget.nbytes)
        high = budget.nbytes if share == 1 else min(ceiling, budget.nbytes)
        return replace(
            budget,
            nbytes=low + int(share * (high - low)),
            beside=None if budget.beside is None else self.between(budget.beside, share),
        )

    def check_budget(self, budget: Budget) -> None:
        """Raises:
        BudgetError: if not even the smallest allocation fits, with what it is made of.
        TargetError: if it is a device's, and nothing is known of the target's runtime.
        """
        for limit in budget.limits:
            self._check_bytes(limit)
        if budget.token_bytes is not None:
            self._check_token_bytes(budget)

    def _check_bytes(self, budget: Budget) -> None:
        budget.check_positive()
        smallest = self.smallest
        used = smallest.used(self.layout, budget)
        if used > budget.nbytes:
            biggest = sorted(
                self.layout.groups, key=lambda n: -smallest.group_bytes(self.layout, n)
            )[:3]
            parts = ", ".join(
                f"{n} {smallest.group_bytes(self.layout, n):,} as {smallest.format_of[n]}"
                for n in biggest
            )
            raise BudgetError(
                f"budget of {budget.nbytes:,} bytes ({budget.bounds}) is under the floor of "
                f"{used:,}: {_made_of(smallest, self.layout, budget)}; with {self.counts[0]} "
                f"experts per layer (largest: {parts}); {_WAYS_OUT[budget.bounds]}"
            )

    def _check_token_bytes(self, budget: Budget) -> None:
        assert budget.token_bytes is not None
        read = self.smallest.token_bytes(self.layout, budget.context)
        if read > budget.token_bytes:
            raise BudgetError(
                f"a token may read {budget.token_bytes:,} bytes at most, the smallest allocation "
                f"reads {read:,} ({self.experts_used[0]} experts used, keys and values in "
                f"{self.kv_formats[-1]}); lower --min-tokens-per-second or --context, or offer "
                "fewer experts_used"
            )


def _made_of(allocation: Allocation, layout: Layout, budget: Budget) -> str:
    if budget.bounds != "device":
        size = allocation.nbytes(layout)
        return (
            f"{size.encoded:,} encoded, {size.full_precision:,} routers and norms, "
            f"{size.overhead:,} file overhead"
        )
    assert budget.workload is not None
    memory = allocation.device_memory(layout, budget.workload)
    return (
        f"{memory.weights:,} weights, {memory.kv_cache:,} keys and values, {memory.compute:,} "
        f"compute buffers, {memory.overhead:,} overhead, {memory.reserve:,} reserve"
    )


_LESS_WEIGHT = "raise the budget, lower [experts] minimum or loosen pins"
_WAYS_OUT = {
    "file": _LESS_WEIGHT,
    "weights": _LESS_WEIGHT,
    "device": "raise the memory, lower --context, --sequences or --reserve, offer smaller "
    "kv_format and micro_batch, lower [experts] minimum or loosen pins",
}


def largest_first(param: str) -> bool:
    """Returns whether the values of a param are in descending order of bytes."""
    return parse(param).largest_first


def is_setting(param: str) -> bool:
    """Returns whether a param is a setting of the runtime; the others decide weights."""
    return isinstance(parse(param), SettingOf)


@cache
def split(value: str, count: int) -> tuple[tuple[str, int], ...]:
    """Formats of a choice, and how many of a layer's `count` experts each stores, best first."""
    head, star, rest = value.partition("*")
    if not star:
        return ((value, count),)
    n_head, _, tail = rest.partition("+")
    n = int(n_head)
    return ((head, count),) if count <= n else ((head, n), (tail, count - n))


def canonical(value: str, count: int) -> str:
    """The choice as an allocation shows it: a mix whose head holds all experts is its format."""
    found = split(value, count)
    return found[0][0] if len(found) == 1 else value


def choice_of(text: str) -> str:
    """The choice that a group's format in an allocation is: `A:0,3+B:1` is `A*2+B`.

    What no choice writes comes back as it is.
    """
    pieces = [piece.partition(":") for piece in text.split("+")]
    if len(pieces) != 2 or not in_parts(text):
        return text
    (head, _, experts), (tail, _, _) = pieces
    return f"{head}*{experts.count(',') + 1}+{tail}"


@cache
def part_bytes(shape: tuple[int, ...], value: str) -> tuple[int, ...]:
    """Bytes of each part of a group of this shape; its first axis is what a mix divides."""
    return tuple(FORMATS[f].nbytes((n, *shape[1:])) for f, n in split(value, shape[0]))


class Costs:
    """Bytes of each choice under a budget, as a sum over independent parts.

    The constant part, and what a mix adds to a header, are upper bounds where a header's length
    depends on the choices, so a sum of costs within the budget is an allocation within the budget.
    What is beside the budget has `Costs` of its own; `each` are both.
    """

    def __init__(self, space: Space, budget: Budget) -> None:
        self.space = space
        self.budget = budget
        self._target = target_named(space.layout.target)
        self.padded = budget.bounds != "weights"
        self.beside = None if budget.beside is None else Costs(space, budget.beside)
        self.each = (self,) if self.beside is None else (self, self.beside)
        self._overhead: dict[tuple[str, str], int] = {}
        self._settings: dict[tuple[RuntimeSettings, int], int] = {}

    def group(self, name: str, value: str, count: int) -> int:
        """Bytes of a group in a format or mix when its layer retains `count`."""
        group = self.space.layout.groups[name]
        parts = part_bytes(group.shape_with(count), value)
        if not self.padded:
            return sum(parts)
        nbytes = sum(self._target.padded(n) for n in parts)
        if len(parts) == 1 or self.budget.bounds != "file":
            return nbytes
        key = name, value
        if key not in self._overhead:
            names = [fmt for fmt, _ in split(value, count)]
            self._overhead[key] = self._target.parts_overhead(group, names)
        return nbytes + self._overhead[key]

    def layer(self, layer: int, count: int) -> int:
        """Bytes of a layer's router when it retains `count`."""
        if not self.padded:
            return 0
        kept = (
            k for k in self.space.layout.full_precision if k.layer == layer and k.role.is_router
        )
        return sum(self._target.padded(k.nbytes(count)) for k in kept)

    @cached_property
    def constant(self) -> int:
        """Bytes that no choice changes."""
        if not self.padded:
            return 0
        layout = self.space.layout
        norms = (k for k in layout.full_precision if not k.role.is_router)
        return self._header + sum(self._target.padded(k.nbytes(0)) for k in norms)

    @property
    def _header(self) -> int:
        if self.budget.bounds != "file":
            return 0
        largest = self.space.largest
        return self._target.header_bytes(
            self.space.layout,
            retained=largest.retained_experts,
            formats=largest.format_of,
            experts_used=largest.experts_used,
        )

    def runtime_bytes(self, settings: RuntimeSettings, n_experts: int) -> int:
        """Bytes of a device beside the weights, where a layer retains at most `n_experts`."""
        if self.budget.bounds != "device":
            return 0
        key = settings, n_experts
        if key not in self._settings:
            assert self.budget.workload is not None
            self._settings[key] = self._target.device_memory(
                self.space.layout.inventory,
                self.budget.workload,
                settings,
                weights=0,
                n_experts=n_experts,
            ).total
        return self._settings[key]

    def capacity(self, settings: RuntimeSettings, count: int) -> int:
        """Bytes for groups and routers where every layer retains `count`, under each limit.

        Beside the weights of a device nothing depends on their formats, so a second limit is a
        smaller room. It may count less than groups and routers do here (no routers, no padding):
        routers are given back, of padding up to 31 bytes a group stay unused.
        """
        room = self.budget.nbytes - self.constant - self.runtime_bytes(settings, count)
        if self.beside is None:
            return room
        layers = self.space.layout.layers
        uncounted = sum(self.layer(x, count) - self.beside.layer(x, count) for x in layers)
        return min(room, self.beside.capacity(settings, count) + uncounted)

    def spare_bytes(self, params: Params) -> int:
        """Bytes that complete params leave of the limit that they leave least of."""
        return min(c.budget.nbytes - c.total(params) for c in self.each)

    def total(self, params: Params) -> int:
        """Bytes of complete params; at least what is written."""
        return self.constant + self.affected(params, list(self.space.choices))

    def affected(self, params: Params, names: list[str]) -> int:
        """Bytes of the groups, routers and what is beside weights that these params decide."""
        layers = [x for n in names for x in self.space.count_params.get(n, ())]
        keys = [parse(n) for n in names]
        groups = {key.group for key in keys if isinstance(key, FormatOf)}
        groups |= {g for x in layers for g in self.space.expert_groups[x]}
        count, format_params = self.space.layer_counts(params), self.space.format_params
        encoded = sum(
            self.group(g, params[format_params[g]], count.get(self.space.layer_of[g], 0))
            for g in groups
        )
        runtime = 0
        if layers or any(isinstance(key, SettingOf) for key in keys):
            settings = self.space.runtime_settings(params)
            runtime = self.runtime_bytes(settings, max(count.values()))
        return encoded + sum(self.layer(x, count[x]) for x in layers) + runtime

    def reads(self, name: str, value: str, count: int, experts_used: int) -> int:
        """Bytes of a group that decoding a token reads when its layer retains `count`."""
        group = self.space.layout.groups[name]
        nbytes = sum(part_bytes(group.shape_with(count), value))
        counts = {self.space.layer_of[name]: count}
        return token_share(self.space.layout, name, nbytes, experts_used, counts)

    def other_reads(self, count: int, settings: RuntimeSettings) -> int:
        """Bytes that decoding a token reads beside the groups, where layers retain `count`."""
        layout, context = self.space.layout, self.budget.context
        kept = sum(kept_share(k, count, settings.experts_used) for k in layout.full_precision)
        return kept + self._target.kv_bytes(layout.inventory, settings.kv_format, context)

    def token_bytes(self, params: Params) -> int:
        """Bytes that decoding a token reads, of complete params; at least what is read."""
        return self.affected_reads(params, list(self.space.choices))

    def affected_reads(self, params: Params, names: list[str]) -> int:
        """Bytes that a token reads of what these params decide."""
        counts, settings = self.space.layer_counts(params), self.space.runtime_settings(params)
        keys, format_params = [parse(n) for n in names], self.space.format_params
        groups = {key.group for key in keys if isinstance(key, FormatOf)}
        if EXPERTS_USED in keys:
            groups = set(self.space.formats)
        read = sum(
            self.reads(
                g, params[format_params[g]], counts.get(self.space.layer_of[g], 0),
                settings.experts_used,
            )
            for g in groups
        )  # fmt: skip
        if all(isinstance(key, FormatOf) for key in keys):
            return read
        return read + self.other_reads(max(counts.values()), settings)

    def fits(self, params: Params) -> bool:
        """Whether complete params are within every limit."""
        limit = self.budget.token_bytes
        fast = limit is None or self.token_bytes(params) <= limit
        return fast and self.spare_bytes(params) >= 0
