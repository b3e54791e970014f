"""The search-space file, and its binding to a checkpoint in a target.

In: a TOML file (grammar: `search_spaces/README.md`), a layout, and the experts' saliencies. Out: a
`Space`. Invariant: every group and layer has a choice, or an error is raised; every format offered
stores its group as named.
"""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import msgspec

from allocator.decision.allocation import DEFAULT_KV_FORMAT
from allocator.decision.mixes import mix
from allocator.decision.pricing import part_bytes
from allocator.decision.space import Space
from allocator.errors import SpaceError
from allocator.files.atomic import read_toml
from allocator.formats import FORMATS, format_named
from allocator.targets import Group, Layout, Target, target_named

OBSERVED = ("reap", "norm", "frequency", "gate")
SALIENCIES = ("fisher", *OBSERVED)
"""Rankings of a layer's experts that a profile measures."""

MIXED = ("Q8_0", "Q6_K", "Q5_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XXS", "IQ1_S")
"""Formats that are mixed with their neighbour among those offered, by bits descending."""
HEAD_SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Shares of a layer's experts that a mix stores in its first format: 4, 8, 12, 16, 20 of 24."""


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A limit on the formats of some groups.

    Attributes:
        pattern: names of the groups, with shell wildcards.
        format: the one format that is offered.
        minimum: the format of least bits that is offered.
        maximum: the format of most bits that is offered.
    """

    pattern: str
    format: str | None = None
    minimum: str | None = None
    maximum: str | None = None


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits on retained experts.

    Attributes:
        minimum: retained experts per layer at least; a quarter by default.
        maximum: retained experts per layer at most; all by default.
        same: whether all layers retain as many.
        mixes: whether routed experts of a projection may have two formats.
        saliency: the ranking of experts, one of `SALIENCIES`.
        protected: experts that always stay, by MoE layer.
    """

    minimum: int | None = None
    maximum: int | None = None
    same: bool = False
    mixes: bool = True
    saliency: str = "fisher"
    protected: dict[int, list[int]] = {}  # msgspec copies it


