"""Changes of the original whose loss is measured, each alone.

In: a layout, a profile's inputs, and a search space for its settings. Out: frozen changes, each
with the name of its line in `losses.jsonl` or `settings.jsonl`. Invariants: a change is of one
bundle of groups, of one layer's retained count, or of one setting; the list follows from the inputs
alone, so a stopped profile measures what is missing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from allocator.decision.allocation import DEFAULT_KV_FORMAT
from allocator.decision.parameters import EXPERTS_USED, KV_FORMAT
from allocator.decision.space import Space
from allocator.families import Role
from allocator.prediction.profile import bundle_of
from allocator.profiling.inputs import ProfileInputs
from allocator.targets import Group, Layout


@dataclass(frozen=True)
class FormatChange:
    """A bundle of groups in other formats.

    Attributes:
        bundle: the groups that are changed together, e.g. `layers.3.attention`.
        formats: their formats, by group.
    """

    bundle: str
    formats: Mapping[str, str]

    @property
    def name(self) -> str:
        """Of the change's line."""
        return f"{self.bundle}: " + " ".join(f"{g}={f}" for g, f in self.formats.items())

    def first_layer(self, layout: Layout) -> int:
        """Returns the first layer that measuring the change runs."""
        group = layout.groups[next(iter(self.formats))]
        if group.role is Role.HEAD:  # it multiplies what the last layer gives
            return layout.inventory.n_layers - 1
        return group.layer or 0


@dataclass(frozen=True)
class CountChange:
    """A layer with fewer experts.

    Attributes:
        layer: a MoE layer.
        count: experts that it retains.
    """

    layer: int
    count: int

    @property
    def name(self) -> str:
        """Of the change's line."""
        return f"layers.{self.layer} retains {self.count}"

    def first_layer(self, layout: Layout) -> int:
        """Returns the first layer that measuring the change runs."""
        return self.layer


@dataclass(frozen=True)
class SettingChange:
    """The original with one setting changed.

    Attributes:
        setting: `experts_used` or `kv_format`.
        value: of the setting.
    """

    setting: str
    value: Any

    @property
    def name(self) -> str:
        """Of the change's line."""
        return f"{self.setting} {self.value}"

    def first_layer(self, layout: Layout) -> int:
        """Returns the first layer that measuring the change runs."""
        return 0


MeasuredChange = FormatChange | CountChange | SettingChange


def profile_changes(
    inputs: ProfileInputs, anchor: Callable[[Group, float], str]
) -> Iterator[FormatChange | CountChange]:
    """Yields the changes of a profile: bundles in small formats, then layers with fewer experts.

    Args:
        inputs: of the profile.
        anchor: the format that a group is measured in, from its effective bits.
    """
    layout = inputs.layout
    bundles: dict[str, list[Group]] = {}
    for group in layout.groups.values():
        bundles.setdefault(bundle_of(group), []).append(group)
    for name, groups in bundles.items():
        anchors = [{g.name: anchor(g, bits) for g in groups} for bits in inputs.anchor_bits]
        for i, formats in enumerate(anchors):
            if formats not in anchors[:i]:
                yield FormatChange(name, formats)
    for layer in layout.layers:
        for count in _measured_counts(inputs):
            yield CountChange(layer, count)


def _measured_counts(inputs: ProfileInputs) -> list[int]:
    """Retained counts that the router can choose among, most first."""
    inventory = inputs.layout.inventory
    step = inventory.expert_groups
    least = inventory.least_experts(inventory.experts_used)
    shares = inputs.pruned_shares
    counts = (round(share * inventory.n_experts / step) * step for share in shares)
    measured = {max(least, n) for n in counts} | {least}
    return sorted((n for n in measured if n < inventory.n_experts), reverse=True)


def setting_changes(space: Space) -> list[SettingChange]:
    """Returns every setting of a space that is not the original's, where there is a choice."""
    original = original_settings(space.layout)
    return [
        SettingChange(name, value)
        for name in original
        if len(values := space.choices.get(name, ())) > 1
        for value in values
        if value != original[name]
    ]


def original_settings(layout: Layout) -> dict[str, Any]:
    """Returns the settings that the original has, by name."""
    return {EXPERTS_USED.name: layout.inventory.experts_used, KV_FORMAT.name: DEFAULT_KV_FORMAT}


def share_of_layers(change: MeasuredChange, layout: Layout) -> float:
    """Returns the share of the layers that measuring a change runs, from 0 to 1."""
    n_layers = layout.inventory.n_layers
    return (n_layers - change.first_layer(layout)) / n_layers
