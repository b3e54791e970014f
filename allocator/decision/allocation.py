"""The decision: retained experts per layer, format per group, and the runtime's settings.

In: the choices. Out: a frozen, hashable value with a digest, its JSON, and its bytes in a layout.
Invariant: `nbytes` is an integer equal to the bytes of the written file, per tensor and in total.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from allocator.decision.budget import Budget, FileBytes
from allocator.errors import FormatError, SpaceError
from allocator.families import Role
from allocator.formats import Parts, in_parts, parts
from allocator.targets import FullPrecision, Layout, Target, target_named
from allocator.targets.device_memory import MICRO_BATCH, DeviceMemory, RuntimeSettings, Workload

KV_FORMAT = "f16"
"""How the runtimes store keys and values unless told otherwise."""


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
        target: whose layout its groups are (`gguf`, `safetensors`).
        retained: `(layer, expert indices)` for every MoE layer, both ascending.
        formats: `(group, format)` for every group, by name; a format's name, or the parts in
            which routed experts are stored (`formats.parts`).
        experts_used: routed experts per token.
        kv_format: how the runtime stores keys and values.
        micro_batch: tokens that the runtime computes at once; None leaves it to the runtime.
    """

    target: str
    retained: tuple[tuple[int, tuple[int, ...]], ...]
    formats: tuple[tuple[str, str], ...]
    experts_used: int
    kv_format: str = KV_FORMAT
    micro_batch: int | None = None

    @classmethod
    def of(
        cls,
        *,
        target: str,
        retained: Mapping[int, tuple[int, ...]],
        formats: Mapping[str, str],
        experts_used: int,
        kv_format: str = KV_FORMAT,
        micro_batch: int | None = None,
    ) -> "Allocation":
        """From mappings, in canonical order."""
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
        """What the runtime is told."""
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
        """Raises:
        SpaceError: if this is no allocation of that layout.
        FormatError: if a format is unknown, or cannot store its group.
        """
        if self.target != layout.target:
            raise SpaceError(
                f"allocation for target {self.target!r}, needed {layout.target!r}: its groups are "
                "encoded in another layout; make an allocation for this target"
            )
        if set(self.format_of) != set(layout.groups):
            odd = min(set(self.format_of) ^ set(layout.groups))
            raise SpaceError(f"allocation: group {odd!r} is not in both allocation and checkpoint")
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
                found = self.parts(layout, name)
            except (FormatError, SpaceError) as error:
                raise SpaceError(f"allocation: {name}: {error}") from None
        else:
            found = self.parts(layout, name)
        for fmt, _ in found:
            fmt.nbytes(group.shape)
            if fmt.needs_importance and not group.importance:
                raise SpaceError(f"allocation: {name} has no importance, which {fmt.name} needs")

    def parts(self, layout: Layout, name: str) -> Parts:
        """What a group stores: formats and the experts that each holds.

        Raises:
            FormatError: if a format is unknown.
            SpaceError: if the parts are not those of the retained experts.
        """
        return parts(self.format_of[name], layout.groups[name].experts(self.retained_experts))

    def nbytes(self, layout: Layout, container: Target | None = None) -> FileBytes:
        """Its bytes, itemised.

        Args:
            layout: its target bound to the checkpoint.
            container: the kind of file; its own target's by default.
        """
        target = container or target_named(self.target)
        encoded = {name: self.group_bytes(layout, name) for name in layout.groups}
        same = target.name == layout.target
        kept = [
            k.nbytes(self._count(k.layer))
            if same
            else _source_bytes(layout, k.source, k.shape, k.shape_with(self._count(k.layer)))
            for k in layout.full_precision
        ]
        header = target.header_bytes(
            layout,
            retained=self.retained_experts,
            formats=self.format_of,
            experts_used=self.experts_used,
        )
        padding = sum(target.padded(n) - n for n in (*encoded.values(), *kept))
        return FileBytes(sum(encoded.values()), sum(kept), padding, header)

    def weight_bytes(self, layout: Layout) -> int:
        """Bytes of its tensors in memory, each padded as in its file."""
        target = target_named(self.target)
        encoded = (self.group_bytes(layout, name) for name in layout.groups)
        kept = (k.nbytes(self._count(k.layer)) for k in layout.full_precision)
        return sum(map(target.padded, (*encoded, *kept)))

    def device_memory(self, layout: Layout, workload: Workload) -> DeviceMemory:
        """What its target's runtime occupies, itemised.

        Raises:
            TargetError: if nothing is known of that runtime.
        """
        return target_named(self.target).device_memory(
            layout.inventory,
            workload,
            self.runtime_settings,
            weights=self.weight_bytes(layout),
            n_experts=max(self.counts.values()),
        )

    def token_bytes(self, layout: Layout, context: int) -> int:
        """Bytes that decoding one token reads: used weights, and keys and values at `context`.

        Of routed experts the share that is used, of an embedding that is no head one row, of keys
        and values in layers with a sliding window that window.

        Raises:
            TargetError: if nothing is known of its target's runtime.
        """
        read = sum(
            token_share(
                layout, name, self.group_bytes(layout, name), self.experts_used, self.counts
            )
            for name in layout.groups
        )
        kept = sum(
            kept_share(k, self._count(k.layer), self.experts_used) for k in layout.full_precision
        )
        target = target_named(self.target)
        return read + kept + target.kv_bytes(layout.inventory, self.kv_format, context)

    def used(self, layout: Layout, budget: Budget) -> int:
        """The bytes that count against a budget, not against the one beside it.

        Raises:
            TargetError: if it is for a device, and nothing is known of the target's runtime.
        """
        if budget.bounds == "device":
            assert budget.workload is not None
            return self.device_memory(layout, budget.workload).total
        size = self.nbytes(layout)
        return size.file if budget.bounds == "file" else size.encoded

    def fits(self, layout: Layout, budget: Budget) -> bool:
        """Whether it holds the budget and what is beside it, and what a token may read."""
        limit = budget.token_bytes
        fast = limit is None or self.token_bytes(layout, budget.context) <= limit
        return fast and all(self.used(layout, x) <= x.nbytes for x in budget.limits)

    def group_bytes(self, layout: Layout, name: str) -> int:
        """Encoded bytes of one group, all its parts."""
        group = layout.groups[name]
        return sum(
            fmt.nbytes(group.shape_with(len(experts))) for fmt, experts in self.parts(layout, name)
        )

    def _count(self, layer: int | None) -> int:
        return self.counts.get(-1 if layer is None else layer, 0)

    @cached_property
    def digest(self) -> str:
        """sha256 of its canonical JSON; names it in files and attributes."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in allocation files and trial attributes."""
        return {
            "target": self.target,
            "experts_used": self.experts_used,
            "kv_format": self.kv_format,
            "retained": {str(layer): list(experts) for layer, experts in self.retained},
            "formats": self.format_of,
        } | ({} if self.micro_batch is None else {"micro_batch": self.micro_batch})

    @classmethod
    def from_json(cls, data: Any) -> "Allocation":
        """The inverse of `to_json`.

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


def token_share(
    layout: Layout, name: str, nbytes: int, experts_used: int, counts: Mapping[int, int]
) -> int:
    """What decoding one token reads of a group that occupies `nbytes`, rounded up.

    Args:
        layout: of the group.
        name: of the group.
        nbytes: what it occupies.
        experts_used: routed experts per token.
        counts: retained experts by MoE layer.
    """
    group = layout.groups[name]
    if group.role.is_expert and group.layer is not None:
        return -(-nbytes * experts_used // counts[group.layer])
    if group.role is Role.EMBEDDING and not layout.inventory.tied_embeddings:
        return nbytes // group.shape[0]
    return nbytes


def kept_share(kept: FullPrecision, count: int, experts_used: int) -> int:
    """What decoding one token reads of a tensor in full precision, rounded up.

    Args:
        kept: the tensor.
        count: experts that its layer retains.
        experts_used: routed experts per token.
    """
    nbytes = kept.nbytes(count)
    return -(-nbytes * experts_used // count) if kept.role is Role.EXPERT_BIAS else nbytes


def _source_bytes(
    layout: Layout, source: str, shape: tuple[int, ...], retained: tuple[int, ...]
) -> int:
    return layout.inventory.tensors[source].nbytes // shape[0] * retained[0]