class SearchSpace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A search-space file."""

    schema: int
    formats: list[str] | None = None
    experts: Experts = Experts()
    experts_used: list[int] | None = None
    kv_format: list[str] | None = None
    micro_batch: list[int] | None = None
    pin: list[Pin] = []  # msgspec copies it

    @classmethod
    def read(cls, path: Path) -> "SearchSpace":
        """Reads a search space from TOML.

        Raises:
            SpaceError: if the file is missing, no TOML, or has an unknown key or format.
        """
        space = read_toml(path, cls, SpaceError)
        if space.schema != 1:
            raise SpaceError(f"{path}: schema {space.schema}, needed 1; use a newer allocator")
        if space.experts.saliency not in SALIENCIES:
            raise SpaceError(
                f"{path}: [experts] saliency {space.experts.saliency!r}, needed one of "
                f"{', '.join(SALIENCIES)}"
            )
        for name in ("minimum", "maximum"):
            limit = getattr(space.experts, name)
            if limit is not None and limit < 1:
                raise SpaceError(f"{path}: [experts] {name} = {limit}, needed 1 or more per layer")
        for name in ("formats", "experts_used", "kv_format", "micro_batch"):
            if getattr(space, name) == []:
                raise SpaceError(f"{path}: {name} is empty; name at least one, or leave it out")
        for name in (
            *(space.formats or ()),
            *(f for p in space.pin for f in (p.format, p.minimum, p.maximum) if f),
        ):
            if name not in FORMATS:
                raise SpaceError(f"{path}: unknown format {name!r}; known: {', '.join(FORMATS)}")
        return space


def bind(
    spec: SearchSpace, layout: Layout, saliency: Mapping[str, Mapping[int, list[float]]] | None
) -> Space:
    """Binds a search space to a layout.

    Args:
        spec: the search space.
        layout: the target bound to a checkpoint.
        saliency: per method and MoE layer, one value per expert; None ranks experts by index (for
            pricing before a profile exists).

    Raises:
        SpaceError: if a pin matches nothing, or leaves a group or layer without a choice.
    """
    inventory = layout.inventory
    for pin in spec.pin:
        if not any(fnmatchcase(name, pin.pattern) for name in layout.groups):
            raise SpaceError(f"pin {pin.pattern!r} matches no group; groups are named like "
                             f"{', '.join(list(layout.groups)[:4])}")  # fmt: skip
    used = tuple(spec.experts_used or (inventory.experts_used,))
    if any(not 1 <= n <= inventory.experts_used for n in used):
        raise SpaceError(f"experts_used {used}: needed 1..{inventory.experts_used}")
    target = target_named(layout.target)
    kv_formats = tuple(spec.kv_format or (DEFAULT_KV_FORMAT,))
    for name in spec.kv_format or ():
        target.check_kv_format(inventory, name)
    for n in spec.micro_batch or ():
        target.check_micro_batch(n)
    formats = {name: _formats(spec, group) for name, group in layout.groups.items()}
    counts = _counts(spec.experts, layout, max(used))
    if spec.experts.mixes and target.mixes_experts:
        formats = {
            name: _with_mixes(group, formats[name], counts[-1]) if group.role.is_expert
            else formats[name]
            for name, group in layout.groups.items()
        }  # fmt: skip
    return Space(
        layout=layout,
        formats=formats,
        counts=counts,
        tied=spec.experts.same or target.one_expert_count,
        rankings=_rankings(spec.experts, layout, saliency),
        experts_used=tuple(sorted(set(used))),
        kv_formats=_by_bytes(kv_formats, layout, target),
        micro_batches=tuple(sorted(set(spec.micro_batch or ()), reverse=True)) or (None,),
    )


def _by_bytes(kv_formats: tuple[str, ...], layout: Layout, target: Target) -> tuple[str, ...]:
    """Formats of keys and values, largest first, each once."""
    distinct = tuple(dict.fromkeys(kv_formats))
    if len(distinct) == 1:
        return distinct
    return tuple(sorted(distinct, key=lambda f: -target.kv_bytes(layout.inventory, f, 1)))


def _formats(spec: SearchSpace, group: Group) -> tuple[str, ...]:
    offered = group.offered()
    if spec.formats is not None:
        offered = tuple(f for f in offered if f.name in spec.formats)
    low, high, pinned = 0.0, float("inf"), offered
    for pin in spec.pin:
        if not fnmatchcase(group.name, pin.pattern):
            continue
        if pin.format is not None:
            fmt = format_named(pin.format)
            if not group.can_hold(fmt) or (fmt.needs_importance and not group.importance):
                raise SpaceError(
                    f"pin {pin.pattern!r}: {pin.format} cannot store {group.name} "
                    f"(rows of {group.shape[-1]}); offered: "
                    f"{', '.join(f.name for f in group.offered())}"
                )
            pinned = (fmt,) if pinned in (offered, (fmt,)) else ()
        low = max(low, format_named(pin.minimum).bits) if pin.minimum else low
        high = min(high, format_named(pin.maximum).bits) if pin.maximum else high
    offered = tuple(f for f in pinned if low <= f.bits <= high)
    if not offered:
        raise SpaceError(
            f"no format left for {group.name} (rows of {group.shape[-1]}); it could take "
            f"{', '.join(f.name for f in group.offered())}: loosen [formats] or its pins"
        )
    return tuple(f.name for f in offered)


def _with_mixes(group: Group, names: tuple[str, ...], most: int) -> tuple[str, ...]:
    """Formats and their mixes, largest first with all experts; `most` of them are retained."""
    n_experts = group.shape[0]
    heads = sorted({round(share * n_experts) for share in HEAD_SHARES})
    ladder = [name for name in MIXED if name in names]
    mixes = [
        mix(head, n, tail)
        for head, tail in pairwise(ladder)
        for n in heads
        if 0 < n < most  # with as many in the first format, the mix is that format
    ]
    return tuple(sorted([*names, *mixes], key=lambda v: -sum(part_bytes(group.shape, v))))


def _counts(experts: Experts, layout: Layout, used: int) -> tuple[int, ...]:
    n, groups = layout.inventory.n_experts, layout.inventory.expert_groups
    least = layout.inventory.least_experts(used)
    low = max(experts.minimum if experts.minimum is not None else n // 4, least)
    low = -(-low // groups) * groups  # a router that chooses among groups needs them equal
    high = min(n if experts.maximum is None else experts.maximum, n) // groups * groups
    per_group = (Counter(e // (n // groups) for e in set(v)) for v in experts.protected.values())
    protected = groups * max((max(c.values(), default=0) for c in per_group), default=0)
    if experts.minimum is not None and experts.minimum > n:
        raise SpaceError(f"[experts] minimum {experts.minimum}: the checkpoint has {n} per layer")
    if max(low, protected) > high:
        raise SpaceError(
            f"[experts]: minimum {max(low, protected)} (experts used {used}, protected "
            f"{protected}) is above maximum {high}"
        )
    return tuple(range(max(low, protected), high + 1, groups))


def _rankings(
    experts: Experts, layout: Layout, saliency: Mapping[str, Mapping[int, list[float]]] | None
) -> dict[int, tuple[int, ...]]:
    inventory = layout.inventory
    for layer, indices in experts.protected.items():
        if layer not in layout.layers or any(not 0 <= i < inventory.n_experts for i in indices):
            raise SpaceError(
                f"[experts] protected {layer} = {indices}: MoE layers are {layout.layers}, "
                f"experts 0..{inventory.n_experts - 1}"
            )
    if saliency is not None and experts.saliency not in saliency:
        raise SpaceError(
            f"[experts] saliency {experts.saliency!r}: known are {', '.join(saliency)}"
        )
    rankings = {}
    for layer in layout.layers:
        scores = (
            [0.0] * inventory.n_experts if saliency is None else saliency[experts.saliency][layer]
        )
        protected = set(experts.protected.get(layer, ()))
        order = sorted(
            range(inventory.n_experts), key=lambda e: (e not in protected, -scores[e], e)
        )
        rankings[layer] = _balanced(order, inventory.n_experts // inventory.expert_groups)
    return rankings


def _balanced(order: list[int], group_size: int) -> tuple[int, ...]:
    """The ranking dealt out over router groups in turn: prefixes of whole rounds are balanced."""
    queues: dict[int, list[int]] = {}
    for expert in order:
        queues.setdefault(expert // group_size, []).append(expert)
    return tuple(expert for row in zip(*queues.values(), strict=True) for expert in row)
