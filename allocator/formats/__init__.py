"""Every way to store a tensor, with its exact bytes. The only place that knows a block's size.

In: a format's name and a shape. Out: bytes, as an integer. Invariant: a size given here is the
size written; a shape that the format cannot store as named raises instead of being padded or cut.
Block layouts are ggml's (`ggml-common.h`); each row of the table spells the sum out.

A group of routed experts may be stored in parts: `IQ2_XXS:0,3,5+IQ1_S:1,2,4` names every part's
format and the experts that it holds. A plain name is one part with all of them.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from allocator.errors import FormatError, SpaceError


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a weight.

    Attributes:
        name: the runtime's own name, e.g. `Q4_K`.
        ggml_type: ggml's number for it.
        block: weights along the last axis that are encoded together.
        block_bytes: bytes one block occupies, scales included.
        needs_importance: the encoder refuses to work without an importance vector.
    """

    name: str
    ggml_type: int
    block: int
    block_bytes: int
    needs_importance: bool = False

    def stores(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of `shape` = `(..., in_features)` are whole blocks."""
        return shape[-1] % self.block == 0

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of `shape` = `(..., out_features, in_features)`.

        Raises:
            FormatError: if `in_features` is not a multiple of `block`.
        """
        if not self.stores(shape):
            raise FormatError(
                f"{self.name}: in_features {shape[-1]} is not a multiple of its block {self.block} "
                f"(shape {shape}); choose a format with a smaller block for this tensor"
            )
        return prod(shape) // self.block * self.block_bytes

    @property
    def bits(self) -> float:
        """Effective bits per weight; for display and ordering only."""
        return self.block_bytes * 8 / self.block


FORMATS = {
    f.name: f
    for f in (
        Format("F32", 0, 1, 4),
        Format("F16", 1, 1, 2),
        Format("BF16", 30, 1, 2),
        Format("Q8_0", 8, 32, 2 + 32),  # f16 scale + 8-bit weights
        Format("Q6_K", 14, 256, 128 + 64 + 16 + 2),  # low 4 bits + high 2 bits + scales + f16
        Format("Q5_K", 13, 256, 4 + 12 + 32 + 128),  # 2 f16 + 6-bit scales + high bit + low 4 bits
        Format("Q4_K", 12, 256, 4 + 12 + 128),  # 2 f16 + 6-bit scales + 4-bit weights
        Format("Q3_K", 11, 256, 32 + 64 + 12 + 2),  # high bit + low 2 bits + 6-bit scales + f16
        Format("Q2_K", 10, 256, 16 + 64 + 4),  # 4-bit scales and minima + 2-bit weights + 2 f16
        Format("Q5_1", 7, 32, 4 + 4 + 16),  # f16 scale and minimum + high bits + low 4 bits
        Format("Q5_0", 6, 32, 2 + 4 + 16),  # f16 scale + high bits + low 4 bits
        Format("Q4_1", 3, 32, 4 + 16),  # f16 scale and minimum + 4-bit weights
        Format("Q4_0", 2, 32, 2 + 16),  # f16 scale + 4-bit weights
        Format("IQ4_NL", 20, 32, 2 + 16),  # f16 scale + 4-bit codes
        Format("MXFP4", 39, 32, 1 + 16),  # exponent of the scale + 4-bit floats
        Format("IQ4_XS", 23, 256, 2 + 2 + 4 + 128),  # f16 + high and low scale bits + 4-bit codes
        Format("IQ3_S", 21, 256, 2 + 64 + 8 + 32 + 4),  # f16 + codes + high bits + signs + scales
        Format("IQ3_XXS", 18, 256, 2 + 96),  # f16 + codes, signs and scales
        Format("IQ2_S", 22, 256, 2 + 64 + 8 + 8),  # f16 + codes and signs + high bits + scales
        Format("IQ2_XS", 17, 256, 2 + 64 + 8, needs_importance=True),  # f16 + codes + scales
        Format("IQ2_XXS", 16, 256, 2 + 64, needs_importance=True),  # f16 + codes, signs, scales
        Format("IQ1_M", 29, 256, 32 + 16 + 8),  # codes + high bits and shifts + scales
        Format("IQ1_S", 19, 256, 2 + 32 + 16, needs_importance=True),  # f16 + codes + high bits
    )
}

GAUSSIAN_ERROR = {
    "F32": 0.0, "F16": 0.0, "BF16": 0.0, "Q8_0": 2.87e-5, "Q6_K": 3.00e-4, "Q5_K": 1.26e-3,
    "Q4_K": 5.04e-3, "Q3_K": 2.09e-2, "Q2_K": 7.21e-2, "Q5_1": 1.15e-3, "Q5_0": 1.64e-3,
    "Q4_1": 4.91e-3, "Q4_0": 6.68e-3, "IQ4_NL": 5.62e-3, "IQ4_XS": 5.73e-3, "IQ3_S": 1.89e-2,
    "IQ3_XXS": 3.32e-2, "IQ2_S": 6.22e-2, "IQ2_XS": 9.00e-2, "IQ2_XXS": 1.18e-1, "IQ1_M": 2.05e-1,
    "IQ1_S": 2.36e-1, "MXFP4": 1.32e-2,
}  # fmt: skip
"""Squared error over squared weights: ggml's own codecs on 64 rows of 2048 normal bfloat16 weights
(so that 16 bits lose nothing), the same importance everywhere (tests/codecs/test_ggml.py)."""

_SUPERBLOCK = (  # offered for rows of whole 256-blocks
    "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
_SMALL_BLOCK = ("BF16", "Q8_0", "Q5_0", "IQ4_NL", "Q4_0")  # for the other rows of 32-blocks
OFFERED = tuple(dict.fromkeys(_SUPERBLOCK + _SMALL_BLOCK))


def offered(
    shape: tuple[int, ...], *, importance: bool, source: Format | None = None
) -> tuple[Format, ...]:
    """Formats that store a weight of `shape` as named, largest first.

    The ggml types left out are dominated at equal bytes on this kind of row and serve baselines
    only.

    Args:
        shape: `(..., out_features, in_features)`.
        importance: whether the weight's input channels have an importance vector.
        source: the format that the checkpoint holds it in, if it is one of these: that is exact,
            so no larger one is of use.
    """
    names = _SUPERBLOCK if shape[-1] % 256 == 0 else _SMALL_BLOCK
    found = [FORMATS[n] for n in names if FORMATS[n].stores(shape)]
    if source is not None:
        found = [source, *(f for f in found if f.bits < source.bits)]
    return tuple(f for f in found if importance or not f.needs_importance)


_FALLBACK = (  # llama-quantize's replacement for rows that are not whole 256-blocks
    (("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    (("Q2_K", "Q3_K"), "Q4_0"),
    (("Q4_K",), "Q5_0"),
    (("Q5_K",), "Q5_1"),
    (("Q6_K",), "Q8_0"),
)


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        FormatError: if there is none.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise FormatError(f"unknown format {name!r}; known: {', '.join(FORMATS)}") from None


def fallback(name: str, shape: tuple[int, ...]) -> Format:
    """What llama-quantize stores when asked for `name` on a weight of `shape`.

    For uniform baselines and role mixes only: a search space never offers a format that it
    cannot store as named.
    """
    wanted = format_named(name)
    if wanted.stores(shape):
        return wanted
    replaced = FORMATS[next((to for names, to in _FALLBACK if name in names), "F16")]
    return replaced if replaced.stores(shape) else FORMATS["F16"]


Parts = tuple[tuple[Format, tuple[int, ...]], ...]
"""Formats and the experts that each stores, ascending; `()` where a group has no experts."""

_EXPERTS = re.compile(r"[0-9]{1,6}(,[0-9]{1,6})*")


def in_parts(text: str) -> bool:
    """Whether a group's format in an allocation means parts, and is no plain name."""
    return ":" in text or "+" in text


def parts(text: str, retained: tuple[int, ...]) -> Parts:
    """What a group stores, read from its format in an allocation.

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
    found = tuple(_part(piece) for piece in text.split("+"))
    listed = Counter(expert for _, experts in found for expert in experts)
    needed = set(retained)
    for expert in sorted(needed | set(listed)):
        if expert not in needed:
            raise SpaceError(f"a part holds expert {expert}, which its layer does not retain")
        if listed[expert] != 1:
            raise SpaceError(f"parts hold expert {expert} {listed[expert]} times, needed once")
    ordered = sorted(found, key=lambda part: (-part[0].bits, part[0].name))
    names = [fmt.name for fmt, _ in found]
    if len(set(names)) < max(2, len(names)) or text != parts_text(
        (fmt.name, tuple(sorted(experts))) for fmt, experts in ordered
    ):
        raise SpaceError(
            f"parts of {', '.join(names)}: needed two formats or more (one is written as its plain "
            "name), each once, by bits descending, experts ascending"
        )
    return found


def parts_text(found: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """The inverse of `parts`: one part is a plain name.

    Args:
        found: a format's name and its experts, per part.
    """
    rows = list(found)
    if len(rows) == 1:
        return rows[0][0]
    return "+".join(f"{name}:{','.join(map(str, experts))}" for name, experts in rows)


def _part(piece: str) -> tuple[Format, tuple[int, ...]]:
    name, _, experts = piece.partition(":")
    if not _EXPERTS.fullmatch(experts):
        raise SpaceError(f"part {piece[:40]!r}: needed FORMAT:experts, e.g. IQ1_S:1,2,4")
    return format_named(name), tuple(map(int, experts.split(",")))
