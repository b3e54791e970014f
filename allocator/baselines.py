"""What people do without a search: one format for everything, or one per role.

In: a layout and a ranking of experts. Out: named allocations. Invariant: rows that are not whole
blocks of the wanted format take llama-quantize's fallback, under its real name, as a user of that
tool would get.
"""

from collections.abc import Iterator, Mapping

from allocator.allocation import Allocation
from allocator.formats import FORMATS, fallback
from allocator.targets import Group, Layout

UNIFORM = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
REST = ("Q6_K", "Q4_K")
COUNTS = (1, 5 / 6, 2 / 3, 1 / 2, 1 / 3)
"""Shares of the experts that the pruned baselines keep: 24, 20, 16, 12, 8 of 24."""


def _stored(group: Group, fmt: str) -> str:
    wanted = fallback(fmt, group.shape)
    if wanted.needs_importance and not group.importance:
        return "Q2_K"  # llama-quantize's own choice for an embedding without importance
    return wanted.name


def mixed(
    layout: Layout, rankings: Mapping[int, tuple[int, ...]], *, experts: str, rest: str, count: int
) -> Allocation:
    """Routed experts in one format, everything else in another, `count` experts in every layer."""
    return Allocation.of(
        target=layout.target,
        retained={layer: tuple(sorted(rankings[layer][:count])) for layer in layout.layers},
        formats={
            name: _stored(group, experts if group.role.is_expert else rest)
            for name, group in layout.groups.items()
        },
        experts_used=layout.inventory.experts_used,
    )


def baselines(
    layout: Layout, rankings: Mapping[int, tuple[int, ...]], *, pruned: bool = False
) -> Iterator[tuple[str, Allocation]]:
    """Uniform formats, then role mixes, largest first.

    Args:
        layout: the target bound to the checkpoint.
        rankings: experts to keep first, by MoE layer.
        pruned: also with fewer experts, the same count in every layer.
    """
    inventory = layout.inventory
    step = inventory.expert_groups
    least = inventory.least_experts(inventory.experts_used)
    shares = COUNTS if pruned else (1,)
    wanted = (max(round(s * inventory.n_experts / step) * step, least) for s in shares)
    for count in dict.fromkeys(wanted):
        suffix = "" if count == inventory.n_experts else f", {count} experts"
        for fmt in UNIFORM:
            yield (
                f"{fmt}{suffix}",
                mixed(layout, rankings, experts=fmt, rest=fmt, count=count),
            )
        for rest in REST:
            for fmt in UNIFORM:
                if FORMATS[fmt].bits < FORMATS[rest].bits:
                    name = f"{fmt} / {rest}{suffix}"
                    yield name, mixed(layout, rankings, experts=fmt, rest=rest, count=count)
