"""The decision: retained experts per layer, format per group, and the runtime's settings.

In: the choices. Out: a frozen, hashable value with a digest, its JSON, and its bytes in a layout
(`pricing`). Invariant: equal decisions have equal JSON and an equal digest, in whatever order they
are given.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from allocator.decision.budget import Budget
from allocator.decision.pricing import FileBytes, StoredBytes
from allocator.errors import FormatError, SpaceError
from allocator.formats import Format, Parts, formats_in, in_parts
from allocator.targets import Layout, Target, target_named
from allocator.targets.device_memory import MICRO_BATCH, DeviceMemory, RuntimeSettings, Workload

DEFAULT_KV_FORMAT = "f16"
"""How the runtimes store keys and values by default."""


class _Json(msgspec.Struct, forbid_unknown_fields=True):
    target: str
    experts_used: int
    kv_format: str
    retained: dict[int, list[int]]
    formats: dict[str, str]
    micro_batch: int | None = None


@dataclass(frozen=True)
class Allocation:
    """A complete configuration of a quantized checkpoint.

    Attributes:
        target: name of the one whose layout its groups are.
        retained: `(layer, expert indices)` for every MoE layer, both ascending.
        formats: `(group, format)` for every group, by name; a format's name, or the parts in
            which routed experts are stored (`formats.parts`).
        experts_used: routed experts per token.
        kv_format: how the runtime stores keys and values.
        micro_batch: tokens that the runtime computes at once; None for the runtime's own number.
    """

    target: str
    retained: tuple[tuple[int, tuple[int, ...]], ...]
    formats: tuple[tuple[str, str], ...]
    experts_used: int
    kv_format: str = DEFAULT_KV_FORMAT
    micro_batch: int | None = None

    @classmethod
    def of(
        cls,
        *,
        target: str,
        retained: Mapping[int, tuple[int, ...]],
        formats: Mapping[str, str],
        experts_used: int,
        kv_format: str = DEFAULT_KV_FORMAT,
        micro_batch: int | None = None,
    ) -> "Allocation":
        """Builds an allocation from mappings, in canonical order."""
        return cls(
            target=target,
            retained=tuple((layer, tuple(sorted(retained[layer]))) for layer in sorted(retained)),
            formats=tuple(sorted(formats.items())),
            experts_used=experts_used,
            kv_format=kv_format,
            micro_batch=micro_batch,
        )

    @property
    def runtime_settings(self) -> RuntimeSettings:
        """Settings of the runtime, with the runtime's own micro-batch where none is chosen."""
        return RuntimeSettings(self.experts_used, self.kv_format, self.micro_batch or MICRO_BATCH)

    @cached_property
    def retained_experts(self) -> dict[int, tuple[int, ...]]:
        """Retained expert indices by MoE layer."""
        return dict(self.retained)

    @cached_property
    def counts(self) -> dict[int, int]:
        """Number of retained experts by MoE layer."""
        return {layer: len(experts) for layer, experts in self.retained}

    @cached_property
    def format_of(self) -> dict[str, str]:
        """Format by group."""
        return dict(self.formats)

    def check(self, layout: Layout) -> None:
        """Raises an error unless this is an allocation of a layout.

        Raises:
            SpaceError: if groups, layers, experts or settings are not those of the layout.
            FormatError: if a format is unknown, or cannot store its group.
        """
        if self.target != layout.target:
            raise SpaceError(
                f"allocation for target {self.target!r}, needed {layout.target!r}: its groups are "
                "encoded in another layout; make an allocation for this target"
            )
        if set(self.format_of) != set(layout.groups):
            unmatched = min(set(self.format_of) ^ set(layout.groups))
            raise SpaceError(
                f"allocation: group {unmatched!r} is not in both allocation and checkpoint"
            )
        inventory = layout.inventory
        target = target_named(self.target)
        target.check_kv_format(inventory, self.kv_format)
        if self.micro_batch is not None:
            target.check_micro_batch(self.micro_batch)
        if tuple(self.retained_experts) != layout.layers:
            raise SpaceError(
                f"allocation: retained experts for layers {tuple(self.retained_experts)}, "
                f"the checkpoint routes in {layout.layers}"
            )
        if not 1 <= self.experts_used <= inventory.experts_used:
            raise SpaceError(
                f"allocation: {self.experts_used} experts used, needed 1..{inventory.experts_used}"
            )
        for layer, experts in self.retained:
            if len(set(experts)) != len(experts) or not set(experts) <= set(
                range(inventory.n_experts)
            ):
                raise SpaceError(
                    f"allocation: layer {layer} retains {experts}, no set of its experts"
                )
            if len(experts) < inventory.least_experts(self.experts_used):
                raise SpaceError(
                    f"allocation: layer {layer} retains {len(experts)} experts, fewer than the "
                    f"{inventory.least_experts(self.experts_used)} that its router needs for "
                    f"{self.experts_used} experts used"
                )
            size = inventory.n_experts // inventory.expert_groups
            per_group = Counter(e // size for e in experts)
            if len(per_group) != inventory.expert_groups or len(set(per_group.values())) != 1:
                raise SpaceError(
                    f"allocation: layer {layer} retains {dict(per_group)} by router group, "
                    f"needed as many in each of {inventory.expert_groups}"
                )
        if target.one_expert_count and len(set(self.counts.values())) > 1:
            raise SpaceError(
                f"allocation: target {self.target} knows one retained count, got {self.counts}"
            )
        for name in self.format_of:
            self._check_format(layout, name)

    def _check_format(self, layout: Layout, name: str) -> None:
        group, text = layout.groups[name], self.format_of[name]
        if in_parts(text):
            if not group.role.is_expert:
                raise SpaceError(
                    f"allocation: {name} is in parts, which only groups of routed experts can be; "
                    "give it one format"
                )
            if not target_named(self.target).mixes_experts:
                raise SpaceError(
                    f"allocation: {name} is in parts, target {self.target} stores the experts of a "
                    "projection in one format"
                )
            try:
                stored = self.parts(layout, name)
            except (FormatError, SpaceError) as error:
                raise SpaceError(f"allocation: {name}: {error}") from None
        else:
            stored = self.parts(layout, name)
        for fmt, _ in stored:
            fmt.nbytes(group.shape)
            if not group.can_hold(fmt):
                raise SpaceError(
                    f"allocation: {name} in {fmt.name}, a format of codec {fmt.codec}; files of "
                    f"target {self.target} hold formats of {', '.join(group.codecs or ())}"
                )
            if fmt.needs_importance and not group.importance:
                raise SpaceError(f"allocation: {name} has no importance, which {fmt.name} needs")

    @property
    def stored_formats(self) -> frozenset[Format]:
        """Every format that some group, or a part of one, is stored in."""
        return frozenset(fmt for _, text in self.formats for fmt in formats_in(text))

    def stored(self, layout: Layout, container: Target | None = None) -> StoredBytes:
        """Returns the bytes of its checkpoint.

        Args:
            layout: its target bound to the checkpoint.
            container: the kind of file; its own target's by default.
        """
        return StoredBytes(
            layout,
            container or target_named(self.target),
            self.retained_experts,
            self.format_of,
            self.runtime_settings,
        )

    def parts(self, layout: Layout, name: str) -> Parts:
        """Returns the formats of a group, and the experts that each stores.

        Raises:
            FormatError: if a format is unknown.
            SpaceError: if the parts are not those of the retained experts.
        """
        return self.stored(layout).parts(name)

    def nbytes(self, layout: Layout, container: Target | None = None) -> FileBytes:
        """Returns the bytes of its file, itemised; arguments as of `stored`."""
        return self.stored(layout, container).file

    def device_memory(self, layout: Layout, workload: Workload) -> DeviceMemory:
        """Returns what its target's runtime occupies, itemised.

        Raises:
            TargetError: if nothing is known of that runtime.
        """
        return self.stored(layout).device_memory(workload)

    def token_bytes(self, layout: Layout, context: int) -> int:
        """Returns the bytes that decoding one token reads at `context` tokens.

        Raises:
            TargetError: if nothing is known of its target's runtime.
        """
        return self.stored(layout).token_bytes(context)

    def used(self, layout: Layout, budget: Budget) -> int:
        """Returns the bytes that count against a budget, its second limit apart.

        Raises:
            TargetError: if it is for a device, and nothing is known of the target's runtime.
        """
        return budget.used(self.stored(layout))

    def fits(self, layout: Layout, budget: Budget) -> bool:
        """Returns whether it is within every limit of a budget."""
        return budget.admits(self.stored(layout))

    @cached_property
    def digest(self) -> str:
        """sha256 of its canonical JSON; names it in files and attributes."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, as in allocation files and trial attributes."""
        return {
            "target": self.target,
            "experts_used": self.experts_used,
            "kv_format": self.kv_format,
            "retained": {str(layer): list(experts) for layer, experts in self.retained},
            "formats": self.format_of,
        } | ({} if self.micro_batch is None else {"micro_batch": self.micro_batch})

    @classmethod
    def from_json(cls, data: Any) -> "Allocation":
        """Reads an allocation from the plain data that `to_json` returns.

        Raises:
            SpaceError: if the data has another shape.
        """
        try:
            raw = msgspec.convert(data, _Json, strict=False)
        except msgspec.ValidationError as error:
            raise SpaceError(f"allocation: {error}") from None
        return cls.of(
            target=raw.target,
            retained={layer: tuple(experts) for layer, experts in raw.retained.items()},
            formats=raw.formats,
            experts_used=raw.experts_used,
            kv_format=raw.kv_format,
            micro_batch=raw.micro_batch,
        )
