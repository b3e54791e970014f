"""Allocations that people make without a search: one format, one per role, or a rule by hand.

In: a layout and a ranking of experts. Out: named allocations. Invariant: rows that are not whole
blocks of the wanted format take llama-quantize's fallback, under its real name, as a user of that
tool would get. A tensor whose format in the checkpoint is no larger than the wanted one keeps that
format. A name lists the groups in other formats where they hold more than a twentieth of the
weights: `Q6_K (Q8_0 in 12 groups)`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from allocator.decision.allocation import Allocation
from allocator.families import Role
from allocator.formats import FORMATS, fallback
from allocator.targets import Group, Layout

UNIFORM = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
REST = ("Q6_K", "Q4_K")
SKILLED_REST = ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS")
"""What stands beside the routed experts in mixes that a skilled person would write."""
_MOST_UNNAMED = 1 / 20  # of the weights may be in formats that the name does not list
COUNTS = (1, 5 / 6, 2 / 3, 1 / 2, 1 / 3)
"""Shares of the experts that the pruned baselines retain: 24, 20, 16, 12, 8 of 24."""
HAND_COUNTS = (1, 192 / 256, 160 / 256)
"""Shares of the experts that the hand rule retains: 24, 18, 15 of 24."""
_HAND = {  # in the middle layers, in the outer eighths
    Role.EXPERT_GATE: ("IQ1_S", "IQ1_M"),
    Role.EXPERT_UP: ("IQ1_S", "IQ1_M"),
    Role.EXPERT_DOWN: ("IQ1_M", "IQ2_XXS"),
    Role.SHARED_GATE: ("IQ3_S", "Q4_K"),
    Role.SHARED_UP: ("IQ3_S", "Q4_K"),
    Role.SHARED_DOWN: ("Q4_K", "Q5_K"),
    Role.HEAD: ("Q5_K", "Q5_K"),
}
_HAND_REST = ("Q4_K", "Q4_K")  # attention, dense MLP, embedding


def _stored(group: Group, fmt: str) -> str:
    wanted = fallback(fmt, group.shape)
    if wanted.needs_importance and not group.importance:
        return "Q2_K"  # llama-quantize's own choice for an embedding without importance
    source = group.source_format
    if source is not None and source.bits <= wanted.bits:
        return source.name
    return wanted.name


def _counts(layout: Layout, shares: Sequence[float]) -> Iterator[tuple[int, str]]:
    """Retained counts that the router can serve, and the suffix of a name for each."""
    inventory = layout.inventory
    step = inventory.expert_groups
    least = inventory.least_experts(inventory.experts_used)
    wanted = (max(round(s * inventory.n_experts / step) * step, least) for s in shares)
    for count in dict.fromkeys(wanted):
        yield count, "" if count == inventory.n_experts else f", {count} experts"


def mixed(
    layout: Layout, rankings: Mapping[int, tuple[int, ...]], *, experts: str, rest: str, count: int
) -> Allocation:
    """Returns the allocation with routed experts in one format and everything else in another.

    Args:
        layout: the target bound to the checkpoint.
        rankings: experts by MoE layer, those that stay longest first.
        experts: format of the routed experts.
        rest: format of the other groups.
        count: experts that every layer retains.
    """
    return _allocation(layout, rankings, _by_kind(layout, experts, rest), count)


def _by_kind(layout: Layout, experts: str, rest: str, down: str | None = None) -> dict[str, str]:
    of_role = {
        Role.EXPERT_GATE: experts,
        Role.EXPERT_UP: experts,
        Role.EXPERT_DOWN: down or experts,
    }
    return {name: of_role.get(group.role, rest) for name, group in layout.groups.items()}


def _other_formats(layout: Layout, allocation: Allocation, wanted: Mapping[str, str]) -> str:
    """The suffix of a name that lists groups in another format than wanted."""
    groups = [layout.groups[n] for n, fmt in allocation.formats if fmt != wanted[n]]
    weights = layout.inventory.n_computed_weights
    if sum(prod(group.shape) for group in groups) <= _MOST_UNNAMED * weights:
        return ""
    counted = Counter(allocation.format_of[group.name] for group in groups)
    rows = [f"{fmt} in {n} group{'s' * (n > 1)}" for fmt, n in counted.most_common()]
    return f" ({', '.join(rows)})"


def _allocation(
    layout: Layout, rankings: Mapping[int, tuple[int, ...]], wanted: Mapping[str, str], count: int
) -> Allocation:
    return Allocation.of(
        target=layout.target,
        retained={layer: tuple(sorted(rankings[layer][:count])) for layer in layout.layers},
        formats={name: _stored(group, wanted[name]) for name, group in layout.groups.items()},
        experts_used=layout.inventory.experts_used,
    )


def baselines(
    layout: Layout,
    rankings: Mapping[int, tuple[int, ...]],
    *,
    pruned: bool = False,
    skilled: bool = False,
) -> Iterator[tuple[str, Allocation]]:
    """Yields uniform formats, then role mixes, largest first, each with its name.

    Args:
        layout: the target bound to the checkpoint.
        rankings: experts by MoE layer, those that stay longest first.
        pruned: whether to add allocations with fewer experts, the same count in every layer.
        skilled: whether to add the mixes that a skilled person would write: further formats for
            what is no routed expert, and every mix with the experts' `down` in the next larger
            format of `UNIFORM` too.
    """
    mixes = [*((fmt, fmt, fmt) for fmt in UNIFORM), *_mixes(REST)]
    if skilled:
        mixes = [*mixes, *(m for m in _mixes(SKILLED_REST, down_too=True) if m not in mixes)]
    for count, suffix in _counts(layout, COUNTS if pruned else (1,)):
        for experts, down, rest in mixes:
            wanted = _by_kind(layout, experts, rest, down)
            made = _allocation(layout, rankings, wanted, count)
            of_experts = experts if down == experts else f"{experts}, down {down}"
            name = of_experts if experts == rest else f"{of_experts} / {rest}"
            yield f"{name}{_other_formats(layout, made, wanted)}{suffix}", made


def _mixes(rests: Sequence[str], *, down_too: bool = False) -> Iterator[tuple[str, str, str]]:
    """Formats of the experts' gate and up, of their `down`, and of the rest, which is larger."""
    for rest in rests:
        smaller = [fmt for fmt in UNIFORM if FORMATS[fmt].bits < FORMATS[rest].bits]
        for fmt in smaller:
            yield fmt, fmt, rest
            larger = UNIFORM[UNIFORM.index(fmt) - 1]
            if down_too and larger in smaller:
                yield fmt, larger, rest


def hand_rule(
    layout: Layout,
    rankings: Mapping[int, tuple[int, ...]],
    *,
    retained: Sequence[float] = HAND_COUNTS,
) -> Iterator[tuple[str, Allocation]]:
    """Yields the rule of arXiv 2509.25689's released code: formats by role and layer position.

    Args:
        layout: the target bound to the checkpoint.
        rankings: experts by MoE layer, those that stay longest first; the rule's own are by summed
            gate weight (saliency `gate`).
        retained: shares of the experts that every layer retains.
    """
    wanted = {name: _by_hand(layout, group) for name, group in layout.groups.items()}
    for count, suffix in _counts(layout, retained):
        yield f"hand rule{suffix}", _allocation(layout, rankings, wanted, count)


def _by_hand(layout: Layout, group: Group) -> str:
    n_layers = layout.inventory.n_layers
    eighth = -(-n_layers // 8)
    if group.role is Role.EMBEDDING and layout.inventory.tied_embeddings:
        return _HAND[Role.HEAD][0]
    middle, outer = _HAND.get(group.role, _HAND_REST)
    inside = group.layer is not None and eighth <= group.layer < n_layers - eighth
    return middle if inside else outer
