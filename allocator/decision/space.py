"""What may be chosen of a checkpoint in a target.

In: a layout, the values offered of every decision (`search_space.bind`), and a ranking of each
layer's experts. Out: a `Space`: Optuna distributions, and the map from params to `Allocation` and
back. Invariant: every format offered stores its group as named; `allocation(params(a)) == a` for
every allocation `a` of the space, and `params(allocation(p))` is `p` in its canonical form
(`mixes.canonical` of every format at its layer's retained count).

`parameters` names the params. A choice with one possible value is fixed and has no param. A group
of routed experts may choose a mix (`mixes`) beside plain formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from allocator.decision.allocation import DEFAULT_KV_FORMAT, Allocation
from allocator.decision.mixes import choice_of, split
from allocator.decision.parameters import (
    EXPERTS_USED,
    KNOWN,
    KV_FORMAT,
    MICRO_BATCH,
    ExpertsOf,
    FormatOf,
    Params,
    is_setting,
    largest_first,
)
from allocator.errors import SpaceError
from allocator.formats import parts_text
from allocator.targets import Layout
from allocator.targets.device_memory import MICRO_BATCH as DEFAULT_MICRO_BATCH
from allocator.targets.device_memory import RuntimeSettings


@dataclass(frozen=True)
class Space:
    """A search space bound to a layout.

    Attributes:
        layout: the target bound to the checkpoint.
        formats: offered formats and mixes by group, largest first with all experts retained.
        counts: possible retained counts of a layer, ascending.
        tied: whether all layers retain the same count.
        rankings: expert indices by MoE layer, those that stay longest first.
        experts_used: possible numbers of routed experts per token.
        kv_formats: possible formats of keys and values, largest first.
        micro_batches: possible numbers of tokens computed at once, descending; None is the
            runtime's own number.
    """

    layout: Layout
    formats: Mapping[str, tuple[str, ...]]
    counts: tuple[int, ...]
    tied: bool
    rankings: Mapping[int, tuple[int, ...]]
    experts_used: tuple[int, ...]
    kv_formats: tuple[str, ...] = (DEFAULT_KV_FORMAT,)
    micro_batches: tuple[int | None, ...] = (None,)

    @cached_property
    def count_params(self) -> dict[str, tuple[int, ...]]:
        """Layers whose retained count a param decides, by param."""
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
        table: dict[str, BaseDistribution] = {}
        for name, values in self.choices.items():
            if len(values) < 2:
                continue
            step = None if largest_first(name) else values[1] - values[0]
            if step is not None and values == tuple(range(values[0], values[-1] + 1, step)):
                table[name] = IntDistribution(values[0], values[-1], step=step)
            else:
                table[name] = CategoricalDistribution(values)
        return table

    def complete(self, params: Mapping[str, Any]) -> Params:
        """Returns params with the fixed choices filled in, checked.

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
        """Returns the allocation that params propose.

        Raises:
            SpaceError: if a param is unknown, missing or outside its choices.
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
            batch or DEFAULT_MICRO_BATCH,
        )

    def layer_counts(self, params: Params) -> dict[int, int]:
        """Returns the retained count by MoE layer of complete params."""
        return {x: params[n] for n, layers in self.count_params.items() for x in layers}

    def params(self, allocation: Allocation) -> Params:
        """Returns the params that propose an allocation, in canonical form.

        Choices with one possible value have no param.

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
                "the allocation retains other experts than this space's ranking, or has settings "
                "that it does not offer"
            )
        return {name: full[name] for name in self.distributions}

    def retained(self, layer: int, count: int) -> tuple[int, ...]:
        """Returns the experts that a layer retains where it retains `count`."""
        return self._ranked(layer, 0, count)

    def parts(self, group: str, value: str, count: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Returns the formats that a group stores, and the experts that each stores.

        Args:
            group: name of the group.
            value: one of its formats or mixes.
            count: experts that its layer retains. A group without routed experts has one part with
                no experts, whatever the count.
        """
        layer = self.routed_layer_of.get(group)
        if layer is None:
            return ((value, ()),)
        parts, start = [], 0
        for name, n in split(value, count):
            parts.append((name, self._ranked(layer, start, start + n)))
            start += n
        return tuple(parts)

    @cached_property
    def routed_layer_of(self) -> dict[str, int]:
        """MoE layer by group of routed experts."""
        return {g: layer for layer, groups in self.expert_groups.items() for g in groups}

    @cached_property
    def _slices(self) -> dict[tuple[int, int, int], tuple[int, ...]]:
        return {}

    def _ranked(self, layer: int, start: int, stop: int) -> tuple[int, ...]:
        """Returns the experts of these ranks, ascending."""
        key = layer, start, stop
        if key not in self._slices:
            self._slices[key] = tuple(sorted(self.rankings[layer][start:stop]))
        return self._slices[key]

    @cached_property
    def smallest(self) -> Allocation:
        """The allocation with every group in its smallest format, and as few experts as allowed."""
        return self.allocation(
            {n: v[-1] if largest_first(n) else v[0] for n, v in self.choices.items()}
        )

    @cached_property
    def largest(self) -> Allocation:
        """The allocation with every group in its largest format, and all allowed experts."""
        return self.allocation(
            {n: v[0] if largest_first(n) else v[-1] for n, v in self.choices.items()}
        )
