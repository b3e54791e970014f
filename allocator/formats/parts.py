"""Several formats in one group of routed experts: `IQ2_XXS:0,3,5+IQ1_S:1,2,4`.

In: a group's format as an allocation writes it. Out: each part's format and experts; and back.
Invariant: there is one way to write a division. A plain name is one part with all experts.
"""

import re
from collections import Counter
from collections.abc import Iterable

from allocator.errors import SpaceError
from allocator.formats.base import Format
from allocator.formats.registry import format_named

Parts = tuple[tuple[Format, tuple[int, ...]], ...]
"""Formats and the experts that each stores, ascending; `()` where a group has no experts."""

_EXPERTS = re.compile(r"[0-9]{1,6}(,[0-9]{1,6})*")


def in_parts(text: str) -> bool:
    """Tells whether a group's format in an allocation means parts, and is no plain name."""
    return ":" in text or "+" in text


def parts(text: str, retained: tuple[int, ...]) -> Parts:
    """Reads what a group stores from its format in an allocation.

    Args:
        text: a format's name, or `FORMAT:experts` joined by `+`, by bits descending.
        retained: the experts that the group's layer retains; `()` if it has none.

    Raises:
        FormatError: if a format is unknown.
        SpaceError: if parts are malformed, in another order, or do not hold every retained expert
            once.
    """
    if not in_parts(text):
        return ((format_named(text), retained),)
    pieces = tuple(_part(piece) for piece in text.split("+"))
    listed = Counter(expert for _, experts in pieces for expert in experts)
    needed = set(retained)
    for expert in sorted(needed | set(listed)):
        if expert not in needed:
            raise SpaceError(f"a part holds expert {expert}, which its layer does not retain")
        if listed[expert] != 1:
            raise SpaceError(f"parts hold expert {expert} {listed[expert]} times, needed once")
    ordered = sorted(pieces, key=lambda part: (-part[0].bits, part[0].name))
    names = [fmt.name for fmt, _ in pieces]
    if len(set(names)) < max(2, len(names)) or text != parts_text(
        (fmt.name, tuple(sorted(experts))) for fmt, experts in ordered
    ):
        raise SpaceError(
            f"parts of {', '.join(names)}: needed two formats or more (one is written as its plain "
            "name), each once, by bits descending, experts ascending"
        )
    return pieces


def parts_text(pieces: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Writes parts as `parts` reads them; one part is a plain name.

    Args:
        pieces: a format's name and its experts, per part.
    """
    rows = list(pieces)
    if len(rows) == 1:
        return rows[0][0]
    return "+".join(f"{name}:{','.join(map(str, experts))}" for name, experts in rows)


def formats_in(text: str) -> tuple[Format, ...]:
    """Returns the formats that a group's format in an allocation names.

    Raises:
        FormatError: if one is unknown.
    """
    return tuple(format_named(piece.partition(":")[0]) for piece in text.split("+"))


def _part(piece: str) -> tuple[Format, tuple[int, ...]]:
    name, _, experts = piece.partition(":")
    if not _EXPERTS.fullmatch(experts):
        raise SpaceError(f"part {piece[:40]!r}: needed FORMAT:experts, e.g. IQ1_S:1,2,4")
    return format_named(name), tuple(map(int, experts.split(",")))
