"""The search-space file, and its binding to a checkpoint in a target.

In: a TOML file (grammar: `docs/search-spaces.md`), a layout, and the experts' saliencies. Out: a
`Space`. Invariant: every group and layer has a choice, or an error is raised; every format offered
stores its group as named.
"""

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec

from allocator.decision.allocation import DEFAULT_KV_FORMAT
from allocator.decision.mixes import mix
from allocator.decision.pricing import part_bytes
from allocator.decision.space import Space
from allocator.errors import SpaceError
from allocator.files.keys import About
from allocator.files.toml_files import read_toml
from allocator.files.toml_template import write_toml
from allocator.formats import FORMATS, format_named
from allocator.targets import Group, Layout, Target, target_named

OBSERVED = ("reap", "norm", "frequency", "gate")
SALIENCIES = ("fisher", *OBSERVED)
"""Rankings of a layer's experts that a profile measures."""

MIXED = ("Q8_0", "Q6_K", "Q5_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XXS", "IQ1_S")
"""Formats that are mixed with their neighbour among those offered, by bits descending."""
HEAD_SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Shares of a layer's experts that a mix stores in its first format: 4, 8, 12, 16, 20 of 24."""


def _format_names() -> tuple[str, ...]:
    return tuple(FORMATS)


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A limit on the formats of some groups; pins apply in order, each narrows what is left."""

    pattern: Annotated[
        str | list[str],
        About(
            "Groups by name, with shell wildcards; of several, one has to match. `allocator "
            "inspect` lists the names.",
            example="*.attention.*",
        ),
    ]
    format: Annotated[
        str | None,
        About(
            "The one format that these groups get.",
            names=_format_names,
            example="Q8_0",
            default="any",
        ),
    ] = None
    minimum: Annotated[
        str | None,
        About(
            "The format of least bits that these groups may get.",
            names=_format_names,
            example="IQ4_XS",
            default="any",
        ),
    ] = None
    maximum: Annotated[
        str | None,
        About(
            "The format of most bits that these groups may get.",
            names=_format_names,
            example="Q8_0",
            default="any",
        ),
    ] = None

    def matches(self, name: str) -> bool:
        """Tells whether a group's name has one of the patterns."""
        patterns = [self.pattern] if isinstance(self.pattern, str) else self.pattern
        return any(fnmatchcase(name, pattern) for pattern in patterns)


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits on retained experts."""

    minimum: Annotated[
        int | None,
        About(
            "Least retained experts per MoE layer.",
            least=1,
            default="a quarter of them",
            example=16,
        ),
    ] = None
    maximum: Annotated[
        int | None,
        About("Most retained experts per MoE layer.", least=1, default="all", example=64),
    ] = None
    same: Annotated[
        bool,
        About("Whether all layers retain as many experts; target `gguf` always has it so."),
    ] = False
    mixes: Annotated[
        bool,
        About(
            "Whether the routed experts of a projection may have two formats; target `gguf` has "
            "one in any case."
        ),
    ] = True
    saliency: Annotated[
        str,
        About(
            "The ranking that says which experts stay, and which get the larger format of a mix. "
            "`fisher` is their loss in a small format, the others are observed in a forward pass.",
            names=lambda: SALIENCIES,
        ),
    ] = "fisher"
    protected: Annotated[
        dict[int, list[int]],
        About(
            "Experts that always stay: indices from 0, by index of the MoE layer.",
            default="none",
            example={3: [0, 7]},
        ),
    ] = {}  # msgspec copies it


class SearchSpace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a search may choose; `schema = 1` alone offers everything that the target can store."""

    schema: Annotated[int, About("Version of this grammar.", least=1, most=1, example=1)]
    formats: Annotated[
        list[str] | None,
        About(
            "Formats offered to every group, among those that store the group as named.",
            names=_format_names,
            filled=True,
            default="all",
            example=["Q8_0", "Q6_K", "Q4_K", "IQ3_S", "IQ2_S"],
        ),
    ] = None
    experts: Annotated[Experts, About("Limits on retained experts.")] = Experts()
    experts_used: Annotated[
        list[int] | None,
        About(
            "Numbers of routed experts per token to choose from, up to the original's. Fewer read "
            "less per token.",
            least=1,
            filled=True,
            default="the original's",
            example=[6, 8],
        ),
    ] = None
    kv_format: Annotated[
        list[str] | None,
        About(
            "Formats of cached keys and values to choose from (target `gguf`): `f16`, `q8_0` or "
            "`q4_0`, or one for keys and one for values as in `q8_0/q4_0`.",
            filled=True,
            default="f16",
            example=["f16", "q8_0", "q4_0"],
        ),
    ] = None
    micro_batch: Annotated[
        list[int] | None,
        About(
            "Numbers of tokens computed at once to choose from (target `gguf`). They cost memory "
            "and prompt speed, no loss.",
            least=1,
            filled=True,
            default="llama.cpp's 512",
            example=[512, 256, 128],
        ),
    ] = None
    pin: Annotated[
        list[Pin],
        About("Limits on the formats of some groups, applied in order.", default="none"),
    ] = []  # msgspec copies it

    @classmethod
    def read(cls, path: Path) -> "SearchSpace":
        """Reads a search space from TOML.

        Raises:
            SpaceError: one line per fault of the file.
        """
        return read_toml(path, cls, SpaceError)

    def write(self, path: Path) -> None:
        """Writes the search space, with every key and what it means.

        Raises:
            SpaceError: if values are wrong: one line per fault.
        """
        title = "What the search may choose. As it stands, whatever is not set here is offered."
        write_toml(path, self, SpaceError, title=title, schema="search-space")


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
        if not any(pin.matches(name) for name in layout.groups):
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
        if not pin.matches(group.name):
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
